"""Levels of a field -> which of them finds the better best, how sure that is, and what it lacks.

Two levels are compared in the expected best of n trials, by the test of `analysis.best_of`, and
Holm's correction covers all pairs. n is a third of what the smaller level has: of more there are
too few separate draws in the sample (at a half, a difference of 1.2 standard deviations between
20 normal values each was found in 38 % of cases, at a third in 58 %). A verdict is never
read off marginal means; what a confirmation says of the best configurations of two levels is told
beside it (`analysis.confirmed_levels`). Three things can stand between a difference and a verdict:

- chance in which trials were drawn: the test;
- chance in which images were measured: all trials share the validation images, so that more
  trials do not help. A difference below 1.96 binomial standard errors, as of two independent
  measurements (which is cautious), is told as one on these images only;
- early stopping that let the levels compete with each other: said wherever they shared rungs.

Left out: the trials of a sampler that learns are no independent draws. A level's trials then
resemble each other more than the test assumes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
from scipy.stats import mannwhitneyu, norm

from analysis.best_of import (
    Budget,
    Estimate,
    Sample,
    difference,
    expected_best,
    intervals,
    probability_better,
)
from analysis.confirmation_record import Confirmation
from analysis.confirmed_levels import Confirmed, enter_confirmed
from analysis.frames import SweepFrames
from analysis.levels import Level, levels_of
from analysis.tables import is_accuracy, standard_error
from analysis.verdict import overall_verdict, pair_verdict

ALPHA = 0.05
"""Chance of any false verdict, over all pairs of one comparison."""
SHARE = 3
"""Two levels are compared at the smaller one's trials, or images, divided by this."""
POWER = 0.8
BEYOND = 10.0
"""More than so many times the trials is all that is said of what would be needed."""
MAX_POINTS = 48
"""Points of a curve."""
MAX_INTERVALS = 8
"""Of these points, those with an interval."""
SEED = 0

Result = Literal["better", "better_on_these_images", "undecided", "untested"]


class Span(TypedDict):
    """An estimate and its 95 % interval; None where there are too few trials for one."""

    value: float
    low: float | None
    high: float | None


class Point(Span):
    """Of a curve: what is expected of a budget, in trials or in images."""

    budget: float


class LevelRow(TypedDict):
    """One level; values as recorded."""

    level: str
    trials: int
    completed: int
    stopped: int
    failed: int
    images: int
    best: float | None
    best_sweep: str | None
    best_number: int | None
    expected: Span | None  # best of `Comparison.n` trials
    by_trials: list[Point]
    by_images: list[Point]


class Pair(TypedDict):
    """Two levels, `first` the one with the higher expected best; positive: `first` is better."""

    first: str
    second: str
    result: Result
    why: str  # of "untested"
    trials: int  # of both levels, all that were tried
    n: int | None  # the equal budget, trials each
    expected_first: float | None
    expected_second: float | None
    difference: Span | None
    p: float | None
    p_holm: float | None
    measurement: float | None  # half width of the 95 % interval that the images alone give
    images_needed: int | None  # validation images for that to be below the difference
    probability: Span | None  # that the best of n of `first` beats the best of n of `second`
    images: int | None  # the equal budget, images each
    difference_by_images: Span | None
    cliffs_delta: Span | None  # of single trials at the mark `early_mark`
    p_rank: float | None  # Mann-Whitney there, not corrected
    trials_needed: int | None  # of each level, to tell the difference seen; None: nil, or beyond
    beyond: bool  # more than BEYOND times as many would be needed
    confirmed: Confirmed | None  # their best configurations with fresh seeds, on test
    text: str


class Comparison(TypedDict):
    """All levels of one field; see `Pair` and `LevelRow`."""

    field: str
    sweeps: list[str]
    objective: str
    mode: str
    dataset: str
    total_images: int
    val_images: int | None
    alpha: float
    n: int  # trials at which all levels are set side by side: a third of the smallest one's
    early_mark: int
    apart: bool
    adaptive: bool  # whether a sampler that learns chose the trials
    stops: bool  # whether trials were stopped early
    levels: list[LevelRow]
    pairs: list[Pair]
    verdict: str
    notes: list[str]


def compare(
    sweeps: Sequence[SweepFrames],
    field: str,
    *,
    seed: int = SEED,
    confirmations: Sequence[Confirmation] | None = None,
) -> Comparison:
    """Compare the levels of a field, in one sweep or pooled over several.

    `field` and the errors are those of `levels.levels_of`; `seed` is that of all resampling.
    `confirmations` of these sweeps, if they were looked for, may be none.
    """
    found = levels_of(sweeps, field, seed=seed)
    info = sweeps[0].info
    sign = 1.0 if info["mode"] == "max" else -1.0
    accuracy = is_accuracy(info["objective"])
    known = [frames.info["val_images"] for frames in sweeps]
    images = min((n for n in known if n is not None), default=None)
    images = images if accuracy and None not in known else None
    generator = np.random.default_rng(seed)
    side_by_side = budget_of(*found.levels)
    rows = [_level_row(each, side_by_side, sign, accuracy, generator) for each in found.levels]
    comparison = Comparison(
        field=field,
        sweeps=[frames.info["name"] for frames in sweeps],
        objective=info["objective"],
        mode=info["mode"],
        dataset=info["dataset"],
        total_images=info["total_images"],
        val_images=images,
        alpha=ALPHA,
        n=side_by_side,
        early_mark=found.early_mark,
        apart=found.apart,
        adaptive=any(frames.info["sampler"] not in ("random", "grid", "qmc") for frames in sweeps),
        stops=any(level.stopped for level in found.levels),
        levels=rows,
        pairs=_pairs(found.levels, sign, images, generator),
        verdict="",
        notes=list(found.notes),
    )
    if confirmations is not None:
        enter_confirmed(comparison, confirmations)
    for pair in comparison["pairs"]:
        pair["text"] = pair_verdict(pair, comparison)
    comparison["verdict"] = overall_verdict(comparison)
    return comparison


def budget_of(*levels: Level) -> int:
    """The equal budget at which levels are compared, in trials."""
    sizes = [len(level.outcomes) for level in levels if level.outcomes is not None]
    return max(1, min(sizes, default=0) // SHARE)


def _level_row(
    level: Level, n: int, sign: float, accuracy: bool, generator: np.random.Generator
) -> LevelRow:
    row = LevelRow(
        level=level.name,
        trials=level.trials,
        completed=level.completed,
        stopped=level.stopped,
        failed=level.failed,
        images=level.images,
        best=level.best,
        best_sweep=level.best_trial and level.best_trial[0],
        best_number=level.best_trial and level.best_trial[1],
        expected=None,
        by_trials=[],
        by_images=[],
    )
    if level.outcomes is None:
        return row
    sample, total, half = level.outcomes, len(level.outcomes), max(1, len(level.outcomes) // 2)
    mean = max(1.0, float(sample.costs_N.mean()))
    counts = _spread(1, total, half)
    curves = [
        _curve(sample, worth, budgets, half, generator)
        for worth, budgets in (
            (counts, [Budget(trials=count) for count in counts]),
            (counts, [Budget(images=mean * count) for count in counts]),
            ([n], [Budget(trials=n)]),
        )
    ]
    by_trials, by_images, expected = ([_span(e, sign, accuracy) for e in each] for each in curves)
    row["by_trials"] = [
        Point(budget=float(count), **span) for count, span in zip(counts, by_trials, strict=True)
    ]
    row["by_images"] = [
        Point(budget=mean * count, **span) for count, span in zip(counts, by_images, strict=True)
    ]
    row["expected"] = expected[0]
    return row


def _spread(least: int, most: int, also: int) -> list[int]:
    """At most MAX_POINTS whole numbers, denser where they are small, with both ends and `also`."""
    places = np.geomspace(least, most, MAX_POINTS - 1) if most > MAX_POINTS else range(1, most + 1)
    return sorted({*(round(float(place)) for place in places), most, also})


def _curve(
    sample: Sample,
    counts: Sequence[int],
    budgets: Sequence[Budget],
    half: int,
    generator: np.random.Generator,
) -> list[Estimate]:
    """Estimates at budgets that are worth so many trials each; intervals up to half of them."""
    inside = [place for place, count in enumerate(counts) if count <= half < len(sample)]
    if len(inside) > MAX_INTERVALS:
        inside = [inside[round(i)] for i in np.linspace(0, len(inside) - 1, MAX_INTERVALS)]
    found = intervals(sample, [budgets[place] for place in inside], generator) if inside else []
    known = dict(zip(inside, found, strict=True))
    unknown = (math.nan, math.nan, math.nan)
    return [
        known[place] if place in known else Estimate(expected_best(sample, budget), *unknown)
        for place, budget in enumerate(budgets)
    ]


def _span(estimate: Estimate, sign: float = 1.0, accuracy: bool = False) -> Span:
    """As recorded: `sign` turns values back, and no accuracy lies outside of 0 and 1."""
    low, high = sorted((sign * estimate.low, sign * estimate.high))
    known = math.isfinite(low) and math.isfinite(high)
    if accuracy:
        low, high = max(0.0, low), min(1.0, high)
    return Span(
        value=sign * estimate.value, low=low if known else None, high=high if known else None
    )


def _pairs(
    levels: Sequence[Level], sign: float, images: int | None, generator: np.random.Generator
) -> list[Pair]:
    pairs = list(itertools.combinations(levels, 2))
    rows = [_pair(a, b, sign, len(pairs), images, generator) for a, b in pairs]
    tested = sorted((row for row in rows if row["p"] is not None), key=lambda row: row["p"] or 0.0)
    largest = 0.0
    for place, row in enumerate(tested):  # Holm 1979
        assert row["p"] is not None
        largest = max(largest, min(1.0, (len(tested) - place) * row["p"]))
        row["p_holm"] = largest
        if largest <= ALPHA and row["difference"] is not None:
            noise = row["measurement"]
            within = noise is not None and row["difference"]["value"] < noise
            row["result"] = "better_on_these_images" if within else "better"
            row["trials_needed"], row["beyond"] = None, False
    return rows


def _pair(
    first: Level,
    second: Level,
    sign: float,
    pairs: int,
    images: int | None,
    generator: np.random.Generator,
) -> Pair:
    row = Pair(
        first=first.name,
        second=second.name,
        result="untested",
        why="",
        trials=first.trials + second.trials,
        n=None,
        expected_first=None,
        expected_second=None,
        difference=None,
        p=None,
        p_holm=None,
        measurement=None,
        images_needed=None,
        probability=None,
        images=None,
        difference_by_images=None,
        cliffs_delta=None,
        p_rank=None,
        trials_needed=None,
        beyond=False,
        confirmed=None,
        text="",
    )
    a, b = first.outcomes, second.outcomes
    if a is None or b is None:
        lacking = " and ".join(each.name for each in (first, second) if each.outcomes is None)
        return row | {"why": f"no trial of {lacking} was completed"}
    n = budget_of(first, second)
    budget = Budget(trials=n)
    if expected_best(a, budget) < expected_best(b, budget):
        first, second, a, b = second, first, b, a
    expected = [sign * expected_best(each, budget) for each in (a, b)]
    row |= {
        "first": first.name,
        "second": second.name,
        "n": n,
        "expected_first": expected[0],
        "expected_second": expected[1],
    }
    if min(len(a), len(b)) < 2:
        return row | {"why": "a level of one trial cannot be compared"}
    if not _could_reject(len(a), len(b), pairs):
        return row | {"why": f"{len(a)} and {len(b)} trials are too few to show any difference"}
    found = difference(a, b, budget, generator)
    gap = found.interval.value
    spent = min(a.costs_N.sum(), b.costs_N.sum()) / SHARE
    dearest, cheapest = (f(a.costs_N.mean(), b.costs_N.mean()) for f in (max, min))
    # One trial at least, and not all of them: else the two budgets would not be equal.
    equal = dearest <= spent <= cheapest * (min(len(a), len(b)) - 1)
    by_images = (
        difference(a, b, Budget(images=float(spent)), generator, resamples=1_000, permutations=0)
        if equal
        else None
    )
    early = first.early, second.early
    ranked = min(map(len, early)) >= 2
    delta = probability_better(*early, 1) if ranked else None
    noise = _measurement(expected, images)
    needed, beyond = _trials_needed(found.interval, pairs, min(len(a), len(b)))
    return row | {
        "result": "undecided",
        "difference": _span(found.interval),
        "p": found.p,
        "measurement": noise,
        "images_needed": math.ceil(images * (noise / gap) ** 2)
        if images and noise and 0 < gap < noise
        else None,
        "probability": _span(probability_better(a, b, n)),
        "images": None if by_images is None else int(spent),
        "difference_by_images": None if by_images is None else _span(by_images.interval),
        "cliffs_delta": None
        if delta is None
        else Span(value=2 * delta.value - 1, low=2 * delta.low - 1, high=2 * delta.high - 1),
        "p_rank": float(mannwhitneyu(*(each.values_N for each in early)).pvalue)
        if ranked
        else None,
        "trials_needed": needed,
        "beyond": beyond,
    }


def _could_reject(first: int, second: int, pairs: int) -> bool:
    """Whether the most extreme arrangement of so many trials would be rare enough."""
    arrangements = math.comb(first + second, first)
    return (2 if first == second else 1) / arrangements <= ALPHA / pairs


def _measurement(expected: Sequence[float], images: int | None) -> float | None:
    errors = [standard_error(value, images) for value in expected]
    known = [error for error in errors if error is not None]
    return 1.96 * math.hypot(*known) if len(known) == 2 else None


def _trials_needed(found: Estimate, pairs: int, trials: int) -> tuple[int | None, bool]:
    """Trials of each level that would show this difference with 80 % power, and whether they are
    too many to name.

    By the normal approximation, with the error of the smaller level falling as 1 / sqrt(trials);
    it is read off the interval, which is wider than the jackknife's.
    """
    if not found.value or not found.error:
        return None, False
    error = (found.high - found.low) / (2 * 1.96)
    wanted = float(norm.ppf(1 - ALPHA / (2 * pairs)) + norm.ppf(POWER))
    ratio = (wanted * error / found.value) ** 2
    if not ratio <= BEYOND:
        return None, True
    return max(trials + 1, math.ceil(ratio * trials)), False
