"""Budgets of hours, GPU hours and images, on a clock that is set by hand."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.budget import gpu_hours, spent_budget
from search.config import SweepConfig
from search.driver import Driver
from search.journal import FILE_NAME, load_state, read_events
from search.run import Sweep
from search.segments import Next, Segment
from search.simulate import Outcome
from tests.simulated import simulated_sweep
from tests.test_driver import MARKS, RUNGS, TOTAL
from tests.test_proposals import begin, issued, positions_of, report, small_space

HOUR = 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def is_spent(driver: Driver, clock: Clock) -> bool:
    spent = spent_budget(driver.config, driver.journal.state, driver.in_flight, clock.now)
    return spent is not None


def reasons(path: Path) -> list[str]:
    return [event["reason"] for event in read_events(path) if event["event"] == "budget_spent"]


def test_hours_are_those_in_which_a_driver_ran(tmp_path: Path) -> None:
    path, clock = tmp_path / "e.jsonl", Clock()
    driver = begin(path, clock=clock, max_hours=1.0)
    segment = issued(driver)
    clock.now += 0.25 * HOUR
    report(driver, segment, 100)
    clock.now += 10 * HOUR  # killed, and resumed much later
    driver = begin(path, clock=clock, max_hours=1.0)
    clock.now += 0.7499 * HOUR
    assert isinstance(driver.next_segment(3), Segment)
    assert not is_spent(driver, clock)
    clock.now += 0.0002 * HOUR
    assert driver.next_segment(3) is Next.WAIT
    assert reasons(path) == ["the budget of 1 hours is spent"]


def test_images_are_those_of_all_trials(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    driver = begin(path, max_images=2 * (TOTAL + 7), scheduler="none")
    for number in range(2):
        assert driver.spent is None
        segment = issued(driver)
        assert segment.number == number
        for mark in MARKS:
            report(driver, segment, mark)
    assert driver.next_segment(1) is Next.FINISHED
    assert reasons(path) == ["the budget of 1,214 images is spent"]


@pytest.mark.parametrize("gpus", [0.25, 2.0, 0.0])
def test_gpu_hours_are_hours_times_the_gpus_of_a_trial(tmp_path: Path, gpus: float) -> None:
    path, clock = tmp_path / "e.jsonl", Clock()
    driver = begin(path, clock=clock, max_gpu_hours=1.0, gpus_per_trial=gpus)
    segments = [issued(driver, 2), issued(driver, 2)]
    clock.now += 0.49 * HOUR / (gpus or 1)
    report(driver, segments[0], 100)
    assert gpu_hours(driver.journal.state, driver.in_flight, clock.now) == pytest.approx(
        0.98 if gpus else 0.0
    )
    assert not is_spent(driver, clock)
    clock.now += 0.011 * HOUR / (gpus or 1)
    assert is_spent(driver, clock) == (gpus > 0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), promote=st.booleans(), steps=st.integers(5, 60))
def test_only_the_time_of_running_segments_counts(
    seed: int, promote: bool, steps: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against a ledger of starts and stops: no pause, no wait, no time between sessions."""
    path, clock = tmp_path_factory.mktemp("sweep") / "e.jsonl", Clock()
    drawn = random.Random(seed)
    config: dict[str, Any] = {"clock": clock, "promote": promote, "gpus_per_trial": 0.5}
    driver = begin(path, **config)
    since: dict[int, float] = {}
    running: list[tuple[Segment, int]] = []
    ended_s = 0.0

    def check() -> None:
        held_s = ended_s + sum(clock.now - start for start in since.values())
        found = gpu_hours(driver.journal.state, driver.in_flight, clock.now)
        assert found == pytest.approx(held_s / HOUR * 0.5)

    for _ in range(steps):
        clock.now += drawn.choice([0, 1, 60, 1800])
        check()
        if drawn.random() < 0.5 and isinstance(segment := driver.next_segment(3), Segment):
            running.append((segment, segment.checkpoint_mark))
            since[segment.number] = clock.now
        elif running:
            segment, mark = running.pop(drawn.randrange(len(running)))
            mark = next(each for each in MARKS if each > mark)
            if died := drawn.random() < 0.15:
                driver.on_segment_end(segment.number, None, "its node is gone")
            if died or report(driver, segment, mark, save_is_cheap=drawn.random() < 0.5):
                ended_s += clock.now - since.pop(segment.number)
            else:
                running.append((segment, mark))
        check()
    counted = driver.journal.state.gpu_s
    clock.now += 5000
    driver = begin(path, **config)
    assert driver.journal.state.gpu_s == counted  # what was in flight counts to its last event
    since.clear()
    ended_s = counted / 0.5
    check()
    for trial in driver.journal.state.unfinished():
        driver.obey({"command": "stop", "trial": trial.number})
        check()
    if isinstance(segment := driver.next_segment(1), Segment):
        since[segment.number] = clock.now
        clock.now += 77
        check()


@pytest.mark.parametrize("budget", ["max_hours", "max_gpu_hours", "max_images"])
@pytest.mark.parametrize("on_budget", ["drain", "stop"])
def test_what_runs_when_a_budget_is_spent_and_after_it_is_raised(
    tmp_path: Path, budget: str, on_budget: str
) -> None:
    path, clock = tmp_path / "e.jsonl", Clock()
    config: dict[str, Any] = {
        "clock": clock,
        "gpus_per_trial": 1.0,
        "scheduler": "none",
        "trials": 4,
        "on_budget": on_budget,
    }
    small = 500 if budget == "max_images" else 1.0
    driver = begin(path, **config, **{budget: small})
    first, second = issued(driver, 2), issued(driver, 2)
    assert not report(driver, first, 200)
    assert not report(driver, second, 200)
    clock.now += HOUR
    stops = report(driver, first, 300)
    assert stops == (on_budget == "stop")
    assert driver.next_segment(9) is Next.WAIT
    if on_budget == "drain":
        for segment, marks in ((first, (400, 500, 600)), (second, MARKS[2:])):
            assert [report(driver, segment, mark) for mark in marks][-1]
    else:
        assert report(driver, second, 300, save_is_cheap=False)
    assert driver.next_segment(9) is Next.FINISHED
    assert len(reasons(path)) == 1
    (event,) = (event for event in read_events(path) if event["event"] == "budget_spent")
    assert event["then"] == on_budget
    states = [trial.state for trial in driver.journal.state.trials.values()]
    assert states == ["completed" if on_budget == "drain" else None] * 2

    again = begin(path, **config, **{budget: 100 * small})
    assert again.spent is None
    started = []
    while isinstance(segment := again.next_segment(1), Segment):
        started.append((segment.number, segment.checkpoint_mark))
        marks = [mark for mark in MARKS if mark > segment.checkpoint_mark]
        assert [report(again, segment, mark) for mark in marks][-1]
    unfinished = [] if on_budget == "drain" else [(0, 300), (1, 300)]
    assert started == [*unfinished, (2, 0), (3, 0)]
    assert again.journal.state.counts() == {"completed": 4}
    assert len(reasons(path)) == 1


def test_a_spent_budget_is_spent_still_after_a_resume(tmp_path: Path) -> None:
    path, clock = tmp_path / "e.jsonl", Clock()
    driver = begin(path, clock=clock, max_images=500, scheduler="none")
    segment = issued(driver)
    for mark in MARKS:
        report(driver, segment, mark)
    for _ in range(2):
        again = begin(path, clock=clock, max_images=500, scheduler="none")
        assert again.next_segment(3) is Next.FINISHED
        assert again.spent


def test_with_a_spent_budget_what_waits_goes_on_waiting_until_it_is_raised(tmp_path: Path) -> None:
    """Not even the best is promoted, though a place at its rung has come free."""
    path, clock = tmp_path / "e.jsonl", Clock()
    driver = begin(path, clock=clock, max_hours=1.0, promote=True)
    segments = [issued(driver, 3) for _ in range(3)]
    for segment in segments[:2]:
        assert report(driver, segment, RUNGS[0], metrics={"knn_top1": 0.9})
    clock.now += 2 * HOUR
    assert report(driver, segments[2], RUNGS[0], metrics={"knn_top1": 0.1})
    assert driver.scheduler.next_promotion() is not None
    assert driver.next_segment(3) is Next.FINISHED
    trials = driver.journal.state.trials.values()
    assert [trial.state for trial in trials] == [None] * 3
    assert len(positions_of(path, "started")) == 3
    again = begin(path, clock=clock, max_hours=9.0, promote=True)
    assert issued(again, 3).number == 0
    assert again.journal.state.trials[0].promoted == [RUNGS[0]]


def test_a_budget_stops_what_still_runs_of_an_exhausted_space(tmp_path: Path) -> None:
    path, clock = tmp_path / "e.jsonl", Clock()
    driver = begin(
        path,
        small_space(1, 1, 1),
        None,
        clock=clock,
        max_hours=1.0,
        on_budget="stop",
        scheduler="none",
    )
    segments = [issued(driver, 9), issued(driver, 9)]
    assert driver.next_segment(9) is Next.WAIT
    assert "exhausted" in str(driver.proposals.exhausted)
    assert not report(driver, segments[0], 100)
    clock.now += 2 * HOUR
    assert report(driver, segments[0], 200)
    assert report(driver, segments[1], 100)
    assert reasons(path) == ["the budget of 1 hours is spent"]


def test_a_trial_that_only_waits_for_a_slot_costs_nothing(tmp_path: Path) -> None:
    """Interrupted, and stopped by a command an hour later."""
    clock = Clock()
    driver = begin(tmp_path / "e.jsonl", clock=clock, gpus_per_trial=1.0)
    segment = issued(driver)
    clock.now += 600
    driver.drain("asked to")
    assert report(driver, segment, 100)
    clock.now += HOUR
    driver.obey({"command": "stop", "trial": 0})
    assert driver.journal.state.trials[0].state == "pruned"
    assert gpu_hours(driver.journal.state, driver.in_flight, clock.now) == pytest.approx(600 / HOUR)


def test_a_resume_with_a_spent_budget_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(config: SweepConfig) -> None:
        raise AssertionError("a cluster is started")

    monkeypatch.setattr("search.run.ray_cluster", start)

    def rising(segment: Segment, mark: int) -> Outcome:
        return Outcome({"knn_top1": mark / 1000})

    folder = simulated_sweep(tmp_path, rising, trials=20, max_images=2_000)
    before = (folder / FILE_NAME).read_bytes()
    result = Sweep.open(folder).resume()
    assert (result.state, result.why) == ("interrupted", "budget")
    assert result.reason == "the budget of 2,000 images is spent"
    assert result.unrecorded is None
    with pytest.raises(ValueError, match=r"raise it in .* before you ask for more trials"):
        Sweep.open(folder).resume(trials=7)
    assert (folder / FILE_NAME).read_bytes() == before
    raised = (folder / "sweep.yaml").read_text().replace("max_images: 2000", "max_images: 9000")
    (folder / "sweep.yaml").write_text(raised)
    sweep = Sweep.open(folder)
    assert not sweep._spent_still(load_state(folder / FILE_NAME))
