"""How well a value on the way tells the value at the end: rank correlations between marks.

Trials that passed every rung are a sample of restricted range: they were chosen by the very values
that are to be judged. So beside their correlation stands the one over all trials, in which the
audited trials stand for those that were stopped (`analysis.rank_correlation`). Failed trials have
no end and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from analysis.audit import Array, Outcomes
from analysis.rank_correlation import RankCorrelation, kendall

MOST_TRIALS = 400
"""A correlation takes time in the square of its trials; of more, this many are drawn."""
MOST_RUNGS = 8
MOST_MARKS = 40
DRAW_SEED = 0


@dataclass(frozen=True)
class MarkCorrelation:
    """Between the objective at mark `early` and at mark `late`, both in images."""

    early: int
    late: int
    stopped: int
    """Trials that were to be stopped before `late`."""
    sample: int
    """Of these, the audited ones of which it is known what they came to at `late`."""
    passed: RankCorrelation | None
    """Of the trials that nobody stopped before `late`."""
    all: RankCorrelation | None
    """Of all trials, had none been stopped; None where too few were audited."""


def between(outcomes: Outcomes, early: int, late: int) -> MarkCorrelation:
    """The correlation between two marks, over those that passed and over all trials."""
    x_N, y_N = outcomes.scores_at(early), outcomes.scores_at(late)
    both = np.isfinite(x_N) & np.isfinite(y_N)
    stopped = outcomes.was_stopped & (outcomes.stopped_at_N < late)
    failed = np.isneginf(outcomes.end_N)
    drawn = stopped & outcomes.audited_N & (np.isfinite(y_N) | failed)
    passed = _kendall(outcomes, x_N, y_N, both & ~stopped)
    count, sample = int(stopped.sum()), int(drawn.sum())
    everyone = passed
    if count:
        everyone = _kendall(outcomes, x_N, y_N, both & (~stopped | drawn), drawn, sample, count)
        everyone = everyone if everyone is not None and everyone.sampled else None
    return MarkCorrelation(early, late, count, sample, passed, everyone)


def _kendall(
    outcomes: Outcomes,
    x_N: Array,
    y_N: Array,
    among_N: Array,
    sampled_N: Array | None = None,
    sample: float = 0,
    stopped: float = 0,
) -> RankCorrelation | None:
    """Tau of the trials `among_N`; of more than MOST_TRIALS, of as many drawn at random."""
    places = np.flatnonzero(among_N)
    sampled = np.zeros(len(x_N), bool) if sampled_N is None else sampled_N
    if len(places) > MOST_TRIALS:
        rng = np.random.default_rng(DRAW_SEED)
        share = MOST_TRIALS / len(places)
        kinds = [places[sampled[places] == kind] for kind in (False, True)]
        kept = [rng.choice(kind, round(share * len(kind)), replace=False) for kind in kinds]
        shrink = len(kept[1]) / max(1, len(kinds[1]))
        sample, stopped = sample * shrink, stopped * shrink
        places = np.sort(np.concatenate(kept))
    groups = outcomes.stratum_N[places]
    return kendall(
        x_N[places],
        y_N[places],
        group_N=groups if len(np.unique(groups)) > 1 else None,
        sampled_N=sampled[places],
        sample=sample,
        stopped=stopped,
    )


def rung_correlations(outcomes: Outcomes, rungs: Sequence[int]) -> list[MarkCorrelation]:
    """Of each rung with the full resource, then of each with the next; at most MOST_RUNGS rungs."""
    kept = thinned([rung for rung in rungs if rung < outcomes.total_images], MOST_RUNGS)
    pairs = [(rung, outcomes.total_images) for rung in kept]
    pairs += list(pairwise(kept))
    return [between(outcomes, *pair) for pair in pairs]


def mark_correlations(outcomes: Outcomes) -> list[MarkCorrelation]:
    """Of marks on the way with the full resource: such as most trials have, at most MOST_MARKS."""
    marks = [int(mark) for mark in outcomes.marks_M if mark < outcomes.total_images]
    known = np.isfinite(outcomes.scores_NM[np.isfinite(outcomes.end_N)])
    often = [mark for mark in marks if 2 * known[:, outcomes.column[mark]].sum() > len(known)]
    return [between(outcomes, mark, outcomes.total_images) for mark in thinned(often, MOST_MARKS)]


def thinned(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[place] for place in np.linspace(0, len(values) - 1, most).round().astype(int)]


def tells_from(correlations: Sequence[MarkCorrelation], agree: float) -> MarkCorrelation | None:
    """The first mark from which on at least this share of the pairs is in the order of the end.

    Judged by the lower end of the interval of all trials, at that mark and at each later one.
    """
    found = None
    for each in reversed(correlations):
        if each.all is None or (1 + each.all.low) / 2 < agree:
            break
        found = each
    return found
