"""Intervals over seeds and images: coverage where the truth is known, edges, agreement with p."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from analysis.crossed import (
    difference_interval,
    mean_interval,
    most_seeds,
    seeds_interval,
    seeds_needed,
    wilson,
)

MU, IMAGES_SD, IMAGES = 2.3, 1.5, 360
REPETITIONS = 500
SLACK = 1.96 * math.sqrt(0.05 * 0.95 / REPETITIONS)
"""What chance makes of a rate of 95 %."""


def drawn(
    rng: np.random.Generator, seeds: int, seeds_sd: float, images: int = IMAGES, mu: float = MU
) -> NDArray[np.bool_]:
    """Right where ability + seed + difficulty of the image + noise is above 0."""
    seed_R1 = seeds_sd * rng.standard_normal((seeds, 1))
    image_1I = IMAGES_SD * rng.standard_normal((1, images))
    return mu + seed_R1 + image_1I + rng.standard_normal((seeds, images)) > 0


def truth(seeds_sd: float, mu: float = MU) -> float:
    return float(norm.cdf(mu / math.sqrt(1 + seeds_sd**2 + IMAGES_SD**2)))


def percentile_bootstrap(
    rng: np.random.Generator, correct_RI: NDArray[np.bool_]
) -> tuple[float, float]:
    means_R = correct_RI.mean(axis=1)
    resampled = means_R[rng.integers(0, len(means_R), (300, len(means_R)))].mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("seeds_sd", [0.02, 0.2])
def test_the_truth_is_inside_as_often_as_stated_and_not_in_a_bootstrap_of_few_seeds(
    seeds: int, seeds_sd: float
) -> None:
    """Spread over the seeds is 1.1 and 2.1 points, of which 1.1 are the choice of 360 images."""
    rng, true = np.random.default_rng(seeds), truth(seeds_sd)
    ours = bootstrap = 0
    for _ in range(REPETITIONS):
        correct_RI = drawn(rng, seeds, seeds_sd)
        found = mean_interval(correct_RI)
        ours += found.low <= true <= found.high
        low, high = percentile_bootstrap(rng, correct_RI)
        bootstrap += low <= true <= high
    assert ours / REPETITIONS >= 0.95 - SLACK
    assert ours / REPETITIONS <= 0.995  # no interval without an end
    assert bootstrap / REPETITIONS < 0.85


def test_images_alone_cover_the_images_where_seeds_make_no_difference() -> None:
    rng, true = np.random.default_rng(1), truth(0.0)
    hits = sum(
        found.low <= true <= found.high
        for found in (mean_interval(drawn(rng, 1, 0.0)) for _ in range(REPETITIONS))
    )
    assert abs(hits / REPETITIONS - 0.95) <= SLACK + 0.01


@pytest.mark.parametrize("seeds", [3, 5])
def test_differences_hold_their_level_and_find_what_is_there(seeds: int) -> None:
    rng, sd, gap = np.random.default_rng(7), 0.1, 0.4
    spread = math.sqrt(1 + 2 * sd**2 + IMAGES_SD**2)
    true = float(norm.cdf((MU + gap) / spread) - norm.cdf(MU / spread))
    false = found = inside = 0
    for _ in range(REPETITIONS):
        shared_RI = (
            MU
            + sd * rng.standard_normal((seeds, 1))
            + (IMAGES_SD * rng.standard_normal((1, IMAGES)))
        )
        noise = (
            sd * rng.standard_normal((seeds, 1)) + rng.standard_normal((seeds, IMAGES))
            for _ in range(3)
        )
        a_RI, b_RI, c_RI = (shared_RI + each for each in noise)
        false += difference_interval(a_RI > 0, b_RI > 0).p < 0.05
        real = difference_interval(c_RI + gap > 0, b_RI > 0)
        found += real.p < 0.05
        inside += real.low <= true <= real.high
    assert false / REPETITIONS <= 0.05 + SLACK
    assert inside / REPETITIONS >= 0.95 - SLACK
    assert found / REPETITIONS > (0.2 if seeds == 3 else 0.6)


def test_parts_agree_with_the_analysis_of_variance_by_hand() -> None:
    correct_RI = np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], dtype=float)
    seeds, images = correct_RI.shape
    mean = correct_RI.mean()
    ms_seeds = images * ((correct_RI.mean(1) - mean) ** 2).sum() / (seeds - 1)
    ms_images = seeds * ((correct_RI.mean(0) - mean) ** 2).sum() / (images - 1)
    rest_RI = correct_RI - correct_RI.mean(1)[:, None] - correct_RI.mean(0)[None] + mean
    ms_rest = (rest_RI**2).sum() / ((seeds - 1) * (images - 1))
    found = mean_interval(correct_RI)
    cells = seeds * images
    assert found.parts.seeds == pytest.approx(ms_seeds / cells)
    assert found.parts.images == pytest.approx((ms_images - ms_rest) / cells)
    assert found.std == pytest.approx(correct_RI.mean(1).std(ddof=1))
    assert (found.mean, found.seeds, found.images) == (pytest.approx(mean), 3, 4)
    total = found.parts.seeds + found.parts.images
    assert total == pytest.approx((ms_seeds + ms_images - ms_rest) / cells)


def test_one_seed_has_wilsons_interval_of_its_images() -> None:
    correct_I = np.arange(1_000) < 870
    found = mean_interval(correct_I)
    low, high = wilson(0.87, 1_000, 0.975)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert (found.low, found.high) == (
        pytest.approx(0.8477, abs=1e-4),
        pytest.approx(0.8894, abs=1e-4),
    )
    assert (found.covers_seeds, found.std) == (False, None)
    again = mean_interval(np.stack([correct_I] * 3))
    assert again.high - again.low >= high - low - 1e-9  # copies are no further images


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("images", [1, 300, 50_000])
@pytest.mark.parametrize("right", [0, 1])
def test_no_interval_is_without_width_or_outside_of_0_and_1(
    seeds: int, images: int, right: int
) -> None:
    found = mean_interval(np.full((seeds, images), right))
    assert found.mean == right
    assert 0 <= found.low < found.high <= 1
    assert found.low <= found.mean <= found.high
    assert found.high - found.low == pytest.approx(3.84 / (images + 3.84), rel=0.01)
    same = difference_interval(np.full((seeds, images), right), np.full((seeds, images), right))
    assert same.low < same.mean == 0 < same.high
    assert same.p == 1


def test_p_and_the_interval_are_two_sides_of_one_test() -> None:
    rng = np.random.default_rng(3)
    b_RI = drawn(rng, 4, 0.05)
    a_RI = b_RI | (rng.random(b_RI.shape) < 0.3)
    p = difference_interval(a_RI, b_RI).p
    assert 1e-6 < p < 0.05
    at_its_level = difference_interval(a_RI, b_RI, level=1 - p)
    assert at_its_level.low == pytest.approx(0, abs=1e-6)
    turned = difference_interval(b_RI, a_RI)
    assert (turned.p, turned.mean) == (pytest.approx(p), pytest.approx(-at_its_level.mean))


def test_more_seeds_help_against_seeds_and_not_against_few_images() -> None:
    rng = np.random.default_rng(11)
    noisy = [drawn(rng, 3, 0.15, images=4_000, mu=mu) for mu in (2.5, 2.3)]
    shared = difference_interval(*noisy)
    assert shared.mean > 0
    small = difference_interval(noisy[0][:, :40], noisy[1][:, :40])
    assert seeds_needed(small) is None
    by_seeds = difference_interval(
        *(
            np.repeat(np.array(rates)[:, None], 2_000, 1) > np.arange(2_000) / 2_000
            for rates in ([0.9, 0.92, 0.95], [0.89, 0.93, 0.91])
        )
    )
    needed = seeds_needed(by_seeds)
    assert needed is not None
    assert needed > 3
    of_ten_pairs = seeds_needed(by_seeds, level=1 - 0.05 / 10)
    assert of_ten_pairs is None or of_ten_pairs > needed
    assert [most_seeds(seeds) for seeds in (5, 25, 60)] == [50, 50, 120]
    assert seeds_needed(difference_interval(noisy[0][:1], noisy[1][:1])) is None


def test_values_of_seeds_have_students_interval() -> None:
    found = seeds_interval([0.1, 0.2, 0.3])
    assert (found.mean, found.std) == (pytest.approx(0.2), pytest.approx(0.1))
    assert found.high == pytest.approx(0.2 + 4.3027 * 0.1 / math.sqrt(3), abs=1e-4)
    assert seeds_interval([0.1]).low is None


def test_wrong_input_is_told_in_one_line() -> None:
    for wrong, message in (
        (np.zeros((0, 3)), "table of seeds x images"),
        (np.full((2, 3), 2), "must lie in"),
        (np.full((2, 3), math.nan), "must lie in"),
        (np.zeros((2, 2, 2)), "table of seeds x images"),
    ):
        with pytest.raises(ValueError, match=message):
            mean_interval(wrong)
    with pytest.raises(ValueError, match="same seeds and images, got 2 x 3 and 1 x 3"):
        difference_interval(np.zeros((2, 3)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="level must be in"):
        mean_interval(np.zeros((2, 3)), level=1.0)
    with pytest.raises(ValueError, match="finite numbers"):
        seeds_interval([])
