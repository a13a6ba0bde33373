"""The trainer: exact continuation, marks, the order of images, divergence, refusals."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.extent import ALL
from trainer import TrainConfig, Trainer
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.datasets import DataSplits, load_for
from trainer.loop import Diverged, Report, report_marks
from trainer.models import ENCODERS

TIMINGS = ("images_per_s", "wall_s", "peak_mem_bytes")


def tiny(**changed: Any) -> TrainConfig:
    base = {"train_limit": 150, "val_limit": 60, "image_size": 16, "batch_size": 32, "epochs": 2.5}
    base |= {"projector_hidden": 32, "projector_out": 16, "report_every": 70, "threads": 1}
    return TrainConfig.model_validate(base | {"device": "cpu"} | changed)


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return load_for(tiny())


def measures(report: Report) -> dict[str, float]:
    return {key: value for key, value in asdict(report).items() if key not in TIMINGS}


def without_timings(state: dict[str, Any]) -> dict[str, Any]:
    last = {k: v for k, v in state["last_report"].items() if k not in TIMINGS}
    return state | {"last_report": last, "wall_s": 0.0}


def assert_identical(left: Any, right: Any, at: str = "") -> None:
    assert type(left) is type(right), at
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), at
    elif isinstance(left, dict):
        assert list(left) == list(right), at
        for key in left:
            assert_identical(left[key], right[key], f"{at}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), at
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert_identical(*pair, f"{at}.{number}")
    else:
        assert left == right, at


# ---------------------------------------------------------------------- continuation


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"precision": "float32", "optimizer": "sgd", "schedule": "cosine"},
        {"loss": "info_nce", "queue_size": 100, "optimizer": "lars", "lr": 0.1},
        {"loss": "byol", "ema_decay": 0.9, "schedule": "constant", "optimizer": "adam"},
        {"loss": "simsiam", "micro_batch_size": 10, "clip_norm": 0.1},
        {"loss": "sup_con", "projector_layers": 3, "linear_probe": "always"},
        # dropout draws from torch's own generator
        {"encoder": "conv_dropout", "micro_batch_size": 16},
    ],
    ids=["defaults", "float32-sgd-cosine", "queue-lars", "momentum-average", "predictor-micro",
         "labels-probe", "dropout-micro"],
)  # fmt: skip
def test_cut_anywhere_and_continued_equals_uninterrupted(
    data: DataSplits, changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ENCODERS["conv_small"]
    monkeypatch.setitem(
        ENCODERS,
        "conv_dropout",
        plain._replace(build=lambda size: nn.Sequential(plain.build(size), nn.Dropout(0.2))),
    )
    config = tiny(**changed)
    whole = Trainer(config, data)
    reports = []
    for number, report in enumerate(whole.run()):
        reports.append(report)
        save_checkpoint(tmp_path / f"{number}.pt", whole.state_dict(), config, report.mark)
    end = without_timings(whole.state_dict())
    assert len(reports) == 6

    for cut in range(len(reports)) if ALL else (1, 4):
        continued = Trainer(config, data)
        checkpoint = load_checkpoint(tmp_path / f"{cut}.pt")
        continued.load_state_dict(checkpoint.state)
        rest = list(continued.run())
        assert [measures(r) for r in rest] == [measures(r) for r in reports[cut + 1 :]]
        assert_identical(without_timings(continued.state_dict()), end)
        assert not rest or rest[-1].wall_s > reports[cut].wall_s


CONTINUE = """
import sys, torch
from pathlib import Path
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.datasets import load_for
from trainer.loop import Trainer
checkpoint = load_checkpoint(Path(sys.argv[1]))
trainer = Trainer(checkpoint.config, load_for(checkpoint.config))
trainer.load_state_dict(checkpoint.state)
torch.manual_seed(12345)
torch.rand(7)
mark = [report.mark for report in trainer.run()][-1]
save_checkpoint(Path(sys.argv[2]), trainer.state_dict(), checkpoint.config, mark)
"""


@pytest.mark.slow
def test_continued_in_a_new_process_equals_uninterrupted(data: DataSplits, tmp_path: Path) -> None:
    whole = Trainer(tiny(), data)
    for number, report in enumerate(whole.run()):
        if number == 1:
            save_checkpoint(tmp_path / "cut.pt", whole.state_dict(), tiny(), report.mark)
    command = [sys.executable, "-c", CONTINUE, tmp_path / "cut.pt", tmp_path / "end.pt"]
    subprocess.run(command, check=True)
    continued = load_checkpoint(tmp_path / "end.pt").state
    assert_identical(without_timings(continued), without_timings(whole.state_dict()))


def test_a_saved_state_is_not_changed_by_training_on(data: DataSplits) -> None:
    trainer = Trainer(tiny(), data)
    run = trainer.run()
    next(run)
    state = trainer.state_dict()
    name, weights = next(iter(state["network"].items()))
    before = weights.clone()
    moment = state["optimizer"]["state"][0]["exp_avg"].clone()
    again = Trainer(tiny(), data)
    again.load_state_dict(state)
    next(run)
    next(again.run())
    assert torch.equal(state["network"][name], before)
    assert not torch.equal(trainer.state_dict()["network"][name], before)
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], moment)


def test_state_of_another_configuration_is_refused(data: DataSplits) -> None:
    trainer = Trainer(tiny(projector_out=8), data)
    with pytest.raises(ValueError, match="not one of this configuration"):
        trainer.load_state_dict(Trainer(tiny(), data).state_dict())
    with pytest.raises(ValueError, match="not one of this configuration"):
        trainer.load_state_dict({"network": {}})


# ---------------------------------------------------------------------- determinism


def first_report(config: TrainConfig, data: DataSplits) -> dict[str, float]:
    return measures(next(Trainer(config, data).run()))


def test_seed_decides_the_run_and_global_generators_do_not(data: DataSplits) -> None:
    torch.manual_seed(1)
    once = first_report(tiny(seed=5), data)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert first_report(tiny(seed=5), data) == once
    assert torch.equal(torch.get_rng_state(), before), "training drew from the global generator"
    assert first_report(tiny(seed=6), data)["train_loss"] != once["train_loss"]


def test_seeds_up_to_the_largest_are_distinct(data: DataSplits) -> None:
    losses = [
        first_report(tiny(seed=seed, epochs=0.2), data)["train_loss"]
        for seed in (0, 2**32, 2**63 - 2, 2**63 - 1)
    ]
    assert len(set(losses)) == 4


def test_how_often_is_reported_does_not_change_training(data: DataSplits) -> None:
    often, seldom = (Trainer(tiny(report_every=every), data) for every in (32, 10_000))
    assert len(list(often.run())) > len(list(seldom.run())) == 1
    assert_identical(often.state_dict()["network"], seldom.state_dict()["network"])


# ---------------------------------------------------------------------- marks


def test_report_marks() -> None:
    assert report_marks(250, 100) == (100, 200, 250)
    assert report_marks(200, 100, extra=[30, 100, 200]) == (30, 100, 200)
    assert report_marks(50, 100) == (50,)
    for outside in (0, -1, 251):
        with pytest.raises(ValueError, match=r"mark must be in \(0, 250\] images"):
            report_marks(250, 100, extra=[outside])


@given(
    total=st.integers(1, 5_000),
    every=st.integers(1, 6_000),
    extra=st.sets(st.integers(1, 5_000), max_size=5),
)
def test_report_marks_rise_to_the_end(total: int, every: int, extra: set[int]) -> None:
    marks = report_marks(total, every, {mark for mark in extra if mark <= total})
    assert list(marks) == sorted(set(marks))
    assert marks[-1] == total
    assert {mark for mark in extra if mark <= total} <= set(marks)
    assert all(gap <= every for gap in np.diff([0, *marks]))


def test_a_report_comes_at_the_first_step_that_reaches_its_mark(data: DataSplits) -> None:
    reports = list(Trainer(tiny(), data).run())
    assert [r.mark for r in reports] == [70, 140, 210, 280, 350, 375]
    assert [r.samples_seen for r in reports] == [96, 160, 224, 288, 352, 384]
    assert [r.epoch for r in reports] == [r.samples_seen / 150 for r in reports]


def test_marks_within_one_batch_share_one_evaluation(data: DataSplits) -> None:
    trainer = Trainer(tiny(), data, marks=(10, 20, 40, 375))
    run = trainer.run()
    first, second = next(run), next(run)
    assert second == replace(first, mark=20)
    assert first.samples_seen == 32

    continued = Trainer(tiny(), data, marks=(10, 20, 40, 375))
    state = Trainer(tiny(), data, marks=(10, 20, 40, 375))
    next(state.run())
    continued.load_state_dict(state.state_dict())
    again = next(continued.run())
    assert measures(again) == measures(second)


def test_a_state_past_some_marks_goes_on_with_the_next(data: DataSplits) -> None:
    trainer = Trainer(tiny(), data, marks=(150, 375))
    next(trainer.run())
    other = Trainer(tiny(), data, marks=(50, 100, 150, 300, 375))
    other.load_state_dict(trainer.state_dict())
    assert [report.mark for report in other.run()] == [300, 375]


def test_run_again_after_the_end_yields_nothing(data: DataSplits) -> None:
    trainer = Trainer(tiny(epochs=0.2), data)
    assert len(list(trainer.run())) == 1
    assert list(trainer.run()) == []


@pytest.mark.parametrize("marks", [(0, 375), (10, 376), (-5,)])
def test_marks_outside_the_run_are_refused(data: DataSplits, marks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mark must be in \(0, 375\] images"):
        Trainer(tiny(), data, marks=marks)


# ---------------------------------------------------------------------- divergence


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_absurd_learning_rate_diverges(data: DataSplits, optimizer: str) -> None:
    config = tiny(optimizer=optimizer, warmup=0.0).model_copy(update={"lr": 1e20})  # past its range
    trainer = Trainer(config, data)
    with pytest.raises(Diverged) as caught:
        list(trainer.run())
    assert caught.value.reason == str(caught.value)


def test_nan_weights_are_a_non_finite_loss(data: DataSplits) -> None:
    trainer = Trainer(tiny(), data)
    with torch.no_grad():
        next(trainer._network.head.parameters()).fill_(math.nan)
    with pytest.raises(Diverged, match="loss was not finite within images 0 to 96"):
        next(trainer.run())


def test_constant_features_are_a_collapse(data: DataSplits) -> None:
    trainer = Trainer(tiny(), data)
    for module in trainer.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.zero_()
                module.bias.fill_(1.0)
            module.requires_grad_(False)
    with pytest.raises(Diverged, match="features collapsed: standard deviation"):
        next(trainer.run())


@pytest.mark.parametrize("marks", [[96, 192], [96]])
def test_only_a_runs_end_minds_running_statistics_that_lag(
    data: DataSplits, marks: list[int]
) -> None:
    trainer = Trainer(tiny(batch_size=96, epochs=1.28), data, marks=marks)
    reports = trainer.run()
    last_norm = [m for m in trainer.encoder.modules() if isinstance(m, nn.BatchNorm2d)][-1]

    def lag() -> None:  # as in a deep network: everything is far below what the norm has seen
        assert last_norm.running_mean is not None
        last_norm.running_mean.fill_(1e6)

    trained = trainer._train_until
    trainer._train_until = lambda *a: (lag(), trained(*a))[1]  # type: ignore[method-assign]
    assert next(reports).feature_std == 0
    if marks == [96]:  # a part of a run, as a stopped trial is
        assert next(reports, None) is None
        return
    with pytest.raises(Diverged, match="fewer than 100 batches; train for more steps"):
        next(reports)


# ---------------------------------------------------------------------- what is measured


def test_report_is_plausible_and_finite(data: DataSplits) -> None:
    report = list(Trainer(tiny(), data).run())[-1]
    assert all(math.isfinite(value) for value in report.metrics().values())
    assert 0.3 < report.knn_top1 <= 1
    assert report.alignment > 0 > report.uniformity
    assert 1 <= report.rankme <= 60
    assert report.peak_mem_bytes > 50e6
    assert report.images_per_s > 0
    assert 0 < report.lr <= 1e-3


def test_pauses_between_reports_are_not_counted(data: DataSplits) -> None:
    started = time.perf_counter()
    reports = []
    for report in Trainer(tiny(report_every=200), data).run():
        reports.append(report)
        time.sleep(0.2)
    elapsed_s = time.perf_counter() - started
    assert 0 < reports[0].wall_s < reports[1].wall_s <= elapsed_s - 0.2 * len(reports)


def test_features_are_float32_and_leave_training_as_it_was(data: DataSplits) -> None:
    trainer, undisturbed = Trainer(tiny(), data), Trainer(tiny(), data)
    run, other = trainer.run(), undisturbed.run()
    next(run), next(other)
    features = trainer.features(data.val.images)
    assert features.dtype == torch.float32
    assert features.shape == (60, 192)
    assert torch.equal(features, trainer.features(data.val.images.copy()))
    probe = nn.Linear(192, 10)
    probe(features).sum().backward()  # inference tensors would refuse
    assert measures(next(run)) == measures(next(other))


def test_read_only_arrays_are_used_without_a_copy_or_a_warning(data: DataSplits) -> None:
    def locked(split: Any) -> Any:
        images, labels = split.images.copy(), split.labels.copy()
        images.flags.writeable = labels.flags.writeable = False
        return replace(split, images=images, labels=labels)

    shared = replace(data, train=locked(data.train), val=locked(data.val))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = Trainer(tiny(epochs=0.2), shared)
        assert len(list(trainer.run())) == 1
        trainer.features(shared.val.images)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"batch_size": 151},
            "batch_size must be at most the 150 images .* got 151; use more images or fix it",
        ),
        ({"encoder": "vit"}, "encoder .*conv_small, resnet18.*'vit'"),
        ({"encoder_weights": "/nowhere"}, "encoder_weights '/nowhere' is no file"),
        ({"optimizer": "lion"}, "optimizer must be one of adam, adamw, sgd, lars; got 'lion'"),
        ({"schedule": "step"}, "schedule must be one of wsd, cosine, constant; got 'step'"),
        ({"loss": "magic"}, "loss.*'magic'.*nt_xent"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "cuda:99"}, "device must be one of the . CUDA devices here, got 'cuda:99'"),
    ],
)
def test_what_cannot_be_had_is_refused_at_construction(
    data: DataSplits, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(**changed), data)
