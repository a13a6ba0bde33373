"""ASHA as pure code, stopping and promoting, in one bracket or several.

Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020
(https://arxiv.org/abs/1810.05934), section 3. A rung is a number of images at which trials are
compared; at each one the best of every `reduction` go on. Stopping is the variant of Ray Tune's
AsyncHyperBandScheduler: who is not among the best on arrival is stopped. Promoting is the paper's:
who is not among the best waits, and is promoted once it is. Several brackets, of which each begins
a rung later than the one before, are asynchronous Hyperband.

Nothing here knows Ray, a clock or a random number: the same reports in the same order give the
same decisions, which is what makes a sweep resumable and replayable.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decision:
    """What was decided on one report, and on what grounds.

    `rung` is the rung, in images, that the report entered (None: none); `cutoff` the least value
    that passes it; `competitors` how many values, this one included, the cut-off rests on.
    """

    stop: bool
    rung: int | None = None
    cutoff: float | None = None
    competitors: int = 0
    pause: bool = False
    """It waits at its rung, with a checkpoint, for a promotion."""
    audited: bool = False
    """It would have been stopped here; it goes on to the end, to show what that would have cost."""

    def to_json(self) -> dict[str, Any]:
        """As the journal keeps it."""
        return dict(vars(self))


GO_ON = Decision(stop=False)


@dataclass(frozen=True)
class Promotion:
    """Trial `number` goes on from `rung`: among the best of `competitors`, at least `cutoff`."""

    number: int
    rung: int
    cutoff: float
    competitors: int


def rungs_for(grace: int, reduction: int, total: int) -> tuple[int, ...]:
    """The rungs grace, grace * reduction, ... below `total`, all in images."""
    if not 0 < grace <= total:
        raise ValueError(f"grace must be in (0, {total}] images, got {grace}")
    if reduction < 2:
        raise ValueError(f"reduction must be at least 2, got {reduction}")
    rungs = []
    rung = grace
    while rung < total:
        rungs.append(rung)
        rung *= reduction
    return tuple(rungs)


def score_of(value: float | None, mode: str) -> float:
    """A value as a score, of which more is better; minus infinity for one that is not finite."""
    if value is None or not math.isfinite(value):
        return -math.inf
    return value if mode == "max" else -value


class Rung:
    """The values that entered one rung, always in order; (-score, number), so the best is first."""

    def __init__(self) -> None:
        self.scores: dict[int, float] = {}
        self.promoted: set[int] = set()
        self._ranked: list[tuple[float, int]] = []
        self._waiting: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self.scores)

    def enter(self, number: int, score: float, *, waits: bool) -> None:
        """Add a trial's score; one that `waits` may be promoted."""
        self.scores[number] = score
        insort(self._ranked, (-score, number))
        if waits:
            heapq.heappush(self._waiting, (-score, number))

    def rank(self, number: int) -> int:
        """0 for the best; among equals the lower number."""
        return bisect_left(self._ranked, (-self.scores[number], number))

    def cutoff(self, keep: int) -> float:
        """The score of the last of the best `keep`."""
        return -self._ranked[keep - 1][0]

    def best_waiting(self, left: set[int]) -> int | None:
        """The best trial that waits, without those promoted and those that `left`."""
        gone = (self.promoted, left)
        while self._waiting and any(self._waiting[0][1] in each for each in gone):
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None


@dataclass
class Asha:
    """One bracket of ASHA over `rungs` (ascending, in images); `promotes` chooses the form.

    Stopping: a report passes when it is among the best floor(n / reduction), at least one, of
    the n values that entered its rung up to now; ties pass. With fewer than `min_competitors`
    values (default: `reduction`) everyone passes, since a lone first arrival says nothing.

    Promoting: who is among the best floor(n / reduction) goes on at once, all others wait;
    `next_promotion` says who of them has come to be among the best. Of equal values the lower
    number is the better one.
    """

    rungs: Sequence[int]
    reduction: int = 3
    mode: str = "max"
    min_competitors: int | None = None
    promotes: bool = False
    entries: dict[int, Rung] = field(default_factory=dict)
    """rung -> what entered it."""
    _left: set[int] = field(default_factory=set)
    """Trials that wait no more: ended otherwise."""
    _last_rung: dict[int, int] = field(default_factory=dict)

    def report(self, number: int, mark: int, value: float | None) -> Decision:
        """Decide on trial `number` having reached `mark` images with `value`.

        A report lands on the highest rung at or below its mark that lies above the trial's last
        rung; rungs that it jumped over stay empty, since its value belongs to more images. A
        value that is not finite never passes.
        """
        last = self._last_rung.get(number, 0)
        reached = [rung for rung in self.rungs if last < rung <= mark]
        if not reached:
            return GO_ON
        rung = reached[-1]
        self._last_rung[number] = rung
        score = score_of(value, self.mode)
        entry = self.entries.setdefault(rung, Rung())
        lost = score == -math.inf
        entry.enter(number, score, waits=self.promotes and not lost)
        competitors = len(entry)
        if lost:
            return Decision(stop=True, rung=rung, competitors=competitors)
        if self.promotes:
            return self._go_on_or_wait(number, rung, entry)
        if competitors < (self.min_competitors or self.reduction):
            return Decision(stop=False, rung=rung, competitors=competitors)
        cutoff = entry.cutoff(max(1, competitors // self.reduction))
        return Decision(
            stop=score < cutoff,
            rung=rung,
            cutoff=self._value(cutoff),
            competitors=competitors,
        )

    def _go_on_or_wait(self, number: int, rung: int, entry: Rung) -> Decision:
        competitors = len(entry)
        keep = self._keep(competitors)
        passes = entry.rank(number) < keep
        if passes:
            self.promote(number, rung)
        return Decision(
            stop=False,
            pause=not passes,
            rung=rung,
            cutoff=self._value(entry.cutoff(keep)) if keep else None,
            competitors=competitors,
        )

    def _keep(self, competitors: int) -> int:
        if competitors < (self.min_competitors or self.reduction):
            return 0
        return max(1, competitors // self.reduction)

    def next_promotion(self, *, last: bool = False) -> Promotion | None:
        """The best trial that waits and has come to be among the best, from the highest rung.

        `last` says that no further value will come: then the best that waits at the highest rung
        that any trial reached goes on, too, unless one has passed it, so that some trial reaches
        the full resource. To be followed by `promote`.
        """
        for rung in reversed(self.rungs):
            entry = self.entries.get(rung)
            if entry is None or not len(entry):
                continue
            number, keep = entry.best_waiting(self._left), self._keep(len(entry))
            last = last and not entry.promoted
            if number is None:
                continue
            if last:
                keep = max(keep, entry.rank(number) + 1)
            if entry.rank(number) < keep:
                return Promotion(number, rung, self._value(entry.cutoff(keep)), len(entry))
        return None

    def promote(self, number: int, rung: int) -> None:
        """Enter that a trial went on from `rung`."""
        self.entries[rung].promoted.add(number)

    def leave(self, number: int) -> None:
        """Enter that a trial ended or is to run on outside of the competition."""
        self._left.add(number)

    def _value(self, score: float) -> float:
        return score if self.mode == "max" else -score

    def replay(self, reports: Iterable[tuple[int, int, float | None]]) -> list[Decision]:
        """The decisions on (number, mark, value) reports in this order."""
        return [self.report(*report) for report in reports]


def hyperband_shares(rungs: int, reduction: int, brackets: int) -> list[float]:
    """Share of the trials for each bracket, the one with all rungs first; they add up to 1.

    Hyperband's (Li et al. 2018, https://arxiv.org/abs/1603.06560, algorithm 1): a bracket with s
    rungs begins with ceil((s_max + 1) / (s + 1) * reduction^s) trials, which costs all brackets
    about the same.
    """
    sizes = [
        math.ceil((rungs + 1) / (left + 1) * reduction**left)
        for left in range(rungs, rungs - brackets, -1)
    ]
    return [size / sum(sizes) for size in sizes]
