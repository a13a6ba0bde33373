"""Losses over pairs where their values are known: limits of the temperature, and closed forms.

Shapes: B images, N = 2B embeddings, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

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


def pair(batch: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two views' embeddings of different lengths, the second a disturbed copy of the first."""
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    z1 = z0 + 0.7 * torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return (3 * z0).to(dtype), z1.to(dtype)


def labels_of(batch: int) -> Tensor:
    return torch.randint(0, 3, (batch,), generator=torch.Generator().manual_seed(0))


BATCH, KEYS = 12, 5
WITH_TEMPERATURE: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], float]] = {
    # what each is where all similarities are alike
    "nt_xent": (nt_xent, math.log(2 * BATCH - 1)),
    "info_nce": (
        lambda a, b, t: info_nce(a, b, a, b, torch.eye(16, dtype=a.dtype)[:KEYS], t),
        math.log(BATCH + KEYS),
    ),
    "dcl": (dcl, math.log(2 * BATCH - 2)),
    "dclw": (lambda a, b, t: dclw(a, b, t, 0.5), math.log(2 * BATCH - 2)),
    "sigmoid": (lambda a, b, t: sigmoid(a, b, t, 0.0), BATCH * math.log(2)),
    "sup_con": (lambda a, b, t: sup_con(a, b, labels_of(BATCH), t), math.log(2 * BATCH - 1)),
}


@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_a_high_temperature_makes_all_similarities_alike(name: str) -> None:
    loss, expected = WITH_TEMPERATURE[name]
    assert loss(*pair(BATCH, 16), 1e6).item() == pytest.approx(expected, abs=1e-5)


def hard_limit(name: str, z0: Tensor, z1: Tensor) -> float:
    """What temperature times loss tends to as the temperature falls: only the nearest counts."""
    z_ND = torch.nn.functional.normalize(torch.cat([z0, z1]), dim=1)
    similarity = (z_ND @ z_ND.T).numpy()
    rows, partner = np.arange(2 * BATCH), np.roll(np.arange(2 * BATCH), BATCH)
    positive = similarity[rows, partner]
    np.fill_diagonal(similarity, -np.inf)
    if name == "sup_con":
        label = np.tile(labels_of(BATCH).numpy(), 2)
        same = (label[:, None] == label) & ~np.eye(2 * BATCH, dtype=bool)
        positive = np.array([similarity[i, same[i]].mean() for i in rows])
    if name == "sigmoid":
        cross = similarity[:BATCH, BATCH:]
        signs = 1 - 2 * np.eye(BATCH)
        return float(np.maximum(signs * cross, 0).sum() / BATCH)
    if name in ("dcl", "dclw"):
        similarity[rows, partner] = -np.inf
    if name == "dclw":
        scores = np.exp(positive / 0.5)
        positive = positive * (2 - scores / scores.mean())
    if name == "info_nce":
        similarity[:BATCH, :BATCH] = similarity[BATCH:, BATCH:] = -np.inf
        similarity = np.concatenate([similarity, z_ND.numpy()[:, :KEYS]], axis=1)
    return float((similarity.max(axis=1) - positive).mean())


@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_a_low_temperature_leaves_the_hardest_pairs(name: str) -> None:
    loss, _ = WITH_TEMPERATURE[name]
    z0, z1 = pair(BATCH, 16, dtype=torch.float64)
    found = 1e-5 * loss(z0, z1, 1e-5).item()
    assert found == pytest.approx(hard_limit(name, z0, z1), abs=1e-4)


@pytest.mark.parametrize("batch", [2, 64])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_identical_embeddings_give_the_log_of_the_choices(batch: int, temperature: float) -> None:
    z = torch.ones(batch, 8)
    one_class = torch.zeros(batch, dtype=torch.int64)
    queue = torch.nn.functional.normalize(torch.ones(3, 8), dim=1)
    assert nt_xent(z, z, temperature).item() == pytest.approx(math.log(2 * batch - 1), abs=1e-5)
    found = info_nce(z, z, z, z, queue, temperature).item()
    assert found == pytest.approx(math.log(batch + 3), abs=1e-5)
    found = sup_con(z, z, one_class, temperature).item()
    assert found == pytest.approx(math.log(2 * batch - 1), abs=1e-5)
    # the positive's 1 / temperature stands beside the negatives' in dcl, and cancels
    found = dcl(z, z, temperature).item()
    assert found == pytest.approx(math.log(2 * batch - 2), abs=1e-5)
    assert torch.equal(dclw(z, z, temperature, 0.5), dcl(z, z, temperature))


def test_orthogonal_images_have_their_closed_forms() -> None:
    z, batch, hot = torch.eye(6), 6, math.exp(1 / 0.5)
    expected = -math.log(hot / (hot + 2 * batch - 2))
    assert nt_xent(z, z, 0.5).item() == pytest.approx(expected, abs=1e-6)
    expected = -math.log(hot / (hot + batch - 1))
    assert info_nce(z, z, z, z, None, 0.5).item() == pytest.approx(expected, abs=1e-6)
    expected = math.log(2 * batch - 2) - 2
    assert dcl(z, z, 0.5).item() == pytest.approx(expected, abs=1e-6)
    expected = math.log1p(math.exp(1 - 1 / 0.5)) + (batch - 1) * math.log1p(math.exp(-1))
    assert sigmoid(z, z, 0.5, -1.0).item() == pytest.approx(expected, abs=1e-6)
    assert align_uniform(z, z, 2, 3, 0.5).item() == pytest.approx(-0.5 * 3 * 2, abs=1e-6)


def test_a_single_image_has_its_closed_forms() -> None:
    z0, z1 = pair(1, 8)
    cosine = torch.nn.functional.cosine_similarity(z0, z1).item()
    assert nt_xent(z0, z1, 0.1).item() == 0
    assert info_nce(z0, z1, z0, z1, None, 0.1).item() == 0
    assert sup_con(z0, z1, torch.tensor([4]), 0.1).item() == pytest.approx(0, abs=1e-6)
    assert triplet(z0, z1, 0.5).item() == 0
    expected = math.log1p(math.exp(10 - cosine / 0.1))
    assert sigmoid(z0, z1, 0.1, -10).item() == pytest.approx(expected, abs=1e-5)
    expected = 1 - cosine
    assert margin_contrastive(z0, z1, 1, squared=True).item() == pytest.approx(expected, abs=1e-6)


def test_margins_have_their_closed_forms() -> None:
    same = torch.ones(5, 8)
    # collapse: no positive term, every negative lacks the whole margin
    assert margin_contrastive(same, same, 1.2).item() == pytest.approx(1.2, abs=1e-3)
    found = margin_contrastive(same, same, 1.2, squared=True).item()
    assert found == pytest.approx(1.2**2 / 2, abs=1e-3)
    assert triplet(same, same, 0.7).item() == pytest.approx(0.7, abs=1e-3)
    # orthogonal images are sqrt(2) apart: beyond the margin, or short of it
    eye, short = torch.eye(5), 2 - 2**0.5
    assert margin_contrastive(eye, eye, 1.0).item() == 0
    assert margin_contrastive(eye, eye, 2.0).item() == pytest.approx(short, abs=1e-6)
    found = margin_contrastive(eye, eye, 2.0, squared=True).item()
    assert found == pytest.approx(short**2 / 2, abs=1e-6)
    assert triplet(eye, eye, 1.0).item() == 0
    assert triplet(eye, eye, 2.0).item() == pytest.approx(short, abs=1e-6)
    # views on opposite poles are 2 apart
    pole = torch.tensor([[1.0, 0.0]])
    assert margin_contrastive(pole, -pole, 1.0).item() == pytest.approx(2, abs=1e-6)
    assert margin_contrastive(pole, -pole, 1.0, squared=True).item() == pytest.approx(2, abs=1e-6)


def test_a_label_for_each_image_makes_sup_con_nt_xent() -> None:
    z0, z1 = pair(20, 8)
    found = sup_con(z0, z1, torch.arange(20), 0.2)
    torch.testing.assert_close(found, nt_xent(z0, z1, 0.2), atol=1e-6, rtol=1e-6)


def test_labels_are_names_only() -> None:
    z0, z1 = pair(20, 8)
    labels = labels_of(20)
    assert torch.equal(sup_con(z0, z1, labels, 0.2), sup_con(z0, z1, 7 - 1000 * labels, 0.2))
