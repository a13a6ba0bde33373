"""Heat maps of pairs and lines over all parameters."""

from __future__ import annotations

import math

import numpy as np
import optuna.distributions as d
import pytest

from analysis.effects import comparable
from analysis.heat_maps import MAX_DOTS, heat_map_figure, pairs, tiles
from analysis.parallel import MAX_AXES, MAX_LINES, best_trials, parallel_figure
from tests.effect_sweeps import SPACE, planted, sweep

SMALL = {name: SPACE[name] for name in ("strength", "batch_size")}


def test_the_usual_pairs_come_first_then_the_important_ones():
    frames = planted(60)
    order = ["lr", "strength", "temperature", "batch_size"]
    assert pairs(frames, order) == [
        ("temperature", "batch_size"),
        ("temperature", "lr"),
        ("lr", "strength"),
        ("strength", "temperature"),
    ]


def test_parameters_that_do_not_vary_make_no_pair():
    frames = sweep({"strength": [0.1, 0.2] * 5, "batch_size": [64] * 10}, [0.5] * 10, ranges=SMALL)
    assert pairs(frames, ["strength", "batch_size"]) == []


def test_tiles_hold_means_and_counts_of_what_lies_in_them():
    strength = [0.1, 0.1, 0.8, 0.8, 1.5, 1.5]
    sizes = [64, 64, 64, 256, 256, 256]
    frames = sweep(
        {"strength": strength, "batch_size": sizes},
        [0.1, 0.3, 0.5, 0.6, 0.7, 0.8],
        states=["completed"] * 5 + ["diverged"],
        ranges=SMALL,
    )
    found = tiles(frames, ("strength", "batch_size"), comparable(frames))
    assert found is not None
    assert found.counts.tolist() == [[2, 1, 0], [0, 1, 1]]
    assert found.means[0].tolist()[:2] == pytest.approx([0.2, 0.5])
    assert found.means[1].tolist()[1:] == pytest.approx([0.6, 0.7])  # 0.8 is of a failed trial
    assert math.isnan(found.means[0, 2])
    heat = heat_map_figure(frames, found).data[0]
    assert heat.z[0][2] is None  # empty tiles stay empty
    assert "n = 2" in heat.text[0][0]
    assert "batch_size 64" in heat.text[0][0]


def test_few_trials_make_no_tiles():
    frames = sweep(
        {"strength": [0.1, 0.5, 1], "batch_size": [64, 128, 256]}, [0.5] * 3, ranges=SMALL
    )
    assert tiles(frames, ("strength", "batch_size"), comparable(frames)) is None


def test_lower_values_are_yellow_where_lower_is_better():
    frames = planted(40)
    found = tiles(frames, ("lr", "strength"), comparable(frames))
    assert found is not None
    higher = heat_map_figure(frames, found).data[0].colorscale
    frames.info["mode"] = "min"
    lower = heat_map_figure(frames, found).data[0].colorscale
    assert [colour for _, colour in lower] == [colour for _, colour in reversed(higher)]
    assert [at for at, _ in lower] == sorted(at for at, _ in lower)


def test_rings_are_sampled_and_every_trial_counts():
    frames = planted(1_000)
    found = tiles(frames, ("temperature", "batch_size"), comparable(frames))
    assert found is not None
    assert found.counts.sum() == len(comparable(frames).values)
    assert len(heat_map_figure(frames, found).data[1].x) == MAX_DOTS


def test_lines_are_those_of_the_best():
    frames = planted(1_000)
    compared = comparable(frames)
    drawn = best_trials(frames, compared)
    assert len(drawn.values) == MAX_LINES
    assert drawn.values.min() >= compared.values.drop(drawn.values.index).max()
    assert drawn.values.iloc[-1] == compared.values.max()
    figure = parallel_figure(frames, frames.parameters, drawn)
    assert figure is not None
    numbers = {
        told[0] for trace in figure.data for told in trace.customdata or () if told is not None
    }
    assert numbers == set(drawn.values.index)


def test_a_line_is_broken_where_a_trial_lacks_the_parameter():
    ranges = {
        "strength": SPACE["strength"],
        "margin": d.FloatDistribution(0, 2),
        "lr": SPACE["lr"],
    }
    frames = sweep(
        {
            "strength": [0.1, 0.8, 1.5],
            "margin": [1.0, None, 2.0],
            "lr": [1e-4, 1e-2, 1e-1],
        },
        [0.1, 0.5, 0.9],
        ranges=ranges,
    )
    figure = parallel_figure(
        frames, ["strength", "margin", "lr"], best_trials(frames, comparable(frames))
    )
    assert figure is not None
    lines = {
        told[0]: list(trace.x) for trace in figure.data for told in (trace.customdata or ())[:1]
    }
    assert lines[0][:3] == pytest.approx([0, 0.5, 0])
    assert lines[1][1] is None
    assert lines[1][2] == pytest.approx(2 / 3)
    assert lines[2][:3] == pytest.approx([1, 1, 1])


def test_many_parameters_are_few_axes():
    rng = np.random.default_rng(0)
    names = [f"p{index:02}" for index in range(20)]
    frames = sweep(
        {name: rng.random(10).tolist() for name in names},
        rng.random(10).tolist(),
        ranges=dict.fromkeys(names, d.FloatDistribution(0, 1)),
    )
    figure = parallel_figure(frames, names, best_trials(frames, comparable(frames)))
    assert figure is not None
    assert len(figure.layout.shapes) == MAX_AXES


def test_one_parameter_needs_no_lines():
    frames = sweep({"strength": [0.1, 0.5, 1.0]}, [0.1, 0.2, 0.3], ranges=SMALL)
    assert parallel_figure(frames, ["strength"], best_trials(frames, comparable(frames))) is None
