"""What a sweep would cost, before it is started: `contrasweep sweep --dry-run`.

Pace and sizes are measured (`search.calibration`). How many trials pass each rung is found by
simulating the sweep: its own driver, scheduler, budgets and clock, on trials of random rank. A
sampler that learns makes later trials better, and more of them pass: some of the simulated sweeps
have such trials then, and the stated ranges take them in. Nothing is written.

Left out: the seconds that Ray takes to start, trials that fail, and how pace and size depend on
what is searched (the batch size, the loss).
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from search.budget import gpu_hours
from search.calibration import CALIBRATION_S, Calibration, calibrate, gpus_of_a_trial
from search.config import SweepConfig
from search.console import out_console
from search.driver import Driver
from search.progress import duration
from search.segments import Segment
from search.simulate import (
    Outcome,
    Simulation,
    UnwrittenJournal,
    VirtualClock,
    begin_journal,
    steady,
)
from search.state import Event

if TYPE_CHECKING:
    from search.plan import Plan

SIMULATIONS = 24
SIMULATED_TRIALS = 4_000
"""Of all simulations together, 3 ms each; but there are at least four simulations."""
MOST_TRIALS = 1_000
"""Of one simulation; further trials cost in proportion."""
LEARNING = (0.0, 0.0, 0.5, 1.0)
"""How much better the last trial is than the first, in one simulation after the other, where the
sampler learns; random ranks are spread over 1. In simulated sweeps of `quick`, whose values were
smooth functions of its parameters, TPE came to the images of 0 to 0.5 (32 trials) and of 0.25 to
1 (100 trials)."""


@dataclass(frozen=True)
class Spread:
    """Mean, least and most over the simulated sweeps."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RungForecast:
    """A rung, and how many trials train on beyond it."""

    images: int
    epochs: float
    trials: Spread


@dataclass(frozen=True)
class Forecast:
    """What a sweep would come to. Images are nominal: a trial goes to the end of its last batch."""

    trials: int
    slots: int
    scheduler: str
    images_per_trial: int
    epochs: float
    rungs: tuple[RungForecast, ...]
    started: Spread
    """Trials that the budget lets begin."""
    completed: Spread
    images: Spread
    images_unstopped: int
    """If each trial went on to its end."""
    hours: Spread
    hours_unstopped: float
    gpu_hours: Spread | None
    spent: str | None
    """The budget that ends most simulated sweeps before all trials are tried."""
    checkpoints: int
    """Most that lie on the disk at one time."""
    disk_bytes: int
    simulations: int
    calibration: Calibration

    def to_json(self) -> dict[str, Any]:
        """The object that --dry-run --json prints."""
        return asdict(self)


def forecast(
    plan: Plan,
    slots: int,
    *,
    gpus_per_trial: float | None = None,
    calibration: Calibration | None = None,
    seconds: float = CALIBRATION_S,
) -> Forecast:
    """What `plan` would cost with `slots` trials at a time.

    A `calibration` that is not given is made, of about `seconds` of training; `gpus_per_trial`:
    as configured, or as a sweep on this machine would have it. ValueError in one line if the
    default configuration cannot be trained.
    """
    config = plan.config
    gpus = gpus_of_a_trial(config) if gpus_per_trial is None else gpus_per_trial
    trials = plan.trials
    measured = calibration or calibrate(plan, min(slots, trials), gpus, seconds)
    simulated_trials = min(trials, MOST_TRIALS)
    count = min(SIMULATIONS, max(4, SIMULATED_TRIALS // simulated_trials))
    learning = (0.0,) if config.sampler in ("random", "grid") else LEARNING
    simulated = []
    for number, gain in zip(range(count), itertools.cycle(learning), strict=False):
        changes = {"trials": simulated_trials, "gpus_per_trial": gpus, "seed": number}
        outcome = _simulate(plan, config.model_copy(update=changes), slots, measured, gain)
        simulated.append(_extrapolated(outcome, trials / simulated_trials, config))

    def spread(values: list[float]) -> Spread:
        return Spread(fmean(values), min(values), max(values))

    spent = [each.spent for each in simulated if each.spent is not None]
    paused = max(each.paused for each in simulated)
    # A running trial's last checkpoint stays until the next one is written.
    checkpoints = 2 * min(slots, trials) + paused + min(config.keep_checkpoints, trials)
    train = len(plan.data.train)
    return Forecast(
        trials=trials,
        slots=slots,
        scheduler=config.scheduler,
        images_per_trial=plan.total_images,
        epochs=plan.total_images / train,
        rungs=tuple(
            RungForecast(rung, rung / train, spread([each.beyond[at] for each in simulated]))
            for at, rung in enumerate(plan.rungs)
        ),
        started=spread([each.started for each in simulated]),
        completed=spread([each.completed for each in simulated]),
        images=spread([each.images for each in simulated]),
        images_unstopped=trials * plan.total_images,
        hours=spread([each.hours for each in simulated]),
        hours_unstopped=math.ceil(trials / slots) * _trial_s(plan, measured) / 3600,
        gpu_hours=spread([each.gpu_hours for each in simulated]) if gpus else None,
        spent=spent[0] if 2 * len(spent) > len(simulated) else None,
        checkpoints=checkpoints,
        disk_bytes=checkpoints * measured.checkpoint_bytes,
        simulations=len(simulated),
        calibration=measured,
    )


def print_forecast(found: Forecast) -> None:
    """The plan, what it would cost, and the measurements on which that rests."""
    out_console.print(
        f"{found.trials:,} trials of up to {found.images_per_trial:,} images "
        f"({found.epochs:.3g} epochs), {found.slots:,} at a time"
    )
    table = _table("", "images", "epochs", "trials", "range")
    table.add_row("started", "0", "0", *_counted(found.started))
    for rung in found.rungs:
        row = (f"{rung.images:,}", f"{rung.epochs:.3g}", *_counted(rung.trials))
        table.add_row("train on beyond", *row)
    end = (f"{found.images_per_trial:,}", f"{found.epochs:.3g}", *_counted(found.completed))
    table.add_row("reach the end", *end)
    out_console.print(table)
    sums = _table("", "in all", "range", "without stopping")
    sums.add_row("images", *_counted(found.images), f"{found.images_unstopped:,}")
    sums.add_row("time", *_lasting(found.hours), duration(found.hours_unstopped * 3600))
    if found.gpu_hours is not None:
        hours = found.gpu_hours
        sums.add_row("GPU hours", f"{hours.mean:.3g}", f"{hours.low:.3g} to {hours.high:.3g}", "")
    out_console.print(sums)
    if found.spent is not None:
        out_console.print(f"{found.spent} before all trials are tried")
    measured = found.calibration
    out_console.print(
        f"disk: at most {found.checkpoints:,} checkpoints of {_size(measured.checkpoint_bytes)} "
        f"at a time, {_size(found.disk_bytes)}"
    )
    which = "the default configuration" if measured.is_default else "the base configuration"
    processes = "process" if measured.at_once == 1 else "processes"
    threads = "thread" if measured.threads == 1 else "threads"
    out_console.print(
        f"measured: {which} ({measured.encoder}, {measured.learns}, batch size "
        f"{measured.batch_size:,}) in {measured.at_once} {processes} at once here, "
        f"{measured.threads} {threads} each, on {measured.device}: {measured.images_per_s:,.0f} "
        f"images a second, {measured.evaluation_s:.2g} s a report; other batch sizes, losses and "
        "encoders of the space have another pace and size; the time leaves out Ray's start, and is "
        "longer where the machine has more to do than now",
        style="dim",
        soft_wrap=True,
    )


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    return table


def _counted(spread: Spread) -> tuple[str, str]:
    return f"{spread.mean:,.0f}", f"{spread.low:,.0f} to {spread.high:,.0f}"


def _lasting(hours: Spread) -> tuple[str, str]:
    mean, low, high = (duration(each * 3600) for each in (hours.mean, hours.low, hours.high))
    return mean, f"{low} to {high}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


# ---- simulated sweeps


class _Outcome(NamedTuple):
    """What one simulated sweep came to; `beyond` is trials by rung, `paused` the most at a time."""

    started: float
    completed: float
    beyond: tuple[float, ...]
    images: float
    hours: float
    gpu_hours: float
    paused: int
    spent: str | None


class _CountingJournal(UnwrittenJournal):
    """Counts the trials that wait for a promotion."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock)
        self._paused: set[int] = set()
        self.most_paused = 0

    def append(self, event: str, **fields: Any) -> Event:
        record = super().append(event, **fields)
        if event == "report" and fields["decision"]["pause"]:
            self._paused.add(fields["number"])
            self.most_paused = max(self.most_paused, len(self._paused))
        elif event in ("started", "finished"):
            self._paused.discard(fields["number"])
        return record


def _simulate(
    plan: Plan, config: SweepConfig, slots: int, measured: Calibration, gain: float
) -> _Outcome:
    """The sweep of `config` on trials of random rank, the last of them by `gain` better."""
    # Random draws of the space: strata, batches and doubles as there will be, and no waiting.
    config = config.model_copy(update={"sampler": "random", "also": [], "points": []})
    sign = 1.0 if config.mode == "max" else -1.0

    def curve(segment: Segment, mark: int) -> Outcome:
        rank = random.Random(f"{config.seed} {segment.number}").random()
        return Outcome({config.objective: sign * (rank + gain * segment.number / config.trials)})

    clock = VirtualClock()
    journal = _CountingJournal(clock)
    began_s = clock()
    begin_journal(
        journal,
        config,
        workers=slots,
        total_images=plan.total_images,
        marks=plan.marks,
        rungs=plan.rungs,
    )
    driver = Driver.from_journal(config, journal, plan.space, plan.defaults, strata=plan.strata)
    Simulation(
        driver,
        curve,
        clock=clock,
        workers=slots,
        pace=steady(measured.images_per_s),
        overhead_s=measured.evaluation_s,
        save_s=_save_s(plan, measured),
    ).run()
    trials = journal.state.trials.values()
    furthest = [max(trial.reports, default=0) for trial in trials]
    completed = sum(trial.state == "completed" for trial in trials)
    probes_h = completed * measured.probe_s / 3600
    gpus = config.gpus_per_trial or 0.0
    return _Outcome(
        started=len(furthest),
        completed=completed,
        beyond=tuple(sum(mark > rung for mark in furthest) for rung in plan.rungs),
        images=journal.state.samples_seen,
        hours=(clock() - began_s) / 3600 + probes_h / min(slots, len(furthest)),
        gpu_hours=gpu_hours(journal.state, (), clock()) + probes_h * gpus,
        paused=journal.most_paused,
        spent=driver.spent,
    )


def _extrapolated(found: _Outcome, times: float, config: SweepConfig) -> _Outcome:
    """The outcome of `times` as many trials, or of as many as the budgets allow."""
    if found.spent is not None or times == 1:
        return found
    budgets = {
        "hours": (config.max_hours, found.hours),
        "GPU hours": (config.max_gpu_hours, found.gpu_hours),
        "images": (config.max_images, found.images),
    }
    spent = None
    for name, (limit, used) in budgets.items():
        if limit is not None and used * times > limit:
            times, spent = limit / used, f"the budget of {limit:,g} {name} is spent"
    return _Outcome(
        started=found.started * times,
        completed=found.completed * times,
        beyond=tuple(trials * times for trials in found.beyond),
        images=found.images * times,
        hours=found.hours * times,
        gpu_hours=found.gpu_hours * times,
        paused=math.ceil(found.paused * times),
        spent=spent,
    )


def _save_s(plan: Plan, measured: Calibration) -> float:
    """Seconds that saving costs a report: where it is slow, not each one is saved."""
    from search.trainable import SAVE_SHARE

    between_s = plan.total_images / len(plan.marks) / measured.images_per_s + measured.evaluation_s
    return min(measured.save_s, SAVE_SHARE * between_s)


def _trial_s(plan: Plan, measured: Calibration) -> float:
    """Seconds of a trial that goes on to its end."""
    report_s = measured.evaluation_s + _save_s(plan, measured)
    training_s = plan.total_images / measured.images_per_s
    return training_s + len(plan.marks) * report_s + measured.probe_s
