"""`contrasweep export-frames`: tables that other programs read back as they were."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner, Result

from analysis.frames import TABLES, SweepFrames, write_frames
from analysis.load import load_sweep
from search.exports import exports
from search.mistakes import UsageError
from search.run import Sweep
from search.segments import Segment
from search.simulate import Outcome
from tests.simulated import simulated_sweep

app = typer.Typer()
app.add_typer(exports)


@app.callback()
def with_verbs() -> None:
    """Several verbs, as the command line has."""


def contrasweep(*arguments: str | Path) -> Result:
    texts = ["export-frames", *map(str, arguments)]
    return CliRunner().invoke(app, texts, catch_exceptions=False, standalone_mode=False)


def curve(segment: Segment, mark: int) -> Outcome:
    value = segment.fields["lr"] * (1 - math.exp(-mark / 200))
    return Outcome({"knn_top1": value, "train_loss": 5 - mark / 200})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated_sweep(tmp_path_factory.mktemp("runs"), curve, trials=12)


@pytest.fixture(scope="module")
def frames(folder: Path) -> SweepFrames:
    sweep = Sweep.open(folder)
    sweep.record_rest()
    return load_sweep(sweep.tracking_uri, "swept", metrics="all")


def test_parquet_holds_the_frames_as_they_are(folder: Path, frames: SweepFrames) -> None:
    told = json.loads(contrasweep(folder, "--metrics", "all", "--json").stdout)
    assert told["out"] == str(folder / "frames")
    assert set(told["files"]) == set(TABLES)
    for name, path in told["files"].items():
        table = pd.read_parquet(path)
        expected = getattr(frames, name)
        if name in ("last", "fields"):
            expected = expected.reset_index()
        assert len(table) == told["rows"][name] > 0
        pd.testing.assert_frame_equal(table, expected, check_dtype=name != "fields")
    assert sorted(path.name for path in (folder / "frames").iterdir()) == sorted(
        f"{name}.parquet" for name in TABLES
    )


def test_csv_of_several_sweeps_tells_them_apart(
    folder: Path, frames: SweepFrames, tmp_path: Path
) -> None:
    other = simulated_sweep(tmp_path, curve, trials=3, name="other", sampler="tpe")
    journal = other / "events.jsonl"
    journal.write_text(journal.read_text().replace('"simulated"', '"of its own"'))
    done = contrasweep(folder, other, "--out", tmp_path / "out", "--format", "csv")
    assert f"trials.csv: {12 + 3} rows" in done.stdout
    trials = pd.read_csv(tmp_path / "out" / "trials.csv")
    assert trials.columns[0] == "sweep"
    assert trials["sweep"].tolist() == ["swept"] * 12 + ["other"] * 3
    assert trials["param.lr"].tolist()[:12] == frames.trials["param.lr"].tolist()
    curves = pd.read_csv(tmp_path / "out" / "curves.csv")
    assert set(curves["metric"]) == {"knn_top1"}
    both = curves[curves["sweep"] == "swept"]["value"].tolist()
    assert both == frames.curves.loc[frames.curves["metric"] == "knn_top1", "value"].tolist()


def test_mistakes_are_told_in_a_line_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'rank' must be one of knn_top1.*, or all"):
        contrasweep(folder, "--out", tmp_path / "out", "--metrics", "knn_top1,rank")
    with pytest.raises(UsageError, match="'excel' is not one of 'parquet', 'csv'"):
        contrasweep(folder, "--out", tmp_path / "out", "--format", "excel")
    relative = os.path.relpath(folder)
    with pytest.raises(ValueError, match="must be given once, got 'swept' twice"):
        contrasweep(folder, relative, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="is not a sweep's folder"):
        contrasweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_files_that_were_there(
    frames: SweepFrames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: path.read_bytes() for name, path in write_frames([frames], tmp_path).items()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="No space left"):
        write_frames([frames], tmp_path, "csv")
    assert {path.stem: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_values_of_several_kinds_and_sweeps_of_one_name(
    frames: SweepFrames, tmp_path: Path
) -> None:
    mixed = frames.trials.assign(**{"param.crop": pd.Series([1, "a", None, [2, 3]] * 3)})
    older = SweepFrames(
        {**frames.info, "sweep_id": "older"}, mixed, frames.curves.iloc[:0], frames.decisions
    )
    paths = write_frames([frames, older], tmp_path)
    trials = pd.read_parquet(paths["trials"])
    assert trials["sweep"].unique().tolist() == ["swept simulated", "swept older"]
    assert trials["param.crop"].isna().tolist()[:12] == [True] * 12
    assert trials["param.crop"].tolist()[12:14] == ["1", "a"]
    assert trials["param.crop"].tolist()[15] == "[2, 3]"
    formulas = older.trials.assign(reason="=1+1", node="-0.5")
    older = SweepFrames(older.info, formulas, older.curves, older.decisions)
    text = pd.read_csv(write_frames([older], tmp_path, "csv")["trials"], dtype="str")
    assert set(text["reason"]) == {"'=1+1"}  # text, no formula
    assert set(text["node"]) == {"-0.5"}
    assert pd.read_parquet(paths["last"])["sweep"].unique().tolist() == ["swept simulated"]
    assert frames.trials.columns[0] == "number"  # the frames themselves are as they were
