"""Schedules against their closed forms and bounds; what the optimisers decay; what waits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.averages import MovingAverage
from trainer.config import TrainConfig
from trainer.lars import LARS
from trainer.models import ProjectionHead, build_encoder
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


def test_constant_is_constant_after_its_warmup() -> None:
    fields = {"schedule": "constant", "lr": 0.5, "warmup": 0.1, "cooldown": 0.5}
    assert rate(250, **fields) == pytest.approx(0.125)
    assert [rate(images, **fields) for images in (1_000, 5_000, TOTAL)] == [0.5] * 3


def test_cosine_knows_the_horizon() -> None:
    config = TrainConfig(schedule="cosine")
    assert learning_rate_at(config, 5_000, 10_000) < learning_rate_at(config, 5_000, 20_000)


def test_peak_follows_the_batch_size_as_told() -> None:
    fields = {"lr": 0.1, "batch_size": 1_024, "warmup": 0.0}
    assert rate(0, **fields) == pytest.approx(0.1)
    assert rate(0, **fields, lr_scaling="sqrt") == pytest.approx(0.2)
    assert rate(0, **fields, lr_scaling="linear") == pytest.approx(0.4)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(
        ValueError, match="schedule must be one of wsd, cosine, constant; got 'step'"
    ):
        rate(0, schedule="step")
    known = "adam, adamw, sgd, lars"
    with pytest.raises(ValueError, match=f"optimizer must be one of {known}; got 'lion'"):
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
        decayed = before[key] * 0.95
        if name == "adam":  # L2's gradient, of whatever size, makes a first step of lr
            pull = 0.5 * before[key]
            decayed = before[key] - 0.1 * pull / (pull.abs() + 1e-8)
        torch.testing.assert_close(value, decayed if value.ndim > 1 else before[key])


def test_fields_reach_the_optimisers() -> None:
    fields = {"lr": 0.3, "weight_decay": 0.02, "momentum": 0.7, "lars_trust": 0.004}
    for name in OPTIMIZERS:
        config = TrainConfig.model_validate({"optimizer": name, "batch_size": 512, **fields})
        matrices, vectors = build_optimizer(config, ProjectionHead(8, 16, 4)).param_groups
        assert (matrices["lr"], vectors["lr"]) == (0.3, 0.3)
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.02, 0)
        assert matrices.get("momentum", 0.7) == 0.7
        assert matrices.get("trust", 0.004) == 0.004
        assert (matrices["adapted"], vectors["adapted"]) == (True, False)
    assert isinstance(build_optimizer(config, ProjectionHead(8, 16, 4)), LARS)
    scaled = TrainConfig(lr=0.3, batch_size=1024, lr_scaling="sqrt")
    assert build_optimizer(scaled, nn.Linear(2, 2)).param_groups[0]["lr"] == pytest.approx(0.6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_finds_a_minimum(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 4, generator=generator)
    targets = inputs @ torch.randn(4, 2, generator=generator) + 1
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.fill_(0.1)
        model.bias.zero_()
    lr = {"lars": 0.3, "sgd": 0.02}.get(name, 0.05)
    config = TrainConfig(optimizer=name, lr=lr, lars_trust=0.1, weight_decay=0)
    optimizer = build_optimizer(config, model)
    losses = []
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / 300)
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_trained_once(name: str) -> None:
    head = ProjectionHead(8, 16, 4)
    groups = build_optimizer(TrainConfig(optimizer=name), head).param_groups
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in head.parameters())


class NoWaiting(TorchDispatchMode):
    """Fails where the host asks for a tensor's value, for which a GPU would have to finish."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits"
        return func(*args, **(kwargs or {}))


def test_the_watch_for_waiting_sees_it() -> None:
    number = torch.ones(())
    with NoWaiting():
        for ask in (number.item, lambda: bool(number > 0), lambda: float(number)):
            with pytest.raises(AssertionError, match="the host waits"):
                ask()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    head = ProjectionHead(8, 16, 4)
    average = MovingAverage(head, 0.9, debias=True)
    optimizer = build_optimizer(TrainConfig(optimizer=name), head)
    for parameter in head.parameters():
        parameter.grad = torch.ones_like(parameter)
    with NoWaiting():
        for _ in range(2):
            clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            average.update(head)


def test_clipping_bounds_the_norm_of_all_gradients_together() -> None:
    head = ProjectionHead(8, 16, 4)

    def gradients(scale: float) -> torch.Tensor:
        for parameter in head.parameters():
            parameter.grad = torch.full_like(parameter, scale)
        clip_grad_norm_(head.parameters(), 0.5)
        return torch.cat([parameter.grad.flatten() for parameter in head.parameters()])

    clipped = gradients(3.0)
    assert clipped.norm() == pytest.approx(0.5, rel=1e-5)
    assert clipped.std() == pytest.approx(0, abs=1e-6)  # only shortened, not turned
    assert gradients(1e-3).unique().tolist() == pytest.approx([1e-3])


def test_a_transformers_token_and_positions_do_not_decay() -> None:
    encoder, _ = build_encoder("vit_tiny", 8)
    groups = build_optimizer(TrainConfig(weight_decay=0.5), encoder).param_groups
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in encoder.named_parameters():
        a_vector = name in ("class_token", "encoder.pos_embedding") or parameter.ndim == 1
        assert (id(parameter) in decaying) != a_vector, name
