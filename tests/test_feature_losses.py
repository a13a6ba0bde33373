"""Losses without negatives against naive numpy, closed forms, and two libraries.

What holds for every loss alike is in test_losses.py.

Shapes: B images, D width of an embedding.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, VICRegLoss
from pytorch_metric_learning import losses as pml
from torch import Tensor

from trainer import row_chunks
from trainer.feature_losses import barlow_twins, byol, simsiam, vicreg


def pair(batch: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Two views' embeddings with offsets and scales, the second a disturbed copy of the first."""
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    z1 = z0 + 0.7 * torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return (3 * z0 + 1).to(dtype), z1.to(dtype)


def naive_barlow(z0: Tensor, z1: Tensor, weight: float) -> float:
    """Algorithm 1 of the paper; its standardisation is batch normalisation's."""
    a, b = ((z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + 1e-5) for z in (z0.numpy(), z1.numpy()))
    correlation = a.T @ b / len(a)
    loss = 0.0
    for i, row in enumerate(correlation):
        for j, value in enumerate(row):
            loss += (1 - value) ** 2 if i == j else weight * value**2
    return loss


def naive_vicreg(z0: Tensor, z1: Tensor, weights: tuple[float, float, float]) -> float:
    """Algorithm 1 of the paper."""
    a, b = z0.numpy(), z1.numpy()
    invariance = np.mean((a - b) ** 2)
    stds = [np.sqrt(z.var(axis=0, ddof=1) + 1e-4) for z in (a, b)]
    variance = np.mean([np.mean(np.maximum(0, 1 - std)) for std in stds])
    covariance = 0.0
    for z in (a, b):
        matrix = np.atleast_2d(np.cov(z.T))
        covariance += (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2)) / z.shape[1]
    return float(np.dot(weights, (invariance, variance, covariance)))


SIZES = {"batch": st.integers(2, 9), "width": st.integers(1, 8), "seed": st.integers(0, 10**6)}


@settings(deadline=None, max_examples=30)
@given(**SIZES, weight=st.floats(0, 1))
def test_barlow_twins_equals_its_formula(batch: int, width: int, seed: int, weight: float) -> None:
    z0, z1 = pair(batch, width, seed, torch.float64)
    found = barlow_twins(z0, z1, weight).item()
    assert found == pytest.approx(naive_barlow(z0, z1, weight), rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(**SIZES, weights=st.tuples(*[st.floats(0, 30)] * 3))
def test_vicreg_equals_its_formula(
    batch: int, width: int, seed: int, weights: tuple[float, float, float]
) -> None:
    z0, z1 = pair(batch, width, seed, torch.float64)
    found = vicreg(z0, z1, *weights).item()
    assert found == pytest.approx(naive_vicreg(z0, z1, weights), rel=1e-9, abs=1e-9)


def their_regression(p0: Tensor, p1: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    cosine = NegativeCosineSimilarity()
    return 0.5 * (cosine(p0, t1.detach()) + cosine(p1, t0.detach()))


THEIRS = {
    "barlow_twins, lightly": (
        lambda a, b: barlow_twins(a, b, 5e-3),
        BarlowTwinsLoss(lambda_param=5e-3),
    ),
    "vicreg, lightly": (lambda a, b: vicreg(a, b, 25, 25, 1), VICRegLoss()),
    "vicreg other weights, lightly": (
        lambda a, b: vicreg(a, b, 5, 30, 0.1),
        VICRegLoss(lambda_param=5, mu_param=30, nu_param=0.1),
    ),
    "vicreg, pml": (
        lambda a, b: vicreg(a, b, 25, 25, 1),
        lambda a, b: pml.VICRegLoss()(a, ref_emb=b),
    ),
    "simsiam, lightly": (
        lambda a, b: simsiam(a, b, 2 * b, a + b),
        lambda a, b: their_regression(a, b, 2 * b, a + b),
    ),
    "byol, lightly": (
        lambda a, b: byol(a, b, 2 * b, a + b),
        lambda a, b: 4 + 4 * their_regression(a, b, 2 * b, a + b),
    ),
}


@pytest.mark.parametrize("chunk_values", [row_chunks.CHUNK_VALUES, 40])
@pytest.mark.parametrize("batch", [4, 33])
@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("case", THEIRS)
def test_value_and_gradient_equal_other_libraries(
    case: str, scale: float, batch: int, chunk_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_chunks, "CHUNK_VALUES", chunk_values)
    results = []
    for loss in THEIRS[case]:
        z0, z1 = ((scale * z).requires_grad_() for z in pair(batch, 16))
        value = loss(z0, z1)
        results.append((value.detach(), *torch.autograd.grad(value, (z0, z1))))
    torch.testing.assert_close(*results, atol=1e-6, rtol=2e-6)


def whitened(batch: int, width: int) -> Tensor:
    """Columns of mean 0, unbiased variance 1 and no correlation."""
    noise = torch.randn(
        batch, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return torch.linalg.qr(noise - noise.mean(dim=0)).Q * (batch - 1) ** 0.5


def test_white_features_that_agree_are_perfect() -> None:
    z = whitened(50, 8)
    assert barlow_twins(z, z, 0.01).item() == pytest.approx(0, abs=1e-8)
    assert vicreg(z, z, 25, 25, 1).item() == pytest.approx(0, abs=1e-8)


def test_constant_features_are_collapse() -> None:
    z = torch.full((10, 8), 3.0)
    assert barlow_twins(z, z, 0.01).item() == 8
    assert vicreg(z, z, 25, 20, 1).item() == pytest.approx(20 * (1 - 0.01), abs=1e-5)
    assert simsiam(z, z, z, z).item() == pytest.approx(-1, abs=1e-6)
    assert byol(z, z, z, z).item() == pytest.approx(0, abs=1e-6)


def test_repeated_features_cost_what_their_correlation_says() -> None:
    z = whitened(50, 1).repeat(1, 4)
    assert barlow_twins(z, z, 0.1).item() == pytest.approx(0.1 * 12, rel=1e-4)
    assert vicreg(z, z, 0, 0, 1).item() == pytest.approx(2 * 12 / 4, rel=1e-9)


def test_barlow_twins_sees_neither_offset_nor_scale_of_a_feature() -> None:
    z0, z1 = pair(40, 6)
    shifted = barlow_twins(z0 * torch.linspace(1, 9, 6) + 5, z1 - 3, 0.01)
    torch.testing.assert_close(shifted, barlow_twins(z0, z1, 0.01), atol=1e-4, rtol=1e-4)


def test_large_features_keep_the_precision_of_their_covariances() -> None:
    z = 1000 * whitened(50, 8) + whitened(50, 1)  # variances of 10^6, covariances of 1
    found = vicreg(z.float(), z.float(), 0, 0, 1).item()
    assert found == pytest.approx(vicreg(z, z, 0, 0, 1).item(), rel=0.05)


def test_regressions_have_their_range_and_look_across_the_views() -> None:
    a, b = torch.eye(4)[:2], torch.eye(4)[2:]
    assert simsiam(a, b, b, a).item() == -1  # p0 is z1, p1 is z0
    assert simsiam(a, b, a, b).item() == 0
    assert simsiam(a, b, -b, -a).item() == 1
    assert byol(a, b, b, a).item() == 0
    assert byol(a, b, a, b).item() == 4
    assert byol(a, b, -b, -a).item() == 8


@pytest.mark.parametrize("loss", [simsiam, byol])
def test_targets_get_no_gradient(loss) -> None:
    p0, p1, t0, t1 = (z.requires_grad_() for z in (*pair(6, 8), *pair(6, 8, seed=1)))
    loss(p0, p1, t0, t1).backward()
    assert p0.grad.abs().sum() > 0
    assert p1.grad.abs().sum() > 0
    assert t0.grad is None
    assert t1.grad is None


@pytest.mark.parametrize(
    "loss", [lambda a, b: barlow_twins(a, b, 5e-3), lambda a, b: vicreg(a, b, 25, 25, 1)]
)
def test_wide_projections_never_make_the_whole_matrix(loss, monkeypatch, watch_largest) -> None:
    width, batch = 1024, 8
    largest = {}
    for chunk_values in (1 << 14, 1 << 22):
        monkeypatch.setattr(row_chunks, "CHUNK_VALUES", chunk_values)
        z0, z1 = (z.requires_grad_() for z in pair(batch, width))
        with watch_largest() as mode:
            loss(z0, z1).backward()
        largest[chunk_values] = mode.values
    assert largest[1 << 14] <= 1 << 14
    assert largest[1 << 22] == width**2  # so that the measure is known to measure


@pytest.mark.parametrize("shapes", [((1, 4), (1, 4)), ((4, 4), (4, 5)), ((4,), (4,))])
def test_misfits_are_refused(shapes) -> None:
    z0, z1 = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"shape \[B, D\] with B at least 2"):
        barlow_twins(z0, z1, 0.1)
    with pytest.raises(ValueError, match=r"shape \[B, D\] with B at least 2"):
        vicreg(z0, z1, 1, 1, 1)
    if shapes[0] != shapes[1]:
        with pytest.raises(ValueError, match=r"shape \[B, D\]"):
            simsiam(z0, z0, z0, z1)
        with pytest.raises(ValueError, match=r"shape \[B, D\]"):
            byol(z0, z1, z0, z0)
