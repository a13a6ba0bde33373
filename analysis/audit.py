"""What early stopping cost, from the audit: trials that it would have stopped and let run on.

Whether a trial is audited is drawn by its number alone, so the audited ones are a simple random
sample of all that were to be stopped, and what became of them tells of the others. A stopped trial
whose objective was not finite at its rung is never audited and could not have won; it is left out.
An audited trial that diverged or ran out of memory ended below all others; one that still runs,
was lost, or was ended by a command or an error is not known.

Trials are compared within their stratum only, whatever their bracket: all ends are values at the
full resource.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.load import SweepFrames

Array = NDArray[Any]
OWN_FAULT = ("diverged", "oom")
"""Failures that a configuration has by itself, and would have had again."""


@dataclass(frozen=True)
class Outcomes:
    """What became of each of a sweep's N trials; scores are such that more is better."""

    number_N: Array
    stratum_N: Array
    """Codes from 0."""
    end_N: Array
    """Score at the full resource; nan where not known, minus infinity of a trial that failed."""
    stopped_at_N: Array
    """Rung in images where the scheduler stopped it, or would have; nan where it did not."""
    audited_N: Array
    scores_NM: Array
    """Score at each mark, nan where there is none."""
    marks_M: Array
    """In images, ascending; the last is the full resource if a trial reported there."""
    sign: float
    """Score = sign * objective."""
    total_images: int

    @property
    def was_stopped(self) -> Array:
        """[N], whether the scheduler stopped the trial, or would have, at a finite value."""
        return ~np.isnan(self.stopped_at_N)

    @property
    def ran_through(self) -> Array:
        """[N], the trials that passed every rung and came to a finite end."""
        return np.isfinite(self.end_N) & ~self.was_stopped

    @property
    def best_kept(self) -> float | None:
        """Objective of the best trial that was not stopped; None of several strata or of none."""
        if len(np.unique(self.stratum_N)) != 1 or not self.ran_through.any():
            return None
        return self.sign * float(np.max(self.end_N[self.ran_through]))

    @cached_property
    def column(self) -> dict[int, int]:
        """Mark -> its column in `scores_NM`."""
        return {int(mark): place for place, mark in enumerate(self.marks_M)}

    def scores_at(self, mark: int) -> Array:
        """Each trial's score at a mark; of the full resource the ends, failed ones nan."""
        if mark >= self.total_images:
            return np.where(np.isfinite(self.end_N), self.end_N, np.nan)
        if mark not in self.column:
            return np.full(len(self.end_N), np.nan)
        scores: Array = self.scores_NM[:, self.column[mark]]
        return scores


def outcomes_of(frames: SweepFrames) -> Outcomes:
    """The outcomes of a sweep's trials, in the order of `frames.trials`."""
    info, trials = frames.info, frames.trials
    sign = 1.0 if info["mode"] == "max" else -1.0
    curves = frames.curves[frames.curves["metric"] == info["objective"]]
    curves = curves.drop_duplicates(["number", "mark"], keep="last")
    table = curves.pivot(index="number", columns="mark", values="value")
    table = table.reindex(trials["number"])
    scores = sign * table.to_numpy(dtype=float)
    scores[~np.isfinite(scores)] = np.nan
    marks = table.columns.to_numpy(dtype=np.int64)
    objective = sign * trials["objective"].to_numpy(dtype=float)
    completed = (trials["state"] == "completed").to_numpy()
    end = np.where(completed, np.where(np.isfinite(objective), objective, -np.inf), np.nan)
    end[trials["state"].isin(OWN_FAULT).to_numpy()] = -np.inf
    audited_at = trials["audited"].to_numpy(dtype=float, na_value=np.nan)
    rung = trials["rung"].to_numpy(dtype=float, na_value=np.nan)
    pruned = (trials["ending"] == "pruned").to_numpy()
    stopped_at = np.where(np.isnan(audited_at), np.where(pruned, rung, np.nan), audited_at)
    found = Outcomes(
        number_N=trials["number"].to_numpy(),
        stratum_N=pd.factorize(trials["stratum"])[0],
        end_N=end,
        stopped_at_N=stopped_at,
        audited_N=~np.isnan(audited_at),
        scores_NM=scores,
        marks_M=marks,
        sign=sign,
        total_images=info["total_images"],
    )
    for at in np.unique(stopped_at[~np.isnan(stopped_at)]):
        here = stopped_at == at
        stopped_at[here & np.isnan(found.scores_at(int(at)))] = np.nan
    return found


class WronglyStopped(TypedDict):
    """How many stopped trials would have been among the best `top` of their stratum's others."""

    top: int
    stopped: int  # trials that were to be stopped, the audited ones among them
    audited: int  # of these, those whose end is known
    above: int  # of these again, those that ended above
    share: float  # above / audited
    estimate: float  # of `stopped`
    low: int  # of `stopped`, 95 % interval
    high: int


def wrongly_stopped(outcomes: Outcomes, top: int = 1) -> WronglyStopped | None:
    """Those of the stopped that would have ended above the `top`-th best unstopped trial.

    Strata with fewer than `top` unstopped trials are left out. None where no end of a stopped
    trial is known. The share is without bias, since the audited are a simple random sample; the
    interval is `hypergeometric_interval`.
    """
    bar = _bars(outcomes, top)
    stopped = outcomes.was_stopped & ~np.isnan(bar)
    known = stopped & outcomes.audited_N & ~np.isnan(outcomes.end_N)
    n, of = int(known.sum()), int(stopped.sum())
    if not n:
        return None
    above = int((outcomes.end_N[known] > bar[known]).sum())
    low, high = hypergeometric_interval(above, n, of)
    share = above / n
    return WronglyStopped(
        top=top,
        stopped=of,
        audited=n,
        above=above,
        share=share,
        estimate=share * of,
        low=low,
        high=high,
    )


def _bars(outcomes: Outcomes, top: int) -> Array:
    """For each trial the end of the `top`-th best unstopped one of its stratum; else nan."""
    bars = np.full(len(outcomes.end_N), np.nan)
    for stratum in np.unique(outcomes.stratum_N):
        mine = outcomes.stratum_N == stratum
        ends = np.sort(outcomes.end_N[mine & outcomes.ran_through])
        if len(ends) >= top:
            bars[mine] = ends[-top]
    return bars


def hypergeometric_interval(
    hits: int, sample: int, population: int, confidence: float = 0.95
) -> tuple[int, int]:
    """How many of `population` are hits, when `hits` of a simple random `sample` of it are.

    The counts that neither one-sided hypergeometric test rejects: Clopper and Pearson's interval
    for a finite population. It covers at least at its rate, and is exact once all are sampled.
    """
    from scipy.stats import hypergeom

    counts = range(hits, population - (sample - hits) + 1)
    tail = (1 - confidence) / 2
    # so many or more become likelier with every hit in the population, so many or fewer less
    low = bisect_right(counts, tail, key=lambda n: hypergeom.sf(hits - 1, population, n, sample))
    high = bisect_left(counts, -tail, key=lambda n: -hypergeom.cdf(hits, population, n, sample))
    return counts[low], counts[high - 1]


class Regret(TypedDict):
    """The best audited trial against the best unstopped one of its stratum."""

    number: int
    value: float
    other: int  # the best unstopped trial
    other_value: float
    better: float  # how much better the audited one ended; negative: worse
    stratum: str


def observed_regret(frames: SweepFrames, outcomes: Outcomes) -> Regret | None:
    """Of all strata the one where an audited trial did best against the unstopped ones."""
    found: list[Regret] = []
    audited = outcomes.audited_N & np.isfinite(outcomes.end_N)
    for code, stratum in enumerate(pd.factorize(frames.trials["stratum"])[1]):
        mine = outcomes.stratum_N == code
        theirs, ours = mine & outcomes.ran_through, mine & audited
        if theirs.any() and ours.any():
            best, other = (
                int(np.argmax(np.where(group, outcomes.end_N, -math.inf)))
                for group in (ours, theirs)
            )
            found.append(
                Regret(
                    number=int(outcomes.number_N[best]),
                    value=float(outcomes.sign * outcomes.end_N[best]),
                    other=int(outcomes.number_N[other]),
                    other_value=float(outcomes.sign * outcomes.end_N[other]),
                    better=float(outcomes.end_N[best] - outcomes.end_N[other]),
                    stratum=str(stratum),
                )
            )
    return max(found, key=lambda regret: regret["better"], default=None)
