"""Tune's AsyncHyperBandScheduler and controller as they come, and our driver beside them.

Each test shows both, so it tells when Ray changes. What Optuna is told stands in
test_stock_study.py.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import ray
import ray.train._internal.storage
from optuna.trial import TrialState
from ray.tune import Callback, ResumeConfig, Stopper
from ray.tune.search import ConcurrencyLimiter

from search.asha import Asha
from search.journal import load_state
from search.searcher import SweepSearcher
from search.segments import Next, Segment
from search.simulate import Outcome, Simulation, VirtualClock, steady
from tests.stock import (
    EPOCH,
    ITERATION,
    METRIC,
    Ours,
    Stock,
    StockDriver,
    StockTrial,
    controller,
    processed,
    queued,
)


def line(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    return {"lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the controller's snapshots, half of which Tune keeps where its cluster is."""
    session = str(tmp_path / "session")
    monkeypatch.setattr(ray.train._internal.storage, "_get_ray_train_session_dir", lambda: session)
    monkeypatch.delenv("TUNE_MAX_PENDING_TRIALS_PG", raising=False)
    return tmp_path


@pytest.fixture
def ours(tmp_path: Path) -> Callable[..., Ours]:
    return lambda name="events.jsonl", **options: Ours(tmp_path / name, line, **options)


class Hooks:
    """The calls of a stock pair's hooks, in their order."""

    def __init__(self, stock: Stock) -> None:
        self.calls: list[str] = []
        for part in (stock.searcher, stock.scheduler):
            for name in ("suggest", *(each for each in dir(part) if each.startswith("on_trial_"))):
                if hasattr(part, name):
                    setattr(part, name, self._noting(part, name))

    def _noting(self, part: Any, name: str) -> Callable[..., Any]:
        hook = getattr(part, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(f"{type(part).__name__}.{name}")
            return hook(*args, **kwargs)

        return noting


def test_the_harness_calls_the_hooks_as_the_controller_does(folder: Path) -> None:
    """Two trials, of which one is stopped at the first rung and one at the full resource."""
    stock, controlled = Stock.make(line, max_t=2), Stock.make(line, max_t=2)
    hooks, controllers_hooks = Hooks(stock), Hooks(controlled)
    made = controller(controlled, folder)
    trials = [stock.add(), stock.add()]
    controllers_trials = [queued(made), queued(made)]
    for number, value in ((0, 0.5), (1, 0.1), (0, 0.6)):
        stock.report(trials[number], value)
        processed(made, controllers_trials[number], value)
    assert hooks.calls == controllers_hooks.calls
    assert len(hooks.calls) == 12
    assert stock.scheduler.debug_string() == controlled.scheduler.debug_string()
    assert [each.status for each in trials] == [each.status for each in controllers_trials]
    for mine, theirs in zip(stock.study.trials, controlled.study.trials, strict=True):
        assert (mine.state, mine.value) == (theirs.state, theirs.value)
        assert mine.intermediate_values == theirs.intermediate_values
    assert not ray.is_initialized()


def test_the_stock_pair_is_simulated_as_ours_is() -> None:
    """Two workers, five trials: who reaches the full resource and who does not, by the rules."""
    stock, clock = Stock.make(line, max_t=3, reduction_factor=3), VirtualClock()
    driver: Any = StockDriver(stock, trials=5, marks=(EPOCH, 2 * EPOCH, 3 * EPOCH))
    values = (0.5, 0.3, 0.6, 0.52, 0.7)
    furthest = {}

    def curve(segment: Segment, mark: int) -> Outcome:
        furthest[segment.number] = mark
        return Outcome({METRIC: values[segment.number]})

    Simulation(driver, curve, clock=clock, workers=2, pace=steady(EPOCH)).run()
    assert furthest == {0: 3 * EPOCH, 1: EPOCH, 2: 3 * EPOCH, 3: EPOCH, 4: 3 * EPOCH}
    assert {trial.status for trial in stock.trials} == {"TERMINATED"}
    assert clock.now_s - 1.0 == pytest.approx(7.0)


def test_rungs_are_lost_by_a_restore_of_the_one_and_rebuilt_by_the_other(
    folder: Path, ours: Callable[..., Ours]
) -> None:
    stock, mine = Stock.make(line), ours()
    made = controller(stock, folder)
    for value in (0.9, 0.8, 0.7):
        processed(made, queued(made), value)
        mine.report(mine.add(), value)
    assert sorted(stock.scheduler._brackets[0]._rungs[-1][1].values()) == [0.7, 0.8, 0.9]
    made.checkpoint(force=True, wait=True)
    again = Stock.make(line)
    made = controller(again, folder, resume_config=ResumeConfig())
    assert made.resumed
    assert len(again.study.trials) == 3  # the searcher's state came back
    assert not any(values for _, values in again.scheduler._brackets[0]._rungs)
    processed(made, queued(made), 0.1)
    assert made._trials[-1].status == "RUNNING"  # the worst of four is the first again

    mine.rebuilt()
    while (segment := mine.add()).number < 3:  # those that ran at the kill come first
        pass
    assert mine.report(segment, 0.1)
    assert mine.driver.journal.state.reports[-1]["decision"]["competitors"] == 4


def test_a_jump_leaves_the_lower_rung_open_to_a_later_value_in_the_one_alone(
    ours: Callable[..., Ours],
) -> None:
    """Rungs at 100 and 300 images; a trial's first report is at 300, its second at 400."""
    stock = Stock.make(line, time_attr="images", grace_period=100, reduction_factor=3, max_t=900)
    trial = stock.add()
    for images, value in ((300, 0.5), (400, 0.9)):
        stock.report(trial, value, images=images)
    entered = {rung: list(values.values()) for rung, values in stock.scheduler._brackets[0]._rungs}
    assert entered == {900: [], 300: [0.5], 100: [0.9]}

    mine = ours()
    segment = mine.add()
    for images, value in ((300, 0.5), (400, 0.9)):
        mine.report(segment, value, mark=images)
    reports = mine.driver.journal.state.trials[0].reports
    assert {mark: report["decision"]["rung"] for mark, report in reports.items()} == {
        300: 300,
        400: None,
    }


def stock_passes(order: Sequence[int]) -> int:
    """How many of these values, as they come to a first rung, the stock scheduler lets pass."""
    stock = Stock.make({}, max_t=16, reduction_factor=4)
    passed = 0
    for value in order:
        trial = StockTrial(str(value), {})
        stock.scheduler.on_trial_add(None, trial)
        result = {ITERATION: 1, METRIC: float(value)}
        passed += stock.scheduler.on_trial_result(None, trial, result) == "CONTINUE"
    return passed


def our_passes(order: Sequence[int], *, promotes: bool) -> int:
    asha, passed = Asha([EPOCH], reduction=4, promotes=promotes), 0
    for value in order:
        decision = asha.report(value, EPOCH, float(value))
        passed += not (decision.stop or decision.pause)
        while promotes and (promotion := asha.next_promotion()) is not None:
            asha.promote(promotion.number, promotion.rung)
            passed += 1
    return passed


def test_who_comes_first_decides_less_in_ours() -> None:
    """Of 64 values one in 4 should pass a rung, 16, in whichever order they come.

    Improving values all pass in every form: each is the best so far when it comes.
    """
    orders = [random.Random(seed).sample(range(64), 64) for seed in range(100)]
    stock = statistics.mean(map(stock_passes, orders))
    stopping, promoting = (
        statistics.mean(our_passes(order, promotes=promotes) for order in orders)
        for promotes in (False, True)
    )
    assert 16 < stopping < promoting < stock < 20
    assert stopping < stock - 1
    improving, worsening = range(64), range(63, -1, -1)
    assert stock_passes(improving) == our_passes(improving, promotes=False) == 64
    assert our_passes(improving, promotes=True) == 61
    assert stock_passes(worsening) == 1
    assert our_passes(worsening, promotes=False) == 3
    assert our_passes(worsening, promotes=True) == 16


def test_steps_are_counts_of_reports_in_the_one_and_images_in_the_other(
    ours: Callable[..., Ours],
) -> None:
    """One trial has 8 times the images a report; the other's worker dies after two reports."""
    stock, mine = Stock.make(line), ours()
    trial, other = stock.add(), stock.add()
    stock.report(other, 0.1, images=8 * EPOCH)
    stock.report(trial, 0.5, images=EPOCH)
    stock.report(trial, 0.6, images=2 * EPOCH)
    trial.last_result = {}  # a new worker counts from 1
    with pytest.warns(UserWarning, match="already reported"):
        stock.report(trial, 0.2, images=EPOCH)
    assert trial.last_result[ITERATION] == 1
    assert set(stock.scheduler._brackets[0]._rungs[-1][1].values()) == {0.1, 0.5}  # one rung
    assert stock.told(other).intermediate_values == {1: 0.1}

    segment = mine.add()
    mine.report(segment, 0.5, over=7)
    mine.report(segment, 0.6, over=15)
    mine.driver.on_segment_end(segment.number, None, "its worker died")
    segment = mine.add()
    assert (segment.number, segment.attempt, segment.checkpoint_mark) == (0, 2, 2 * EPOCH)
    mine.report(segment, 0.2, mark=EPOCH)  # as if its last checkpoint had been lost
    assert [report["mark"] for report in mine.driver.journal.state.reports] == [EPOCH, 2 * EPOCH]
    assert mine.told(segment).intermediate_values == {EPOCH: 0.5, 2 * EPOCH: 0.6}
    assert mine.driver.journal.state.trials[0].samples_seen == 2 * EPOCH + 15


def test_a_restarted_trial_is_unknown_to_the_one_and_goes_by_its_number_in_the_other(
    folder: Path, ours: Callable[..., Ours]
) -> None:
    made = controller(Stock.make(line), folder)
    failed = queued(made)
    made._process_trial_failure(failed, exception=ray.exceptions.RayActorError())
    made.checkpoint(force=True, wait=True)
    restart = ResumeConfig(errored=ResumeConfig.ResumeType.RESTART)
    made = controller(Stock.make(line), folder, resume_config=restart)
    (trial,) = made._trials
    assert trial.trial_id != failed.trial_id
    made._set_trial_status(trial, "RUNNING")
    with pytest.raises(KeyError, match=trial.trial_id):
        processed(made, trial, 0.5)

    mine = ours()
    segment = mine.add()
    mine.driver.on_segment_end(segment.number, None, "its worker died")
    again = mine.rebuilt().add()
    assert (again.number, again.attempt, again.fields) == (0, 2, segment.fields)
    assert not mine.report(again, 0.5)


def test_a_stop_of_the_sweep_bypasses_the_one_and_is_journaled_by_the_other(
    folder: Path, ours: Callable[..., Ours]
) -> None:
    class Now(Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return True

    class Ends(Callback):
        seen = 0

        def on_trial_complete(self, *args: Any, **info: Any) -> None:
            self.seen += 1

    stock, ends = Stock.make(line), Ends()
    made = controller(stock, folder, stopper=Now(), callbacks=[ends])
    trial = queued(made)
    processed(made, trial, 0.5)
    made._stop_experiment_if_needed()
    assert trial.status == "TERMINATED"  # as one that came to its end
    assert ends.seen == 0
    assert stock.study.trials[0].state == TrialState.RUNNING
    assert trial.trial_id in stock.scheduler._trial_info

    mine = ours(max_hours=1.0)
    segments = [mine.add(), mine.add()]
    mine.report(segments[0], 0.5)
    mine.clock.now_s += 3601
    assert mine.driver.next_segment(100) is Next.WAIT  # nothing new is started
    mine.driver.drain("asked to")
    assert [mine.report(segment, 0.6) for segment in segments] == [True, True]
    assert mine.driver.next_segment(100) is Next.FINISHED
    state = load_state(mine.driver.journal.path)
    assert [trial.state for trial in state.trials.values()] == [None, None]
    assert [trial.checkpoint_mark for trial in state.trials.values()] == [2 * EPOCH, EPOCH]


def test_brackets_come_from_a_global_generator_in_the_one_and_from_the_seed_in_the_other(
    ours: Callable[..., Ours],
) -> None:
    def stock_brackets(seed: int) -> list[int]:
        np.random.seed(seed)
        stock = Stock.make(line, max_t=27, reduction_factor=3, brackets=3)
        trials = [stock.add() for _ in range(30)]
        made = stock.scheduler._brackets
        return [made.index(stock.scheduler._trial_info[trial.trial_id]) for trial in trials]

    def our_brackets(name: str, seed: int) -> list[int]:
        np.random.seed(seed)
        random.seed(seed)
        before = str(np.random.get_state()), random.getstate()
        mine = ours(name, brackets=2, trials=30)
        for _ in range(30):
            mine.report(mine.add(), 0.5)
        assert (str(np.random.get_state()), random.getstate()) == before
        return [trial.bracket for trial in mine.driver.journal.state.trials.values()]

    assert stock_brackets(1) != stock_brackets(2)
    drawn = our_brackets("one", 1)
    assert drawn == our_brackets("two", 2)
    assert set(drawn) == {0, 1}


def test_trials_are_asked_for_one_by_one_in_the_one_and_as_many_as_fit_in_the_other(
    folder: Path, ours: Callable[..., Ours]
) -> None:
    stock = Stock.make(line)
    assert controller(stock, folder)._max_pending_trials == 1
    limited = ConcurrencyLimiter(stock.searcher, max_concurrent=5)
    stock.searcher = limited
    assert controller(stock, folder)._max_pending_trials == 5

    mine, fit = ours(), 5
    searcher = SweepSearcher(mine.driver, lambda: fit)
    suggested = [searcher.suggest(f"ray{number}") for number in range(7)]
    assert [isinstance(each, dict) for each in suggested] == [True] * 5 + [False] * 2
    fit = 6  # a node joined
    assert isinstance(searcher.suggest("ray7"), dict)
