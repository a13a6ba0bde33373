"""The Pareto set of a sweep of several objectives: its table, its figure, its columns."""

from __future__ import annotations

import csv
import json

from analysis.load import load_sweep
from analysis.pareto import pareto_figure, pareto_rows
from analysis.tables import leaderboard_rows
from tests.pages import headings, read


def test_a_sweep_of_several_objectives_shows_its_pareto_set(
    sweep_store, record_sweep, fake_trial, tmp_path
):
    trials = [
        fake_trial(
            number,
            "completed",
            {"lr": value / 100} if number == 1 else {"lr": 1e-3, "margin": value},
            [value] * 8,
            tags={"pareto": str(on_front).lower()},
            metrics={"speed": speed},
        )
        for number, value, speed, on_front in [
            (0, 0.5, 900.0, False),
            (1, 0.6, 1234.0, True),
            (2, 0.9, 777.0, True),
        ]
    ]
    also = {"also": json.dumps(["speed"]), "also_modes": json.dumps(["max"])}
    record_sweep("pareto", trials, tags=also)
    frames = load_sweep(sweep_store, "pareto")
    rows = pareto_rows(frames)
    assert [(row["number"], row["values"]) for row in rows] == [(2, [0.9, 777]), (1, [0.6, 1234])]
    markup = read(sweep_store, "pareto", tmp_path)
    text = " ".join(markup.text.split())
    assert "Of these 2 completed trials none is beaten by another in all of knn_top1 and" in text
    assert headings(markup, 1)[:4] == ["trial", "state", "knn_top1", "speed"]
    assert "0.006" in markup.text  # lr of trial 1, which has no margin
    assert "s0-pareto" in markup.figures()
    figure = pareto_figure(frames)
    assert figure is not None
    dots, front = figure.data
    assert (dots.name, list(dots.x), list(dots.y)) == ("completed", [0.5], [900])
    assert (front.name, list(front.x), list(front.y)) == ("Pareto set", [0.6, 0.9], [1234, 777])
    assert (front.mode, front.line.shape) == ("lines+markers", "vh")
    assert [number for number, _ in front.customdata] == [1, 2]
    assert "trial %{customdata[0]}" in front.hovertemplate
    assert figure.layout.xaxis.title.text == "knn_top1 (higher is better)"
    assert figure.layout.yaxis.title.text == "speed (higher is better)"
    with (tmp_path / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        assert [float(row["also.speed"]) for row in csv.DictReader(file)] == [777, 1234, 900]
    assert [row["also.speed"] for row in leaderboard_rows(frames)] == [777, 1234, 900]


def test_of_three_objectives_two_are_drawn_without_a_line(
    sweep_store, record_sweep, fake_trial, tmp_path
):
    hostile = "<img src=x>"
    trials = [
        fake_trial(
            number,
            "completed",
            {"lr": 1e-3},
            [0.1 * number] * 8,
            tags={"pareto": "true"} if number == 2 and ended else {},
            metrics={"speed": 5.0, "memory": 2e9},
        )
        for ended in (True, False)
        for number in range(3)
    ]
    for name, some in (("three", trials[:3]), ("three going on", trials[3:])):
        also = {"also": json.dumps(["speed", hostile]), "also_modes": json.dumps(["max", "min"])}
        record_sweep(name, some, tags=also)
    markup = read(sweep_store, "three", tmp_path)
    assert [trace["mode"] for trace in markup.figures()["s0-pareto"]["data"]] == ["markers"] * 2
    assert "that of all 3 objectives, of which two are drawn" in markup.text
    assert "img" not in markup.tags
    assert hostile in headings(markup, 1)
    going_on = read(sweep_store, "three going on", tmp_path)
    assert len(going_on.figures()["s0-pareto"]["data"]) == 1
    assert "is recorded once the sweep has ended" in going_on.text


def test_a_sweep_of_one_objective_has_no_pareto_set(sweep_store, recorded, tmp_path):
    assert pareto_figure(recorded) is None
    markup = read(sweep_store, "planted", tmp_path)
    assert "Pareto" not in markup.text
    assert "s0-pareto" not in markup.figures()


def test_where_lower_is_better_the_step_goes_the_other_way(sweep_store, record_sweep, fake_trial):
    trials = [
        fake_trial(
            number,
            "completed",
            {"lr": 1e-3},
            [1.0 + number] * 8,
            tags={"pareto": "true"},
            metrics={"speed": 100.0 * (number + 1)},
        )
        for number in range(2)
    ]
    lower = {"mode": "min", "objective": "val_loss", "also": json.dumps(["speed"])}
    record_sweep("pareto of losses", trials, tags=lower)
    figure = pareto_figure(load_sweep(sweep_store, "pareto of losses"))
    assert figure is not None
    (front,) = figure.data
    assert (list(front.x), list(front.y), front.line.shape) == ([1, 2], [100, 200], "hv")
    assert figure.layout.yaxis.title.text == "speed"  # which way is better was not recorded
