"""The linear classifier against scikit-learn's, its optimality conditions and its corners.

Shapes: N bank, M queries, D width, L classes.
"""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer import evaluate
from trainer.linear_probe import PENALTY, fit, linear_top1


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labelled(
    count: int, seed: int, *, width: int = 24, classes: int = 5, noise: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Features around one centre a class, correlated and far from 0, as an encoder's are."""
    centres = torch.randn(classes, width, generator=rng(100))
    mixing = torch.randn(width, width, generator=rng(101)) + 3 * torch.ones(width, width) / width
    labels = torch.randint(classes, (count,), generator=rng(seed))
    features = centres[labels] + noise * torch.randn(count, width, generator=rng(seed + 1))
    return (features @ mixing).relu() + 0.5, labels


def standardised(bank_ND: Tensor, features_MD: Tensor) -> Tensor:
    std_D, mean_D = torch.std_mean(bank_ND.double(), dim=0, correction=0)
    return (features_MD.double() - mean_D) / std_D


def objective(
    x_ND: Tensor, labels_N: Tensor, weight_DL: Tensor, bias_L: Tensor, l2: float
) -> float:
    loss = cross_entropy(x_ND @ weight_DL.double() + bias_L.double(), labels_N)
    return float(loss + l2 / 2 * weight_DL.double().square().sum())


@pytest.mark.parametrize("noise", [0.5, 3.0])  # separable and not
@pytest.mark.parametrize("l2", [1e-4, PENALTY, 0.1])
def test_equals_scikit_learn(noise: float, l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, bank_labels = labelled(600, 0, noise=noise)
    queries, answers = labelled(500, 10, noise=noise)
    x, q = standardised(bank, bank), standardised(bank, queries)
    theirs = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000)
    theirs.fit(x.numpy(), bank_labels.numpy())
    least = objective(
        x, bank_labels, torch.from_numpy(theirs.coef_.T), torch.from_numpy(theirs.intercept_), l2
    )
    monkeypatch.setattr(evaluate, "CHUNK_VALUES", 1000)
    weight, bias = fit(x.float(), bank_labels, 5, l2)
    assert objective(x, bank_labels, weight, bias, l2) == pytest.approx(least, rel=1e-3)
    predicted = (q.float() @ weight + bias).argmax(dim=1).numpy()
    assert np.mean(predicted == theirs.predict(q.numpy())) > 0.99
    score = theirs.score(q.numpy(), answers.numpy())
    assert linear_top1(bank, bank_labels, queries, answers, l2=l2) == pytest.approx(score, abs=0.01)


@settings(deadline=None, max_examples=15)
@given(
    count=st.integers(2, 80),
    width=st.integers(1, 40),
    classes=st.integers(2, 6),
    l2=st.sampled_from([1e-3, 0.1]),
    seed=st.integers(0, 1000),
)
def test_converges_to_where_the_gradient_is_zero(
    count: int, width: int, classes: int, l2: float, seed: int
) -> None:
    # also fewer features than dimensions, and classes of one image
    x = torch.randn(count, width, generator=rng(seed), dtype=torch.double)
    labels = torch.arange(count) % classes
    weight, bias = fit(x, labels, min(count, classes), l2)
    weight.requires_grad_()
    bias = bias.clone().requires_grad_()
    loss = cross_entropy(x @ weight + bias, labels) + l2 / 2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(float(gradient.abs().max()) for gradient in gradients) < 2e-4


def test_the_penalty_shrinks_the_weights_and_keeps_separable_ones_finite() -> None:
    x, labels = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    sizes = [float(fit(x, labels, 2, l2)[0].norm()) for l2 in (1e-4, 1e-2, 1.0)]
    assert sizes == sorted(sizes, reverse=True)
    # two points: w = (-a, a) with l2 * a = sigmoid(-2a) / 1, from the gradient's zero
    weight, bias = fit(x.double(), labels, 2, 0.05)
    a = float(weight[0, 1])
    assert 0.05 * a == pytest.approx(1 / (1 + math.exp(2 * a)), rel=1e-3)
    assert weight[0].tolist() == pytest.approx([-a, a], rel=1e-4)
    assert bias.tolist() == pytest.approx([0, 0], abs=1e-4)
    with pytest.raises(ValueError, match="l2 must be above 0, got 0"):
        fit(x, labels, 2, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_is_blind_to_shift_and_scale_of_each_dimension(seed: int) -> None:
    bank, bank_labels = labelled(300, seed, noise=2.0)
    queries, answers = labelled(200, seed + 10, noise=2.0)
    scale = torch.logspace(-6, 6, bank.shape[1])
    shift = torch.randn(bank.shape[1], generator=rng(seed)) * scale
    expected = linear_top1(bank, bank_labels, queries, answers)
    found = linear_top1(bank * scale + shift, bank_labels, queries * scale + shift, answers)
    assert 0.3 < expected < 1
    assert found == pytest.approx(expected, abs=0.01)


def test_reads_what_is_linear_and_nothing_else() -> None:
    angle = 2 * math.pi * torch.rand(400, generator=rng())
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    half, rings = (angle > math.pi).long(), (torch.arange(400) % 2)
    assert linear_top1(circle[:200], half[:200], circle[200:], half[200:]) > 0.97
    ringed = circle * (1 + rings[:, None])  # one ring inside the other
    assert linear_top1(ringed[:200], rings[:200], ringed[200:], rings[200:]) < 0.65


def test_the_same_answer_each_time() -> None:
    bank, labels = labelled(300, 0, noise=3.0)
    weight, bias = fit(bank, labels, 5, PENALTY)
    again_weight, again_bias = fit(bank, labels, 5, PENALTY)
    assert torch.equal(weight, again_weight)
    assert torch.equal(bias, again_bias)


def test_classes_that_the_bank_lacks_are_wrong_and_gaps_in_the_numbers_do_no_harm() -> None:
    bank, labels = labelled(300, 0, noise=0.1)
    assert linear_top1(bank, labels * 7, bank, labels * 7) == 1
    known = labels != 3
    share = float(known.double().mean())
    assert linear_top1(bank[known], labels[known], bank, labels) == pytest.approx(share)
    assert linear_top1(bank, torch.full_like(labels, 2), bank, labels) == pytest.approx(
        float((labels == 2).double().mean())
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_left_out_or_wrong(bad: float) -> None:
    bank, labels = labelled(200, 0, noise=0.1)
    broken = bank.clone()
    broken[:50, 3] = bad
    assert linear_top1(bank, labels, bank, labels) == 1
    assert linear_top1(bank, labels, broken, labels) == pytest.approx(0.75)
    assert linear_top1(broken, labels, bank, labels) == 1
    assert linear_top1(torch.full_like(bank, bad), labels, bank, labels) == 0
    assert linear_top1(bank, labels, torch.full_like(bank, bad), labels) == 0


@pytest.mark.parametrize("value", [0.0, 1e-38, 1.0, 1e30, 3e38])
def test_constant_and_extreme_features_never_raise(value: float) -> None:
    bank, labels = labelled(100, 0, noise=0.1)
    constant = torch.full_like(bank, value)
    most_common = float(labels.bincount().max()) / len(labels)
    assert linear_top1(constant, labels, constant, labels) == pytest.approx(most_common)
    one_gone = bank.clone()
    one_gone[:, 0] = value
    assert linear_top1(one_gone, labels, one_gone, labels) == 1
    huge = bank * (value / 1e3 or 1.0)
    assert 0 <= linear_top1(huge, labels, huge, labels) <= 1
    assert 0 <= linear_top1(bank, labels, huge, labels) <= 1


def test_takes_half_precision_and_what_inference_mode_made() -> None:
    bank, labels = labelled(200, 0, noise=0.1)
    with torch.inference_mode():
        made = bank * 1
        assert linear_top1(made, labels, made, labels) == 1
    assert linear_top1(made, labels, made, labels) == 1
    assert linear_top1(bank.bfloat16(), labels, bank.half(), labels) == 1


def test_refuses_to_judge_nothing_or_the_unlabelled() -> None:
    bank, labels = labelled(20, 0)
    with pytest.raises(ValueError, match="bank, got 0"):
        linear_top1(bank[:0], labels[:0], bank, labels)
    with pytest.raises(ValueError, match="labels must be at least 0, got -1"):
        linear_top1(bank, labels - 1 - labels.min(), bank, labels)


@pytest.mark.slow
def test_9_000_features_take_less_than_a_second() -> None:
    # of the processor, so that a busy machine does not fail it
    bank, labels = labelled(9_000, 0, width=192, classes=10, noise=5.0)
    linear_top1(bank[:100], labels[:100], bank[:100], labels[:100])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        linear_top1(bank, labels, bank, labels)
        assert time.process_time() - start < 1
    finally:
        torch.set_num_threads(threads)
