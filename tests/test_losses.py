"""What holds for every loss of the registry.

Formulas, closed forms and other libraries: test_pair_losses.py, test_feature_losses.py.

Shapes: B images, N = 2B embeddings, D width, Q keys of a queue.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer import row_chunks
from trainer.config import TrainConfig
from trainer.losses import LOSSES, Embedded, get_loss

CONFIG = TrainConfig(temperature=0.3, margin=1.2, sigmoid_bias=-2.0)
PARTS = {
    "predictor": ("p0_BD", "p1_BD"),
    "target": ("target0_BD", "target1_BD"),
    "queue": ("queue_QD",),
    "labels": ("labels_B",),
}
CHANGED = {  # another value for each field that some loss reads
    "temperature": 0.7,
    "margin": 1.5,
    "margin_squared": True,
    "triplet_margin": 0.6,
    "dclw_sigma": 0.2,
    "sigmoid_bias": -4.0,
    "barlow_lambda": 0.1,
    "vicreg_invariance": 3.0,
    "vicreg_variance": 3.0,
    "vicreg_covariance": 3.0,
    "align_alpha": 1.0,
    "uniform_t": 1.0,
    "uniform_weight": 2.0,
}
BY_FEATURE = {"barlow_twins", "vicreg"}  # neither rotation nor length of embeddings is free
LEAST_TWO = {"dcl", "dclw", "align_uniform", *BY_FEATURE}


def pair(batch: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views' embeddings of different lengths, the second a disturbed copy of the first."""
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    z1 = z0 + 0.7 * torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return 3 * z0.float(), z1.float()


def embedded(z0: Tensor, z1: Tensor, labels: Tensor | None = None) -> Embedded:
    """All that any loss may need: the predictor changes nothing, the target is a copy."""
    queue_QD = torch.eye(9, z0.shape[-1], dtype=z0.dtype)
    labels_B = torch.arange(len(z0)) % 4 if labels is None else labels
    return Embedded(z0, z1, z0, z1, z0.detach().clone(), z1.detach().clone(), queue_QD, labels_B)


@pytest.fixture(params=sorted(LOSSES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def loss(name: str):
    """A loss as a function of the two projections; all else follows from them."""
    compute = get_loss(name).compute
    return lambda z0, z1, labels=None: compute(embedded(z0, z1, labels), CONFIG)


def few_values(monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    monkeypatch.setattr(row_chunks, "CHUNK_VALUES", values)


# --- values --------------------------------------------------------------------------------------


def test_is_a_finite_scalar_and_lower_for_views_that_belong_together(loss) -> None:
    z0, z1 = pair(32, 16)
    value = loss(z0, z1)
    assert value.shape == ()
    assert value.isfinite()
    assert value < loss(z0, z1.roll(1, dims=0))


def test_is_symmetric_in_the_views_and_blind_to_the_order_of_images(loss) -> None:
    z0, z1 = pair(16, 8)
    labels = torch.arange(16) % 4
    expected = loss(z0, z1, labels)
    torch.testing.assert_close(loss(z1, z0, labels), expected, atol=1e-5, rtol=1e-5)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    found = loss(z0[order], z1[order], labels[order])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_lengths_and_rotations_matter_only_to_losses_of_features(name: str) -> None:
    z0, z1 = pair(16, 8)
    batch = embedded(z0, z1)
    compute = LOSSES[name].compute
    expected = compute(batch, CONFIG)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2))).Q
    rotated = Embedded(*(t if t is None or t.ndim == 1 else t @ rotation for t in batch))
    lengths = torch.linspace(0.01, 100, 16)[:, None]
    scaled = embedded(z0 * lengths, z1 / lengths)
    for changed in (rotated, scaled):
        alike = torch.allclose(compute(changed, CONFIG), expected, atol=1e-5, rtol=1e-5)
        assert alike is (name not in BY_FEATURE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_whatever_comes_in(loss, dtype: torch.dtype) -> None:
    z0, z1 = (z.to(dtype) for z in pair(32, 16))
    expected = loss(z0.float(), z1.float())
    assert expected.isfinite()
    assert loss(z0, z1).dtype == torch.float32
    assert torch.equal(loss(z0, z1), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(z0, z1), expected)
        assert loss(z0.double(), z1.double()).dtype == torch.float64


def test_does_not_change_its_inputs(name: str) -> None:
    batch = embedded(*pair(8, 4))
    copies = [t.clone() for t in batch]
    LOSSES[name].compute(batch, CONFIG)
    assert all(map(torch.equal, batch, copies))


def test_draws_nothing_at_random(loss) -> None:
    z0, z1 = pair(8, 4)
    before = torch.get_rng_state()
    assert torch.equal(loss(z0, z1), loss(z0, z1))
    assert torch.equal(torch.get_rng_state(), before)


def test_refuses_embeddings_that_do_not_fit(name: str) -> None:
    fits = embedded(*pair(4, 8))
    for z0, z1 in (
        (torch.zeros(4, 8), torch.zeros(5, 8)),
        (torch.zeros(4), torch.zeros(4)),
        (torch.zeros(0, 8), torch.zeros(0, 8)),
    ):
        batch = fits._replace(z0_BD=z0, z1_BD=z1, p0_BD=z0, p1_BD=z1)
        with pytest.raises(ValueError, match=r"equal shape \[B, D\]"):
            LOSSES[name].compute(batch, CONFIG)


# --- gradients -----------------------------------------------------------------------------------


# dclw's weights are constants to its gradient, not to finite differences: see test_pair_losses.py
@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"dclw"}), indirect=True)
@pytest.mark.parametrize("chunk_values", [row_chunks.CHUNK_VALUES, 21])
def test_gradients_are_those_of_finite_differences(name, chunk_values: int, monkeypatch) -> None:
    few_values(monkeypatch, chunk_values)
    batch = embedded(*(z.double() for z in pair(5, 4)))
    moved = PARTS["predictor"] if "predictor" in LOSSES[name].needs else ("z0_BD", "z1_BD")
    inputs = [getattr(batch, part).clone().requires_grad_() for part in moved]

    def value(*tensors: Tensor) -> Tensor:
        return LOSSES[name].compute(
            batch._replace(**dict(zip(moved, tensors, strict=True))), CONFIG
        )

    assert torch.autograd.gradcheck(value, inputs)


def test_a_step_against_the_gradient_lowers_it(loss) -> None:
    z0, z1 = (z.requires_grad_() for z in pair(16, 8))
    value = loss(z0, z1)
    gradients = torch.autograd.grad(value, (z0, z1))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    after = loss(*(z - 1e-3 * g / g.norm() for z, g in zip((z0, z1), gradients, strict=True)))
    assert after < value


@pytest.mark.parametrize(
    "case", ["identical", "views equal", "opposite", "zero", "one zero", "two images", "one image"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_values", [row_chunks.CHUNK_VALUES, 100])
def test_gradients_are_finite_where_embeddings_coincide_or_vanish(
    loss, name: str, case: str, dtype: torch.dtype, chunk_values: int, monkeypatch
) -> None:
    few_values(monkeypatch, chunk_values)
    z0, z1 = pair(40, 16)
    if case == "identical":
        z0 = z1 = torch.randn(1, 16, generator=torch.Generator().manual_seed(3)).repeat(40, 1)
    elif case == "views equal":
        z1 = z0.clone()
    elif case == "opposite":
        z1 = -z0
    elif case == "zero":
        z0, z1 = torch.zeros(40, 16), torch.zeros(40, 16)
    elif case == "one zero":
        z0[3] = 0
    else:
        count = 2 if case == "two images" else 1
        z0, z1 = z0[:count], z1[:count]
    z0, z1 = (z.detach().clone().to(dtype).requires_grad_() for z in (z0, z1))
    if case == "one image" and name in LEAST_TWO:
        with pytest.raises(ValueError, match="B at least 2"):
            loss(z0, z1)
        return
    value = loss(z0, z1)
    value.backward()
    assert value.isfinite()
    assert z0.grad.isfinite().all()
    assert z1.grad.isfinite().all()


# --- chunks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_values", [1, 100])  # a row a chunk; a last chunk that is shorter
def test_chunks_change_neither_value_nor_gradient(loss, chunk_values: int, monkeypatch) -> None:
    results = []
    for values in (row_chunks.CHUNK_VALUES, chunk_values):
        few_values(monkeypatch, values)
        z0, z1 = (z.double().requires_grad_() for z in pair(17, 8))
        value = loss(z0, z1)
        results.append((value.detach(), *torch.autograd.grad(value, (z0, z1))))
        with torch.no_grad():
            torch.testing.assert_close(loss(z0, z1), value)
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-12)


def test_a_large_batch_never_makes_the_matrix_of_all_pairs(
    loss, name: str, monkeypatch, watch_largest
) -> None:
    batch, width = 512, 8
    largest = {}
    for chunk_values in (1 << 14, 1 << 20):
        few_values(monkeypatch, chunk_values)
        z0, z1 = (z.requires_grad_() for z in pair(batch, width))
        with watch_largest() as mode:
            loss(z0, z1).backward()
        largest[chunk_values] = mode.values
    assert largest[1 << 14] <= 1 << 14  # of the 2^20 values of N x N
    if name not in ("byol", "simsiam", *BY_FEATURE):  # so that the measure is known to measure
        assert largest[1 << 20] >= batch**2


# --- what the registry says ----------------------------------------------------------------------


def test_each_field_moves_the_losses_that_say_they_read_it_and_no_other(name: str) -> None:
    batch = embedded(*pair(16, 8))
    compute = LOSSES[name].compute
    expected = compute(batch, CONFIG)
    moved = {
        field
        for field, value in CHANGED.items()
        if compute(batch, CONFIG.model_copy(update={field: value})) != expected
    }
    assert moved == set(LOSSES[name].fields)
    assert set(CHANGED) == {field for entry in LOSSES.values() for field in entry.fields}


def test_each_loss_gets_by_with_what_it_says_it_needs(name: str) -> None:
    batch = embedded(*pair(16, 8))
    entry = LOSSES[name]
    unneeded = {f: None for need, fs in PARTS.items() if need not in entry.needs for f in fs}
    found = entry.compute(batch._replace(**unneeded), CONFIG)
    assert torch.equal(found, entry.compute(batch, CONFIG))
    for need in entry.needs:
        for field in PARTS[need]:
            without = batch._replace(**{field: None})
            if need == "queue":  # that is the run's first step
                assert entry.compute(without, CONFIG) != found
                continue
            with pytest.raises(ValueError, match=rf"needs {field}"):
                entry.compute(without, CONFIG)


def test_every_loss_says_in_one_line_what_it_is() -> None:
    for entry in LOSSES.values():
        assert entry.description
        assert len(entry.description.splitlines()) == 1
        assert set(entry.needs) <= set(PARTS)
        assert set(entry.fields) <= set(TrainConfig.model_fields)


def test_an_unknown_loss_is_an_error_that_lists_the_known() -> None:
    known = ", ".join(sorted(LOSSES))
    message = f"unknown loss 'ntxent'; known: {known}; or give FILE.py:FUNCTION or MODULE:FUNCTION"
    with pytest.raises(ValueError) as error:  # noqa: PT011
        get_loss("ntxent")
    assert str(error.value) == message
    with pytest.raises(ValueError, match=r"or give mine\.py:FUNCTION$"):
        get_loss("mine.py")
