"""Where trials failed: the test's level, planted regions, intervals and words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import optuna.distributions as d
import pytest
from scipy.stats import binomtest

from analysis.failure_regions import (
    associations,
    failure_figure,
    kinds_of,
    rates,
    strongest,
    wilson,
)
from tests.effect_sweeps import SPACE, planted, sweep


def settings(rng, n):
    return {
        "lr": (10 ** rng.uniform(-4, -1, n)).tolist(),
        "temperature": (10 ** rng.uniform(-1.3, 0, n)).tolist(),
        "batch_size": rng.choice([64, 128, 256], n).tolist(),
        "strength": rng.uniform(0.1, 1.5, n).tolist(),
    }


@pytest.mark.slow
def test_no_effect_is_told_no_more_often_than_the_level():
    rng, told = np.random.default_rng(0), []
    for n in (15, 20, 30, 45, 60):
        frames = sweep(settings(rng, n), [0.5] * n)
        for _ in range(100):
            failed = rng.permutation(n) < rng.integers(3, n // 3)
            states = np.where(failed, "diverged", "completed")
            dealt = replace(frames, trials=frames.trials.assign(state=states))
            told.append(strongest(associations(dealt)) is not None)
    assert 0 < np.mean(told) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 500)


def test_a_planted_region_is_found_and_told():
    lr = [0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.09]
    temperature = [0.1 + 0.07 * (7 * n % 13) for n in range(14)]
    states = ["completed"] * 8 + ["diverged", "pruned", *["diverged"] * 4]
    frames = sweep(
        {"lr": lr, "temperature": temperature},
        [0.5] * 14,
        states=states,
        ranges={name: SPACE[name] for name in ("lr", "temperature")},
    )
    found = strongest(associations(frames))
    assert found is not None
    assert (found.parameter, found.kind, found.tests) == ("lr", "diverged", 2)
    assert (found.failures, found.inside_failures, found.inside, found.outside) == (5, 5, 6, 8)
    assert found.sentence().startswith(
        "All 5 trials that diverged had lr at or above 0.02: 5 of 6 trials there diverged, "
        "0 of 8 elsewhere (p = 0.00"
    )
    assert found.sentence().endswith("corrected for 2 tests).")


def test_a_level_that_does_not_fit_is_found():
    sizes = [64] * 10 + [128] * 10 + [256] * 10
    states = ["completed"] * 19 + ["oom"] * 9 + ["completed"] * 2
    frames = sweep(
        {"batch_size": sizes, "strength": [0.1 + 0.04 * (11 * n % 30) for n in range(30)]},
        [0.5] * 30,
        states=states,
        ranges={name: SPACE[name] for name in ("batch_size", "strength")},
    )
    found = strongest(associations(frames))
    assert found is not None
    assert (found.parameter, found.region, found.tests) == ("batch_size", "256", 4)
    assert "8 of 9 trials that ran out of memory had batch_size 256: 8 of 10" in found.sentence()


def test_small_values_may_be_the_bad_ones():
    strength = np.linspace(0.1, 1.5, 20).tolist()
    states = ["error"] * 5 + ["completed"] * 15
    frames = sweep(
        {"strength": strength}, [0.5] * 20, states=states, ranges={"strength": SPACE["strength"]}
    )
    found = strongest(associations(frames))
    assert found is not None
    assert found.region == f"at or below {strength[4]:.4g}"
    assert (found.inside_failures, found.inside) == (5, 5)


def test_other_failures_are_not_at_risk():
    lr = np.geomspace(1e-4, 1e-1, 12).tolist()
    states = ["oom"] * 3 + ["completed"] * 4 + ["lost", "unfinished"] + ["diverged"] * 3
    frames = sweep({"lr": lr}, [0.5] * 12, states=states, ranges={"lr": SPACE["lr"]})
    assert kinds_of(frames) == {"diverged": 3, "oom": 3}
    by_kind = {item.kind: item for item in associations(frames)}
    assert (by_kind["diverged"].inside + by_kind["diverged"].outside) == 7
    assert (by_kind["oom"].inside + by_kind["oom"].outside) == 7


@pytest.mark.parametrize("failures", [0, 2, 11, 12])
def test_few_or_nothing_but_failures_are_not_tested(failures):
    lr = np.geomspace(1e-4, 1e-1, 12).tolist()
    states = ["diverged"] * failures + ["completed"] * (12 - failures)
    frames = sweep({"lr": lr}, [0.5] * 12, states=states, ranges={"lr": SPACE["lr"]})
    assert associations(frames) == []
    assert strongest([]) is None


@pytest.mark.parametrize(("k", "n"), [(0, 7), (3, 11), (5, 5), (1, 400)])
def test_intervals_are_wilsons(k, n):
    exact = binomtest(k, n).proportion_ci(0.95, method="wilson")
    low, high = wilson(np.array([float(k)]), np.array([float(n)]))
    assert (low[0], high[0]) == pytest.approx((exact.low, exact.high))


def test_an_empty_bin_has_no_interval():
    low, high = wilson(np.array([0.0]), np.array([0.0]))
    assert np.isnan([low[0], high[0]]).all()


def test_every_trial_at_risk_lies_in_a_bin():
    frames = planted(200)
    for name in frames.parameters:
        found = rates(frames, name, "diverged")
        assert found is not None
        assert found.trials.sum() == 200
        assert found.failures.sum() == (frames.trials["state"] == "diverged").sum()
        assert len(found.texts) == len(found.trials) == len(found.places)


def test_a_default_outside_its_range_lies_in_a_bin():
    lr = [5.0, *np.geomspace(1e-4, 1e-1, 11)]
    frames = sweep({"lr": lr}, [0.5] * 12, ranges={"lr": SPACE["lr"]})
    found = rates(frames, "lr", "oom")
    assert found is not None
    assert found.trials.sum() == 12


def test_a_figure_has_a_series_for_each_kind():
    lr = np.geomspace(1e-4, 1e-1, 12).tolist()
    states = ["oom"] * 3 + ["completed"] * 6 + ["diverged"] * 3
    frames = sweep({"lr": lr}, [0.5] * 12, states=states, ranges={"lr": SPACE["lr"]})
    figure = failure_figure(frames, "lr", ["diverged", "oom"])
    assert figure is not None
    assert [trace.name for trace in figure.data] == ["diverged", "ran out of memory"]
    assert figure.layout.showlegend
    assert max(figure.data[0].y) == 1.0


def test_nothing_is_drawn_of_a_parameter_that_no_trial_has():
    ranges = {"lr": SPACE["lr"], "margin": d.FloatDistribution(0, 1)}
    lr = np.geomspace(1e-4, 1e-1, 12).tolist()
    frames = sweep({"lr": lr, "margin": [None] * 12}, [0.5] * 12, ranges=ranges)
    assert failure_figure(frames, "margin", ["diverged"]) is None
