from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from analysis.audit import outcomes_of
from analysis.load import load_sweep
from analysis.page import Figures, render
from analysis.rungs import mark_correlations
from analysis.stopping import rung_table, saving
from analysis.stopping_plots import correlation_figure, end_figure
from analysis.stopping_section import stopping_section
from search.advice import advise
from tests.asha_sweeps import altered, draw_sweep, frames_of

LEFT = 4 * (4_000 - 1_024) + 2 * (4_000 - 2_024)


def test_each_rung_counts_arrivals_and_stops(recorded):
    table = rung_table(recorded)
    assert table[["rung", "arrived", "passed", "stopped"]].to_numpy().tolist() == [
        *([1_000, 11, 7, 4], [2_000, 7, 5, 2])
    ]
    assert table["cutoff"].tolist() == [0.45, 0.6]
    assert (table["best"] > table["worst"]).all()


def test_cutoffs_are_in_order_of_time(sweep_store, record_sweep, fake_trial):
    late = fake_trial(
        0, "pruned", {"lr": 1e-3}, [0.1, 0.2], decisions={1_000: (0.7, 2, True)}, start_s=90
    )
    early = fake_trial(
        1, "pruned", {"lr": 1e-3}, [0.1, 0.3], decisions={1_000: (0.4, 1, True)}, start_s=0
    )
    record_sweep("order", [late, early])
    table = rung_table(load_sweep(sweep_store, "order"))
    assert table.loc[0, ["first_cutoff", "cutoff"]].tolist() == [0.4, 0.7]


def test_a_rung_nobody_reached_is_shown_empty(sweep_store, record_sweep, fake_trial):
    record_sweep("early", [fake_trial(0, None, {"lr": 1e-3}, [0.5])], state="running")
    table = rung_table(load_sweep(sweep_store, "early"))
    assert table["rung"].tolist() == [1_000, 2_000]
    assert table["arrived"].tolist() == [0, 0]
    assert table["cutoff"].isna().all()


def test_saved_is_what_stopped_trials_had_left(recorded):
    result = saving(recorded)
    spent = 5 * 4_024 + 4 * 1_024 + 2 * 2_024 + 2 * 524
    assert result["stopped"] == 6
    assert result["samples_seen"] == spent
    assert result["samples_saved"] == LEFT
    assert result["fraction"] == pytest.approx(LEFT / (spent + LEFT))
    assert result["slot_s"] == pytest.approx(LEFT / 50)  # wall_s: 50 images a second
    assert result["wall_s"] == pytest.approx(LEFT / 100)


def test_who_waited_when_a_command_came_has_neither_passed_nor_been_stopped(
    sweep_store, record_sweep, fake_trial
):
    def waiting(number, **tags):
        paused = {"metrics": {"rung_pause": 1.0}, "decisions": {1_000: (0.5, 2, False)}}
        return fake_trial(number, "pruned", {"lr": 1e-3}, [0.1, 0.2], tags=tags, **paused)

    by_command = {"rung": "", "reason": "stopped by command"}
    audited = waiting(2, **by_command, audited="1000")  # waited, ran on as an audit, was stopped
    record_sweep("audited", [waiting(0), waiting(1, **by_command), audited])
    first = rung_table(load_sweep(sweep_store, "audited")).iloc[0]
    assert first[["arrived", "passed", "stopped", "audited"]].tolist() == [3, 0, 1, 1]
    record_sweep("waiting", [waiting(0), waiting(1, **by_command)])
    frames = load_sweep(sweep_store, "waiting")
    first = rung_table(frames).iloc[0]
    assert first[["arrived", "passed", "stopped"]].tolist() == [2, 0, 1]
    assert (saving(frames)["stopped"], saving(frames)["by_command"]) == (1, 1)
    assert saving(frames)["samples_saved"] == 4_000 - 1_024


def test_pace_falls_back_to_images_per_s(recorded):
    frames = dataclasses.replace(recorded, trials=recorded.trials.assign(wall_s=math.nan))
    assert saving(frames)["slot_s"] == pytest.approx(LEFT / 62.5)


def test_without_a_scheduler_nothing_is_saved(sweep_store, record_sweep, fake_trial):
    trials = [
        fake_trial(0, "completed", {"lr": 1e-3}, [0.5] * 8),
        fake_trial(1, "diverged", {"lr": 1e-3}, [0.5], "nan"),
    ]
    record_sweep("plain", trials, tags={"rungs": "[]", "scheduler": "none"})
    frames = load_sweep(sweep_store, "plain")
    assert rung_table(frames).empty
    result = saving(frames)
    assert (result["samples_saved"], result["fraction"], result["slot_s"]) == (0, 0.0, 0.0)


# ---- the report's section


def shown(frames, advice=None):
    """The section's values and its markup."""
    figures = Figures()
    section = stopping_section(frames, figures, "s0", advice)
    values = {"info": frames.info, "stopping": section}
    page = render("stopping.html.j2", figures, s=values, info=frames.info)
    json.dumps(figures.drawn, allow_nan=False)
    return section, page


def test_saving_cost_and_confidence_are_said_first():
    drawn = draw_sweep(np.random.default_rng(2), 60, audit=0.3, noise=2.0)
    frames = frames_of(drawn)
    section, page = shown(frames)
    saved, cost, order = section["lead"]
    stopped = int((drawn.stopped & ~drawn.audited_N).sum())
    assert saved.startswith(f"Stopping {stopped} of 60 trials early saved ")
    assert f'<td data-sort="{section["correlations"][0]["all"]["tau"]}">' in page
    assert (
        f"Of {drawn.stopped.sum()} trials that were to be stopped, {drawn.audited_N.sum()}" in cost
    )
    first = section["wrongly"][0]
    truth = (drawn.ends[drawn.audited_N] > drawn.ends[~drawn.stopped].max()).sum()
    assert first["above"] == truth
    assert f"between {first['low']} and {first['high']} of the {first['stopped']}" in cost
    assert "pairs" in order
    assert page.count("<table>") == 3
    assert [row["late"] for row in section["correlations"]] == [9_000, 9_000, 3_000]
    assert section["correlations"][0]["all"]["n"] == 60 - stopped


def test_without_an_audit_the_cost_is_unknown_and_said_to_be(recorded):
    section, page = shown(recorded)
    assert any("cannot be told" in paragraph for paragraph in section["lead"])
    assert section["wrongly"] == []
    assert "1,000" in page
    assert all(row["all"] is None for row in section["correlations"] if row["late"] == 4_000)


def test_without_early_stopping_the_curve_says_when_it_could_have_begun():
    frames = frames_of(draw_sweep(np.random.default_rng(3), 40, rungs=()))
    section, page = shown(frames)
    assert section["lead"][0] == "This sweep ran without early stopping."
    assert "three of four pairs" in section["lead"][1]
    assert section["correlation_figure"]["id"] == "s0-stopping-order"
    assert section["end_figures"] == []
    assert "<details" not in page


def test_the_figure_of_ends_marks_the_audited_the_cutoff_and_the_best():
    drawn = draw_sweep(np.random.default_rng(4), 40, audit=0.4)
    frames = frames_of(drawn)
    outcomes = outcomes_of(frames)
    figure = end_figure(frames, outcomes, 1_000, 0.5)
    traces = {trace.name: trace for trace in figure.data}
    here = drawn.stopped_at_N == 1_000
    assert set(traces["audited here"].customdata) == set(np.flatnonzero(here & drawn.audited_N))
    unknown = traces["stopped here, end unknown"]
    assert set(unknown.customdata) == set(np.flatnonzero(here & ~drawn.audited_N))
    lines = [(shape.x0, shape.y0) for shape in figure.layout.shapes]
    best = 0.5 + 0.05 * drawn.ends[~drawn.stopped].max()
    assert lines[0][1] == pytest.approx(best)
    assert lines[1][0] == 0.5


def test_the_curve_of_correlations_stands_beside_that_of_those_that_passed():
    drawn = draw_sweep(np.random.default_rng(5), 80, audit=0.4)
    frames = frames_of(drawn)
    marks = mark_correlations(outcomes_of(frames))
    band, line, passed = correlation_figure(frames, marks).data
    assert list(line.x) == [each.early for each in marks]
    assert list(line.y) == [each.all.tau for each in marks]
    assert list(passed.y) == [each.passed.tau for each in marks]
    assert len(band.x) == 2 * len(marks)


def test_a_stratum_is_compared_with_itself():
    frames = frames_of(draw_sweep(np.random.default_rng(6), 80, audit=0.4, strata=("<b>", "other")))
    section, page = shown(frames)
    assert "of its stratum" in section["lead"][1]
    assert "<b>" not in page


@pytest.mark.parametrize(
    "change",
    [
        lambda f: cut(f, f.trials["number"] < 0),
        lambda f: cut(f, f.trials["number"] == 0),
        lambda f: altered(f, state="error", ending="error"),
        lambda f: altered(f, state="unfinished", ending="unfinished"),
        lambda f: dataclasses.replace(f, curves=f.curves.assign(value=0.25)),
        lambda f: dataclasses.replace(altered(f, objective=math.nan), curves=f.curves[:0]),
        lambda f: dataclasses.replace(
            altered(f, objective=math.inf), curves=f.curves.assign(value=-math.inf)
        ),
        lambda f: dataclasses.replace(f, decisions=f.decisions[:0]),
    ],
    ids=[
        *("empty", "one trial", "all failed", "all running", "all equal", "no metric"),
        *("no finite value", "no decisions"),
    ],
)
def test_the_section_takes_whatever_a_sweep_came_to(change):
    frames = change(frames_of(draw_sweep(np.random.default_rng(7), 24, audit=0.5)))
    section, page = shown(frames, advise(frames, shuffles=1))
    assert section["lead"]
    assert "nan" not in page.lower()


@pytest.mark.parametrize("trials", [0, 1])
def test_so_it_does_without_early_stopping(trials):
    frames = frames_of(draw_sweep(np.random.default_rng(7), 12, rungs=()))
    section, page = shown(cut(frames, frames.trials["number"] < trials))
    assert section["lead"] == ["This sweep ran without early stopping."]
    assert "<figure" not in page


def cut(frames, kept):
    """Only these trials of a sweep."""
    numbers = set(frames.trials.loc[kept, "number"])
    return dataclasses.replace(
        frames,
        trials=frames.trials[kept].reset_index(drop=True),
        curves=frames.curves[frames.curves["number"].isin(numbers)],
        decisions=frames.decisions[frames.decisions["number"].isin(numbers)],
    )


def test_advice_stands_in_the_section_with_its_command_line():
    frames = frames_of(draw_sweep(np.random.default_rng(0), 16, rungs=(), noise=0.3))
    section, page = shown(frames, advise(frames, shuffles=5))
    assert f"<code>{section['advice']['command']}</code>" in page
    assert page.count("recommended</span>") == 1
    assert "of the images are saved" in page
