"""The decisions of a sweep against simulated workers: no Ray, the real journal, study and ASHA."""

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.brackets import make_brackets
from search.config import SweepConfig
from search.driver import MAX_DEATHS, Driver
from search.journal import Journal, JournalError, load_state, read_events
from search.segments import Next, Segment
from search.state import FINAL_STATES
from spaces import Space

TOTAL, MARKS, RUNGS = 600, (100, 200, 300, 400, 500, 600), (100, 300)


def space(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    if trial.suggest_categorical("optimizer", ["adamw", "sgd"]) == "sgd":
        return {"lr": lr, "optimizer": "sgd", "momentum": trial.suggest_float("momentum", 0, 0.9)}
    return {"lr": lr, "optimizer": "adamw"}


def curve(fields: dict[str, Any], mark: int) -> float:
    """A learning curve that is best near lr = 0.01 and rises with the images."""
    distance = abs(math.log10(fields["lr"]) + 2)
    return 1.0 - 0.3 * distance - 0.5 * math.exp(-mark / 200)


def result(segment: Segment, mark: int, **changes: Any) -> dict[str, Any]:
    return {
        "outcome": "report",
        "number": segment.number,
        "mark": mark,
        "samples_seen": mark + 7,
        "metrics": {"knn_top1": curve(segment.fields, mark)},
        "save_is_cheap": True,
        "node": "here",
        "worker_pid": 1,
    } | changes


DEFAULTS = {"lr": 1e-3, "optimizer": "adamw"}


def start(
    path: Path,
    space: Space = space,
    defaults: dict[str, Any] | None = DEFAULTS,
    rungs: tuple[int, ...] = RUNGS,
    **changes: Any,
) -> Driver:
    config = SweepConfig(**{"name": "s", "trials": 8, "epochs": 6} | changes)
    if not path.exists():
        journal = Journal.create(path, durable=False)
        journal.append(
            "sweep_started",
            schema=1,
            sweep_id="id",
            config=config.model_dump(),
            mode="max",
            total_images=TOTAL,
            marks=MARKS,
            rungs=rungs,
            slots=3,
        )
    else:
        journal = Journal(path, durable=False)
        journal.drop_torn_line()
        journal.append("resumed", trials=journal.state.planned, slots=3)
    return Driver.from_journal(config, journal, space, defaults)


class Workers:
    """Three slots that train in an order drawn from a generator, saving as the driver asks."""

    def __init__(self, driver: Driver, seed: int, slots: int = 3) -> None:
        self.driver, self.random, self.slots = driver, random.Random(seed), slots
        self.running: list[tuple[Segment, int]] = []

    def step(self) -> bool:
        """Fill the slots, let one segment make its next report; False when all is over."""
        while isinstance(segment := self.driver.next_segment(self.slots), Segment):
            self.running.append((segment, segment.checkpoint_mark))
        if not self.running:
            assert segment is Next.FINISHED
            return False
        segment, mark = self.running.pop(self.random.randrange(len(self.running)))
        mark = next((m for m in MARKS if m > mark), TOTAL)
        made = result(segment, mark)
        stop = self.driver.on_result(made)
        if self.driver.wants_checkpoint(made):
            self.driver.on_checkpoint(segment.number, mark, f"/{segment.number}/{mark}")
        if stop:
            self.driver.on_segment_end(segment.number, made)
        else:
            self.running.append((segment, mark))
        return True

    def run(self) -> None:
        while self.step():
            pass


SCHEDULERS: dict[str, dict[str, Any]] = {
    "asha": {},
    "asha, reduction 2": {"reduction": 2, "min_competitors": 4},
    "promote": {"promote": True},
    "brackets": {"brackets": 2},
    "promote, brackets": {"promote": True, "brackets": 2},
    "audit": {"audit": 0.5},
    "promote, audit": {"promote": True, "audit": 0.5},
    "median": {"scheduler": "median"},
    "none": {"scheduler": "none"},
}


def check_whole(path: Path) -> None:
    """Every planned trial ended once, no mark stands twice, the decisions are the rules'."""
    state = load_state(path)
    assert sorted(state.trials) == list(range(8))
    assert all(trial.state in FINAL_STATES for trial in state.trials.values())
    assert not state.open
    assert state.counts()["completed"] >= 1
    marks = Counter((r["number"], r["mark"]) for r in state.reports)
    assert set(marks.values()) == {1}
    assert state.samples_seen == sum(trial.samples_seen for trial in state.trials.values())
    rules = make_brackets(SweepConfig(**state.header["config"]), state.header["rungs"])
    for trial in state.trials.values():
        rules.assign(trial.number, trial.stratum, trial.bracket)
    for report in state.reports:
        trial = state.trials[report["number"]]
        if trial.audited_at is not None and report["mark"] > trial.audited_at:
            assert report["decision"]["rung"] is None  # it competes no more
            continue
        decision = rules.report(trial.number, report["mark"], report["metrics"]["knn_top1"])
        recorded = {**report["decision"], "audited": False}
        recorded["stop"] |= report["decision"]["audited"]
        assert decision.to_json() == recorded
    for trial in state.trials.values():
        if trial.state == "completed":
            assert trial.samples_seen == TOTAL + 7
            assert trial.checkpoint_mark == TOTAL
        if trial.state == "pruned":
            assert trial.stopped_at in state.header["rungs"]
            assert trial.audited_at is None
            assert trial.checkpoint is None  # dropped: nobody goes on from it


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_sweep_runs_to_its_end(tmp_path: Path, scheduler: str) -> None:
    path = tmp_path / "events.jsonl"
    Workers(start(path, **SCHEDULERS[scheduler]), seed=0).run()
    check_whole(path)
    states = load_state(path).counts()
    assert states["completed"] == 8 if scheduler == "none" else states["pruned"] >= 1
    assert load_state(path).trials[0].is_default
    assert load_state(path).trials[0].params["lr"] == pytest.approx(1e-3)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cuts=st.lists(st.integers(1, 120), max_size=4),
    scheduler=st.sampled_from(list(SCHEDULERS)),
)
def test_killed_anywhere_and_resumed_nothing_is_lost_or_doubled(
    seed: int, cuts: list[int], scheduler: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A kill leaves a prefix of the journal's bytes: cut there, rebuild, go on."""
    path = tmp_path_factory.mktemp("sweep") / "events.jsonl"
    changes = SCHEDULERS[scheduler]
    for number, cut in enumerate(cuts):
        workers = Workers(start(path, **changes), seed + number)
        before = len(list(read_events(path)))
        while len(list(read_events(path))) < before + cut and workers.step():
            pass
        lines = path.read_bytes().splitlines(keepends=True)
        kept = lines[: max(1, min(len(lines), before + cut))]
        torn = lines[len(kept)][: seed % 40 + 1] if len(kept) < len(lines) else b""
        path.write_bytes(b"".join(kept) + torn)
    Workers(start(path, **changes), seed + 99).run()
    check_whole(path)


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(2, 200), sampler=st.sampled_from(["tpe", "random"]))
def test_the_next_suggestion_after_a_kill_is_the_one_that_would_have_come(
    cut: int, sampler: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut an uninterrupted sweep at an event; the rebuilt study suggests what was suggested."""
    folder = tmp_path_factory.mktemp("sweep")
    whole = folder / "whole.jsonl"
    config = {"sampler": sampler, "seed": 5}
    driver = start(whole, **config)
    driver.journal.state.planned = 40
    Workers(driver, seed=1).run()
    lines = whole.read_bytes().splitlines(keepends=True)
    events = list(read_events(whole))
    position = next((i for i in range(cut, len(events)) if events[i]["event"] == "suggested"), None)
    assert position is not None
    part = folder / "part.jsonl"
    part.write_bytes(b"".join(lines[:position]))
    rebuilt = start(part, **config)
    trial = rebuilt._suggest(len(rebuilt.journal.state.trials))
    assert trial is not None
    assert trial.params == events[position]["params"]
    assert trial.config == events[position]["config"]
    assert trial.system_attrs == events[position]["system_attrs"]


def test_a_repeated_mark_keeps_its_decision_and_is_not_written_again(tmp_path: Path) -> None:
    driver = start(tmp_path / "e.jsonl")
    segment = driver.next_segment(1)
    assert isinstance(segment, Segment)
    assert not driver.on_result(result(segment, 100))
    lines = driver.journal.path.read_bytes()
    again = result(segment, 100, metrics={"knn_top1": 0.0})
    assert not driver.on_result(again)
    assert driver.journal.path.read_bytes() == lines


def test_a_recorded_stop_without_an_end_is_ended_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    driver = start(path)
    segment = driver.next_segment(1)
    assert isinstance(segment, Segment)
    assert driver.on_result(result(segment, 100, metrics={"knn_top1": math.nan}))
    again = start(path)
    assert again.journal.state.trials[0].state == "pruned"
    following = again.next_segment(1)
    assert isinstance(following, Segment)
    assert following.number == 1


@pytest.mark.parametrize("state", ["diverged", "oom", "error"])
def test_a_failure_ends_the_trial_with_its_reason(tmp_path: Path, state: str) -> None:
    driver = start(tmp_path / "e.jsonl")
    segment = driver.next_segment(1)
    assert isinstance(segment, Segment)
    failed = {
        "outcome": state,
        "reason": "why",
        "number": segment.number,
        "metrics": {},
        "samples_seen": 55,
    }
    assert driver.on_result(failed)
    assert not driver.wants_checkpoint(failed)
    driver.on_segment_end(segment.number, failed)
    trial = driver.journal.state.trials[0]
    assert (trial.state, trial.reason) == (state, "why")
    assert trial.samples_seen == 55  # what it cost is counted, though it made no report


def test_a_death_is_retried_from_the_checkpoint_and_the_fourth_one_is_final(tmp_path: Path) -> None:
    driver = start(tmp_path / "e.jsonl")
    segment = driver.next_segment(1)
    assert isinstance(segment, Segment)
    driver.on_result(result(segment, 100))
    driver.on_checkpoint(0, 100, "/0/100")
    for death in range(MAX_DEATHS):
        driver.on_segment_end(0, None, "killed")
        segment = driver.next_segment(1)
        assert isinstance(segment, Segment)
        assert (segment.number, segment.attempt) == (0, death + 2)
        assert (segment.checkpoint, segment.checkpoint_mark) == ("/0/100", 100)
    driver.on_segment_end(0, None, "killed by the kernel")
    assert driver.journal.state.trials[0].state == "lost"
    assert "killed by the kernel" in driver.journal.state.trials[0].reason


@pytest.mark.parametrize("progress", ["a mark", "a checkpoint"])
def test_a_trial_that_gets_on_between_the_deaths_of_its_workers_is_not_lost(
    tmp_path: Path, progress: str
) -> None:
    driver = start(tmp_path / "e.jsonl", scheduler="none")
    segment = driver.next_segment(1)
    for number, mark in enumerate(MARKS[:-1]):
        assert isinstance(segment, Segment)
        if progress == "a mark" or number == 0:
            driver.on_result(result(segment, mark))
        if progress == "a checkpoint":
            driver.on_checkpoint(0, mark, f"/0/{mark}")
        for _ in range(3):
            driver.on_segment_end(0, None, "killed by the kernel")
            segment = driver.next_segment(1)
    trial = driver.journal.state.trials[0]
    assert (trial.state, trial.deaths_in_a_row) == (None, 3)
    assert trial.deaths == 3 * (len(MARKS) - 1)
    driver.on_segment_end(0, None, "killed by the kernel")
    assert trial.state == "lost"
    assert trial.reason == "its worker died 4 times without progress: killed by the kernel"


@pytest.mark.parametrize(
    ("error", "why"), [("search.storage.StorageError", "storage"), ("NodeError", "node")]
)
def test_a_storage_or_node_that_fails_is_not_charged_to_the_trial_and_ends_the_sweep(
    tmp_path: Path, error: str, why: str
) -> None:
    path = tmp_path / "e.jsonl"
    driver = start(path)
    assert isinstance(driver.next_segment(1), Segment)
    driver.on_segment_end(0, None, f"{error}: cannot save /x: no space left")
    trial = driver.journal.state.trials[0]
    assert (trial.deaths, trial.deaths_in_a_row, trial.state) == (0, 0, None)
    assert (driver.why, driver.draining) == (why, "cannot save /x: no space left")
    assert driver.next_segment(1) is Next.FINISHED
    again = start(path).next_segment(1)
    assert isinstance(again, Segment)
    assert (again.number, again.attempt) == (0, 2)


def test_draining_stops_each_segment_at_its_next_report_with_a_checkpoint(tmp_path: Path) -> None:
    driver = start(tmp_path / "e.jsonl")
    segment = driver.next_segment(1)
    assert isinstance(segment, Segment)
    driver.drain("asked to")
    assert driver.next_segment(5) is Next.WAIT
    made = result(segment, 100, save_is_cheap=False)
    assert driver.on_result(made)
    assert driver.wants_checkpoint(made)
    driver.on_checkpoint(0, 100, "/0/100")
    driver.on_segment_end(0, made)
    assert driver.next_segment(5) is Next.FINISHED
    assert driver.journal.state.trials[0].state is None  # interrupted: it goes on with resume


def test_a_full_trial_whose_last_checkpoint_is_missing_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    driver = start(path)
    segment = driver.next_segment(1)
    assert isinstance(segment, Segment)
    for mark in MARKS:
        driver.on_result(result(segment, mark))
        if mark < TOTAL:
            driver.on_checkpoint(0, mark, f"/0/{mark}")
    again = start(path)
    segment = again.next_segment(1)
    assert isinstance(segment, Segment)
    assert (segment.number, segment.checkpoint) == (0, "/0/500")


def test_a_spent_budget_starts_nothing_more(tmp_path: Path) -> None:
    driver = start(tmp_path / "e.jsonl", max_hours=1.0)
    now = driver.journal.state.session_started
    driver.journal.clock = lambda: now + 3599
    assert isinstance(driver.next_segment(3), Segment)
    driver.journal.clock = lambda: now + 3601
    assert driver.next_segment(3) is Next.WAIT
    assert driver.spent


def test_a_space_that_raises_fails_its_trial_and_the_sweep_goes_on(tmp_path: Path) -> None:
    """On a draw that the planning did not meet; a value that the trainer refuses likewise."""
    path = tmp_path / "e.jsonl"

    def moody(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        if trial.number == 2:
            raise KeyError("no luck")
        return {"lr": -1.0 if trial.number == 4 else np.float64(lr), "batch_size": np.int64(64)}

    driver = start(path, moody, None, sampler="random")
    Workers(driver, seed=0).run()
    state = load_state(path)
    assert len(state.trials) == 8
    assert state.trials[2].state == "error"
    assert "no luck" in state.trials[2].reason
    assert "test_driver.py" in state.trials[2].reason
    assert state.trials[4].state == "error"
    assert "lr" in state.trials[4].reason
    assert state.counts()["error"] == 2
    assert start(path).next_segment(3) is Next.FINISHED


def test_a_journal_that_cannot_be_written_ends_the_sweep(tmp_path: Path) -> None:
    from search.searcher import SweepSearcher

    driver = start(tmp_path / "e.jsonl")
    driver.journal.path.unlink()
    searcher = SweepSearcher(driver, lambda: 2)
    assert searcher.suggest("ray-id") == "FINISHED"
    assert isinstance(driver.crash, JournalError)


def infeasible_of_the_last(path: Path, seed: int, sampler: str) -> int:
    """Of the last 20 of 60 trials, those whose lr is above 0.001, where memory runs out."""
    driver = start(path, scheduler="none", seed=seed, sampler=sampler)
    driver.journal.state.planned = 60
    infeasible = []
    while isinstance(segment := driver.next_segment(1), Segment):
        bad = segment.fields["lr"] > 0.001
        infeasible.append(bad)
        if bad:
            made = {"outcome": "oom", "reason": "", "number": segment.number, "metrics": {}}
            made["samples_seen"] = 0
        else:
            made = result(segment, TOTAL, metrics={"knn_top1": segment.fields["lr"]})
            driver.on_result(made)
            driver.on_checkpoint(segment.number, TOTAL, "/x")
        driver.on_segment_end(segment.number, made)
    return sum(infeasible[-20:])


def test_infeasible_trials_steer_the_sampler_away(tmp_path: Path) -> None:
    """Two thirds of the range fail, and the best is at their edge: TPE is told, and asks less."""
    found = {
        sampler: sum(
            infeasible_of_the_last(tmp_path / f"{sampler}{seed}.jsonl", seed, sampler)
            for seed in range(4)
        )
        for sampler in ("tpe", "random")
    }
    assert found["random"] >= 45
    assert found["tpe"] <= 0.75 * found["random"], found
