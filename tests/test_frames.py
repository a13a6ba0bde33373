"""Frames of a sweep as the recorder writes it, and as it was written before there were tags of
decisions: both are what the journal says."""

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

import analysis.store as store_module
from analysis.frames import TABLES, SweepFrames
from analysis.histories import decisions_frame
from analysis.load import load_sweep
from analysis.sql import tables_of
from analysis.store import Run, Store, json_tag
from search.journal import FILE_NAME, Journal, load_state
from search.records import TAG_CHARS, decision_tags, milliseconds, plan_tags, trial_tags
from search.simulate import VirtualClock
from search.state import Event, TrialState
from search.tracking import Recorder
from tests.extent import long

MARKS, RUNGS = (100, 200, 300, 400), (100, 300)


def begin(folder: Path) -> tuple[Journal, VirtualClock]:
    folder.mkdir()
    (folder / "sweep.yaml").write_text("space: quick\n")
    clock = VirtualClock(1.76e9)
    journal = Journal.create(folder / FILE_NAME, clock=clock, durable=False)
    config = {"name": folder.name, "trials": 8, "objective": "knn_top1", "space": "quick",
              "sampler": "tpe", "scheduler": "asha", "dataset": "digits", "reduction": 3,
              "fixed": {}}  # fmt: skip
    journal.append(
        "sweep_started", schema=1, sweep_id="id", config=config, mode="max", total_images=400,
        marks=MARKS, rungs=RUNGS, slots=2, space_sha256=None, git_commit="c", tracking="embedded",
        versions={}, data={"name": "digits", "train": 100, "val": 30, "test": 20, "classes": 10,
        "skipped": 0, "skipped_files": [], "digest": "d"},
    )  # fmt: skip
    for number in range(8):
        journal.append(
            "suggested", number=number, params={"lr": 0.1 + number}, distributions={},
            system_attrs={}, config={"lr": 0.1 + number, "seed": number}, default=number == 0,
        )  # fmt: skip
    return journal, clock


def report(journal: Journal, number: int, mark: int, value: float | None, **decided: Any) -> None:
    """One report; `seen` is given where a batch went further, the rest is its decision's."""
    seen = decided.pop("seen", mark + 1)
    rung = mark if mark in RUNGS else None
    decision = {"stop": False, "rung": rung, "cutoff": None, "competitors": number} | decided
    metrics = {"knn_top1": value, "train_loss": 5.0 - mark / 100, "wall_s": seen / 50}
    journal.append("report", number=number, mark=mark, samples_seen=seen, metrics=metrics,
                   decision=decision, node="n1", pid=1)  # fmt: skip


def first_half(journal: Journal, clock: VirtualClock) -> None:
    for number in range(7):
        value = None if number == 6 else 0.5 + number / 100  # 6: no objective, and no end
        cutoff = 0.507 if number else None
        report(journal, number, 100, value, cutoff=cutoff, stop=number == 1, pause=number == 4)
        clock.now_s += 1
    journal.append("finished", number=1, state="pruned", reason="", mark=100)
    report(journal, 0, 200, 0.6)
    report(journal, 2, 200, None)  # a loss that is not a number is no objective


def second_half(journal: Journal, clock: VirtualClock) -> None:
    report(journal, 0, 300, 0.65, cutoff=None)
    clock.now_s += 2
    report(journal, 0, 400, 0.7)
    journal.append("finished", number=0, state="completed", reason="", mark=400)
    report(journal, 2, 300, 0.1, cutoff=0.6)
    journal.append("finished", number=2, state="diverged", reason="nan", mark=300)
    report(journal, 3, 200, 0.55, seen=305)  # one batch reached two marks
    clock.now_s += 0.004
    report(journal, 3, 300, 0.55, seen=305, cutoff=0.6, stop=True)
    journal.append("finished", number=3, state="pruned", reason="", mark=300)
    journal.append("started", number=4, attempt=2, segment=2, node="n2", why="promoted", rung=100)
    report(journal, 4, 200, 0.57)
    journal.append("died", number=4, reason="its node")
    journal.append("started", number=4, attempt=3, segment=3, node="n1", why="retry")
    clock.now_s += 5
    report(journal, 4, 300, 0.58, cutoff=0.5999999999999999)
    report(journal, 5, 200, 0.56)
    report(journal, 5, 300, None)
    report(journal, 5, 400, None)
    journal.append("finished", number=5, state="diverged", reason="collapsed", mark=400)
    journal.append("finished", number=7, state="error", reason="at its start", mark=0)


def as_before_the_tag(client: MlflowClient, run_ids: dict[int, str], reports: list[Event]) -> None:
    """Decisions as metrics at rungs, as records of older versions have them."""
    for number, run_id in run_ids.items():
        if "contrasweep.decisions" in client.get_run(run_id).data.tags:
            client.delete_tag(run_id, "contrasweep.decisions")
        points = []
        for event in reports:
            decision = event["decision"]
            if event["number"] != number or decision["rung"] is None:
                continue
            figures = {
                "rung_competitors": decision["competitors"],
                "rung_stop": decision["stop"],
                "rung_pause": decision.get("pause", False),
                "rung_cutoff": decision["cutoff"],
            }
            at, step = milliseconds(event["time"]), event["samples_seen"]
            points += [
                Metric(name, float(value), at, step)
                for name, value in figures.items()
                if value is not None
            ]
        client.log_batch(run_id, metrics=points)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Journal]]:
    """URI of a store and the journal of the sweep in it, recorded in two goes."""
    folder = tmp_path_factory.mktemp("runs") / "ways"
    journal, clock = begin(folder)
    uri = f"sqlite:///{folder.parent / 'mlflow.db'}"
    recorder = Recorder(folder, uri)
    first_half(journal, clock)
    recorder.sync()
    second_half(journal, clock)
    recorder.sync()
    yield uri, journal
    shutil.rmtree(folder)


def check_against(journal: Journal, frames: SweepFrames) -> None:
    reports = journal.state.reports
    expected = [
        (e["time"], e["number"], name, e["samples_seen"], e["mark"], value)
        for e in reports
        for name, value in e["metrics"].items()
        if value is not None
    ]
    expected.sort(key=lambda row: (round(row[0], 3), row[1], row[3], row[4], row[2]))
    curves = frames.curves
    columns = ["number", "metric", "samples_seen", "mark", "value"]
    rows = list(curves[columns].itertuples(index=False, name=None))
    assert rows == [row[1:] for row in expected]
    times = [pd.Timestamp(milliseconds(row[0]), unit="ms", tz="UTC") for row in expected]
    assert curves["time"].tolist() == times

    decided = sorted(
        (e for e in reports if e["decision"]["rung"]), key=lambda e: (e["mark"], e["number"])
    )
    decisions = frames.decisions.astype({"competitors": "int64"})
    for column in ("number", "mark", "samples_seen"):
        assert decisions[column].tolist() == [e[column] for e in decided]
    for column in ("stop", "pause", "competitors"):
        assert decisions[column].tolist() == [e["decision"].get(column, False) for e in decided]
    for column, values in (
        ("value", [e["metrics"]["knn_top1"] for e in decided]),
        ("cutoff", [e["decision"]["cutoff"] for e in decided]),
    ):
        assert [None if pd.isna(v) else v for v in decisions[column]] == values


def test_the_frames_are_what_the_journal_says_whichever_way_they_were_recorded(
    sweep: tuple[str, Journal], tmp_path: Path
) -> None:
    uri, journal = sweep
    frames = load_sweep(uri, "ways", metrics="all")
    check_against(journal, frames)
    assert frames.trials["mark"].tolist() == [400, 100, 300, 300, 300, 200, 0, 0]
    assert frames.last["train_loss"].tolist()[:7] == [1.0, 4.0, 2.0, 2.0, 2.0, 1.0, 4.0]
    assert frames.fields.loc[3, "lr"] == "3.1"

    copy = tmp_path / "older.db"
    shutil.copy(uri.removeprefix("sqlite:///"), copy)
    client = MlflowClient(f"sqlite:///{copy}")
    run_ids = dict(zip(frames.trials["number"], frames.trials["run_id"], strict=True))
    as_before_the_tag(client, run_ids, journal.state.reports)
    client.delete_tag(frames.info["run_id"], "contrasweep.marks")
    older = load_sweep(f"sqlite:///{copy}", "ways", metrics="all")
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(older, name), getattr(frames, name))


def test_marks_are_counted_unless_a_report_lacks_its_objective(
    sweep: tuple[str, Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[int]] = {}
    read = Store.histories

    def noted(store: Store, run_ids: dict[int, str], metric: str) -> Any:
        asked[metric] = sorted(run_ids)
        return read(store, run_ids, metric)

    monkeypatch.setattr(Store, "histories", noted)
    load_sweep(sweep[0], "ways")
    assert asked == {"knn_top1": [0, 1, 2, 3, 4, 5], "mark": [2, 5]}


def test_the_client_and_the_tables_of_a_store_tell_the_same(
    sweep: tuple[str, Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_table = load_sweep(sweep[0], "ways", metrics="all")
    client = MlflowClient(sweep[0])
    deleted = by_table.trials["run_id"].iloc[-1]
    monkeypatch.setattr(store_module, "tables_of", lambda uri: None)
    by_client = load_sweep(sweep[0], "ways", metrics="all")
    assert by_client.info == by_table.info
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(by_client, name), getattr(by_table, name))
    client.delete_run(deleted)
    without = load_sweep(sweep[0], "ways")
    monkeypatch.undo()
    pd.testing.assert_frame_equal(load_sweep(sweep[0], "ways").trials, without.trials)
    client.restore_run(deleted)
    assert len(without.trials) == len(by_table.trials) - 1


def test_other_tables_than_the_known_are_not_read(
    sweep: tuple[str, Journal], tmp_path: Path
) -> None:
    assert tables_of(sweep[0]) is not None
    copy = tmp_path / "other.db"
    shutil.copy(sweep[0].removeprefix("sqlite:///"), copy)
    with sqlite3.connect(copy) as connection:
        connection.execute("ALTER TABLE latest_metrics RENAME COLUMN is_nan TO nan")
    assert tables_of(f"sqlite:///{copy}") is None


def trial_with(rungs: int) -> TrialState:
    reports: dict[int, Event] = {
        mark: {
            "mark": mark,
            "samples_seen": mark + 7,
            "metrics": {"knn_top1": 1 / mark if mark % 3 else None},
            "decision": {
                "stop": mark == rungs,
                "rung": mark,
                "cutoff": 0.1 / mark,
                "competitors": 3,
            },
        }
        for mark in range(1, rungs + 1)
    }
    return TrialState(number=5, params={}, distributions={}, system_attrs={}, config={},
                      is_default=False, suggested_at=0.0, reports=reports)  # fmt: skip


@pytest.mark.parametrize("rungs", [0, 1, 90, 400])
def test_many_decisions_go_on_in_further_tags(rungs: int) -> None:
    tags = decision_tags(trial_with(rungs), "knn_top1")
    assert all(len(text) <= TAG_CHARS for text in tags.values())
    assert len(json.loads("".join(tags.values()) or "[]")) == rungs
    assert len(tags) == (rungs and 1 + sum(map(len, tags.values())) // TAG_CHARS)
    frame = decided(tags)
    assert frame["mark"].tolist() == list(range(1, rungs + 1))
    assert frame["value"].isna().tolist() == [mark % 3 == 0 for mark in range(1, rungs + 1)]
    assert frame["stop"].sum() == min(rungs, 1)


def decided(tags: dict[str, str]) -> pd.DataFrame:
    prefixed = {f"contrasweep.{key}": text for key, text in tags.items()}
    run = Run(5, "id", None, None, prefixed, {}, {})
    return decisions_frame(cast(Store, None), [run], pd.DataFrame())


def test_decisions_that_were_recorded_as_a_list_a_tag_are_read() -> None:
    parts = ["[[1,8,0.5,null,3,0,0],[2,9,null,0.1,3,0,1]]", "[[3,10,0.25,0.2,4,1,0]]"]
    older = decided(dict(zip(["decisions", "decisions.1"], parts, strict=True)))
    assert older.equals(decided({"decisions": "".join(parts).replace("][", ",")}))
    assert older["mark"].tolist() == [1, 2, 3]
    assert older["pause"].tolist() == [False, True, False]


def test_no_tag_of_a_sweep_or_trial_is_too_long_for_the_store(tmp_path: Path) -> None:
    """MLflow takes longer ones, but a PostgreSQL or strict MySQL behind it does not."""
    begin(tmp_path / "s")
    header = load_state(tmp_path / "s" / FILE_NAME).header
    long: dict[str, Any] = {"marks": list(range(45, 45_001, 45)), "rungs": [7] * 5_000}
    choices = [f"choice {number}" for number in range(1_000)]
    trial = trial_with(0)
    trial.params, trial.distributions = {"a": "x" * 9_000}, {"a": json.dumps(choices)}
    tags = {**plan_tags(header | long), **trial_tags(trial, "id")}
    assert all(len(str(text)) <= TAG_CHARS for text in tags.values())
    prefixed = {f"contrasweep.{key}": str(text) for key, text in tags.items()}
    for tag, value in {
        **long,
        "params": trial.params,
        "distributions": trial.distributions,
    }.items():
        assert json_tag(prefixed, tag, None, "run") == value


@long
@pytest.mark.slow
def test_the_benchmark_of_a_large_sweep_runs(tmp_path: Path) -> None:
    bench = Path(__file__).parent / "bench" / "bench_report.py"
    done = subprocess.run(
        [sys.executable, bench, "--trials", "100", "--store", tmp_path, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(done.stdout)
    assert (figures["rows"]["trials"], figures["rows"]["metrics"]) == (100, 20)
    assert 1_500 < figures["rows"]["points of the objective"] < 3_500
    assert figures["rows"]["decisions"] > 100
    assert figures["page_mb"] < 15
    assert (tmp_path / "report" / "index.html").is_file()
