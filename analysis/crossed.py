"""Mean accuracy over training seeds and images, both drawn at random, and how sure it is.

An encoder is trained with each of R seeds, and each is measured on the same I images: a crossed
layout with one value a cell. Another seed would give another accuracy, and so would other images,
so that an interval must hold both. Spread over the seeds alone leaves out the images, and the
standard error sqrt(p (1 - p) / n) over images alone leaves out the seeds, which Bouthillier et al.
2021 (https://arxiv.org/abs/2103.03098) find to be of the same size.

Two-way random effects without replication: seed + image + rest. With the mean squares MS of the
analysis of variance, Var(mean) = (MS_seeds + MS_images - MS_rest) / (R I), which is what the
pigeonhole bootstrap of Owen 2007 (https://doi.org/10.1214/07-AOAS122) estimates, without its
resampling. The two parts, MS_seeds / (R I) and (MS_images - MS_rest) / (R I), have intervals of
their own, Student's with R - 1 degrees of freedom and Wilson's, which are put together by their
squares (Graybill and Wang 1980; MOVER, Zou and Donner 2008). One t quantile by Satterthwaite's
degrees of freedom was tried first: with 3 seeds that held the truth in 90 % of cases instead of
95 %, since 3 seeds that happen to agree look like no noise at all.

Why no percentile bootstrap over the seeds: the few values that there are span too little. With 3
seeds it held the truth in 52 to 70 % of cases, with 5 in 48 to 82 % (tests/test_crossed.py).

Letters: R seeds, I images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit

Array = NDArray[Any]

LEVEL = 0.95
POWER = 0.8
MOST_SEEDS = 50
"""More than so many, or than twice those that there are, is all that is said of what is needed."""


@dataclass(frozen=True)
class Parts:
    """Where the variance of a mean comes from, each as a variance of that mean."""

    seeds: float  # of the R seeds, what image and seed do together included
    images: float  # of the I images
    least: float  # what the images make of it were there no seeds


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and images, with its interval; fractions.

    Of one seed the interval is that of the images alone (`covers_seeds` is False): it leaves out
    what another training would change.
    """

    mean: float
    low: float
    high: float
    std: float | None  # of the seeds' own means, None of one seed
    seeds: int
    images: int
    level: float
    parts: Parts

    @property
    def covers_seeds(self) -> bool:
        return self.seeds > 1


@dataclass(frozen=True)
class Difference(Interval):
    """A mean of paired differences; `p` is two-sided, of there being none."""

    p: float


@dataclass(frozen=True)
class SeedsInterval:
    """A mean over seeds of values that have no images, with Student's interval."""

    mean: float
    low: float | None  # None of one seed
    high: float | None
    std: float | None
    seeds: int


def mean_interval(correct_RI: ArrayLike, level: float = LEVEL) -> Interval:
    """The accuracy of one configuration, seeds and images taken as random.

    `correct_RI` is 1 where the encoder of a seed is right about an image, else 0; a list of I
    stands for one seed. The interval stays within 0 and 1, and has a width at both ends, too.
    """
    correct_RI = _table(correct_RI)
    _check_level(level)
    seeds, images = correct_RI.shape
    mean, parts = float(correct_RI.mean()), _parts(correct_RI)
    tail = (1 + level) / 2
    own = _quantile(seeds - 1, tail) * math.sqrt(parts.seeds) if seeds > 1 else 0.0
    low, high = wilson(mean, _worth(mean, parts.images, images), tail)
    bare_low, bare_high = wilson(mean, _worth(mean, parts.least, images, seeds), tail)
    return Interval(
        mean=mean,
        low=max(0.0, min(mean - math.hypot(own, mean - low), bare_low)),
        high=min(1.0, max(mean + math.hypot(own, high - mean), bare_high)),
        std=_std(correct_RI.mean(axis=1)),
        seeds=seeds,
        images=images,
        level=level,
        parts=parts,
    )


def difference_interval(a_RI: ArrayLike, b_RI: ArrayLike, level: float = LEVEL) -> Difference:
    """How much more often `a` is right than `b`, over common seeds and images.

    Row r of both is of one seed, column i of one image. The interval and `p` are two sides of one
    test. They are never surer than one image more on either side would leave them, so that equal
    answers everywhere do not make an interval without a width.
    """
    a_RI, b_RI = _table(a_RI), _table(b_RI)
    if a_RI.shape != b_RI.shape:
        raise ValueError(
            "both sides must have the same seeds and images, "
            f"got {_shape(a_RI)} and {_shape(b_RI)}: leave out what only one of them has"
        )
    _check_level(level)
    gap_RI = a_RI - b_RI
    seeds, images = gap_RI.shape
    mean, parts = float(gap_RI.mean()), _parts(gap_RI)
    half = _half_width(parts, seeds, images, (1 + level) / 2)
    return Difference(
        mean=mean,
        low=max(-1.0, mean - half),
        high=min(1.0, mean + half),
        std=_std(gap_RI.mean(axis=1)),
        seeds=seeds,
        images=images,
        level=level,
        parts=parts,
        p=_p_value(mean, parts, seeds, images),
    )


def seeds_interval(values_R: ArrayLike, level: float = LEVEL) -> SeedsInterval:
    """The mean over seeds on the images that there are, which are not taken as random here."""
    values_R = np.asarray(values_R, dtype="float64")
    if values_R.ndim != 1 or not len(values_R) or not np.isfinite(values_R).all():
        raise ValueError("values of seeds must be a list of finite numbers, at least one")
    _check_level(level)
    mean, std, seeds = float(values_R.mean()), _std(values_R), len(values_R)
    if std is None:
        return SeedsInterval(mean, None, None, None, seeds)
    half = _quantile(seeds - 1, (1 + level) / 2) * std / math.sqrt(seeds)
    return SeedsInterval(mean, mean - half, mean + half, std, seeds)


def seeds_needed(found: Difference, level: float = LEVEL) -> int | None:
    """Seeds of each side that would show this difference with 80 % power, were it real.

    None where more seeds do not help, because the images tell no more apart, and where
    `most_seeds` would not be enough; needs two seeds at least. Of one of several pairs, `level` is
    that of each (1 - alpha / pairs: Bonferroni's, which Holm's correction asks for at most).
    """
    _check_level(level)
    if not found.mean or not found.covers_seeds:
        return None
    power = float(ndtri(POWER))
    for seeds in range(found.seeds + 1, most_seeds(found.seeds) + 1):
        of_seeds = math.sqrt(found.parts.seeds * found.seeds / seeds)
        own = _quantile(seeds - 1, (1 + level) / 2) * of_seeds
        images = _quantile(found.images - 1, (1 + level) / 2) * math.sqrt(found.parts.images)
        if math.hypot(own, images) + power * math.sqrt(of_seeds**2 + found.parts.images) <= abs(
            found.mean
        ):
            return seeds
    return None


def most_seeds(seeds: int) -> int:
    """How many `seeds_needed` looks at, where there are so many."""
    return max(MOST_SEEDS, 2 * seeds)


def wilson(mean: float, n: float, tail: float) -> tuple[float, float]:
    """Wilson's score interval (1927) of a proportion of n, which need not be whole."""
    if math.isinf(n):
        return mean, mean
    z = float(ndtri(tail))
    middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    # at 0 and at 1 the ends are the mean but for rounding
    return min(mean, max(0.0, middle - half)), max(mean, min(1.0, middle + half))


def _parts(values_RI: Array) -> Parts:
    """Both parts of the variance of the mean; of one seed all of it is the images'."""
    seeds, images = values_RI.shape
    mean = values_RI.mean()
    if seeds == 1:
        # as Wilson's interval has it: over I, not over I - 1
        variance = float(values_RI.var()) / images
        return Parts(0.0, variance, variance)
    by_seed, by_image = values_RI.mean(axis=1) - mean, values_RI.mean(axis=0) - mean
    ss_seeds = images * float(np.square(by_seed).sum())
    ss_images = seeds * float(np.square(by_image).sum())
    ss_rest = max(0.0, float(np.square(values_RI - mean).sum()) - ss_seeds - ss_images)
    of_images = max(1, images - 1)
    ms_seeds, ms_images = ss_seeds / (seeds - 1), ss_images / of_images
    ms_rest = ss_rest / ((seeds - 1) * of_images)
    cells = seeds * images
    return Parts(
        seeds=ms_seeds / cells,
        images=max(0.0, ms_images - ms_rest) / cells,
        least=ms_images / cells,
    )


def _worth(mean: float, variance: float, images: int, seeds: int | None = None) -> float:
    """Independent images that would give a proportion this variance.

    Where all answers are alike nothing tells how images differ, and each counts once. With
    `seeds`, it is at most one for each cell.
    """
    spread = mean * (1 - mean)
    if spread <= 0:
        return float(images)
    most = math.inf if seeds is None else float(seeds * images)
    return min(most, spread / variance) if variance > 0 else most


def _half_width(parts: Parts, seeds: int, images: int, tail: float) -> float:
    of_images = _quantile(max(1, images - 1), tail)
    least = of_images * math.sqrt(max(parts.least, 1 / images**2))
    if seeds == 1:
        return least
    own = _quantile(seeds - 1, tail) * math.sqrt(parts.seeds)
    return max(least, math.hypot(own, of_images * math.sqrt(parts.images)))


def _p_value(mean: float, parts: Parts, seeds: int, images: int) -> float:
    """The level at which the interval just reaches zero."""
    gap = abs(mean)

    def beyond(log_p: float) -> float:
        return _half_width(parts, seeds, images, 1 - math.exp(log_p) / 2) - gap

    least, most = math.log(1e-12), math.log(1 - 1e-9)
    if beyond(most) >= 0:
        return 1.0
    if beyond(least) <= 0:
        return 1e-12
    return math.exp(float(brentq(beyond, least, most, xtol=1e-6)))


def _quantile(freedom: int, tail: float) -> float:
    return float(stdtrit(freedom, tail))


def _std(values_R: Array) -> float | None:
    return float(values_R.std(ddof=1)) if len(values_R) > 1 else None


def _table(values: ArrayLike) -> Array:
    values_RI = np.atleast_2d(np.asarray(values, dtype="float64"))
    if values_RI.ndim != 2 or not values_RI.size:
        raise ValueError(f"answers must be a table of seeds x images, got {_shape(values_RI)}")
    if not ((values_RI >= 0) & (values_RI <= 1)).all():  # also NaN
        raise ValueError("answers must lie in [0, 1]: 1 is right, 0 is wrong")
    return values_RI


def _shape(values: Array) -> str:
    return " x ".join(map(str, values.shape))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level:g}")
