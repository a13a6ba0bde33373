"""kNN and the label-free measures against other libraries, numpy and closed forms; loss on val.

Shapes: N bank, M queries, B embeddings, D width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

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
from trainer.augment import TwoViews
from trainer.config import TrainConfig
from trainer.datasets import DataSplits, Split, load_for
from trainer.evaluate import alignment, collapse, feature_std, knn_top1, rankme, uniformity
from trainer.evaluator import SEED, Evaluator
from trainer.loop import Diverged, Report, Trainer
from trainer.losses import LOSSES, Embedded
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
    with pytest.raises(ValueError, match="bank, got 0"):
        knn_top1(some[:0], labels[:0], some, labels)
    with pytest.raises(ValueError, match="one query, got 0"):
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
    images = torch.from_numpy(load_for(TrainConfig()).val.images[:128].copy())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, _ = build_encoder(name, 32)
    with torch.inference_mode():
        features = encoder.eval()(images.float() / 128 - 1)
    assert collapse(features) is None
    assert feature_std(features) > 0.03


# --- the loss on val ------------------------------------------------------------------------------

TIMINGS = ("images_per_s", "wall_s", "peak_mem_bytes")
NOISY = """
import torch
def noisy(z0, z1, config):
    return (z0 - z1 + torch.randn_like(z0)).square().mean()
"""


def tiny(**changed: Any) -> TrainConfig:
    base = {"train_limit": 120, "val_limit": 50, "image_size": 8, "batch_size": 20, "epochs": 1}
    base |= {"projector_hidden": 16, "projector_out": 8, "report_every": 60, "threads": 1}
    base |= {"predictor_hidden": 8, "queue_size": 90, "linear_probe": "never", "val_loss": True}
    return TrainConfig.model_validate(base | {"device": "cpu"} | changed)


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return load_for(tiny())


def without_timings(report: Report) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if name not in TIMINGS}


def loss_now(trainer: Trainer) -> float:
    return trainer._evaluator.val_loss(trainer._network, trainer._loss)


def assert_equal(left: Any, right: Any) -> None:
    if isinstance(left, dict | list | tuple):
        assert type(left) is type(right)
        assert len(left) == len(right)
        keys = left if isinstance(left, dict) else range(len(left))
        for key in keys:
            assert_equal(left[key], right[key])
    elif isinstance(left, Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("loss", [*LOSSES, "noisy"])
def test_every_loss_is_measured_on_val_and_leaves_no_trace(
    loss: str, data: DataSplits, tmp_path: Path
) -> None:
    if loss == "noisy":
        (tmp_path / "noisy.py").write_text(NOISY)
        loss = f"{tmp_path}/noisy.py:noisy"
    measured = Trainer(tiny(loss=loss), data)
    plain = Trainer(tiny(loss=loss, val_loss=False), data)
    torch.manual_seed(1)
    generator = torch.get_rng_state()
    run, reports, states = measured.run(), [], []
    for expected in plain.run():
        reports.append(next(run))
        states.append(measured.state_dict())
        assert math.isfinite(reports[-1].val_loss)
        assert loss_now(measured) == reports[-1].val_loss
        assert expected.val_loss is None
        assert "val_loss" not in expected.metrics()
        assert reports[-1].metrics()["val_loss"] == reports[-1].val_loss
        assert without_timings(replace(reports[-1], val_loss=None)) == without_timings(expected)
        untimed = {"last_report": None, "wall_s": 0}
        assert_equal(measured.state_dict() | untimed, plain.state_dict() | untimed)
        gradients, others = (
            [weight.grad for weight in trainer._network.parameters()]
            for trainer in (measured, plain)
        )
        assert_equal(gradients, others)
        for module in (measured._network, *_targets(measured)):
            assert all(part.training for part in module.modules())
    assert torch.equal(torch.get_rng_state(), generator)
    assert len(reports) == 2
    assert reports[0].val_loss != reports[1].val_loss

    torch.manual_seed(2)
    continued = Trainer(tiny(loss=loss), data)
    continued.load_state_dict(states[0])
    assert without_timings(next(continued.run())) == without_timings(reports[1])


def _targets(trainer: Trainer) -> list[torch.nn.Module]:
    slow = trainer._network.momentum
    return [] if slow is None else [slow.module]


@pytest.mark.parametrize("loss", ["nt_xent", "sup_con"])
@pytest.mark.parametrize(
    ("batch_size", "batches"),
    [(20, [20, 20]), (50, [50]), (80, [50])],  # of the 50 images of val
)
def test_the_loss_on_val_is_that_of_the_runs_batches(
    batch_size: int, batches: list[int], loss: str, data: DataSplits
) -> None:
    # sharp enough that images so little trained on differ
    config = tiny(batch_size=batch_size, precision="float32", loss=loss, temperature=0.01)
    trainer = Trainer(config, data)
    next(trainer.run())
    two_views = TwoViews(config, data.mean, data.std, "cpu")
    generator, start, expected = rng(SEED), 0, []
    network = trainer._network.eval()
    for size in batches:
        images = torch.from_numpy(data.val.images[start : start + size].copy())
        labels = torch.from_numpy(data.val.labels[start : start + size].copy())
        with torch.no_grad():
            z0, z1 = network.head(network.encoder(two_views(images, generator))).chunk(2)
        of_batch = Embedded(z0, z1, labels_B=labels)
        expected.append(float(LOSSES[loss].compute(of_batch, config)))
        start += size
    network.train()

    def compute(batch: Embedded, config: TrainConfig) -> Tensor:
        assert not batch.z0_BD.requires_grad
        return LOSSES[loss].compute(batch, config)

    found = trainer._evaluator.val_loss(network, replace(LOSSES[loss], compute=compute))
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


def test_no_more_than_512_images_are_looked_at_unless_a_batch_is_larger(
    data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Split(np.tile(data.val.images, (14, 1, 1, 1)), np.tile(data.val.labels, 14))
    train = Split(np.tile(data.train.images, (6, 1, 1, 1)), np.tile(data.train.labels, 6))
    large = replace(data, val=many, train=train, bank=data.bank)
    seen: list[int] = []
    call = TwoViews.__call__
    monkeypatch.setattr(
        TwoViews, "__call__", lambda self, x, g: (seen.append(len(x)), call(self, x, g))[1]
    )
    for batch_size, batches in ((200, [200, 200]), (512, [512]), (600, [600]), (720, [700])):
        seen.clear()
        loss_now(Trainer(tiny(batch_size=batch_size), large))
        assert seen == batches


def test_the_loss_on_val_is_of_the_trained_network_however_it_is_encoded(data: DataSplits) -> None:
    changes = ({}, {"ema_decay": 0.9}, {"micro_batch_size": 7}, {"linear_probe": "always"})
    reports = [next(Trainer(tiny(precision="float32", **each), data).run()) for each in changes[:2]]
    assert reports[0].val_loss == reports[1].val_loss
    assert reports[0].knn_top1 != reports[1].knn_top1 or reports[0].rankme != reports[1].rankme
    untrained = [loss_now(Trainer(tiny(precision="float32", **each), data)) for each in changes]
    assert untrained == pytest.approx([untrained[0]] * 4, rel=1e-5)


def test_the_loss_on_val_costs_nothing_unless_it_is_asked_for(
    data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise AssertionError("it was measured")

    monkeypatch.setattr(Evaluator, "val_loss", fail)
    assert len(list(Trainer(tiny(val_loss=False), data).run())) == 2
    with pytest.raises(AssertionError, match="it was measured"):
        next(Trainer(tiny(), data).run())


def test_a_loss_on_val_that_is_not_finite_is_divergence(data: DataSplits) -> None:
    trainer = Trainer(tiny(), data)
    norm = next(m for m in trainer._network.head.modules() if isinstance(m, torch.nn.BatchNorm1d))
    norm.running_var.fill_(-1e9)  # which training does not look at
    with pytest.raises(Diverged, match="the loss on val was not finite"):
        next(trainer.run())


def test_where_the_loss_on_val_cannot_be_had_it_is_refused(data: DataSplits) -> None:
    one = replace(data, val=Split(data.val.images[:1], data.val.labels[:1]))
    with pytest.raises(ValueError, match=r"val_loss needs at least 2 images .* got 1; raise val_l"):
        Trainer(tiny(), one)
    Trainer(tiny(val_loss=False), one)
    unlabelled = replace(data, val=Split(data.val.images, np.full_like(data.val.labels, -1)))
    with pytest.raises(ValueError, match="val_loss of the loss sup_con needs a label of every val"):
        Trainer(tiny(loss="sup_con"), unlabelled)
    Trainer(tiny(loss="sup_con", val_loss=False), unlabelled)
    Trainer(tiny(), unlabelled)


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
