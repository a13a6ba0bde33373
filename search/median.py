"""The median stopping rule, as pure code.

Source: Golovin et al., "Google Vizier: A Service for Black-Box Optimization", KDD 2017, section
3.2.2: stop a trial whose best value so far is worse than the median of what the others had shown
on average up to the same point. The others are all trials that got as far, whether or not they
ended since. Left out: performance curves that predict the end.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from search.asha import GO_ON, Decision, score_of


@dataclass
class MedianRule:
    """Compares at each of `rungs` (ascending, in images), the first of which is the grace.

    With fewer than `min_competitors` values (default 3), this one included, everyone passes.
    """

    rungs: Sequence[int]
    mode: str = "max"
    min_competitors: int | None = None
    means: dict[int, list[float]] = field(default_factory=dict)
    """rung -> running averages of the trials that got there, ascending scores."""
    _sums: dict[int, tuple[float, int, float]] = field(default_factory=dict)
    """trial -> sum of its scores, their count, the best of them."""

    def report(self, number: int, mark: int, value: float | None) -> Decision:
        """Decide on trial `number` having reached `mark` images with `value`."""
        score = score_of(value, self.mode)
        at_rung = mark in self.rungs
        if score == -math.inf:
            return Decision(stop=at_rung, rung=mark if at_rung else None)
        total, count, best = self._sums.get(number, (0.0, 0, -math.inf))
        total, count, best = total + score, count + 1, max(best, score)
        self._sums[number] = total, count, best
        if not at_rung:
            return GO_ON
        others = self.means.setdefault(mark, [])
        competitors = len(others) + 1
        median = _median(others) if others else -math.inf
        insort(others, total / count)
        if competitors < (self.min_competitors or 3):
            return Decision(stop=False, rung=mark, competitors=competitors)
        return Decision(
            stop=best < median,
            rung=mark,
            cutoff=median if self.mode == "max" else -median,
            competitors=competitors,
        )


def _median(ascending: list[float]) -> float:
    middle = len(ascending) // 2
    if len(ascending) % 2:
        return ascending[middle]
    return (ascending[middle - 1] + ascending[middle]) / 2
