"""Kendall's tau-b with an interval, also where some trials stand for others that were not seen.

Kendall (1945), "The treatment of ties in ranking problems". Of two trials drawn at random that do
not tie, the one that is better by the first value is better by the second, too, with probability
(1 + tau) / 2. Pairs of different groups (strata, which never compete) are left out.

**Trials that stand for others.** Where early stopping hid the second value of `stopped` trials
but a random sample of them, the audited ones, each sampled one stands for `stopped / sample` of
them, and each pair of sampled ones for stopped (stopped - 1) / (sample (sample - 1)) pairs
(Horvitz and Thompson 1952), so that the sums over pairs are without bias for those over all
trials.

The interval is Student's, on Fisher's scale atanh(tau), with the standard error of a jackknife
that deletes a trial at a time within the seen and within the sampled ones; never shorter than that
of Fieller, Hartley and Pearson (1957), variance 0.437 / (n - 4), for as many trials as Kish's
effective number. Its coverage is measured in the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LEAST = 6
"""Trials below which no interval is worth its name."""
LEAST_SAMPLED = 4
"""Trials that stand for others, below which they are too few to."""
FIELLER = 0.437


@dataclass(frozen=True)
class RankCorrelation:
    """Kendall's tau-b, its 95 % interval, and the trials that it rests on."""

    tau: float
    low: float
    high: float
    n: int
    sampled: int = 0
    """Of `n`, those that stand for others."""

    @property
    def agree(self) -> float:
        """Share of the pairs of trials that both values put in the same order."""
        return (1 + self.tau) / 2


def kendall(
    x_N: Array,
    y_N: Array,
    *,
    group_N: Array | None = None,
    sampled_N: Array | None = None,
    sample: float = 0,
    stopped: float = 0,
    confidence: float = 0.95,
) -> RankCorrelation | None:
    """Tau-b of x and y, finite values of N trials; None where they are too few or all tie.

    `sampled_N`: the trials that stand for others; `sample`: how many were drawn (these, and those
    drawn that never came to a second value), from `stopped` trials. Where trials were thinned out,
    both are what is left of them, and need not be whole.
    """
    n = len(x_N)
    sampled = np.zeros(n, bool) if sampled_N is None else sampled_N.astype(bool)
    seen_n, sampled_n = int((~sampled).sum()), int(sampled.sum())
    if n < LEAST or (sampled_n and (sampled_n < LEAST_SAMPLED or seen_n < 3)):
        return None
    single = stopped / sample if sampled_n else 1.0
    double = stopped * (stopped - 1) / (sample * (sample - 1)) if sampled_n else 1.0
    # of each pair: in the same order or not; whether x, and whether y, tells the two apart
    signs_x = np.sign(x_N[:, None] - x_N[None, :]).astype(np.float32)
    signs_y = np.sign(y_N[:, None] - y_N[None, :]).astype(np.float32)
    if group_N is not None:
        signs_x *= group_N[:, None] == group_N[None, :]
        signs_y *= group_N[:, None] == group_N[None, :]
    pairs_3NN = (signs_x * signs_y, np.abs(signs_x), np.abs(signs_y))
    sides = np.stack([~sampled, sampled], axis=1).astype(np.float32)
    sums_3N2 = np.stack([pairs @ sides for pairs in pairs_3NN]).astype(float)
    seen, drawn = ~sampled, sampled
    ss, sd, dd = (
        sums_3N2[:, seen, 0].sum(1),
        sums_3N2[:, seen, 1].sum(1),
        sums_3N2[:, drawn, 1].sum(1),
    )
    whole_3 = ss + 2 * single * sd + double * dd
    if not (whole_3[1] > 0 and whole_3[2] > 0):
        return None
    tau = float(_ratio(whole_3[:, None])[0])
    variance, freedom = 0.0, 0.0
    for side, (mine, count) in enumerate(((seen, seen_n), (drawn, sampled_n))):
        if not count:
            continue
        one, two = count / (count - 1), count / (count - 2)  # the others make up for the deleted
        rows = sums_3N2[:, mine, :]
        if side == 0:
            without = (
                two * (ss[:, None] - 2 * rows[:, :, 0])
                + 2 * single * one * (sd[:, None] - rows[:, :, 1])
                + double * dd[:, None]
            )
        else:
            without = (
                ss[:, None]
                + 2 * single * one * (sd[:, None] - rows[:, :, 0])
                + double * two * (dd[:, None] - 2 * rows[:, :, 1])
            )
        part = (count - 1) / count * float(np.sum((_ratio(without) - tau) ** 2))
        variance += part
        freedom += part**2 / (count - 1)
    return _with_interval(tau, variance, freedom, n, sampled_n, seen_n, single, confidence)


def _ratio(sums_3N: Array) -> Array:
    """Tau-b from sums over pairs of: the order, x tells apart, y tells apart; 0 where none do."""
    below = np.sqrt(np.maximum(sums_3N[1] * sums_3N[2], 0.0))
    ratios: Array = np.divide(sums_3N[0], below, out=np.zeros_like(below), where=below > 0)
    return np.clip(ratios, -1.0, 1.0)


def _with_interval(
    tau: float,
    variance: float,
    freedom: float,
    n: int,
    sampled: int,
    seen: int,
    single: float,
    confidence: float,
) -> RankCorrelation:
    from scipy.stats import norm
    from scipy.stats import t as student

    effective = (seen + sampled * single) ** 2 / (seen + sampled * single**2)
    inside = float(np.clip(tau, -1 + 1 / n, 1 - 1 / n))  # where atanh and its slope are finite
    degrees = variance**2 / freedom if freedom > 0 else effective - 1
    tail = (1 + confidence) / 2
    reach = max(
        float(student.ppf(tail, max(degrees, 2.0))) * math.sqrt(variance) / (1 - inside**2),
        float(norm.ppf(tail)) * math.sqrt(FIELLER / max(effective - 4, 1.0)),
    )
    middle = math.atanh(inside)
    low, high = math.tanh(middle - reach), math.tanh(middle + reach)
    return RankCorrelation(tau, min(low, tau), max(high, tau), n, sampled)
