"""Values against one parameter -> a trend with an interval at each place.

Numbers: local quadratic regression with a Gaussian kernel whose width leave-one-out
cross-validation chose for the local line. One order more than the width was chosen for removes
the bias that would make the interval too narrow (Calonico, Cattaneo, Farrell 2018,
https://doi.org/10.1080/01621459.2017.1285776). The interval is a sandwich of leave-one-out
residuals (HC3), which allows the noise to vary along the parameter. Levels: means with Student's
interval. Left out: what else varied along with the parameter.

N trials, G places at which the trend is told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from analysis.scales import Floats, Scale

MIN_TRIALS = 8
MIN_SETTINGS = 5
"""Different settings that a curve needs."""
MIN_A_LEVEL = 3
"""Trials that a level's interval needs."""
MAX_TRIALS = 400
"""Of more trials that many are drawn at random: the smoother is a matrix of all pairs."""
GRID = 41
WIDTHS = (0.15, 0.22, 0.33, 0.5, 0.8)
"""Kernel widths tried, as fractions of the range."""
WIDENED = 1.05
"""For the width that the same data chose: without it 93 to 95 of 100 intervals hold the truth."""
NEIGHBOURS = 6
"""Where trials are sparse, the kernel is at least as wide as the way to this many."""


@dataclass(frozen=True)
class Trend:
    """`centre` with `low` and `high`, the ends of its interval, at each of `places`.

    The ends are NaN where a level has too few trials. `n` trials were used, `is_curve` says
    whether the places may be joined.
    """

    places: Floats
    centre: Floats
    low: Floats
    high: Floats
    counts: Floats
    n: int
    is_curve: bool


def trend(places_N: Floats, values_N: Floats, scale: Scale, level: float = 0.95) -> Trend | None:
    """The trend of finite values over their places; None where there are too few trials."""
    known = np.isfinite(places_N) & np.isfinite(values_N)
    x, y = places_N[known], values_N[known]
    if scale.stops is not None:
        return _means(x, y, scale.stops, level)
    if len(x) < MIN_TRIALS or len(np.unique(x)) < MIN_SETTINGS:
        return None
    if len(x) > MAX_TRIALS:
        kept = np.random.default_rng(0).choice(len(x), MAX_TRIALS, replace=False)
        x, y = x[kept], y[kept]
    places = np.linspace(x.min(), x.max(), GRID)
    centre, error, freedom = curve(x, y, places)
    half = WIDENED * student.ppf(0.5 + level / 2, freedom) * error
    counts = np.full(GRID, len(x), dtype=float)
    return Trend(places, centre, centre - half, centre + half, counts, len(x), True)


def curve(x_N: Floats, y_N: Floats, places_G: Floats) -> tuple[Floats, Floats, float]:
    """Local quadratic regression: centre [G], standard error [G], degrees of freedom."""
    span = float(np.ptp(x_N)) or 1.0
    best_width, least = WIDTHS[-1], math.inf
    for width in WIDTHS:
        line_NN = _smoother(x_N, x_N, width * span, 1)
        left_out = (y_N - line_NN @ y_N) / np.maximum(1 - np.diag(line_NN), 0.05)
        loss = float(left_out @ left_out)
        if loss < least:
            best_width, least = width, loss
    own_NN = _smoother(x_N, x_N, best_width * span, 2)
    left_out = (y_N - own_NN @ y_N) / np.maximum(1 - np.diag(own_NN), 0.05)
    weights_GN = _smoother(x_N, places_G, best_width * span, 2)
    error = np.sqrt(weights_GN**2 @ left_out**2)
    used = 2 * np.trace(own_NN) - (own_NN**2).sum()
    return weights_GN @ y_N, error, max(1.0, len(x_N) - float(used))


def _smoother(x_N: Floats, places_G: Floats, width: float, degree: int) -> Floats:
    """The weight of each trial in the local regression at each place, [G, N]."""
    away_GN = x_N[None, :] - places_G[:, None]
    near = min(NEIGHBOURS, len(x_N)) - 1
    reach_G = np.partition(np.abs(away_GN), near, axis=1)[:, near]
    width_G = np.maximum(width, reach_G)[:, None]
    u_GN = away_GN / width_G
    kernel_GN = np.exp(-0.5 * u_GN**2)
    sums = []
    weighted_GN = kernel_GN.copy()
    for _ in range(2 * degree + 1):
        sums.append(weighted_GN.sum(axis=1))
        weighted_GN *= u_GN
    orders = np.arange(degree + 1)
    moments = np.stack(sums, axis=1)[:, orders[:, None] + orders[None, :]]
    scale = np.trace(moments, axis1=1, axis2=2)[:, None, None]
    moments = moments + 1e-10 * scale * np.eye(degree + 1)
    first = np.linalg.solve(moments, np.eye(degree + 1)[None, :, :1])[:, :, 0]
    polynomial_GN = np.zeros_like(u_GN)
    for power in reversed(range(degree + 1)):
        polynomial_GN = polynomial_GN * u_GN + first[:, power, None]
    return np.asarray(kernel_GN * polynomial_GN)


def _means(x: Floats, y: Floats, stops: tuple[float, ...], level: float) -> Trend | None:
    """Mean of the values at each stop, with Student's interval."""
    rows = []
    for stop in stops:
        here = y[np.isclose(x, stop, rtol=1e-9, atol=1e-12)]
        if not len(here):
            continue
        half = math.nan
        if len(here) >= MIN_A_LEVEL:
            error = here.std(ddof=1) / math.sqrt(len(here))
            half = float(student.ppf(0.5 + level / 2, len(here) - 1)) * error
        rows.append((stop, here.mean(), half, len(here)))
    if not rows or len(y) < MIN_A_LEVEL:
        return None
    places, centre, half_width, counts = np.array(rows, dtype=float).T
    return Trend(places, centre, centre - half_width, centre + half_width, counts, len(y), False)
