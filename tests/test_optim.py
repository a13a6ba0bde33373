"""Schedules against their closed forms and bounds; what the optimisers decay."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer.config import TrainConfig
from trainer.models import ProjectionHead
from trainer.optim import OPTIMIZERS, SCHEDULES, build_optimizer, learning_rate_at

TOTAL = 10_000
FRACTION = st.floats(0, 1)


def rate(images: float, **fields: object) -> float:
    return learning_rate_at(TrainConfig.model_validate(fields), images, TOTAL)


def test_wsd_closed_form() -> None:
    fields = {"lr": 0.5, "warmup": 0.1, "cooldown": 0.2}
    assert rate(0, **fields) == 0
    assert rate(250, **fields) == pytest.approx(0.125)
    assert [rate(images, **fields) for images in (1_000, 4_321, 8_000)] == [0.5] * 3
    assert rate(8_500, **fields) == pytest.approx(0.5 * (1 - math.sqrt(0.25)))
    assert rate(TOTAL, **fields) == pytest.approx(0, abs=1e-12)
    assert rate(2 * TOTAL, **fields) == rate(TOTAL, **fields)


def test_cosine_closed_form() -> None:
    fields = {"schedule": "cosine", "lr": 0.5, "warmup": 0.2}
    assert rate(1_000, **fields) == pytest.approx(0.25)
    assert rate(2_000, **fields) == pytest.approx(0.5)
    assert rate(6_000, **fields) == pytest.approx(0.25)
    assert rate(TOTAL, **fields) == pytest.approx(0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(warmup=FRACTION, cooldown=FRACTION, images=st.floats(0, 2 * TOTAL))
def test_rate_is_between_zero_and_peak(
    schedule: str, warmup: float, cooldown: float, images: float
) -> None:
    value = rate(images, schedule=schedule, lr=0.3, warmup=warmup, cooldown=cooldown)
    assert 0 <= value <= 0.3


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(warmup=st.floats(0.01, 0.99), images=FRACTION)
def test_rate_only_rises_in_the_warmup_and_never_after(
    schedule: str, warmup: float, images: float
) -> None:
    fields = {"schedule": schedule, "warmup": warmup, "cooldown": 0.0}
    here, next_ = (rate(at * TOTAL, **fields) for at in (images, min(1.0, images + 0.01)))
    if images + 0.01 < warmup:
        assert next_ > here
    elif images > warmup:
        assert next_ <= here


@given(images=st.integers(0, 8_000), longer=st.integers(1, 9))
def test_wsd_before_the_cooldown_does_not_know_the_horizon(images: int, longer: int) -> None:
    def at(total: int) -> float:
        config = TrainConfig(warmup=500 / total, cooldown=2_000 / total)
        return learning_rate_at(config, images, total)

    assert at(10_000) == pytest.approx(at(10_000 * longer), rel=1e-6)


def test_cosine_knows_the_horizon() -> None:
    config = TrainConfig(schedule="cosine")
    assert learning_rate_at(config, 5_000, 10_000) < learning_rate_at(config, 5_000, 20_000)


def test_peak_follows_the_batch_size_as_told() -> None:
    fields = {"lr": 0.1, "batch_size": 1_024, "warmup": 0.0}
    assert rate(0, **fields) == pytest.approx(0.1)
    assert rate(0, **fields, lr_scaling="sqrt") == pytest.approx(0.2)
    assert rate(0, **fields, lr_scaling="linear") == pytest.approx(0.4)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match="schedule must be one of wsd, cosine; got 'step'"):
        rate(0, schedule="step")
    with pytest.raises(ValueError, match="optimizer must be one of adamw, sgd; got 'lion'"):
        build_optimizer(TrainConfig(optimizer="lion"), nn.Linear(2, 2))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_decay(name: str) -> None:
    head = ProjectionHead(8, 16, 4)
    optimizer = build_optimizer(TrainConfig(optimizer=name, weight_decay=0.5, lr=0.1), head)
    before = {key: value.clone() for key, value in head.named_parameters()}
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, value in head.named_parameters():
        expected = before[key] * 0.95 if value.ndim > 1 else before[key]
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_trained_once(name: str) -> None:
    head = ProjectionHead(8, 16, 4)
    groups = build_optimizer(TrainConfig(optimizer=name), head).param_groups
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in head.parameters())
