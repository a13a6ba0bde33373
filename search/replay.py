"""Recorded learning curves, searched again with other settings of early stopping, in seconds.

Each setting is tried on the same shuffled orders of arrival: the real driver and scheduler decide,
and the workers of `search.simulate` bring back what was recorded. That says what a setting would
have saved and what it would have cost on these trials, not on those that a sampler would have
chosen had it seen other results.

Only what was recorded is known. A rung that falls between two recorded marks moves up to the next
one. A trial that was stopped when it was recorded has no values beyond; a setting that lets it go
on ends it there, is charged its full resource, and counts it in `unknown`. A failed trial fails
again, at the images at which it did.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np

from search.asha import score_of
from search.brackets import bracket_of, make_brackets, plan_rungs
from search.config import SweepConfig, parse_sweep
from search.driver import Driver
from search.proposals import Proposals
from search.seeds import derived_seed
from search.segments import Segment
from search.simulate import (
    Outcome,
    Simulation,
    UnwrittenJournal,
    VirtualClock,
    begin_journal,
)

MIDDLE = (0.025, 0.975)
"""Quantiles between which a range over the shuffles lies."""
UNKNOWN = "no value was recorded beyond"
NEVER = 10**9
"""Failures alike, or checkpoints kept, that no replay comes to."""
SCHEDULERS: dict[str, dict[str, Any]] = {
    "asha": {"scheduler": "asha"},
    "promote": {"scheduler": "asha", "promote": True},
    "median": {"scheduler": "median"},
    "none": {"scheduler": "none"},
}
"""What a setting may be called -> fields of `SweepConfig`."""


@dataclass(frozen=True)
class RecordedTrial:
    """One trial of a recorded sweep."""

    number: int
    values: Mapping[int, float | None]
    """Mark in images -> the objective; None where it was not finite."""
    failed: str | None = None
    """The failing final state it came to; None: completed, stopped or cut off."""
    samples_seen: int = 0
    """Images that it was trained on in all."""
    s_per_image: float = 1e-3
    """Its pace, in seconds."""
    stratum: str = ""
    """Level of the choice that the sweep was stratified by, if it was: it competes there alone."""


@dataclass(frozen=True)
class Recording:
    """A recorded sweep, in images. ValueError if no trial of it reached its full resource."""

    trials: tuple[RecordedTrial, ...]
    objective: str
    total_images: int
    train_images: int
    workers: int = 1
    """Trials that run at once."""

    def __post_init__(self) -> None:
        if not self.finals():
            raise ValueError(
                f"no trial was recorded to its full {self.total_images:,} images with a finite "
                f"{self.objective}, so nothing tells which one was best; record a sweep with "
                "--scheduler none, or a larger --audit"
            )

    @property
    def marks(self) -> tuple[int, ...]:
        """Every mark at which a trial reported, ascending."""
        return tuple(sorted({mark for trial in self.trials for mark in trial.values}))

    def finals(self) -> dict[int, float]:
        """Trial number -> its value at the full resource, where that is known and finite."""
        ends = {trial.number: trial.values.get(self.total_images) for trial in self.trials}
        return {n: v for n, v in ends.items() if v is not None and math.isfinite(v)}

    def without_stopping(self) -> int:
        """Images that all trials together take if none is stopped; failed ones, what they took."""
        return sum(
            trial.samples_seen if trial.failed else self.total_images for trial in self.trials
        )


@dataclass(frozen=True)
class Setting:
    """Early stopping to be tried: a name in `SCHEDULERS`, the grace in epochs, and so on."""

    scheduler: str = "asha"
    grace: float = 1.0
    reduction: int = 3
    brackets: int = 1
    min_competitors: int | None = None
    """Values at a rung before it decides; None: the scheduler's own number."""


@dataclass(frozen=True)
class Row:
    """What a setting comes to over all shuffles; `_low` to `_high` holds 95 of 100 of them."""

    scheduler: str
    grace: float | None
    """In epochs; None for a scheduler that has none, as the two below."""
    reduction: int | None
    brackets: int | None
    rungs: tuple[int, ...]
    """In images, as replayed."""
    moved: bool
    """Whether a rung had to move up to a recorded mark."""
    shuffles: int
    images: float
    """Mean images spent, all trials together; unknown ones are charged their full resource."""
    images_low: float
    images_high: float
    saving: float
    """Mean share of the images without stopping that is not spent."""
    saving_low: float
    saving_high: float
    saving_at_most: float
    """The mean saving if unknown trials were charged no more than what is known."""
    regret: float | None
    """Mean of (best final value - that of the trial chosen); None if none was ever chosen."""
    regret_low: float | None
    regret_high: float | None
    chosen: int
    """Shuffles that chose a trial whose final value is known, on which `regret` rests."""
    survival: float
    """Share of the shuffles in which the best trial reached the full resource."""
    survival_low: float
    """Wilson's 95 % interval of `survival`."""
    survival_high: float
    unknown: float
    """Share of the trial runs that ended because nothing more was recorded of them."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def replay(
    recording: Recording,
    settings: Sequence[Setting],
    *,
    shuffles: int = 200,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Try each setting on the same `shuffles` orders of arrival, which `seed` draws.

    `progress` is told the settings that are done, and how many there are; first none, once all
    are found to make sense. ValueError for a setting that these records cannot tell of.
    """
    if shuffles < 1:
        raise ValueError(f"shuffles must be at least 1, got {shuffles}; 200 is usual")
    plans = [(setting, *_plan(recording, setting)) for setting in settings]
    progress(0, len(plans))
    orders = [_shuffled(recording.trials, seed, each) for each in range(shuffles)]
    rows = []
    for setting, config, rungs, moved in plans:
        runs = [
            _run(recording, config.model_copy(update={"seed": each}), rungs, order)
            for each, order in enumerate(orders)
        ]
        rows.append(_row(recording, setting, rungs, moved, runs))
        progress(len(rows), len(plans))
    return rows


def replay_order(
    recording: Recording, setting: Setting, order: Sequence[RecordedTrial], *, seed: int = 0
) -> Driver:
    """One replay of the trials in this order; `seed` draws their brackets.

    The driver at its end: trial i of its journal is `order[i]`.
    """
    config, rungs, _ = _plan(recording, setting)
    return _drive(recording, config.model_copy(update={"seed": seed}), rungs, order)


def _shuffled(trials: Sequence[RecordedTrial], seed: int, number: int) -> tuple[RecordedTrial, ...]:
    order = list(trials)
    random.Random(derived_seed(seed, number, "shuffle")).shuffle(order)
    return tuple(order)


def _plan(recording: Recording, setting: Setting) -> tuple[SweepConfig, tuple[int, ...], bool]:
    """The sweep's configuration, its rungs among the recorded marks, and whether any moved."""
    if setting.scheduler not in SCHEDULERS:
        known = ", ".join(SCHEDULERS)
        raise ValueError(f"unknown scheduler {setting.scheduler!r} of a replay; known: {known}")
    brackets = setting.brackets if SCHEDULERS[setting.scheduler]["scheduler"] == "asha" else 1
    config = parse_sweep(
        {
            "name": "replay",
            "sampler": "random",
            "objective": recording.objective,
            "trials": len(recording.trials),
            "epochs": recording.total_images / recording.train_images,
            "grace": setting.grace,
            "reduction": setting.reduction,
            "brackets": brackets,
            "min_competitors": setting.min_competitors,
            "keep_checkpoints": NEVER,
            "failures_alike": NEVER,
            **SCHEDULERS[setting.scheduler],
        }
    )
    marks, total = recording.marks, recording.total_images
    wanted = plan_rungs(config, recording.train_images, total, lambda extra: list(marks))
    moved = sorted({marks[bisect_left(marks, rung)] for rung in wanted} - {total})
    if config.scheduler != "none" and len(moved) < brackets:
        epochs = [mark / recording.train_images for mark in marks]
        raise ValueError(
            f"grace {setting.grace:g} with reduction {setting.reduction} gives {len(moved)} rungs "
            f"below the end among the recorded reports (at {_listed(epochs)} epochs), and "
            f"{brackets} brackets need {brackets}; use a shorter --grace"
        )
    grace = max(1, round(setting.grace * recording.train_images))
    return config, tuple(moved), tuple(moved) != wanted or bool(moved and moved[0] != grace)


def _listed(numbers: Sequence[float]) -> str:
    texts = [f"{number:g}" for number in numbers]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:4], "...", texts[-1]])


class RecordedStudy:
    """A study that learns nothing: what comes next is given."""

    def report(self, number: int, mark: int, value: float | None) -> None:
        """Nothing: see the class."""

    def tell(self, number: int, state: str, values: Sequence[float | None]) -> None:
        """Nothing: see the class."""


class RecordedProposals:
    """Hands out recorded trials one by one, in the place of a sweep's `Proposals`."""

    def __init__(
        self, config: SweepConfig, rungs: Sequence[int], order: Sequence[RecordedTrial]
    ) -> None:
        self._config, self._rungs, self._order = config, rungs, order
        self.exhausted: str | None = None
        self.newly_exhausted: list[str] = []
        self.study = RecordedStudy()

    def next(self, number: int) -> dict[str, Any]:
        """Trial `number`: the next in order, in its own stratum and a drawn bracket."""
        nothing: dict[str, Any] = {key: {} for key in ("params", "distributions", "system_attrs")}
        bracket = bracket_of(self._config, self._rungs, number)
        return {
            **nothing,
            "config": {},
            "default": False,
            "bracket": bracket,
            "stratum": self._order[number].stratum,
        }


@dataclass(frozen=True)
class _Run:
    """What one replay of one setting came to."""

    known_images: int
    charged_images: int
    unknown: int
    best_survived: bool
    regret: float | None


def _run(
    recording: Recording,
    config: SweepConfig,
    rungs: tuple[int, ...],
    order: Sequence[RecordedTrial],
) -> _Run:
    state = _drive(recording, config, rungs, order).journal.state
    finals, total = recording.finals(), recording.total_images
    score = {number: score_of(value, config.mode) for number, value in finals.items()}
    most = max(score.values())
    unknown = [trial for trial in state.trials.values() if trial.reason.startswith(UNKNOWN)]
    missing = sum(total - trial.samples_seen for trial in unknown)
    chosen = state.best(recording.objective, config.mode)
    of_chosen = None if chosen is None else score.get(order[chosen.number].number)
    return _Run(
        known_images=state.samples_seen,
        charged_images=state.samples_seen + missing,
        unknown=len(unknown),
        best_survived=any(
            trial.state == "completed" and score.get(order[number].number) == most
            for number, trial in state.trials.items()
        ),
        regret=None if of_chosen is None else most - of_chosen,
    )


def _drive(
    recording: Recording,
    config: SweepConfig,
    rungs: tuple[int, ...],
    order: Sequence[RecordedTrial],
) -> Driver:
    """Run the trials in this order to the end of the sweep."""
    clock = VirtualClock()
    journal = UnwrittenJournal(clock)
    begin_journal(
        journal,
        config,
        workers=recording.workers,
        total_images=recording.total_images,
        marks=recording.marks,
        rungs=rungs,
    )
    driver = Driver(
        config=config,
        journal=journal,
        # what it has to offer is all that a driver asks of its proposals
        proposals=cast(Proposals, RecordedProposals(config, rungs, order)),
        scheduler=make_brackets(config, rungs),
        total_images=recording.total_images,
    )

    def bring_back(segment: Segment, mark: int) -> Outcome:
        trial = order[segment.number]
        last = max(trial.values, default=0)
        if mark <= last:
            return Outcome({recording.objective: trial.values.get(mark)})
        if trial.failed:
            seen = max(last, trial.samples_seen)
            return Outcome(kind=trial.failed, reason="as it was recorded", samples_seen=seen)
        return Outcome(kind="error", reason=f"{UNKNOWN} {last:,} images", samples_seen=last)

    Simulation(
        driver,
        bring_back,
        clock=clock,
        workers=recording.workers,
        pace=lambda segment: order[segment.number].s_per_image,
        save_is_cheap=False,
    ).run()
    return driver


def _row(
    recording: Recording,
    setting: Setting,
    rungs: tuple[int, ...],
    moved: bool,
    runs: Sequence[_Run],
) -> Row:
    from scipy.stats import binomtest

    without = recording.without_stopping()
    images = [float(run.charged_images) for run in runs]
    savings = [1 - spent / without for spent in images]
    regrets = [run.regret for run in runs if run.regret is not None]
    survived = sum(run.best_survived for run in runs)
    wilson = binomtest(survived, len(runs)).proportion_ci(method="wilson")
    stops, halves = setting.scheduler != "none", setting.scheduler in ("asha", "promote")
    return Row(
        scheduler=setting.scheduler,
        grace=setting.grace if stops else None,
        reduction=setting.reduction if halves else None,
        brackets=setting.brackets if halves else None,
        rungs=rungs,
        moved=moved,
        shuffles=len(runs),
        images=float(np.mean(images)),
        images_low=_quantile(images, 0),
        images_high=_quantile(images, 1),
        saving=float(np.mean(savings)),
        saving_low=_quantile(savings, 0),
        saving_high=_quantile(savings, 1),
        saving_at_most=float(np.mean([1 - run.known_images / without for run in runs])),
        regret=float(np.mean(regrets)) if regrets else None,
        regret_low=_quantile(regrets, 0) if regrets else None,
        regret_high=_quantile(regrets, 1) if regrets else None,
        chosen=len(regrets),
        survival=survived / len(runs),
        survival_low=float(wilson.low),
        survival_high=float(wilson.high),
        unknown=sum(run.unknown for run in runs) / (len(runs) * len(recording.trials)),
    )


def _quantile(values: Sequence[float], end: int) -> float:
    return float(np.quantile(values, MIDDLE[end]))
