"""One run without Ray: its files, patience, the final test, going on after a kill."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import trainer.sources
from search.config import SweepConfig
from search.locks import LOCK_NAME, locked
from search.plan import make_plan, make_plan_again
from search.provenance import describe_data, labelled_in_memory
from search.state import SweepState, TrialState
from search.train import (
    BEST,
    ENCODER,
    LAST,
    METRICS,
    History,
    Progress,
    Run,
    read_run,
    train,
    trial_to_repeat,
)
from tests.conftest import Verbs
from tests.extent import long
from trainer.checkpoint import load_checkpoint
from trainer.config import TrainConfig
from trainer.datasets import DataSplits, ImageFiles, Split, load_for
from trainer.export import load_encoder
from trainer.loop import Report, Trainer

TIMINGS = ("images_per_s", "wall_s", "peak_mem_bytes")


def tiny(**changed: Any) -> TrainConfig:
    base = {"train_limit": 150, "val_limit": 60, "test_limit": 80, "image_size": 16}
    base |= {"batch_size": 32, "epochs": 3, "projector_hidden": 32, "projector_out": 16}
    return TrainConfig.model_validate(base | {"threads": 1, "device": "cpu"} | changed)


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return load_for(tiny())


def carry_out(run: Run, data: DataSplits, out: Path, **more: Any) -> dict[str, Any]:
    return train(run, data, out, **more)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / METRICS).open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in found]


def test_a_run_leaves_its_configuration_curves_state_and_encoder(
    data: DataSplits, tmp_path: Path
) -> None:
    result = carry_out(Run(tiny(), test=True), data, tmp_path / "run")
    out = tmp_path / "run"
    assert TrainConfig(**json.loads((out / "config.json").read_text())) == tiny()
    assert [int(row["mark"]) for row in rows(out)] == [150, 300, 450]
    assert [bool(row["linear_top1"]) for row in rows(out)] == [False, False, True]
    assert json.loads((out / "result.json").read_text()) == result
    assert result["samples_seen"] == 480
    assert not result["stopped_early"]
    assert float(rows(out)[-1]["knn_top1"]) == result["metrics"]["knn_top1"]
    assert 0.2 < result["metrics"]["test_knn_top1"] <= 1
    assert 0.2 < result["metrics"]["test_linear_top1"] <= 1

    trainer = Trainer(tiny(), data)
    trainer.load_state_dict(load_checkpoint(out / LAST).state)
    exported = load_encoder(out / ENCODER)
    assert exported.classes == data.classes
    features = exported.features(data.test.images)
    torch.testing.assert_close(features, trainer.features(data.test.images), rtol=1e-4, atol=1e-4)
    assert trainer.test().items() <= result["metrics"].items()


def test_the_test_split_is_not_used_unless_asked(data: DataSplits, tmp_path: Path) -> None:
    none = Split(data.test.images[:0], data.test.labels[:0])
    without = replace(data, test=none)
    result = carry_out(Run(tiny(epochs=1)), without, tmp_path / "run")
    assert not [name for name in result["metrics"] if name.startswith("test")]
    with pytest.raises(ValueError, match="--test needs labelled test images"):
        carry_out(Run(tiny(epochs=1), test=True), without, tmp_path / "test")


# ---------------------------------------------------------------------- patience


def history_of(values: list[float | None]) -> History:
    history = History()
    for mark, value in enumerate(values):
        history.add({"mark": mark, "knn_top1": value, "rankme": 10.0 - mark})
    return history


def test_history_counts_reports_since_the_best() -> None:
    assert history_of([]).stale() == 0
    assert history_of([0.1, 0.2, 0.3]).stale() == 0
    history = history_of([0.1, 0.3, 0.3, 0.2])  # an equal one is no improvement
    assert history.stale() == 2
    assert history.best is not None
    assert history.best["mark"] == 1
    assert history_of([None, None, None]).stale() == 2  # without labels: by the rank


def test_patience_stops_early_and_keeps_the_best(data: DataSplits, tmp_path: Path) -> None:
    # at this rate nothing is learned after the first reports
    config = tiny(lr=0.3, optimizer="sgd", epochs=40, report_every=64, warmup=0.0)
    result = carry_out(Run(config, patience=3, test=True), data, tmp_path / "run")
    found = rows(tmp_path / "run")
    values = [float(row["knn_top1"]) for row in found]
    best = values.index(max(values))
    assert result["stopped_early"]
    assert len(values) == best + 1 + 3 < 40 * 150 // 64
    assert result["metrics"]["knn_top1"] == values[best]
    assert 0 < result["metrics"]["linear_top1"] <= 1  # fitted to the kept encoder at the end
    assert load_checkpoint(tmp_path / "run" / BEST).mark == int(found[best]["mark"])
    assert result["samples_seen"] == int(found[-1]["samples_seen"])

    trainer = Trainer(config, data)
    trainer.load_state_dict(load_checkpoint(tmp_path / "run" / BEST).state)
    kept = load_encoder(tmp_path / "run" / ENCODER).features(data.val.images)
    torch.testing.assert_close(kept, trainer.features(data.val.images), rtol=1e-4, atol=1e-4)


def test_patience_keeps_no_encoder_that_gives_one_point(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trainer._train_until

    def lagging(trainer: Trainer, *arguments: Any) -> Any:
        norm = [m for m in trainer.encoder.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        assert norm.running_mean is not None
        norm.running_mean.fill_(1e6)
        return trained(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_train_until", lagging)
    result = carry_out(Run(tiny(epochs=20, report_every=32), patience=2), data, tmp_path / "run")
    assert "train for more steps" in result["diverged"]
    assert result["stopped_early"]
    assert not (tmp_path / "run" / ENCODER).exists()


def test_patience_that_is_never_lost_trains_to_the_end(data: DataSplits, tmp_path: Path) -> None:
    result = carry_out(Run(tiny(), patience=50), data, tmp_path / "run")
    assert not result["stopped_early"]
    assert result["samples_seen"] == 480


# ---------------------------------------------------------------------- going on


class StopAfter(Progress):
    def __init__(self, reports: int) -> None:
        self.left = reports

    def on_report(self, report: Report) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("patience", [None, 2])
def test_cut_and_resumed_equals_uninterrupted(
    data: DataSplits, tmp_path: Path, patience: int | None
) -> None:
    run = Run(tiny(report_every=64, epochs=4, lr=5e-3), patience=patience)
    whole = carry_out(run, data, tmp_path / "whole")
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        carry_out(run, data, out, progress=StopAfter(3))
    assert not (out / "result.json").exists()
    # the row of a report whose checkpoint a kill did not let through
    with (out / METRICS).open("a") as file:
        file.write("999,999," + "0," * 12 + "\n3")  # and the beginning of another
    result = train(read_run(out), data, out, resume=True)
    assert rows(out) == rows(tmp_path / "whole")
    same = [{k: v for k, v in r["metrics"].items() if k not in TIMINGS} for r in (whole, result)]
    assert same[0] == same[1]
    assert result["stopped_early"] == whole["stopped_early"]


def test_a_finished_run_resumed_stays_as_it_is(data: DataSplits, tmp_path: Path) -> None:
    carry_out(Run(tiny()), data, tmp_path / "run")
    before = rows(tmp_path / "run")
    train(read_run(tmp_path / "run"), data, tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == before


@long
@pytest.mark.slow
def test_killed_and_resumed_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verbs: Verbs
) -> None:
    common = ["--epochs", "6", "--train-limit", "400", "--set", "batch_size=64"]
    monkeypatch.chdir(tmp_path)
    whole = verbs.json("train", "--out", "whole", *common)
    victim = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from search.cli import main; main()",
            "train",
            "--out",
            "cut",
            *common,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut" / LAST).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    resumed = verbs.json("train", "--resume", "cut")
    for name, value in whole["metrics"].items():
        if name not in TIMINGS:
            assert resumed["metrics"][name] == value
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


# ---------------------------------------------------------------------- a loss of one's own

OWN_LOSS = """
def pull(z0, z1, config):
    '''squared distance of the views'''
    return (z0 - z1).square().mean() * config.temperature
"""


def test_a_loss_of_ones_own_is_copied_and_its_change_is_noticed(
    data: DataSplits, tmp_path: Path
) -> None:
    source = tmp_path / "mine.py"
    source.write_bytes(OWN_LOSS.encode().replace(b"\n", b"\r\n"))  # as an editor may have it
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        carry_out(Run(tiny(loss=f"{source}:pull")), data, out, progress=StopAfter(1))
    assert (out / "loss.py").read_bytes() == source.read_bytes()
    source.unlink()  # the copy is enough
    assert train(read_run(out), data, out, resume=True)["samples_seen"] == 480
    (out / "loss.py").write_text(OWN_LOSS.replace("square()", "abs()"))
    with pytest.raises(ValueError, match=r"the loss in .*loss.py has changed"):
        read_run(out)


# ---------------------------------------------------------------------- refusals


def test_what_cannot_be_trained_leaves_no_folder(data: DataSplits, tmp_path: Path) -> None:
    out = tmp_path / "run"
    weights = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(2)}, weights)
    for config, message in (
        (tiny(batch_size=500), "batch_size must be at most the 150 images"),
        (tiny(device="cuda:99"), "device must be one of"),
        (tiny(encoder_weights=str(weights)), "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Run(config), data, out)
        assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="is not empty; choose another --out, or go on with"):
        train(Run(tiny()), data, tmp_path / "full")


def test_other_data_are_refused(data: DataSplits, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Run(tiny()), data, tmp_path / "run", progress=StopAfter(1))
    run = read_run(tmp_path / "run")
    assert run.loading().in_memory == "yes"
    images = data.train.images.copy()
    images[0] = 255 - images[0]
    other = replace(data, train=replace(data.train, images=images))
    with pytest.raises(ValueError, match="the data set digits has changed since the run began"):
        train(run, other, tmp_path / "run", resume=True)


@pytest.fixture
def large_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A folder that the free memory does not hold, and one that it does, with a corrupt file."""
    rng = np.random.default_rng(0)
    for label, count in (("large", 120), ("small/cat", 40), ("small/dog", 40)):
        (tmp_path / label).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{number:03}.png")
    (tmp_path / "small" / "cat" / "007.png").write_bytes(b"no cat")
    free = 4 * 100 * 3 * 16 * 16  # of which a quarter holds 100 images
    monkeypatch.setattr(trainer.sources, "available_memory_bytes", lambda: free)
    large, small = (f"folder:{tmp_path / name}" for name in ("large", "small"))
    return {"dataset": large, "labelled": small}


@pytest.mark.parametrize("free", [0, 2**40])
def test_each_source_is_held_again_as_it_was(
    large_and_small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    config = tiny(**large_and_small, loader_workers=0)
    where: dict[str, Any] = {"cache_dir": tmp_path / "cache"}
    data = load_for(config, **where)
    assert isinstance(data.train.images, ImageFiles)
    assert isinstance(data.val.images, np.ndarray)
    assert data.skipped == ("cat/007.png",)
    with pytest.raises(KeyboardInterrupt):
        train(Run(config), data, tmp_path / "run", progress=StopAfter(1))

    monkeypatch.setattr(trainer.sources, "available_memory_bytes", lambda: free)
    run = read_run(tmp_path / "run")
    again = load_for(run.loading(), labelled_in_memory=run.labelled_in_memory, **where)
    assert isinstance(again.train.images, ImageFiles)
    assert isinstance(again.val.images, np.ndarray)
    assert describe_data(again) == describe_data(data)
    assert train(run, again, tmp_path / "run", resume=True)["samples_seen"] == 384


def test_a_run_of_before_sources_were_told_apart_is_read(data: DataSplits, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Run(tiny()), data, tmp_path / "run", progress=StopAfter(1))
    plan = json.loads((tmp_path / "run" / "run.json").read_text())
    assert plan.pop("labelled_in_memory") == "yes"
    (tmp_path / "run" / "run.json").write_text(json.dumps(plan))
    assert read_run(tmp_path / "run").labelled_in_memory is None


def test_a_sweep_holds_each_source_as_it_did(
    large_and_small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = {"batch_size": 32, "image_size": 16, "device": "cpu"}
    config = SweepConfig(**large_and_small, fixed=fixed)
    described = describe_data(make_plan(config, cache_dir=tmp_path / "cache").data)
    assert (described["in_memory"], described["labelled_in_memory"]) == (False, True)
    state = SweepState(header={"data": described, "space_sha256": None})
    for free in (0, 2**40):
        monkeypatch.setattr(trainer.sources, "available_memory_bytes", lambda free=free: free)
        plan = make_plan_again(config, state, tmp_path, cache_dir=tmp_path / "cache")
        assert describe_data(plan.data) == described
    trial = TrialState(0, {}, {}, {}, tiny(**large_and_small).model_dump(), True, 0.0)
    trial.reports[50] = {"samples_seen": 50}
    state.header["marks"], state.trials[0] = [50], trial
    monkeypatch.setattr("search.train.load_state", lambda path: state)
    repeated = trial_to_repeat(tmp_path, 0).run
    assert (repeated.in_memory, repeated.labelled_in_memory) == ("no", "yes")
    old = [labelled_in_memory({"in_memory": before}) for before in (True, False)]
    assert old == ["yes", "no"]  # of a sweep before sources were told apart


def test_two_processes_do_not_write_into_one_folder(data: DataSplits, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Run(tiny()), data, tmp_path / "run", progress=StopAfter(1))
    before = rows(tmp_path / "run")
    with (
        locked(tmp_path / "run"),
        pytest.raises(ValueError, match="another process works on"),
    ):
        train(read_run(tmp_path / "run"), data, tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == before


@pytest.mark.parametrize("written", [[], ["config.json"], ["config.json", ".run.json.x1"]])
def test_a_kill_before_the_plan_is_written_leaves_the_folder_free(
    data: DataSplits, tmp_path: Path, written: list[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with locked(out):
        pass
    assert [path.name for path in out.iterdir()] == [LOCK_NAME]
    for name in written:
        (out / name).write_text("{")
    assert train(Run(tiny(epochs=0.5)), data, out)["samples_seen"] == 96
    assert read_run(out).config == tiny(epochs=0.5)


@pytest.mark.parametrize("name", ["config.json", "run.json", "photo.png"])
def test_a_folder_of_someone_elses_is_left_alone(
    data: DataSplits, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match="is not empty; choose another --out"):
        train(Run(tiny(epochs=0.5)), data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_run_that_diverges_says_why(data: DataSplits, tmp_path: Path) -> None:
    config = tiny(loss="vicreg", optimizer="sgd", lr=100, warmup=0)
    result = train(Run(config), data, tmp_path / "run")
    assert "finite" in result["diverged"]
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert not (tmp_path / "run" / ENCODER).exists()


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run of 'contrasweep train'"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_run(tmp_path)
