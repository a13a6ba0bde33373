"""kNN and the label-free measures against other libraries, numpy and closed forms.

Shapes: N bank, M queries, B embeddings, D width.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss.hypersphere_loss import HypersphereLoss
from lightly.utils.benchmarking import knn_predict
from torch import Tensor
from torch.nn.functional import normalize

from trainer import evaluate
from trainer.config import TrainConfig
from trainer.evaluate import alignment, collapse, feature_std, knn_top1, rankme, uniformity
from trainer.models import build_encoder


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labelled(count: int, width: int, classes: int, noise: float, seed: int):
    """Features around one centre a class (the same for all seeds), with their labels."""
    centres = torch.randn(classes, width, generator=rng(100))
    labels = torch.randint(classes, (count,), generator=rng(seed))
    features = centres[labels] + noise * torch.randn(count, width, generator=rng(seed + 1))
    return features, labels


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "CHUNK_VALUES", 1000)


# --- kNN ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("noise", [0.5, 2.0, 5.0])
def test_knn_equals_lightly(
    k: int, temperature: float, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch)
    bank, bank_labels = labelled(1500, 16, 7, noise, 0)
    queries, answers = labelled(200, 16, 7, noise, 10)
    predicted = knn_predict(
        normalize(queries, dim=1), normalize(bank, dim=1).T, bank_labels, 7, k, temperature
    )[:, 0]
    found = knn_top1(bank, bank_labels, queries, answers, k=k, temperature=temperature)
    assert found == pytest.approx((predicted == answers).double().mean().item())


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 400), k=st.integers(1, 30), seed=st.integers(0, 1000))
def test_the_largest_are_those_of_topk(count: int, k: int, seed: int) -> None:
    values, k = torch.randn(7, count, generator=rng(seed)), min(k, count)
    found, columns = evaluate._largest(values, k)
    expected, places = values.topk(k, dim=1)
    assert torch.equal(found, expected)
    assert torch.equal(columns, places)


def test_knn_finds_itself_and_is_blind_to_length() -> None:
    features = torch.randn(50, 8, generator=rng())
    labels = torch.arange(50)
    lengths = torch.linspace(0.01, 100, 50)[:, None]
    assert knn_top1(features, labels, features * lengths, labels, k=1) == 1
    assert knn_top1(features, labels, -features, labels, k=1) == 0


def test_knn_weighs_near_neighbours_more() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([0, 1, 1])
    query, answer = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_top1(bank, labels, query, answer, k=3, temperature=0.1) == 1  # e^10 > 2 e^6
    assert knn_top1(bank, labels, query, answer, k=3, temperature=10.0) == 0  # one against two


def test_knn_with_fewer_features_than_neighbours_uses_them_all() -> None:
    bank = torch.eye(3)
    assert knn_top1(bank, torch.arange(3), bank, torch.arange(3), k=20) == 1


def test_knn_does_not_overflow_at_low_temperatures() -> None:
    bank, labels = labelled(100, 8, 3, 0.1, 0)
    assert knn_top1(bank, labels, bank, labels, k=5, temperature=0.001) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_knn_counts_features_that_are_not_finite_as_wrong(bad: float) -> None:
    bank, labels = labelled(60, 8, 3, 0.01, 0)
    queries, answers = labelled(40, 8, 3, 0.01, 10)
    broken = queries.clone()
    broken[:10, 3] = bad
    assert knn_top1(bank, labels, queries, answers) == 1
    assert knn_top1(bank, labels, broken, answers) == pytest.approx(0.75)
    holed = bank.clone()
    holed[::2] = bad
    assert knn_top1(holed, labels, queries, answers) == 1
    assert knn_top1(torch.full_like(bank, bad), labels, queries, answers) == 0
    assert knn_top1(bank, labels, torch.full_like(queries, bad), answers) == 0


def test_knn_takes_half_precision() -> None:
    bank, labels = labelled(60, 8, 3, 0.01, 0)
    assert knn_top1(bank.bfloat16(), labels, bank.half(), labels) == 1


def test_knn_refuses_to_judge_nothing() -> None:
    some, labels = labelled(5, 4, 2, 1.0, 0)
    with pytest.raises(ValueError, match="got 0 and 5"):
        knn_top1(some[:0], labels[:0], some, labels)
    with pytest.raises(ValueError, match="got 5 and 0"):
        knn_top1(some, labels, some[:0], labels[:0])
    with pytest.raises(ValueError, match="labels must be at least 0, got -1"):
        knn_top1(some, labels, some, torch.full_like(labels, -1))


# --- alignment and uniformity ---------------------------------------------------------------------


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_alignment_and_uniformity_equal_lightly(t: float, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    z0, z1 = torch.randn(70, 8, generator=rng()), torch.randn(70, 8, generator=rng(1))
    theirs = float(HypersphereLoss(t=t)(z0, z1))
    ours = alignment(z0, z1) + (uniformity(z0, t) + uniformity(z1, t)) / 2
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_alignment_has_its_closed_forms() -> None:
    z = torch.randn(20, 8, generator=rng())
    assert alignment(z, 3 * z) == pytest.approx(0, abs=1e-6)
    assert alignment(z, -z) == pytest.approx(4, abs=1e-5)
    assert alignment(torch.eye(4), torch.eye(4).roll(1, 0)) == pytest.approx(2, abs=1e-6)


def test_uniformity_has_its_closed_forms() -> None:
    assert uniformity(torch.ones(10, 4)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.eye(6)) == pytest.approx(-4)  # all pairs at squared distance 2
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(poles, t=3.0) == pytest.approx(-12, abs=1e-5)
    sphere = torch.randn(3000, 512, generator=rng())
    assert uniformity(sphere) == pytest.approx(-4, abs=0.05)
    with pytest.raises(ValueError, match="at least 2 embeddings, got 1"):
        uniformity(torch.ones(1, 4))


# --- RankMe and feature_std -----------------------------------------------------------------------


def numpy_rankme(features: np.ndarray) -> float:
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    share = singular / np.abs(singular).sum() + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 60),
    width=st.integers(1, 40),
    rank=st.integers(1, 40),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e15]),
    seed=st.integers(0, 10**6),
)
def test_rankme_equals_numpy_s_singular_values(
    count: int, width: int, rank: int, scale: float, seed: int
) -> None:
    generator = rng(seed)
    left = torch.randn(count, rank, generator=generator)
    features = scale * (left @ torch.randn(rank, width, generator=generator))
    expected = numpy_rankme(features.numpy())
    assert rankme(features) == pytest.approx(expected, rel=1e-4)


def test_rankme_has_its_closed_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-4)
    assert rankme(torch.eye(16).repeat(50, 1)) == pytest.approx(16, rel=1e-4)
    assert rankme(torch.ones(500, 16)) == pytest.approx(1, rel=1e-4)
    assert rankme(torch.zeros(500, 16)) == 0
    spectrum = torch.tensor([2.0, 1.0, 1.0])  # entropy of 1/2, 1/4, 1/4: 1.5 bits
    assert rankme(torch.diag(spectrum)) == pytest.approx(2**1.5, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_label_free_measures_of_broken_features_are_nan(bad: float) -> None:
    z = torch.randn(20, 8, generator=rng())
    z[3, 2] = bad
    assert math.isnan(rankme(z))
    assert math.isnan(alignment(z, z))
    assert math.isnan(uniformity(z))
    assert math.isnan(feature_std(z))


def test_feature_std_is_one_where_features_spread_and_zero_where_they_collapse() -> None:
    spread = torch.randn(5000, 128, generator=rng())
    assert feature_std(spread) == pytest.approx(1, abs=0.02)
    assert feature_std(1000 * spread) == pytest.approx(feature_std(spread), abs=1e-5)
    point = torch.randn(1, 128, generator=rng()).repeat(100, 1)
    assert feature_std(point) == pytest.approx(0, abs=1e-5)
    axes = torch.eye(4)
    assert feature_std(axes) == pytest.approx(2 * math.sqrt(3) / 4)


# --- collapse -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 10, 128])
def test_one_point_is_collapse_at_every_length(width: int) -> None:
    point = 1 + torch.rand(1, width, generator=rng())
    noise = 1e-4 * torch.randn(300, width, generator=rng(1))
    lengths = torch.linspace(0.1, 100, 300)[:, None]
    for features in (point + noise, (point + noise) * lengths, torch.zeros(300, width)):
        assert "standard deviation" in str(collapse(features))
        assert "one point" in str(collapse(features.half()))


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("offset", [0.0, 5.0])  # both ends of an axis, a short arc
def test_one_line_is_collapse(noise: float, offset: float) -> None:
    generator = rng()
    start, direction = torch.randn(2, 1, 64, generator=generator)
    features = offset * start + torch.randn(300, 1, generator=generator) * direction
    features += noise * torch.randn(300, 64, generator=generator)
    assert feature_std(features) > 0.1
    assert str(collapse(features)).startswith("features collapsed: effective rank 1")
    # two classes far apart are two ends, and healthy if anything is left beside them
    assert collapse(features + 0.5 * torch.randn(300, 64, generator=generator)) is None


@settings(deadline=None, max_examples=25)
@given(rank=st.integers(2, 12), offset=st.sampled_from([0.0, 3.0]), seed=st.integers(0, 1000))
def test_a_plane_and_more_is_no_line(rank: int, offset: float, seed: int) -> None:
    generator = rng(seed)
    axes, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator))
    features = torch.randn(400, rank, generator=generator) @ axes[:rank]
    assert collapse(features + offset * axes[-1]) is None
    assert collapse(features * torch.logspace(-3, 3, 400)[:, None]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_told_by_their_number(bad: float) -> None:
    features = torch.randn(40, 16, generator=rng())
    assert collapse(features) is None
    features[:3, 2] = bad
    assert collapse(features) == "features are not finite for 3 of 40 images"


def test_too_few_images_cannot_show_collapse() -> None:
    assert collapse(torch.ones(1, 16)) is None
    assert collapse(torch.randn(2, 16, generator=rng())) is None  # two points are on a line
    assert collapse(torch.tensor([[1.0], [-1.0]]).repeat(20, 1)) is None  # so is one dimension
    assert collapse(torch.ones(2, 16)) is not None


@pytest.mark.parametrize("name", ["conv_small", "resnet18"])
def test_untrained_encoders_have_not_collapsed(name: str) -> None:
    from trainer.datasets import load_for

    images = torch.from_numpy(load_for(TrainConfig()).val.images[:128].copy())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, _ = build_encoder(name, 32)
    with torch.inference_mode():
        features = encoder.eval()(images.float() / 128 - 1)
    assert collapse(features) is None
    assert feature_std(features) > 0.03


# --- all ------------------------------------------------------------------------------------------


def test_measures_do_not_depend_on_the_precision_that_comes_in() -> None:
    z = torch.randn(64, 16, generator=rng()).bfloat16()

    def measure(z: Tensor) -> list[float]:
        return [alignment(z, z.roll(1, 0)), uniformity(z), rankme(z), feature_std(z)]

    assert measure(z) == measure(z.float())
    assert measure(z) == pytest.approx(measure(z.double()), rel=1e-5)


@pytest.mark.slow
def test_a_bank_of_20_000_stays_within_its_memory() -> None:
    resource = pytest.importorskip("resource")
    bank = torch.randn(20_000, 512, generator=rng())
    labels = torch.randint(10, (20_000,), generator=rng())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    knn_top1(bank, labels, bank[:5000], labels[:5000])
    uniformity(bank[:5000])
    rankme(bank)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 300  # all similarities at once would be 400 MB, in float64 twice that
