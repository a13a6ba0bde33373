"""Trends over one parameter: coverage of their intervals on known curves, levels, edge cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from analysis.effect_plots import parameter_figure, parameter_trend
from analysis.effects import comparable
from analysis.scales import Scale, scale_of
from analysis.slices import WIDENED, curve, trend
from tests.effect_sweeps import planted, sweep

LINE = Scale("x", None, False, 0.0, 1.0, None)
CURVES = {
    "hump": (lambda x: 0.9 - 0.8 * (x - 0.6) ** 2, lambda x: 0.02 + 0 * x),
    "sine": (lambda x: np.sin(4 * x), lambda x: 0.2 + 0 * x),
    "noise that varies": (lambda x: 0.5 + 0.3 * x, lambda x: 0.01 + 0.05 * x),
    "flat": (lambda x: 0 * x, lambda x: 0.1 + 0 * x),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVES)
def test_intervals_of_a_trend_cover_at_their_rate(name):
    truth, spread = CURVES[name]
    rng, places = np.random.default_rng(0), np.linspace(0.1, 0.9, 9)
    covered = []
    for _ in range(500):
        x = rng.random(40)
        y = truth(x) + spread(x) * rng.normal(size=40)
        centre, error, freedom = curve(x, y, places)
        half = WIDENED * student.ppf(0.975, freedom) * error
        covered.append(np.abs(centre - truth(places)) <= half)
    rate = np.mean(covered)
    assert 0.93 < rate < 0.975, rate  # 0.95, within twice the error of 500 curves and a bias


def test_intervals_of_levels_cover_at_their_rate():
    rng, scale = np.random.default_rng(0), Scale("x", ("a", "b"), False, 0, 1, (0.0, 1.0))
    places, truth = np.repeat([0.0, 1.0], [4, 9]), np.array([0.3, 0.7])
    covered = []
    for _ in range(1_000):
        found = trend(places, truth[places.astype(int)] + 0.1 * rng.normal(size=13), scale)
        assert found is not None
        covered.append((found.low <= truth) & (truth <= found.high))
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_a_trend_follows_a_parabola_exactly():
    x = np.linspace(0, 1, 20)
    found = trend(x, 1 + 2 * x - 3 * x**2, LINE)
    assert found is not None
    assert found.is_curve
    assert found.centre == pytest.approx(1 + 2 * found.places - 3 * found.places**2, abs=1e-6)


def test_levels_with_few_trials_have_no_interval():
    scale = Scale("x", ("a", "b", "c"), False, 0, 2, (0.0, 1.0, 2.0))
    found = trend(np.array([0.0, 0, 0, 1, 1]), np.array([1.0, 2, 3, 4, 6]), scale)
    assert found is not None
    assert (found.places.tolist(), found.centre.tolist()) == ([0, 1], [2, 5])
    assert found.counts.tolist() == [3, 2]
    assert found.high[0] - found.centre[0] == pytest.approx(4.302653 / np.sqrt(3))
    assert np.isnan(found.low[1])


def test_too_few_trials_have_no_trend():
    assert trend(np.arange(7.0), np.arange(7.0), LINE) is None
    assert trend(np.repeat([0.1, 0.2, 0.3, 0.4], 5), np.arange(20.0), LINE) is None
    assert trend(np.full(9, np.nan), np.arange(9.0), LINE) is None


def test_a_trend_stays_finite_with_clusters_and_a_lonely_point():
    x = np.array([*np.full(20, 0.1), *np.linspace(0.1, 0.12, 20), 1.0])
    found = trend(x, np.sin(30 * x), LINE)
    assert found is not None
    assert np.isfinite([found.centre, found.low, found.high]).all()


def test_thousands_of_trials_are_sampled():
    rng = np.random.default_rng(0)
    x = rng.random(5_000)
    found = trend(x, x + 0.1 * rng.normal(size=5_000), LINE)
    assert found is not None
    assert found.n == 400
    assert np.abs(found.centre - found.places).max() < 0.1


def test_completed_trials_are_compared_where_there_are_eight():
    frames = planted(60)
    compared = comparable(frames)
    done = frames.trials[frames.trials["state"] == "completed"]
    assert compared.completed
    assert compared.values.to_dict() == done.set_index("number")["objective"].to_dict()


def test_otherwise_all_are_compared_at_the_shared_mark():
    lr = np.geomspace(1e-4, 1e-1, 12).tolist()
    states = ["completed"] * 7 + ["pruned"] * 5
    early = [0.01 * n for n in range(12)]
    frames = sweep({"lr": lr}, [0.9] * 12, states=states, early=early)
    # the last value of a stopped trial is its first: both are at 1,000 images
    compared = comparable(frames)
    assert (compared.completed, compared.mark, len(compared.values)) == (False, 1_000, 12)
    assert compared.values[:7].tolist() == pytest.approx(early[:7])


def test_a_log_trend_is_drawn_over_settings():
    frames = planted(60)
    scale = scale_of(frames, "lr")
    found = parameter_trend(frames, scale, comparable(frames))
    assert found is not None
    figure = parameter_figure(frames, "lr", found)
    line = next(each for each in figure.data if each.name == "trend")
    assert line.x[0] == pytest.approx(10 ** found.places[0])
    assert line.x[int(np.argmax(line.y))] == pytest.approx(10**-2.5, rel=0.8)


def test_a_number_of_few_values_is_a_few_levels():
    frames = sweep({"lr": [1e-3, 1e-2] * 6}, [0.1 * n for n in range(12)])
    assert scale_of(frames, "lr").stops == (-3.0, -2.0)
    assert scale_of(planted(60), "lr").stops is None
    assert scale_of(planted(60), "batch_size").levels == ("64", "128", "256")
