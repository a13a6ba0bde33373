"""Losses against the papers' pseudocode, closed forms, invariances and two other libraries.

Shapes: B images, N = 2B embeddings, D width.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import NTXentLoss
from pytorch_metric_learning import losses as pml

from trainer.config import TrainConfig
from trainer.losses import LOSSES, get_loss, margin_contrastive, nt_xent

CONFIG = TrainConfig(temperature=0.3, margin=1.2)


def pair(batch: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Two views' embeddings of different lengths, the second a disturbed copy of the first."""
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    z1 = z0 + 0.7 * torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return (3 * z0).to(dtype), z1.to(dtype)


def naive_nt_xent(z0: np.ndarray, z1: np.ndarray, temperature: float) -> float:
    """Algorithm 1 of the paper: l(2k-1, 2k) + l(2k, 2k-1), averaged over 2N."""
    z = np.empty((2 * len(z0), z0.shape[1]))
    z[0::2], z[1::2] = z0, z1
    similarity = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in z] for a in z]

    def term(i: int, j: int) -> float:
        others = sum(math.exp(similarity[i][k] / temperature) for k in range(len(z)) if k != i)
        return -math.log(math.exp(similarity[i][j] / temperature) / others)

    return sum(term(i, i ^ 1) for i in range(len(z))) / len(z)


def naive_margin(z0: np.ndarray, z1: np.ndarray, margin: float) -> float:
    z = [row / np.linalg.norm(row) for row in (*z0, *z1)]
    batch = len(z0)
    positives, negatives = [], []
    for i, a in enumerate(z):
        for j, b in enumerate(z):
            if i != j:
                distance = float(np.linalg.norm(a - b))
                if i % batch == j % batch:
                    positives.append(distance)
                else:
                    negatives.append(max(0.0, margin - distance))
    means = [np.mean([x for x in terms if x > 0] or [0.0]) for terms in (positives, negatives)]
    return float(sum(means))


# --- NT-Xent -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 9),
    width=st.integers(1, 8),
    temperature=st.floats(0.05, 2),
    seed=st.integers(0, 10**6),
)
def test_nt_xent_equals_the_paper_s_algorithm(
    batch: int, width: int, temperature: float, seed: int
) -> None:
    z0, z1 = pair(batch, width, seed, torch.float64)
    expected = naive_nt_xent(z0.numpy(), z1.numpy(), temperature)
    assert nt_xent(z0, z1, temperature).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("batch", [2, 33, 128])
def test_nt_xent_equals_lightly_and_pytorch_metric_learning(temperature: float, batch: int) -> None:
    z0, z1 = pair(batch, 16)
    found = nt_xent(z0, z1, temperature)
    torch.testing.assert_close(found, NTXentLoss(temperature)(z0, z1), atol=1e-6, rtol=1e-6)
    theirs = pml.SelfSupervisedLoss(pml.NTXentLoss(temperature))(z0, z1)
    torch.testing.assert_close(found, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 64])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_nt_xent_of_identical_embeddings_is_the_log_of_the_choices(
    batch: int, temperature: float
) -> None:
    z = torch.ones(batch, 8)
    assert nt_xent(z, z, temperature).item() == pytest.approx(math.log(2 * batch - 1), abs=1e-5)


def test_nt_xent_of_orthogonal_images_has_its_closed_form() -> None:
    z, batch, temperature = torch.eye(6), 6, 0.5
    positive = math.exp(1 / temperature)
    expected = -math.log(positive / (positive + 2 * batch - 2))
    assert nt_xent(z, z, temperature).item() == pytest.approx(expected, abs=1e-6)


def test_nt_xent_gradients_are_those_of_finite_differences() -> None:
    z0, z1 = (z.requires_grad_() for z in pair(4, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (z0, z1))


# --- margin ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 9),
    width=st.integers(2, 8),
    margin=st.floats(0.1, 2.5),
    seed=st.integers(0, 10**6),
)
def test_margin_equals_its_formula(batch: int, width: int, margin: float, seed: int) -> None:
    z0, z1 = pair(batch, width, seed, torch.float64)
    expected = naive_margin(z0.numpy(), z1.numpy(), margin)
    assert margin_contrastive(z0, z1, margin).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("batch", [2, 10, 64])
def test_margin_equals_pytorch_metric_learning(margin: float, batch: int) -> None:
    z0, z1 = pair(batch, 16)
    theirs = pml.SelfSupervisedLoss(pml.ContrastiveLoss(pos_margin=0, neg_margin=margin))(z0, z1)
    found = margin_contrastive(z0, z1, margin)
    torch.testing.assert_close(found, theirs, atol=1e-6, rtol=1e-6)


def test_margin_has_its_closed_forms() -> None:
    same = torch.ones(5, 8)
    # collapse: no positive term, every negative lacks the whole margin
    assert margin_contrastive(same, same, 1.2).item() == pytest.approx(1.2, abs=1e-3)
    # orthogonal images are sqrt(2) apart: beyond the margin, or short of it
    assert margin_contrastive(torch.eye(5), torch.eye(5), 1.0).item() == 0
    found = margin_contrastive(torch.eye(5), torch.eye(5), 2.0).item()
    assert found == pytest.approx(2 - 2**0.5, abs=1e-6)
    # views on opposite poles are 2 apart
    pole = torch.tensor([[1.0, 0.0]])
    assert margin_contrastive(pole, -pole, 1.0).item() == pytest.approx(2, abs=1e-6)


def test_margin_gradients_are_those_of_finite_differences() -> None:
    z0, z1 = (z.requires_grad_() for z in pair(4, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: margin_contrastive(a, b, 1.7), (z0, z1))


# --- what holds for every loss -------------------------------------------------------------------


@pytest.fixture(params=sorted(LOSSES))
def loss(request: pytest.FixtureRequest):
    function = get_loss(request.param)
    return lambda z0, z1: function(z0, z1, CONFIG)


def test_is_a_finite_scalar_and_lower_for_views_that_belong_together(loss) -> None:
    z0, z1 = pair(32, 16)
    value = loss(z0, z1)
    assert value.shape == ()
    assert value.isfinite()
    assert value < loss(z0, z1.roll(1, dims=0))


def test_is_symmetric_in_the_views_and_blind_to_order_length_and_rotation(loss) -> None:
    z0, z1 = pair(16, 8)
    expected = loss(z0, z1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2))).Q
    lengths = torch.linspace(0.01, 100, 16)[:, None]
    for changed in (
        (z1, z0),
        (z0[order], z1[order]),
        (z0 * lengths, z1 / lengths),
        (z0 @ rotation, z1 @ rotation),
    ):
        torch.testing.assert_close(loss(*changed), expected, atol=1e-5, rtol=1e-5)


def test_a_step_against_the_gradient_lowers_it(loss) -> None:
    z0, z1 = (z.requires_grad_() for z in pair(16, 8))
    value = loss(z0, z1)
    gradients = torch.autograd.grad(value, (z0, z1))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    after = loss(z0 - 0.1 * gradients[0], z1 - 0.1 * gradients[1])
    assert after < value


@pytest.mark.parametrize("case", ["identical", "views equal", "zero", "one zero", "single image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_where_embeddings_coincide_or_vanish(loss, case, dtype) -> None:
    z0, z1 = pair(40, 16)
    if case == "identical":
        z0 = z1 = torch.randn(1, 16, generator=torch.Generator().manual_seed(3)).repeat(40, 1)
    elif case == "views equal":
        z1 = z0.clone()
    elif case == "zero":
        z0, z1 = torch.zeros(40, 16), torch.zeros(40, 16)
    elif case == "one zero":
        z0[3] = 0
    else:
        z0, z1 = z0[:1], z1[:1]
    z0, z1 = (z.detach().clone().to(dtype).requires_grad_() for z in (z0, z1))
    value = loss(z0, z1)
    value.backward()
    assert value.isfinite()
    assert z0.grad.isfinite().all()
    assert z1.grad.isfinite().all()


def test_computes_in_float32_whatever_comes_in(loss) -> None:
    z0, z1 = (z.bfloat16() for z in pair(32, 16))
    expected = loss(z0.float(), z1.float())
    assert loss(z0, z1).dtype == torch.float32
    assert torch.equal(loss(z0, z1), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(z0, z1), expected)


def test_does_not_change_its_inputs(loss) -> None:
    z0, z1 = pair(8, 4)
    copies = z0.clone(), z1.clone()
    loss(z0, z1)
    assert torch.equal(z0, copies[0])
    assert torch.equal(z1, copies[1])


def test_refuses_embeddings_that_do_not_fit(loss) -> None:
    for z0, z1 in (
        (torch.zeros(4, 8), torch.zeros(5, 8)),
        (torch.zeros(4), torch.zeros(4)),
        (torch.zeros(0, 8), torch.zeros(0, 8)),
    ):
        with pytest.raises(ValueError, match=r"equal shape \[B, D\]"):
            loss(z0, z1)


def test_the_configuration_s_fields_reach_the_losses() -> None:
    z0, z1 = pair(8, 4)
    warm = TrainConfig(temperature=1.0, margin=0.5)
    assert get_loss("nt_xent")(z0, z1, warm) == nt_xent(z0, z1, 1.0)
    assert get_loss("margin")(z0, z1, warm) == margin_contrastive(z0, z1, 0.5)


def test_an_unknown_loss_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown loss 'ntxent'; known losses: margin, nt_xent"):
        get_loss("ntxent")


def test_every_loss_says_in_one_line_what_it_is() -> None:
    for function in LOSSES.values():
        assert function.__doc__
        assert len(function.__doc__.splitlines()) == 1
