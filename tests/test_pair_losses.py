"""Losses over pairs against the papers' formulas in naive numpy, and against two libraries.

Limits and closed forms: test_loss_limits.py. What holds for every loss alike: test_losses.py.

Shapes: B images, N = 2B embeddings, D width, Q keys of a queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import DCLLoss, DCLWLoss, NTXentLoss
from lightly.loss.hypersphere_loss import HypersphereLoss
from pytorch_metric_learning import losses as pml
from torch import Tensor

from trainer import row_chunks
from trainer.pair_losses import (
    align_uniform,
    dcl,
    dclw,
    info_nce,
    margin_contrastive,
    nt_xent,
    sigmoid,
    sup_con,
    triplet,
)

PairLoss = Callable[[Tensor, Tensor], Tensor]


def pair(batch: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Two views' embeddings of different lengths, the second a disturbed copy of the first."""
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    z1 = z0 + 0.7 * torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return (3 * z0).to(dtype), z1.to(dtype)


def labels_of(batch: int, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, classes, (batch,), generator=torch.Generator().manual_seed(seed))


def unit(z: Tensor) -> list[np.ndarray]:
    return [row / np.linalg.norm(row) for row in z.double().numpy()]


def both_views(z0: Tensor, z1: Tensor) -> tuple[list[np.ndarray], int]:
    return unit(z0) + unit(z1), len(z0)


def mean_above_zero(terms: Sequence[float]) -> float:
    return float(np.mean([x for x in terms if x > 0] or [0.0]))


# --- the formulas, as they stand in the papers ---------------------------------------------------


def naive_nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> float:
    """Algorithm 1 of the paper: l(2k-1, 2k) + l(2k, 2k-1), averaged over 2N."""
    z = [row for rows in zip(unit(z0), unit(z1), strict=True) for row in rows]

    def term(i: int, j: int) -> float:
        others = sum(math.exp(z[i] @ z[k] / temperature) for k in range(len(z)) if k != i)
        return -math.log(math.exp(z[i] @ z[j] / temperature) / others)

    return sum(term(i, i ^ 1) for i in range(len(z))) / len(z)


def naive_info_nce(
    q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, queue: Tensor, temperature: float
) -> float:
    terms = []
    for queries, keys in ((unit(q0), unit(k1)), (unit(q1), unit(k0))):
        for i, q in enumerate(queries):
            scores = [math.exp(q @ k / temperature) for k in (*keys, *queue.double().numpy())]
            terms.append(-math.log(scores[i] / sum(scores)))
    return float(np.mean(terms))


def naive_margin(z0: Tensor, z1: Tensor, margin: float, squared: bool) -> float:
    z, batch = both_views(z0, z1)
    positives, negatives = [], []
    for i, a in enumerate(z):
        for j, b in enumerate(z):
            distance = float(np.linalg.norm(a - b))
            if i != j and i % batch == j % batch:
                positives.append(distance)
            elif i != j:
                negatives.append(max(0.0, margin - distance))
    if squared:
        return float(sum(np.mean([x**2 / 2 for x in t] or [0]) for t in (positives, negatives)))
    return mean_above_zero(positives) + mean_above_zero(negatives)


def naive_triplet(z0: Tensor, z1: Tensor, margin: float) -> float:
    z, batch = both_views(z0, z1)
    terms = []
    for a in range(len(z)):
        positive = np.linalg.norm(z[a] - z[(a + batch) % len(z)])
        for n in range(len(z)):
            if n % batch != a % batch:
                terms += [max(0.0, positive - np.linalg.norm(z[a] - z[n]) + margin)]
    return mean_above_zero(terms)


def naive_dcl(z0: Tensor, z1: Tensor, temperature: float, sigma: float | None = None) -> float:
    z, batch = both_views(z0, z1)
    weights = np.ones(batch)
    if sigma is not None:
        scores = np.array([math.exp(z[i] @ z[i + batch] / sigma) for i in range(batch)])
        weights = 2 - scores / scores.mean()
    terms = []
    for i in range(len(z)):
        positive = z[i] @ z[(i + batch) % len(z)] / temperature
        negatives = [j for j in range(len(z)) if j % batch != i % batch]
        others = sum(math.exp(z[i] @ z[j] / temperature) for j in negatives)
        terms.append(-weights[i % batch] * positive + math.log(others))
    return float(np.mean(terms))


def naive_sigmoid(z0: Tensor, z1: Tensor, temperature: float, bias: float) -> float:
    """Algorithm 1 of the paper."""
    x, y = np.array(unit(z0)), np.array(unit(z1))
    logits = x @ y.T / temperature + bias
    labels = 2 * np.eye(len(x)) - np.ones((len(x), len(x)))
    return float(np.log1p(np.exp(-labels * logits)).sum() / len(x))


def naive_sup_con(z0: Tensor, z1: Tensor, labels: Tensor, temperature: float) -> float:
    z, _ = both_views(z0, z1)
    classes = labels.tolist() * 2
    terms = []
    for i in range(len(z)):
        others = sum(math.exp(z[i] @ z[k] / temperature) for k in range(len(z)) if k != i)
        positives = [p for p in range(len(z)) if p != i and classes[p] == classes[i]]
        logs = [z[i] @ z[p] / temperature - math.log(others) for p in positives]
        terms.append(-np.mean(logs))
    return float(np.mean(terms))


def naive_align_uniform(z0: Tensor, z1: Tensor, alpha: float, t: float, weight: float) -> float:
    """The paper's figure 5."""
    x, y = unit(z0), unit(z1)
    align = np.mean([np.linalg.norm(a - b) ** alpha for a, b in zip(x, y, strict=True)])

    def uniform(rows: list[np.ndarray]) -> float:
        pairs = [(a, b) for i, a in enumerate(rows) for b in rows[:i]]
        return math.log(np.mean([math.exp(-t * np.sum((a - b) ** 2)) for a, b in pairs]))

    return float(align + weight * (uniform(x) + uniform(y)) / 2)


SIZES = {"batch": st.integers(2, 9), "width": st.integers(2, 8), "seed": st.integers(0, 10**6)}
TEMPERATURES = st.floats(0.05, 2)


def close(found: Tensor, expected: float, absolute: float = 1e-9) -> None:
    assert found.item() == pytest.approx(expected, abs=absolute, rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(**SIZES, temperature=TEMPERATURES, keys=st.integers(0, 5))
def test_cross_entropies_equal_their_formulas(
    batch: int, width: int, seed: int, temperature: float, keys: int
) -> None:
    z0, z1 = pair(batch, width, seed, torch.float64)
    k0, k1 = pair(batch, width, seed + 1, torch.float64)
    queue = torch.nn.functional.normalize(pair(keys, width, seed + 2, torch.float64)[0], dim=1)
    labels = labels_of(batch, seed=seed)
    close(nt_xent(z0, z1, temperature), naive_nt_xent(z0, z1, temperature))
    close(
        info_nce(z0, z1, k0, k1, queue, temperature),
        naive_info_nce(z0, z1, k0, k1, queue, temperature),
    )
    close(dcl(z0, z1, temperature), naive_dcl(z0, z1, temperature))
    close(dclw(z0, z1, temperature, 0.4), naive_dcl(z0, z1, temperature, sigma=0.4))
    close(sup_con(z0, z1, labels, temperature), naive_sup_con(z0, z1, labels, temperature))


@settings(deadline=None, max_examples=20)
@given(**SIZES, margin=st.floats(0.1, 2.5), squared=st.booleans())
def test_margins_equal_their_formulas(
    batch: int, width: int, seed: int, margin: float, squared: bool
) -> None:
    z0, z1 = pair(batch, width, seed, torch.float64)
    # 1e-6: the least squared distance, and distances by 2 - 2 cos
    found = margin_contrastive(z0, z1, margin, squared=squared)
    close(found, naive_margin(z0, z1, margin, squared), 1e-6)
    close(triplet(z0, z1, margin), naive_triplet(z0, z1, margin), 1e-6)


@settings(deadline=None, max_examples=20)
@given(**SIZES, temperature=TEMPERATURES, bias=st.floats(-15, 5))
def test_sigmoid_equals_its_formula(
    batch: int, width: int, seed: int, temperature: float, bias: float
) -> None:
    z0, z1 = pair(batch, width, seed, torch.float64)
    close(sigmoid(z0, z1, temperature, bias), naive_sigmoid(z0, z1, temperature, bias))


@settings(deadline=None, max_examples=20)
@given(
    **SIZES, alpha=st.floats(0.5, 4), t=st.floats(0.1, 100), weight=st.sampled_from([0.0, 0.5, 3.0])
)
def test_align_uniform_equals_its_formula(
    batch: int, width: int, seed: int, alpha: float, t: float, weight: float
) -> None:
    z0, z1 = pair(batch, width, seed, torch.float64)
    expected = naive_align_uniform(z0, z1, alpha, t, weight)
    close(align_uniform(z0, z1, alpha, t, weight), expected)


# --- other libraries -----------------------------------------------------------------------------

THEIRS: dict[str, tuple[PairLoss, PairLoss]] = {
    "nt_xent, lightly": (lambda a, b: nt_xent(a, b, 0.2), NTXentLoss(0.2)),
    "nt_xent cold, lightly": (lambda a, b: nt_xent(a, b, 0.05), NTXentLoss(0.05)),
    "nt_xent, pml": (lambda a, b: nt_xent(a, b, 0.2), pml.SelfSupervisedLoss(pml.NTXentLoss(0.2))),
    "dcl, lightly": (lambda a, b: dcl(a, b, 0.1), DCLLoss(0.1)),
    "dclw, lightly": (lambda a, b: dclw(a, b, 0.1, 0.5), DCLWLoss(0.1, sigma=0.5)),
    "margin, pml": (
        lambda a, b: margin_contrastive(a, b, 1.2),
        pml.SelfSupervisedLoss(pml.ContrastiveLoss(pos_margin=0, neg_margin=1.2)),
    ),
    "triplet, pml": (
        lambda a, b: triplet(a, b, 0.05),
        pml.SelfSupervisedLoss(pml.TripletMarginLoss(margin=0.05)),
    ),
    "triplet wide, pml": (
        lambda a, b: triplet(a, b, 1.5),
        pml.SelfSupervisedLoss(pml.TripletMarginLoss(margin=1.5)),
    ),
    "sup_con, pml": (
        lambda a, b: sup_con(a, b, labels_of(len(a)), 0.1),
        lambda a, b: pml.SupConLoss(0.1)(torch.cat([a, b]), labels_of(len(a)).repeat(2)),
    ),
    "align_uniform, lightly": (
        lambda a, b: align_uniform(a, b, 2, 2, 0.7),
        HypersphereLoss(t=2, lam=0.7, alpha=2),
    ),
    "align_uniform, cubed, lightly": (
        lambda a, b: align_uniform(a, b, 3, 5, 1.5),
        HypersphereLoss(t=5, lam=1.5, alpha=3),
    ),
}


@pytest.mark.filterwarnings("ignore:To copy construct")  # lightly's weights of dclw
@pytest.mark.parametrize("chunk_values", [row_chunks.CHUNK_VALUES, 300])
@pytest.mark.parametrize("batch", [4, 33])
@pytest.mark.parametrize("case", THEIRS)
def test_value_and_gradient_equal_other_libraries(
    case: str, batch: int, chunk_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_chunks, "CHUNK_VALUES", chunk_values)
    results = []
    for loss in THEIRS[case]:
        z0, z1 = (z.requires_grad_() for z in pair(batch, 16))
        value = loss(z0, z1)
        results.append((value.detach(), *torch.autograd.grad(value, (z0, z1))))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)


def test_info_nce_of_one_image_is_lightly_s_with_its_memory_bank() -> None:
    theirs = NTXentLoss(0.2, memory_bank_size=(30, 16))
    z0, z1 = pair(1, 16)
    theirs(z0, z1)  # fills the bank with random keys; without a gradient it enters none
    queue = theirs.memory_bank.bank.clone()
    expected = (theirs(z0, z1) + theirs(z1, z0)) / 2
    found = info_nce(z0, z1, z0, z1, queue, 0.2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


# --- single losses ------------------------------------------------------------------------------


def test_dclw_weighs_hard_positives_more_and_dcl_takes_such_weights() -> None:
    z0, z1 = pair(8, 4)
    torch.testing.assert_close(dclw(z0, z1, 0.2, 1e6), dcl(z0, z1, 0.2))  # wide: all alike
    assert torch.equal(dcl(z0, z1, 0.2, torch.ones(8)), dcl(z0, z1, 0.2))
    hard = (-torch.nn.functional.cosine_similarity(z0, z1)).softmax(dim=0) * 8
    assert dcl(z0, z1, 0.2, hard) > dcl(z0, z1, 0.2)


@pytest.mark.parametrize("chunk_values", [row_chunks.CHUNK_VALUES, 21])
def test_dclw_s_weights_are_constants_to_the_gradient(chunk_values: int, monkeypatch) -> None:
    monkeypatch.setattr(row_chunks, "CHUNK_VALUES", chunk_values)
    z0, z1 = (z.requires_grad_() for z in pair(5, 4, dtype=torch.float64))
    with torch.no_grad():
        scores = (torch.nn.functional.cosine_similarity(z0, z1) / 0.4).exp()
        weights = 2 - scores / scores.mean()
    assert torch.autograd.gradcheck(lambda a, b: dcl(a, b, 0.3, weights), (z0, z1))
    found = torch.autograd.grad(dclw(z0, z1, 0.3, 0.4), (z0, z1))
    expected = torch.autograd.grad(dcl(z0, z1, 0.3, weights), (z0, z1))
    torch.testing.assert_close(found, expected)


def test_info_nce_needs_no_queue_and_keys_get_no_gradient() -> None:
    q0, q1, k0, k1 = (z.requires_grad_() for z in (*pair(6, 8), *pair(6, 8, seed=1)))
    empty = torch.empty(0, 8)
    value = info_nce(q0, q1, k0, k1, empty, 0.2)
    assert torch.equal(value, info_nce(q0, q1, k0, k1, None, 0.2))
    value.backward()
    assert q0.grad.abs().sum() > 0
    assert q1.grad.abs().sum() > 0
    assert k0.grad is None
    assert k1.grad is None


def test_more_keys_make_info_nce_harder() -> None:
    q0, q1 = pair(6, 8)
    queue = torch.nn.functional.normalize(pair(30, 8, seed=2)[0], dim=1)
    values = [info_nce(q0, q1, q0, q1, queue[:count], 0.2) for count in (0, 1, 10, 30)]
    assert values == sorted(values)
    assert values[0] < values[-1]


@pytest.mark.parametrize("t", [2.0, 100.0])
def test_uniformity_has_a_gradient_where_its_exponentials_vanish(t: float) -> None:
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.01]], requires_grad=True)  # exp(-4 t) is 0 in float32
    value = align_uniform(z, z, 2, t, 1)
    assert value.item() == pytest.approx(-4 * t, rel=1e-3)
    (gradient,) = torch.autograd.grad(value, z)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 1e-3


def test_misfits_are_refused() -> None:
    z0, z1 = pair(4, 8)
    with pytest.raises(ValueError, match=r"one label an image, 4, got a shape of \(3,\)"):
        sup_con(z0, z1, torch.zeros(3, dtype=torch.int64), 0.2)
    with pytest.raises(ValueError, match=r"queue's keys must be \[Q, 8\].* got \(5, 7\)"):
        info_nce(z0, z1, z0, z1, torch.zeros(5, 7), 0.2)
    with pytest.raises(ValueError, match="equal shape"):
        info_nce(z0, z1, z0[:3], z1[:3], None, 0.2)
    for loss in (
        lambda a, b: dcl(a, b, 0.2),
        lambda a, b: dclw(a, b, 0.2, 0.5),
        lambda a, b: align_uniform(a, b, 2, 2, 1),
    ):
        with pytest.raises(ValueError, match="B at least 2"):
            loss(z0[:1], z1[:1])
