"""Comparisons on synthetic samples of known truth: do intervals and test keep what they promise?

Rates are over REPEATS repetitions; a rate of 95 % then has a standard error of about 2 %, or of 1 %
with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from analysis.best_of import (
    LEVEL,
    Array,
    Budget,
    Sample,
    difference,
    intervals,
    probability_better,
)
from analysis.compare import SHARE, _trials_needed
from tests.extent import times

REPEATS = times(100, 500)
SLACK = 3 * math.sqrt(LEVEL * (1 - LEVEL) / REPEATS)
"""Three standard errors of a rate."""

Draw = Callable[[np.random.Generator, int | tuple[int, int]], Array]
TRUTHS: dict[str, Draw] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "ceiling": lambda rng, size: 1 - rng.gamma(0.7, 0.05, size=size),
    "tied": lambda rng, size: np.round(300 * (0.7 + 0.25 * rng.beta(5, 2, size=size))) / 300,
}
"""Normal; accuracies that crowd under a ceiling, where most trials are good; accuracies on 300
images, which tie."""


def sample(values: Array) -> Sample:
    return Sample.of(values, np.ones(len(values)))


def expected_best(draw: Draw, rng: np.random.Generator, n: int) -> float:
    return float(draw(rng, (400_000 // n, n)).max(axis=1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("total", [8, 20, 60])
def test_intervals_of_the_expected_best_hold_it(truth: str, total: int) -> None:
    draw, rng = TRUTHS[truth], np.random.default_rng(total)
    numbers = [1, total // SHARE, total // 2]
    truths = [expected_best(draw, rng, n) for n in numbers]
    budgets = [Budget(trials=n) for n in numbers]
    held = np.zeros(len(numbers))
    for _ in range(REPEATS):
        found = intervals(sample(draw(rng, total)), budgets, rng, resamples=250)
        held += [each.low <= value <= each.high for each, value in zip(found, truths, strict=True)]
    rates = held / REPEATS
    print(f"{truth}, {total} trials: {dict(zip(numbers, rates, strict=True))}")
    assert rates.min() >= LEVEL - SLACK


@pytest.mark.slow
@pytest.mark.parametrize(
    ("truth", "total"), [*((truth, total) for truth in TRUTHS for total in (8, 20)), ("normal", 60)]
)
def test_the_test_holds_its_level_and_the_interval_the_difference(truth: str, total: int) -> None:
    """Alike: both samples of one truth. Wider: one of twice the spread and the same expected
    best. Apart: shifted by two standard deviations, which the test must find."""
    draw, rng = TRUTHS[truth], np.random.default_rng(100 + total)
    n = total // SHARE
    spread = float(draw(rng, 100_000).std())
    offset = expected_best(draw, rng, n) - expected_best(lambda g, s: 2 * draw(g, s), rng, n)
    shift = 2 * spread
    rejected = dict.fromkeys(("alike", "wider", "apart"), 0)
    held = certain = 0
    for _ in range(REPEATS):
        base, other = draw(rng, total), draw(rng, total)
        others = {"alike": other, "wider": 2 * other + offset, "apart": other - shift}
        for case, values in others.items():
            if case == "wider" and total == 60:
                continue  # thrift: the small samples are the harder ones
            first, second = sample(base), sample(values)
            found = difference(
                first, second, Budget(trials=n), rng, resamples=200, permutations=200
            )
            rejected[case] += found.p <= 1 - LEVEL
            if case == "apart":
                held += found.interval.low <= shift <= found.interval.high
            if case == "alike":
                chance = probability_better(first, second, n)
                certain += chance.low <= 0.5 <= chance.high
    if total == 60:
        del rejected["wider"]
    rates = {case: count / REPEATS for case, count in rejected.items()}
    print(f"{truth}, {total}: {rates}, held {held / REPEATS}, probability {certain / REPEATS}")
    assert rates["alike"] <= 1 - LEVEL + SLACK
    assert rates.get("wider", 0.0) <= 1 - LEVEL + SLACK
    assert rates["apart"] >= 0.6
    assert held / REPEATS >= LEVEL - SLACK
    assert certain / REPEATS >= LEVEL - SLACK


@pytest.mark.slow
def test_a_difference_for_the_same_images_is_held_too() -> None:
    """Weak trials are stopped at a quarter of the cost; the levels stop different shares."""
    rng = np.random.default_rng(7)

    def level(total: int, cut: float) -> Sample:
        values = rng.normal(size=total)
        return Sample.of(values, np.where(values > cut, 4_000.0, 1_000.0))

    budget = Budget(images=12_000.0)
    held, truth = 0, _of_many(level(200_000, 1.0), budget) - _of_many(level(200_000, -1.0), budget)
    for _ in range(REPEATS):
        found = difference(
            level(20, 1.0), level(20, -1.0), budget, rng, resamples=250, permutations=0
        )
        held += found.interval.low <= truth <= found.interval.high
    print(f"images: {held / REPEATS}, truth {truth:.2f}")
    assert truth > 0.3  # more trials for the same images find more
    assert held / REPEATS >= LEVEL - SLACK


def _of_many(sample: Sample, budget: Budget) -> float:
    assert budget.images is not None
    n = budget.images / sample.costs_N.mean()
    whole = math.floor(n)
    values = np.random.default_rng(0).choice(sample.values_N, (100_000, whole + 1))
    low, high = values[:, :whole].max(axis=1).mean(), values.max(axis=1).mean()
    return float(low + (n - whole) * (high - low))


@pytest.mark.slow
def test_as_many_trials_as_are_asked_for_tell_the_difference_seen() -> None:
    rng = np.random.default_rng(8)
    budget, gap = Budget(trials=4), 0.7
    first, second = sample(rng.normal(size=12)), sample(rng.normal(size=12))
    found = difference(first, second, budget, rng).interval
    # as if the gap seen were the true one
    low, high = gap + found.low - found.value, gap + found.high - found.value
    needed, beyond = _trials_needed(type(found)(gap, low, high, found.error), 1, 12)
    assert needed is not None
    assert not beyond
    shown, repeats = 0, times(80, 500)
    for _ in range(repeats):
        a, b = sample(rng.normal(size=needed) + gap), sample(rng.normal(size=needed))
        shown += difference(a, b, budget, rng, resamples=200, permutations=200).p <= 1 - LEVEL
    print(f"{needed} trials: shown in {shown / repeats:.2f}")
    slack = 2 * math.sqrt(0.8 * 0.2 / repeats)  # of the 80 % asked for; the gap itself is rounded
    assert 0.69 - slack <= shown / repeats <= 0.89 + slack
