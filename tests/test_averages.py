"""Averaged weights against their closed form and torch's `AveragedModel`."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.averages import MovingAverage
from trainer.models import build_encoder


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def train(module: nn.Module, number: int) -> None:
    """Change every weight and statistic as a step would, following from a number."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        images = 3 * torch.randn(8, 3, 4, 4, generator=generator)
        module.train()(images.to(next(module.parameters()).dtype))


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@settings(deadline=None, max_examples=25)
@given(decay=st.floats(0, 0.999), updates=st.integers(1, 8), debias=st.booleans())
def test_closed_form(decay: float, updates: int, debias: bool) -> None:
    module = network().double()
    average = MovingAverage(module, decay, debias=debias)
    history = [values(module)]
    for number in range(updates):
        train(module, number)
        average.update(module)
        history.append(values(module))
    shares = [(1 - decay) * decay ** (updates - i) for i in range(1, updates + 1)]
    start = 0.0 if debias else decay**updates
    if debias:
        shares = [share / (1 - decay**updates) for share in shares]
    shares = [start, *shares]
    assert sum(shares) == pytest.approx(1)
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            expected = sum(share * then[name] for share, then in zip(shares, history, strict=True))
            torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9)
        else:
            assert value == updates  # batch norm's count of batches: copied


def test_equals_torch_s_averaged_model() -> None:
    # which begins at its first update, and averages the count of batches as well: left out here
    module = network()
    theirs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    train(module, 0)
    theirs.update_parameters(module)
    ours = MovingAverage(copy.deepcopy(module), 0.8)
    for number in range(1, 5):
        train(module, number)
        ours.update(module)
        theirs.update_parameters(module)
    for name, value in theirs.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ours.module.state_dict()[name], value)


def test_equals_the_module_before_any_update_and_follows_it_at_decay_0() -> None:
    module = network()
    average = MovingAverage(module, 0.0)
    for _ in range(2):
        for name, value in average.module.state_dict().items():
            torch.testing.assert_close(value, module.state_dict()[name], rtol=0, atol=0)
        train(module, 0)
        average.update(module)


def test_decay_1_never_moves() -> None:
    module = network()
    average = MovingAverage(module, 1.0, average_buffers=False)
    before = values(average.module)
    train(module, 0)
    average.update(module)
    assert all(torch.equal(value, before[name]) for name, value in values(average.module).items())


def test_a_short_run_is_not_measured_by_its_untrained_weights() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 100.0)
    plain, debiased = MovingAverage(module, 0.99), MovingAverage(module, 0.99, debias=True)
    nn.init.constant_(module.weight, 1.0)
    for _ in range(50):
        plain.update(module)
        debiased.update(module)
    assert plain.module.weight.item() == pytest.approx(1 + 99 * 0.99**50, rel=1e-4)
    assert debiased.module.weight.item() == pytest.approx(1, rel=1e-4)


def test_buffers_of_its_own_are_left_to_its_own_forward_passes() -> None:
    module = network()
    average = MovingAverage(module, 0.5, average_buffers=False)
    average.module.train()(torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(9)))
    before = values(average.module)
    train(module, 0)
    average.update(module)
    after = values(average.module)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(after[name], before[name])
        assert not torch.equal(after[name], module.state_dict()[name]) or "num" in name
    assert not torch.equal(after["0.weight"], before["0.weight"])


def test_an_update_changes_only_the_average_and_no_gradient_reaches_it() -> None:
    module = network()
    average = MovingAverage(module, 0.5)
    train(module, 0)
    before = values(module)
    average.update(module)
    assert all(torch.equal(value, before[name]) for name, value in values(module).items())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not average.module.training
    images = torch.randn(4, 3, 4, 4)
    assert not average.module(images).requires_grad
    pointers = {parameter.data_ptr() for parameter in module.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in average.module.parameters()}


@pytest.mark.parametrize("debias", [False, True])
def test_goes_on_from_its_state_bit_for_bit(debias: bool) -> None:
    module = network()
    whole = MovingAverage(module, 0.7, debias=debias)
    for number in range(2):
        train(module, number)
        whole.update(module)
    state = copy.deepcopy(whole.state_dict())
    again = MovingAverage(network(), 0.7, debias=debias)
    again.load_state_dict(state)
    for number in range(2, 4):
        train(module, number)
        whole.update(module)
        again.update(module)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], value)
    for name, value in state["module"].items():  # the state itself was not trained in
        assert value.data_ptr() != again.module.state_dict()[name].data_ptr()


def test_keeps_the_layout_of_an_encoder() -> None:
    encoder, _ = build_encoder("conv_small", 32)
    average = MovingAverage(encoder, 0.9)
    average.update(encoder)
    for ours, theirs in zip(average.module.parameters(), encoder.parameters(), strict=True):
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize(
    ("decay", "debias", "allowed"), [(-0.1, False, r"\[0, 1\]"), (1.0, True, r"\[0, 1\)")]
)
def test_a_decay_out_of_range_says_so(decay: float, debias: bool, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"decay must be in {allowed}, got {decay}"):
        MovingAverage(nn.Linear(2, 2), decay, debias=debias)


def test_another_network_is_refused() -> None:
    average = MovingAverage(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="shorter"):
        average.update(nn.Linear(2, 2, bias=False))
