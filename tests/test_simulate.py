"""Sweeps on virtual workers: the same history always, whole or rebuilt at any line, in time."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.config import SweepConfig, parse_sweep
from search.driver import MAX_DEATHS, Driver
from search.journal import Journal, load_state, read_events
from search.segments import Segment
from search.simulate import (
    DIED,
    Outcome,
    Simulation,
    VirtualClock,
    curve_of,
    start_simulated,
    steady,
)
from search.state import FINAL_STATES
from search.strata import Strata
from tests.extent import times

EPOCH = 100
EPOCHS = 9
TOTAL = EPOCHS * EPOCH
MARKS = tuple(range(EPOCH, TOTAL + 1, EPOCH))
WORKERS = 3
DEFAULTS = {"lr": 1e-3, "optimizer": "adamw"}
STRATA = Strata("optimizer", ("adamw", "sgd"))


def space(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    if trial.suggest_categorical("optimizer", ["adamw", "sgd"]) == "sgd":
        return {"lr": lr, "optimizer": "sgd", "momentum": trial.suggest_float("momentum", 0, 0.9)}
    return {"lr": lr, "optimizer": "adamw"}


def value(fields: Mapping[str, Any], mark: int) -> float:
    """Best near lr = 0.01; rises with the images."""
    return 1.0 - 0.3 * abs(math.log10(fields["lr"]) + 2) - 0.5 * math.exp(-mark / 300)


def mishaps(segment: Segment, mark: int) -> Outcome:
    """`value`, but some trials fail and some workers die: each number in a way of its own."""
    kind = segment.number % 11
    if kind == 3 and mark == 200:
        return Outcome(kind="diverged", reason="loss is nan", samples_seen=150)
    if kind == 5:
        return Outcome(kind="oom", reason="out of memory", samples_seen=0)
    if kind in (1, 7) and mark in (100, 300) and segment.attempt == 1 + mark // 200:
        return Outcome(kind=DIED, reason="killed", samples_seen=mark - 50)
    return Outcome({"knn_top1": value(segment.fields, mark), "lr": 0.1})


def uneven(segment: Segment) -> float:
    """No two trials have one pace, nor two events one time: a driver that is rebuilt ends at once
    what was decided, where others' events of that very time may have come first."""
    return (1.0 + math.sqrt(segment.number + 2) % 1) / 100


def begin(path: Path, config: SweepConfig, curve: Any = mishaps) -> Simulation:
    clock = VirtualClock()
    driver = start_simulated(
        path,
        config,
        space,
        clock=clock,
        workers=WORKERS,
        total_images=TOTAL,
        train_images=EPOCH,
        marks=MARKS,
        defaults=DEFAULTS,
        strata=STRATA if config.stratify else Strata(),
    )
    return Simulation(
        driver, curve, clock=clock, workers=WORKERS, pace=uneven, overhead_s=0.5, save_s=0.25
    )


def rebuilt(config: SweepConfig, journal: Journal, clock: VirtualClock) -> Driver:
    strata = STRATA if config.stratify else Strata()
    return Driver.from_journal(config, journal, space, DEFAULTS, strata=strata)


VARIANTS: dict[str, dict[str, Any]] = {
    "stopping, tpe": {"sampler": "tpe", "trials": 14},
    "stopping, random": {"sampler": "random", "trials": 24},
    "none, tpe": {"sampler": "tpe", "scheduler": "none", "trials": 13},
    "none, random": {"sampler": "random", "scheduler": "none"},
    "promoting, tpe": {"sampler": "tpe", "promote": True},
    "promoting, random": {"sampler": "random", "promote": True, "trials": 30},
    "brackets": {"sampler": "random", "brackets": 2, "trials": 24},
    "promoting in brackets": {"sampler": "random", "brackets": 2, "promote": True, "trials": 24},
    "median": {"sampler": "tpe", "scheduler": "median"},
    "stratified": {"sampler": "tpe", "stratify": "optimizer", "trials": 24},
    "audited": {"sampler": "tpe", "audit": 0.5},
    "audited, promoting": {"sampler": "random", "promote": True, "audit": 0.5, "trials": 24},
    "budget, drained": {"sampler": "random", "max_images": 5_000, "trials": 24},
    "budget, stopped": {"sampler": "random", "max_images": 1_500, "on_budget": "stop"},
    "all at once": {
        **{"sampler": "tpe", "trials": 30, "promote": True, "brackets": 2, "audit": 0.3},
        **{"stratify": "optimizer", "keep_checkpoints": 1},
    },
}


def plan(variant: str) -> SweepConfig:
    fields = {"name": "s", "epochs": EPOCHS, "trials": 16, "seed": 4, **VARIANTS[variant]}
    return parse_sweep(fields)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_seed_gives_the_same_journal_byte_by_byte(variant: str, tmp_path: Path) -> None:
    config = plan(variant)
    for name in ("once", "again"):
        begin(tmp_path / name, config).run()
    once = (tmp_path / "once").read_bytes()
    assert once == (tmp_path / "again").read_bytes()
    state = load_state(tmp_path / "once")
    assert (state.budget_spent is not None) == ("budget" in variant)
    if "budget" not in variant:
        assert all(trial.state in FINAL_STATES for trial in state.trials.values())
        assert len(state.trials) == config.trials
        counts = state.counts()
        assert counts["diverged"] >= 1
        assert counts["oom"] >= 1
        assert counts["completed"] >= 1
        assert ("pruned" in counts) == (config.scheduler != "none")
        assert sum(trial.deaths for trial in state.trials.values()) >= 2
    other = config.model_copy(update={"seed": 5})
    begin(tmp_path / "other", other).run()
    assert once != (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=times(4, 10), deadline=None)
@given(data=st.data())
def test_rebuilt_at_any_line_it_goes_on_as_it_would_have(
    variant: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut after a line, within a step or between two; the rest of the journal is the same."""
    folder = tmp_path_factory.mktemp("cut")
    config = plan(variant)
    whole = begin(folder / "whole", config)
    ends = [1]  # lines in the journal before each step
    while whole.step():
        ends.append(len(whole.driver.journal.path.read_bytes().splitlines()))
    lines = (folder / "whole").read_bytes().splitlines(keepends=True)
    cut = data.draw(st.integers(1, len(lines)), label="lines kept")
    before = max(step for step, end in enumerate(ends) if end <= cut)
    part = begin(folder / "part", config)
    for _ in range(before):
        assert part.step()
    (folder / "part").write_bytes(b"".join(lines[:cut]))
    # the driver that was killed lived until its last line
    part.clock.now_s = max(part.clock.now_s, json.loads(lines[cut - 1])["time"])
    journal = Journal(folder / "part", clock=part.clock, durable=False)
    part.continue_with(rebuilt(config, journal, part.clock))
    part.run()
    assert (folder / "part").read_bytes().splitlines(keepends=True) == lines


def test_time_is_training_reports_and_saves(tmp_path: Path) -> None:
    """Two workers, one fast trial and one slow one, in seconds that are known."""
    config = parse_sweep({"name": "s", "epochs": EPOCHS, "trials": 3, "scheduler": "none"})
    clock = VirtualClock(now_s=1000.0)
    driver = start_simulated(
        tmp_path / "e",
        config,
        space,
        clock=clock,
        workers=2,
        total_images=200,
        train_images=EPOCH,
        marks=(100, 200),
    )
    simulation = Simulation(
        driver,
        curve_of(value, "knn_top1"),
        clock=clock,
        workers=2,
        pace=lambda segment: (0.01, 0.02, 0.01)[segment.number],
        overhead_s=1.0,
        save_s=0.5,
    )
    simulation.run()
    told = [
        (event["event"], event["number"], event.get("mark"), event["time"] - 1000.0)
        for event in read_events(tmp_path / "e")
        if event["event"] in ("started", "report", "checkpoint", "finished")
    ]
    assert told == [
        *[("started", 0, 0, 0.0), ("started", 1, 0, 0.0)],
        *[("report", 0, 100, 2.0), ("checkpoint", 0, 100, 2.5)],
        *[("report", 1, 100, 3.0), ("checkpoint", 1, 100, 3.5)],
        *[("report", 0, 200, 4.5), ("checkpoint", 0, 200, 5.0), ("finished", 0, 200, 5.0)],
        *[("started", 2, 0, 5.0)],
        *[("report", 1, 200, 6.5), ("report", 2, 100, 7.0)],
        *[("checkpoint", 1, 200, 7.0), ("finished", 1, 200, 7.0), ("checkpoint", 2, 100, 7.5)],
        *[("report", 2, 200, 9.5), ("checkpoint", 2, 200, 10.0), ("finished", 2, 200, 10.0)],
    ]
    assert clock.now_s == 1010.0
    assert driver.journal.state.wall_s == 10.0


def test_a_worker_that_always_dies_loses_its_trial_and_no_other(tmp_path: Path) -> None:
    def deadly(segment: Segment, mark: int) -> Outcome:
        if segment.number == 1 and mark == 200:
            return Outcome(kind=DIED, reason="killed", samples_seen=110)
        return Outcome({"knn_top1": value(segment.fields, mark)})

    config = parse_sweep({"name": "s", "epochs": EPOCHS, "trials": 4, "scheduler": "none"})
    begin(tmp_path / "e", config, deadly).run()
    state = load_state(tmp_path / "e")
    assert state.counts() == {"completed": 3, "lost": 1}
    assert state.trials[1].deaths == MAX_DEATHS + 1
    assert sorted(state.trials[1].reports) == [100]  # it went on from its checkpoint each time


def test_drained_it_stops_and_a_driver_made_anew_completes_it(tmp_path: Path) -> None:
    config = plan("stopping, random")
    simulation = begin(tmp_path / "e", config, curve_of(value, "knn_top1"))
    while simulation.clock.now_s < 20:
        assert simulation.step()
    busy = set(simulation.in_flight)
    assert len(busy) == WORKERS
    simulation.driver.drain("asked to")
    simulation.run()
    state = simulation.driver.journal.state
    assert simulation.in_flight == set()
    left = {trial.number for trial in state.unfinished()}
    assert left <= busy
    assert left
    journal = Journal(tmp_path / "e", clock=simulation.clock, durable=False)
    simulation.continue_with(rebuilt(config, journal, simulation.clock))
    simulation.run()
    state = load_state(tmp_path / "e")
    assert all(trial.state in FINAL_STATES for trial in state.trials.values())
    assert all(state.trials[number].attempts == 2 for number in left)


def test_no_worker_is_refused(tmp_path: Path) -> None:
    driver = begin(tmp_path / "e", plan("none, random")).driver
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        Simulation(driver, mishaps, clock=VirtualClock(), workers=0)


def large(path: Path, trials: int, workers: int) -> tuple[float, Simulation]:
    """Processor's seconds that a random search of `trials` takes; the simulation at its end."""
    config = parse_sweep({"name": "s", "epochs": EPOCHS, "trials": trials, "sampler": "random"})
    clock = VirtualClock()
    driver = start_simulated(
        path,
        config,
        space,
        clock=clock,
        workers=workers,
        total_images=TOTAL,
        train_images=EPOCH,
        marks=MARKS,
    )
    curve: Callable[[Segment, int], Outcome] = curve_of(value, "knn_top1")
    simulation = Simulation(driver, curve, clock=clock, workers=workers, pace=steady(50.0))
    started = time.process_time()
    simulation.run()
    return time.process_time() - started, simulation


@pytest.mark.slow
def test_ten_thousand_trials_on_a_thousand_workers_take_a_minute_at_most(tmp_path: Path) -> None:
    """By default a quarter of both, in a quarter of the time."""
    quarters = times(1, 4)
    trials = 2_500 * quarters
    took_s, simulation = large(tmp_path / "e", trials, 250 * quarters)
    counts = simulation.driver.journal.state.counts()
    assert sum(counts.values()) == trials
    assert counts["completed"] >= 25 * quarters
    assert took_s < 15 * quarters
