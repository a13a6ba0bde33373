"""LARS against its formula in numpy, against lightly's, and where the formula has holes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.utils.lars import LARS as LightlyLARS  # noqa: N811
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.lars import LARS, trust_ratios
from trainer.models import ProjectionHead
from trainer.optim import build_optimizer


def naive_step(
    weight: np.ndarray,
    gradient: np.ndarray,
    momentum: np.ndarray,
    *,
    lr: float,
    keep: float,
    decay: float,
    trust: float,
    adapted: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """You et al. 2017, equation 6, one parameter."""
    weight_norm, gradient_norm = np.linalg.norm(weight), np.linalg.norm(gradient)
    ratio = 1.0
    if adapted and weight_norm > 0 and gradient_norm > 0:
        ratio = trust * weight_norm / (gradient_norm + decay * weight_norm)
    momentum = keep * momentum + ratio * (gradient + decay * weight)
    return weight - lr * momentum, momentum


def groups(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0, "adapted": False},
    ]


def steps(
    module: nn.Module, optimizer: torch.optim.Optimizer, numbers: Iterable[int]
) -> dict[str, Tensor]:
    """Step once for each number, on gradients that follow from it; give the parameters."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@settings(deadline=None, max_examples=30)
@given(
    decay=st.sampled_from([0.0, 1e-6, 1e-2, 1.0]),
    keep=st.sampled_from([0.0, 0.9]),
    trust=st.sampled_from([1e-3, 0.1]),
    lr=st.floats(0.01, 10),
    seed=st.integers(0, 1000),
)
def test_equals_numpy(decay: float, keep: float, trust: float, lr: float, seed: int) -> None:
    head = ProjectionHead(6, 9, 4).double()
    generator = torch.Generator().manual_seed(seed)
    optimizer = LARS(groups(head, decay), lr, momentum=keep, trust=trust)
    weights = {name: value.detach().numpy().copy() for name, value in head.named_parameters()}
    momenta = {name: np.zeros_like(value) for name, value in weights.items()}
    for _ in range(4):
        for name, parameter in head.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
            matrix = parameter.ndim > 1
            weights[name], momenta[name] = naive_step(
                weights[name],
                parameter.grad.numpy(),
                momenta[name],
                lr=lr,
                keep=keep,
                decay=decay if matrix else 0.0,
                trust=trust,
                adapted=matrix,
            )
        optimizer.step()
    for name, parameter in head.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", [1e-6, 1e-4, 0.1])
def test_equals_lightly_where_conventions_agree(decay: float) -> None:
    # lightly's leaves a group of weight decay 0 unadapted, which the vectors are anyway
    ours, theirs = (ProjectionHead(8, 16, 4) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    one = LARS(groups(ours, decay), 0.7, momentum=0.9, trust=0.01)
    other = LightlyLARS(groups(theirs, decay), lr=0.7, momentum=0.9, trust_coefficient=0.01)
    found, expected = steps(ours, one, range(5)), steps(theirs, other, range(5))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_without_weight_decay_the_step_is_still_in_proportion_to_the_weight() -> None:
    weight = nn.Parameter(torch.full((4, 4), 2.0))  # norm 8
    optimizer = LARS([weight], 0.5, momentum=0.0, weight_decay=0.0, trust=0.01)
    for size in (1e-4, 1e4):  # the gradient's length does not matter
        before = weight.detach().clone()
        weight.grad = torch.full((4, 4), size)
        optimizer.step()
        expected = 0.5 * 0.01 * float(before.norm())
        assert float((weight.detach() - before).norm()) == pytest.approx(expected, rel=1e-3)


def test_small_weight_decay_and_none_are_nearly_the_same() -> None:
    def after(decay: float) -> Tensor:
        torch.manual_seed(0)
        head = ProjectionHead(8, 16, 4)
        config = TrainConfig(optimizer="lars", weight_decay=decay, lr=0.3)
        return steps(head, build_optimizer(config, head), range(5))["0.weight"]

    torch.testing.assert_close(after(0.0), after(1e-9))


def test_vectors_are_neither_decayed_nor_adapted() -> None:
    head = ProjectionHead(8, 16, 4)
    before = {name: value.detach().clone() for name, value in head.named_parameters()}
    config = TrainConfig(optimizer="lars", lr=0.5, weight_decay=0.3, momentum=0.9)
    for parameter in head.parameters():
        parameter.grad = torch.full_like(parameter, 0.2)
    build_optimizer(config, head).step()
    changed = {name: value.detach() - before[name] for name, value in head.named_parameters()}
    vectors = {name: change for name, change in changed.items() if change.ndim == 1}
    assert len(vectors) == 3
    for change in vectors.values():
        torch.testing.assert_close(change, torch.full_like(change, -0.1), rtol=0, atol=1e-6)
    assert max(float(changed[name].abs().max()) for name in ("0.weight", "3.weight")) < 0.01


def test_ratios_are_one_and_nothing_is_nan_where_a_norm_is_zero() -> None:
    zero, some = torch.zeros(3, 3), torch.ones(3, 3)
    ratio_P = trust_ratios([zero, some, zero, some], [some, zero, zero, some], 0.01, 0.0)
    assert ratio_P.tolist() == pytest.approx([1, 1, 1, 0.01])
    # 3 of weight, 3 + 0.5 * 3 of gradient and decay
    assert trust_ratios([some], [some], 0.01, 0.5).tolist() == pytest.approx([0.01 / 1.5])

    weight = nn.Parameter(zero.clone())
    optimizer = LARS([weight], 0.1, weight_decay=0.1)
    weight.grad = zero.clone()
    optimizer.step()
    assert torch.equal(weight.detach(), zero)
    weight.grad = some.clone()
    optimizer.step()  # a matrix that starts at 0 leaves it
    torch.testing.assert_close(weight.detach(), -0.1 * some)


def test_a_broken_gradient_shows() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.tensor([[math.nan, 0], [0, 0]])
    LARS([weight], 0.1).step()
    assert weight.isnan().any()


def test_parameters_without_a_gradient_stay() -> None:
    head = ProjectionHead(8, 16, 4)
    before = {name: value.detach().clone() for name, value in head.named_parameters()}
    optimizer = build_optimizer(TrainConfig(optimizer="lars"), head)
    optimizer.step()  # none has one
    head[3].weight.grad = torch.ones_like(head[3].weight)
    optimizer.step()
    moved = {n for n, value in head.named_parameters() if not torch.equal(value, before[n])}
    assert moved == {"3.weight"}


@pytest.mark.parametrize("cut", [1, 3])
def test_goes_on_from_its_state_bit_for_bit(cut: int) -> None:
    config = TrainConfig(optimizer="lars", weight_decay=1e-3, lr=0.4)
    whole = ProjectionHead(8, 16, 4)
    first = copy.deepcopy(whole)
    expected = steps(whole, build_optimizer(config, whole), range(6))

    optimizer = build_optimizer(config, first)
    steps(first, optimizer, range(cut))
    state = copy.deepcopy(optimizer.state_dict())
    second = copy.deepcopy(first)
    going_on = build_optimizer(config.model_copy(update={"lr": 9.0}), second)
    going_on.load_state_dict(state)
    found = steps(second, going_on, range(cut, 6))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_keeps_the_layout_of_convolutions_and_follows_a_closure() -> None:
    convolution = nn.Conv2d(3, 8, 3, bias=False).to(memory_format=torch.channels_last)
    optimizer = LARS(convolution.parameters(), 0.1)
    images = torch.ones(2, 3, 8, 8)

    def closure() -> float:
        optimizer.zero_grad()
        loss = convolution(images).square().mean()
        loss.backward()
        return loss.item()

    closures: list[Callable[[], float]] = [closure] * 3
    losses = [optimizer.step(each) for each in closures]
    assert losses[0] > losses[1] > losses[2]
    momentum = optimizer.state[convolution.weight]["momentum_buffer"]
    assert momentum.is_contiguous(memory_format=torch.channels_last)
