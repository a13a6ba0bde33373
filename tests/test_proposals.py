"""Where new trials come from, and what a user may ask for in mid-sweep; simulated workers."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.trial import TrialState as OptunaState

from search.config import SweepConfig
from search.driver import Driver
from search.journal import Journal, load_state, read_events
from search.plan import _grid
from search.segments import Next, Segment
from search.state import TrialState
from search.strata import ONE, Strata
from spaces import Space
from tests.test_driver import DEFAULTS, MARKS, RUNGS, TOTAL, Workers, result, space


def begin(
    path: Path,
    space: Space = space,
    defaults: Mapping[str, Any] | None = DEFAULTS,
    *,
    strata: Strata = Strata(),  # noqa: B008  frozen
    grid: Sequence[Mapping[str, Any]] = (),
    warm: Iterable[Mapping[str, Any]] = (),
    gpus_per_trial: float = 0.0,
    more: int = 0,
    clock: Callable[[], float] = time.time,
    delete: Callable[[str], None] = lambda path: None,
    **changes: Any,
) -> Driver:
    """A new sweep whose journal is at `path`, or one that is resumed with `more` trials."""
    config = SweepConfig(**{"name": "s", "trials": 8, "epochs": 6} | changes)
    if path.exists():
        journal = Journal(path, clock=clock, durable=False)
        journal.drop_torn_line()
        journal.append("resumed", trials=journal.state.planned + more, slots=3)
    else:
        journal = Journal.create(path, clock=clock, durable=False)
        journal.append(
            "sweep_started",
            schema=1,
            sweep_id="id",
            config=config.model_dump(),
            mode=config.mode,
            total_images=TOTAL,
            marks=MARKS,
            rungs=RUNGS if config.scheduler == "asha" else (),
            slots=3,
            gpus_per_trial=gpus_per_trial,
        )
        for trial in warm:
            journal.append("warm_trial", **trial)
    return Driver.from_journal(
        config, journal, space, defaults, strata=strata, grid=grid, delete=delete
    )


def cut_before(whole: Path, part: Path, position: int) -> dict[str, Any]:
    """Copy the first `position` events of a journal, as a kill would leave them; the next event."""
    lines = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:position]))
    return dict(json.loads(lines[position])) if position < len(lines) else {}


def positions_of(path: Path, kind: str) -> list[int]:
    """Where the events of a kind stand in a journal."""
    return [at for at, event in enumerate(read_events(path)) if event["event"] == kind]


def issued(driver: Driver, slots: int = 1) -> Segment:
    segment = driver.next_segment(slots)
    assert isinstance(segment, Segment)
    return segment


def report(driver: Driver, segment: Segment, mark: int, **changes: Any) -> bool:
    """One report with all that Ray's hooks would do after it; True: the segment ended there."""
    made = result(segment, mark, **changes)
    stop = driver.on_result(made)
    if driver.wants_checkpoint(made):
        driver.on_checkpoint(segment.number, mark, f"/{segment.number}/{segment.attempt}/{mark}")
    if stop:
        driver.on_segment_end(segment.number, made)
    return stop


def fail(driver: Driver, segment: Segment, state: str = "error", reason: str = "why") -> None:
    made = {"outcome": state, "reason": reason, "number": segment.number, "samples_seen": 0}
    assert driver.on_result(made)
    driver.on_segment_end(segment.number, made)


def kinds(trials: Mapping[int, TrialState]) -> list[str]:
    return [trials[number].source for number in range(len(trials))]


def combination(trial: TrialState) -> str:
    """All that makes a configuration but its seed."""
    return json.dumps({**trial.config, "seed": None}, sort_keys=True)


# ---- the order of sources


def test_enqueued_then_default_then_points_then_the_sampler(tmp_path: Path) -> None:
    points = [{"lr": 0.02, "optimizer": "sgd", "momentum": 0.5}, {"lr": 0.03}]
    driver = begin(tmp_path / "e.jsonl", points=points, trials=6)
    driver.obey({"command": "enqueue", "params": {"lr": 0.05, "optimizer": "adamw"}})
    segments = [issued(driver, 9), issued(driver, 9)]
    driver.obey({"command": "enqueue", "params": {"optimizer": "sgd"}})
    while isinstance(segment := driver.next_segment(9), Segment):
        segments.append(segment)
    trials = driver.journal.state.trials
    assert kinds(trials) == [
        *("enqueued", "default", "enqueued", "point", "point", "sampler", "sampler", "sampler")
    ]
    assert [trial.number for trial in trials.values() if trial.is_default] == [1]
    assert trials[0].params == {"lr": 0.05, "optimizer": "adamw"}
    assert trials[1].params == pytest.approx(DEFAULTS)
    assert trials[2].params.keys() == {"lr", "optimizer", "momentum"}  # the rest is filled in
    assert trials[2].params["optimizer"] == "sgd"
    assert trials[3].params == points[0]
    assert trials[4].params["lr"] == 0.03
    for segment in segments:
        assert segment.fields.items() >= trials[segment.number].params.items()


def test_what_a_point_leaves_open_differs_from_trial_to_trial(tmp_path: Path) -> None:
    driver = begin(tmp_path / "e.jsonl", defaults=None, points=[{"optimizer": "adamw"}] * 4)
    rates = {issued(driver, 9).fields["lr"] for _ in range(4)}
    assert kinds(driver.journal.state.trials) == ["point"] * 4
    assert len(rates) == 4


# ---- spaces with few configurations


def small_space(rates: int, sizes: int, momenta: int) -> Space:
    """A space of `rates * (sizes + momenta)` configurations."""

    def chosen(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        lr = trial.suggest_categorical("lr", [0.01 * (at + 1) for at in range(rates)])
        if trial.suggest_categorical("optimizer", ["adamw", "sgd"]) == "adamw":
            return {"lr": lr, "batch_size": 32 * trial.suggest_int("size", 1, sizes)}
        momentum = trial.suggest_float("momentum", 0.1, 0.1 * momenta, step=0.1)
        return {"lr": lr, "optimizer": "sgd", "momentum": momentum}

    return chosen


@settings(max_examples=12, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 2)] * 3),
    sampler=st.sampled_from(["tpe", "random"]),
    with_point=st.booleans(),
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
)
def test_nothing_is_drawn_twice_and_an_exhausted_space_ends_the_sweep(
    shape: tuple[int, int, int],
    sampler: str,
    with_point: bool,
    seed: int,
    share: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Also when the sweep is killed somewhere and goes on."""
    rates, sizes, momenta = shape
    number = rates * (sizes + momenta)
    folder = tmp_path_factory.mktemp("sweep")
    config: dict[str, Any] = {
        "defaults": {"lr": 0.01, "optimizer": "adamw", "size": 1},
        "points": [{"lr": 0.01}] if with_point else [],
        "sampler": sampler,
        "seed": seed,
        "trials": number + 4,
    }
    whole, part = folder / "whole.jsonl", folder / "part.jsonl"
    Workers(begin(whole, small_space(*shape), **config), seed).run()
    cut_before(whole, part, 1 + round(share * (len(list(read_events(whole))) - 1)))
    driver = begin(part, small_space(*shape), **config)
    Workers(driver, seed + 1).run()
    assert "exhausted" in str(driver.proposals.exhausted)
    assert driver.spent is None
    trials = driver.journal.state.trials
    drawn = [combination(trial) for trial in trials.values() if trial.source != "point"]
    assert len(set(drawn)) == len(drawn)
    assert len({combination(trial) for trial in trials.values()}) >= 0.7 * number
    assert all(trial.state for trial in trials.values())


def grid_of(trials: int, seed: int = 3) -> tuple[dict[str, Any], ...]:
    return _grid(SweepConfig(sampler="grid", trials=trials, seed=seed), small_space(2, 2, 2))


@pytest.mark.parametrize("defaults", [None, {"lr": 0.01, "optimizer": "adamw", "size": 1}])
def test_a_grid_is_tried_once_in_a_drawn_order_and_then_ends(
    tmp_path: Path, defaults: dict[str, Any] | None
) -> None:
    grid, path = grid_of(9), tmp_path / "e.jsonl"  # one is for the default
    assert grid == grid_of(20)
    assert grid != grid_of(9, seed=4)
    with pytest.raises(ValueError, match="8 combinations, but 7 trials"):
        grid_of(8)
    half = SweepConfig(sampler="grid", trials=20, seed=3, points=list(grid[:2]))
    rest = _grid(half, small_space(2, 2, 2), grid[-1])
    assert sorted(rest, key=str) == sorted(grid[2:-1], key=str)
    just = SweepConfig(sampler="grid", trials=8, seed=3)  # one of the eight is the default
    assert len(_grid(just, small_space(2, 2, 2), grid[-1])) == 7
    config: dict[str, Any] = {"sampler": "grid", "trials": 20, "grid": grid, "defaults": defaults}
    driver = begin(path, small_space(2, 2, 2), **config)
    Workers(driver, seed=0).run()
    assert driver.proposals.exhausted == "all 8 points of the grid were tried"

    def tried(path: Path) -> list[dict[str, Any]]:
        return [t.params for t in load_state(path).trials.values() if t.source == "grid"]

    expected = [point for point in grid if point != defaults]
    assert tried(path) == expected
    for position in positions_of(path, "suggested"):
        part = tmp_path / f"{position}.jsonl"
        cut_before(path, part, position)
        Workers(begin(part, small_space(2, 2, 2), **config), seed=1).run()
        assert tried(part) == expected
    assert begin(path, small_space(2, 2, 2), **config, more=3).next_segment(3) is Next.FINISHED


# ---- commands


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ({"command": "enqueue", "params": {"lr": 3.0}}, "lr must be a number in [0.0001, 0.1]"),
        ({"command": "enqueue", "params": {"optimizer": "lars"}}, "must be one of 'adamw', 'sgd'"),
        ({"command": "enqueue", "params": {"depth": 3}}, "depth is not searched"),
        ({"command": "enqueue", "params": [1]}, "needs parameters"),
        ({"command": "enqueue"}, "needs parameters"),
        ({"command": "stop", "trial": 7}, "there is no trial 7"),
        ({"command": "stop", "trial": "0"}, "there is no trial '0'"),
        ({"command": "stop", "trial": 0}, "trial 0 has ended: error"),
        ({"command": "pause"}, "unknown command 'pause'"),
        ({"command": "malformed", "line": 2, "reason": "no JSON"}, "no JSON"),
    ],
)
def test_a_command_that_makes_no_sense_is_journaled_as_refused(
    tmp_path: Path, command: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "e.jsonl"
    driver = begin(path)
    fail(driver, issued(driver))
    driver.obey(command)
    recorded = list(read_events(path))[-1]
    assert recorded["command"] == command
    assert reason in recorded["refused"]
    for state in (driver.journal.state, load_state(path)):
        assert (state.commands_taken, state.planned, state.enqueued) == (1, 8, [])
    assert driver.draining is None
    assert issued(driver).number == 1


def test_an_enqueued_trial_is_one_more_than_planned_and_tried_once(tmp_path: Path) -> None:
    """Wherever the sweep is cut after the command, and though all planned trials have begun."""
    path, wanted = tmp_path / "e.jsonl", {"lr": 0.05, "optimizer": "adamw"}
    driver = begin(path, trials=3)
    segments = [issued(driver, 4) for _ in range(3)]
    assert driver.next_segment(4) is Next.WAIT
    driver.obey({"command": "enqueue", "params": wanted})
    assert issued(driver, 4).fields.items() >= wanted.items()
    assert len(segments) == 3
    (command,) = positions_of(path, "command")
    for position in range(command + 1, len(list(read_events(path))) + 1):
        part = tmp_path / f"{position}.jsonl"
        cut_before(path, part, position)
        Workers(begin(part, trials=3), seed=0).run()
        state = load_state(part)
        assert kinds(state.trials) == ["default", "sampler", "sampler", "enqueued"]
        assert (state.planned, state.commands_taken, state.enqueued) == (4, 1, [])
        assert state.trials[3].params == wanted


def test_an_enqueued_trial_is_tried_though_the_space_is_exhausted(tmp_path: Path) -> None:
    wanted = {"lr": 0.01, "optimizer": "sgd", "momentum": 0.1}
    driver = begin(tmp_path / "e.jsonl", small_space(1, 1, 1), None)
    segments = [issued(driver, 9), issued(driver, 9)]
    assert driver.next_segment(9) is Next.WAIT
    assert "exhausted" in str(driver.proposals.exhausted)
    driver.obey({"command": "enqueue", "params": wanted})
    assert issued(driver, 9).fields.items() >= wanted.items()
    assert len(segments) == 2


def test_a_trial_in_flight_is_stopped_at_its_next_report(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    driver = begin(path)
    segment, other = issued(driver, 2), issued(driver, 2)
    assert not report(driver, segment, 100)
    driver.obey({"command": "stop", "trial": 0})
    assert driver.journal.state.trials[0].state is None
    part = tmp_path / "part.jsonl"
    part.write_bytes(path.read_bytes())
    assert not report(driver, other, 100)  # that one alone
    assert report(driver, segment, 200)
    for trial in (driver.journal.state.trials[0], begin(part).journal.state.trials[0]):
        assert (trial.state, trial.reason) == ("pruned", "stopped by command")
        assert trial.checkpoint is None
        assert trial.stopped_at is None  # no rung did it
    assert issued(driver, 2).number == 2


def test_a_trial_that_waits_or_is_to_be_issued_again_is_stopped_at_once(tmp_path: Path) -> None:
    driver = begin(tmp_path / "e.jsonl", promote=True)
    first, second = issued(driver, 2), issued(driver, 2)
    assert report(driver, first, 100)
    assert driver.journal.state.trials[0].paused_at == 100
    driver.on_segment_end(second.number, None, "its node is gone")
    for number in (0, 1):
        driver.obey({"command": "stop", "trial": number})
        trial = driver.journal.state.trials[number]
        assert (trial.state, trial.reason) == ("pruned", "stopped by command")
    assert issued(driver).number == 2
    assert driver.scheduler.next_promotion(last_without=()) is None


def test_a_stopped_sweep_drains_and_goes_on_with_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    driver = begin(path)
    first, second = issued(driver, 2), issued(driver, 2)
    driver.obey({"command": "stop"})
    assert driver.draining == "stopped by command"
    for segment in (first, second):
        assert driver.next_segment(9) is Next.WAIT
        assert report(driver, segment, 100, save_is_cheap=False)
    assert driver.next_segment(9) is Next.FINISHED
    again = begin(path)
    assert again.draining is None
    for number in (0, 1):
        segment = issued(again, 9)
        assert (segment.number, segment.checkpoint_mark) == (number, 100)


# ---- first trials that all fail


def ends_after(driver: Driver, failures: Sequence[tuple[str, str]]) -> int | None:
    """After how many of these (state, reason) the sweep starts nothing more; None: it goes on."""
    for count, (state, reason) in enumerate(failures):
        segment = driver.next_segment(1)
        if segment is Next.FINISHED:
            return count
        assert isinstance(segment, Segment)
        if state == "completed":
            assert report(driver, segment, TOTAL)
        else:
            fail(driver, segment, state, reason)
    return len(failures) if driver.next_segment(1) is Next.FINISHED else None


@pytest.mark.parametrize(
    ("failures", "ends"),
    [
        ([("error", f"ValueError: {at} is bad\nat line {at}") for at in range(6)], 3),
        ([("lost", "gone")] * 3, 3),
        ([("oom", "CUDA"), ("oom", "CUDA"), ("error", "CUDA")] + [("oom", "CUDA")] * 4, None),
        ([("error", "a"), ("error", "a"), ("error", "b")] + [("error", "b")] * 4, None),
        ([("completed", "")] + [("error", "a")] * 5, None),
        ([("completed", "")] * 5, None),
    ],
)
def test_the_sweep_ends_when_its_first_trials_fail_alike(
    tmp_path: Path, failures: list[tuple[str, str]], ends: int | None
) -> None:
    driver = begin(tmp_path / "e.jsonl", failures_alike=3, scheduler="none")
    assert ends_after(driver, failures) == ends
    assert (driver.why == "failing") == (ends is not None)
    if ends:
        assert "first 3 trials all failed alike" in str(driver.draining)
        assert failures[0][1].partition("\n")[0][:10] in str(driver.draining)
        again = begin(tmp_path / "e.jsonl", failures_alike=3, scheduler="none")
        assert ends_after(again, failures[:4]) is None  # who resumes knows it
        assert again.why != "failing"


def test_a_space_that_always_raises_ends_the_sweep(tmp_path: Path) -> None:
    def broken(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        raise KeyError(f"no luck with {trial.suggest_float('lr', 0.1, 1.0)}")

    driver = begin(tmp_path / "e.jsonl", broken, None)
    assert driver.next_segment(2) is Next.FINISHED
    assert driver.why == "failing"
    assert len(driver.journal.state.trials) == 5


@pytest.mark.parametrize("promote", [False, True])
def test_the_sweep_goes_on_where_another_trial_has_made_a_report(
    tmp_path: Path, promote: bool
) -> None:
    """Be it in flight or waiting for a promotion."""
    driver = begin(tmp_path / "e.jsonl", failures_alike=2, promote=promote)
    assert report(driver, issued(driver, 2), RUNGS[0]) == promote
    for _ in range(4):
        fail(driver, issued(driver, 2))
    assert driver.why != "failing"
    assert driver.draining is None
    assert issued(driver, 2).number == 5


# ---- trials of earlier sweeps


def warm_trials() -> list[dict[str, Any]]:
    lr = distribution_to_json(FloatDistribution(1e-4, 1e-1, log=True))
    shared: dict[str, Any] = {"distributions": {"lr": lr}, "source": {"sweep": "x", "number": 0}}
    return [
        {**shared, "params": {"lr": 1e-2}, "state": "completed", "reports": {"100": 0.5, "600": 1}},
        {**shared, "params": {"lr": 1e-3}, "state": "pruned", "reports": {"100": 0.25}},
        {**shared, "params": {"lr": 9e-2}, "state": "oom", "reports": {}},
        {**shared, "params": {"lr": 2e-2}, "state": "error", "reports": {}},
    ]


def test_warm_trials_reach_the_study_and_no_number(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    live = begin(path, warm=warm_trials())
    assert [issued(live, 3).number for _ in range(3)] == [0, 1, 2]
    report(live, Segment(0, 1, live.journal.state.trials[0].config, None, 0), 100)
    for driver in (live, begin(path)):
        study = driver.proposals.study._studies[ONE]
        warm = study._study.trials[:4]
        assert [trial.state for trial in warm] == [
            OptunaState.COMPLETE,
            OptunaState.PRUNED,
            OptunaState.PRUNED,
            OptunaState.FAIL,
        ]
        assert [trial.value for trial in warm] == [1.0, 0.25, None, None]
        assert [trial.intermediate_values for trial in warm[:2]] == [
            {100: 0.5, 600: 1.0},
            {100: 0.25},
        ]
        assert [max(trial.constraints.values(), default=0.0) for trial in warm] == [0, 0, 1, 0]
        assert study._frozen(0).params == driver.journal.state.trials[0].params
        assert list(study._frozen(0).intermediate_values) == [100]


def test_the_sampler_learns_from_warm_trials_and_after_a_kill_the_same(tmp_path: Path) -> None:
    """Of trials that were best near lr = 0.003: it draws near that and nothing at random."""

    def rates(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        return {"lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)}

    def value(lr: float) -> float:
        return 1.0 - abs(math.log10(lr / 0.003))

    completed, *_ = warm_trials()
    grid = [10 ** (-4 + 3 * at / 20) for at in range(21)]
    warm = [
        {**completed, "params": {"lr": lr}, "reports": {"600": value(lr)}}
        for lr in [*grid, *(0.003 * 1.1**at for at in range(-3, 4))]
    ]
    config: dict[str, Any] = {"defaults": None, "trials": 10, "scheduler": "none"}

    def drawn(driver: Driver) -> list[float]:
        while isinstance(segment := driver.next_segment(1), Segment):
            report(driver, segment, TOTAL, metrics={"knn_top1": value(segment.fields["lr"])})
        return [trial.params["lr"] for trial in driver.journal.state.trials.values()]

    path, part = tmp_path / "warm.jsonl", tmp_path / "part.jsonl"
    warmed = drawn(begin(path, rates, warm=warm, **config))
    cold = drawn(begin(tmp_path / "cold.jsonl", rates, **config))
    assert statistics.fmean(map(value, warmed)) > statistics.fmean(map(value, cold)) + 0.2
    cut_before(path, part, positions_of(path, "suggested")[6])
    assert drawn(begin(part, rates, **config)) == warmed
