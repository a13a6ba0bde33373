"""A sweep on virtual workers under a virtual clock, for tests, replays and experiments.

The decisions are those of a real sweep: the same `Driver`, and through it the same study,
scheduler, budgets and journal. Only training is replaced, by a `Curve` that says what a worker
brings back at a mark, and time, by a `VirtualClock` that moves from event to event. A report, a
save and the end of a segment are events of their own, as they are in Ray Tune, so that other
trials' events may come between them.

Nothing here reads the time or a random number: events happen in the order of (virtual time,
sequence in which they were planned), so the same driver and curve give the same journal, byte by
byte. Left out: workers that join or leave during a sweep.
"""

from __future__ import annotations

import heapq
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from search.brackets import plan_rungs
from search.config import SweepConfig
from search.driver import REPORT, Driver
from search.journal import Journal
from search.segments import Next, Segment
from search.state import SCHEMA, Event
from search.strata import Strata
from spaces import Space

DIED = "died"
"""Outcome of a segment whose worker died; the others are `REPORT` and the failing states."""


@dataclass
class VirtualClock:
    """Seconds that the simulation has come to; call it for the time, as `time.time`.

    It begins after 0, which the journal keeps for "no session yet".
    """

    now_s: float = 1.0

    def __call__(self) -> float:
        """The virtual time in seconds."""
        return self.now_s


@dataclass(frozen=True)
class Outcome:
    """What a worker brings back when it was to train up to a mark.

    `kind` is `REPORT`, a failing final state (`diverged`, `oom`, `error`) or `DIED`;
    `samples_seen` is where it then stands, in images (None: at the mark), by which its time is
    reckoned and, but for a death, the trial charged.
    """

    metrics: Mapping[str, float | None] = field(default_factory=dict)
    kind: str = REPORT
    reason: str = ""
    samples_seen: int | None = None


Curve = Callable[[Segment, int], Outcome]
"""(segment, mark) -> what comes of training that segment up to the mark."""
Pace = Callable[[Segment], float]
"""Seconds that a segment needs for one image."""


def curve_of(value: Callable[[Mapping[str, Any], int], float | None], objective: str) -> Curve:
    """A `Curve` that never fails, from a function (`TrainConfig` fields, mark) -> objective."""
    return lambda segment, mark: Outcome({objective: value(segment.fields, mark)})


def steady(images_per_s: float) -> Pace:
    """The same pace for every trial."""
    return lambda segment: 1.0 / images_per_s


class UnwrittenJournal(Journal):
    """A journal that is only its fold, for a simulation whose lines nobody reads."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(Path(os.devnull), clock=clock, durable=False)

    def append(self, event: str, **fields: Any) -> Event:
        """Take one event into the state; its values must be such as JSON has."""
        record: Event = {"event": event, "time": self.clock(), **fields}
        self.state.apply(record)
        return record


def start_simulated(
    path: Path,
    config: SweepConfig,
    space: Space,
    *,
    clock: VirtualClock,
    workers: int,
    total_images: int,
    train_images: int,
    marks: Sequence[int],
    defaults: dict[str, Any] | None = None,
    strata: Strata = Strata(),  # noqa: B008  frozen
) -> Driver:
    """A driver at the beginning of a sweep, its new journal at `path`.

    Trials report at `marks` and at the scheduler's rungs; all lengths are in images.
    """
    journal = Journal.create(path, clock=clock, durable=False)
    rungs = plan_rungs(config, train_images, total_images, lambda more: sorted({*marks, *more}))
    begin_journal(
        journal,
        config,
        workers=workers,
        total_images=total_images,
        marks=sorted({*marks, *rungs, total_images}),
        rungs=rungs,
    )
    return Driver.from_journal(config, journal, space, defaults, strata=strata)


def begin_journal(
    journal: Journal,
    config: SweepConfig,
    *,
    workers: int,
    total_images: int,
    marks: Sequence[int],
    rungs: Sequence[int],
    **more: Any,
) -> None:
    """Write the line `sweep_started`, with what a driver reads of it; lengths in images.

    `more` is what its other readers want, such as the recorder; it may replace `sweep_id`.
    """
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "sweep_id": "simulated",
        "config": config.model_dump(),
        "mode": config.mode,
        "total_images": total_images,
        "marks": tuple(marks),
        "rungs": tuple(rungs),
        "slots": workers,
        "gpus_per_trial": config.gpus_per_trial or 0.0,
    }
    journal.append("sweep_started", **header | more)


class _Phase(Enum):
    """What an event in the queue is of its segment."""

    REPORT = "report"
    SAVE = "save"
    END = "end"


@dataclass(frozen=True)
class _Work:
    """A segment on its worker, and what happens to it next."""

    segment: Segment
    mark: int
    """The mark that it stands at or is training up to."""
    outcome: Outcome
    phase: _Phase = _Phase.REPORT
    stop: bool = False


class Simulation:
    """`workers` virtual workers that train what `driver` hands out, an event a `step`.

    `overhead_s` is the time that each report costs beside its training, `save_s` that of each
    checkpoint; `save_is_cheap` is what the workers say to the driver, which then has every report
    saved. `clock` must be the one that the driver and its journal read.
    """

    def __init__(
        self,
        driver: Driver,
        curve: Curve,
        *,
        clock: VirtualClock,
        workers: int,
        pace: Pace | None = None,
        overhead_s: float = 0.0,
        save_s: float = 0.0,
        save_is_cheap: bool = True,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}; give it one")
        self.driver = driver
        self.clock = clock
        self.workers = workers
        self._curve = curve
        self._pace = pace or steady(1000.0)
        self._overhead_s, self._save_s = overhead_s, save_s
        self._save_is_cheap = save_is_cheap
        self._marks: tuple[int, ...] = tuple(driver.journal.state.header["marks"])
        self.in_flight: set[int] = set()
        """Numbers of the trials that workers hold at the moment."""
        self._events: list[tuple[float, int, _Work]] = []
        self._planned = 0
        self._ask = True

    def step(self) -> bool:
        """One event: a free worker is given a segment, or a busy one brings something back.

        False, and nothing has happened: the driver has nothing more.
        """
        answer: Segment | Next = Next.WAIT
        if self._ask and len(self._events) < self.workers:
            answer = self.driver.next_segment(self.workers)
            if isinstance(answer, Segment):
                assert answer.number not in self.in_flight, "a trial is on two workers at once"
                self.in_flight.add(answer.number)
                self._train(answer, answer.checkpoint_mark)
                return True
            self._ask = False  # until something has happened
        if not self._events:
            assert answer is Next.FINISHED, "the driver waits, and no worker is at work"
            self._ask = True  # a driver that was given more trials may have more to hand out
            return False
        self.clock.now_s, _, work = heapq.heappop(self._events)
        self._ask = True
        if work.phase is _Phase.END or work.outcome.kind == DIED:
            self._end(work)
        elif work.phase is _Phase.SAVE:
            self._save(work)
        else:
            self._report(work)
        return True

    def run(self) -> None:
        """All the events there are."""
        while self.step():
            pass

    def continue_with(self, driver: Driver) -> None:
        """Put another driver in place of the present one, with the same segments at work.

        It is to have been rebuilt from the journal up to the present step.
        """
        for number in self.in_flight:
            driver.in_flight.add(number)
            driver.to_reissue.pop(number, None)
        self.driver = driver
        self._ask = True

    # ---- events

    def _train(self, segment: Segment, since: int) -> None:
        """Plan the report at the mark after `since`."""
        following = bisect_right(self._marks, since)
        # a full trial whose last checkpoint was lost makes its last report once more
        mark = self._marks[min(following, len(self._marks) - 1)]
        outcome = self._curve(segment, mark)
        reached = mark if outcome.samples_seen is None else outcome.samples_seen
        training_s = max(0, reached - since) * self._pace(segment)
        self._plan(training_s + self._overhead_s, _Work(segment, mark, outcome))

    def _plan(self, after_s: float, work: _Work) -> None:
        heapq.heappush(self._events, (self.clock.now_s + after_s, self._planned, work))
        self._planned += 1

    def _report(self, work: _Work) -> None:
        result = self._result(work)
        stop = self.driver.on_result(result)
        if self.driver.wants_checkpoint(result):
            saved = _Work(work.segment, work.mark, work.outcome, _Phase.SAVE, stop)
            self._plan(self._save_s, saved)
        else:
            self._go_on(work, stop)

    def _save(self, work: _Work) -> None:
        number = work.segment.number
        self.driver.on_checkpoint(number, work.mark, f"simulated/{number}/{work.mark}")
        self._go_on(work, work.stop)

    def _go_on(self, work: _Work, stop: bool) -> None:
        if stop:
            self._plan(0.0, _Work(work.segment, work.mark, work.outcome, _Phase.END))
        else:
            self._train(work.segment, work.mark)

    def _end(self, work: _Work) -> None:
        died = work.outcome.kind == DIED
        last = None if died else self._result(work)
        self.in_flight.discard(work.segment.number)
        self.driver.on_segment_end(work.segment.number, last, work.outcome.reason)

    def _result(self, work: _Work) -> dict[str, Any]:
        """As a trainable returns it; it names no node and no process, since there is none."""
        outcome = work.outcome
        seen = work.mark if outcome.samples_seen is None else outcome.samples_seen
        return {
            "outcome": outcome.kind,
            "reason": outcome.reason,
            "number": work.segment.number,
            "mark": work.mark,
            "samples_seen": seen,
            "save_is_cheap": self._save_is_cheap,
            "metrics": dict(outcome.metrics),
        }
