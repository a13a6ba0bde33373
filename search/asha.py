"""ASHA in its stopping form, as pure code.

Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020
(https://arxiv.org/abs/1810.05934), section 3, with the stopping variant of Ray Tune's
AsyncHyperBandScheduler. A rung is a number of images at which trials are compared; at each one
the best of every `reduction` go on. Left out: promotion of stopped trials, several brackets.

Nothing here knows Ray, a clock or a random number: the same reports in the same order give the
same decisions, which is what makes a sweep resumable and replayable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decision:
    """What was decided on one report: go on or stop, and on what grounds.

    `rung` is the rung, in images, that the report entered (None: none); `cutoff` the least value
    that passes it; `competitors` how many values, this one included, the cut-off rests on.
    """

    stop: bool
    rung: int | None = None
    cutoff: float | None = None
    competitors: int = 0

    def to_json(self) -> dict[str, Any]:
        """As the journal keeps it."""
        return asdict(self)


GO_ON = Decision(stop=False)


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


@dataclass
class Asha:
    """Stopping ASHA over `rungs` (ascending, in images).

    A report is compared with every value that entered the same rung before it: it passes when it
    is among the best floor(n / reduction) of the n values, itself included; ties pass. With
    fewer than `min_competitors` values everyone passes, since a lone first arrival says nothing.
    """

    rungs: Sequence[int]
    reduction: int = 3
    mode: str = "max"
    min_competitors: int | None = None
    values: dict[int, dict[int, float]] = field(default_factory=dict)
    """rung -> trial number -> value, as entered."""

    def report(self, number: int, mark: int, value: float | None) -> Decision:
        """Decide on trial `number` having reached `mark` images with `value`.

        A report lands on the highest rung at or below its mark that lies above the trial's last
        rung; rungs that it jumped over stay empty, since its value belongs to more images. A
        value that is not finite never passes.
        """
        entered = [rung for rung in self.rungs if number in self.values.get(rung, {})]
        reached = [rung for rung in self.rungs if max(entered, default=0) < rung <= mark]
        if not reached:
            return GO_ON
        rung = reached[-1]
        score = _score(value, self.mode)
        at_rung = self.values.setdefault(rung, {})
        at_rung[number] = score
        competitors = len(at_rung)
        if score == -math.inf:
            return Decision(stop=True, rung=rung, competitors=competitors)
        if competitors < (self.min_competitors or self.reduction):
            return Decision(stop=False, rung=rung, competitors=competitors)
        keep = max(1, competitors // self.reduction)
        cutoff = sorted(at_rung.values(), reverse=True)[keep - 1]
        return Decision(
            stop=score < cutoff,
            rung=rung,
            cutoff=cutoff if self.mode == "max" else -cutoff,
            competitors=competitors,
        )

    def replay(self, reports: Iterable[tuple[int, int, float | None]]) -> list[Decision]:
        """The decisions on (number, mark, value) reports in this order."""
        return [self.report(*report) for report in reports]


@dataclass
class NoStopping:
    """The scheduler `none`: every trial goes on to the full resource."""

    rungs: Sequence[int] = ()

    def report(self, number: int, mark: int, value: float | None) -> Decision:
        """Go on, whatever the value."""
        return GO_ON


Scheduler = Asha | NoStopping


def _score(value: float | None, mode: str) -> float:
    if value is None or not math.isfinite(value):
        return -math.inf
    return value if mode == "max" else -value
