from __future__ import annotations

import csv
import dataclasses
import io
import json
import re

import pytest

from analysis.effect_plots import parameter_figure
from analysis.load import load_sweep
from analysis.plots import best_so_far_figure, learning_curves
from analysis.report import leaderboard_csv, write_report
from analysis.stopping import rung_table, saving
from analysis.stopping_plots import rung_figure
from analysis.tables import leaderboard_rows, level_rows
from analysis.words import format_duration, format_value
from tests.built_sweeps import built
from tests.pages import Markup, headings, read

SECTIONS = (
    *("Leaderboard", "Progress", "Effects of the parameters", "Early stopping"),
    *("Failed trials", "Configuration and versions"),
)


@pytest.fixture(scope="module")
def page(recorded, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("page") / "report"
    assert write_report(recorded, folder) == folder / "index.html"
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "leaderboard.csv"]
    return (folder / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def markup(page) -> Markup:
    return Markup(page)


def test_the_page_has_every_section(markup):
    for section in SECTIONS:
        assert section in markup.text
    assert "Trial 10 won with knn_top1 0.8835, 0.0447 better" in " ".join(markup.text.split())
    assert "+4.5 points" in markup.text
    assert "± 0.0160" in markup.text
    assert "15,856 of 45,168 images" in markup.text


def test_the_page_needs_no_network(markup):
    loading = {"src", "href", "srcset", "action", "data", "poster", "background"}
    found = [(tag, value) for tag, name, value in markup.attributes if name in loading]
    assert [value for _, value in found if not value.startswith("#")] == []
    assert not {"link", "iframe", "img", "base", "object", "embed"} & set(markup.tags)
    policy = next(v for _, n, v in markup.attributes if n == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_plotly_is_inlined_once_and_every_figure_has_its_place(page, markup):
    assert len(markup.scripts) == 5
    assert len(re.findall(r"\* plotly\.js v", page)) == 1
    ids = {value for _, name, value in markup.attributes if name == "id"}
    figures = markup.figures()
    assert set(figures) <= ids
    places = [v for _, n, v in markup.attributes if n == "class" and v == "plot"]
    assert len(places) == len(figures) == 4 + 14  # progress; effects and early stopping
    assert all(figure["data"] for figure in figures.values())


def test_text_from_the_store_is_escaped(page, markup):
    assert "<script>alert(1)" not in page
    assert "<script>alert(1)</script> loss is nan" in markup.text
    assert "<b>&" in markup.text
    assert "b" not in markup.tags


def test_hostile_names_stay_text_everywhere(sweep_store, record_sweep, fake_trial, tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>"
    import optuna.distributions as d

    name = f"evil {hostile}"
    ranges = {
        hostile: d.distribution_to_json(d.CategoricalDistribution([hostile, "b"])),
        "lr": d.distribution_to_json(d.FloatDistribution(1e-4, 1.0, log=True)),
    }
    trials = [
        fake_trial(n, "completed", {hostile: (hostile, "b")[n % 2], "lr": 0.01 * n}, [0.1 * n] * 8)
        for n in range(1, 4)
    ]
    record_sweep(name, trials, ranges=ranges, tags={"dataset": hostile, "version.x": hostile})
    markup = read(sweep_store, name, tmp_path)
    assert "img" not in markup.tags
    assert len(markup.scripts) == 5
    titles = json.dumps([figure["layout"] for figure in markup.figures().values()])
    assert "<img" not in titles  # plotly reads HTML in its texts
    assert "&lt;img" in titles
    assert markup.text.count(hostile) >= 4


def test_the_same_records_give_the_same_page(recorded, page, tmp_path):
    assert write_report(recorded, tmp_path).read_text(encoding="utf-8") == page


def test_the_csv_holds_every_trial(recorded, tmp_path):
    write_report(recorded, tmp_path)
    with (tmp_path / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["number"]) for row in rows][:3] == [10, 2, 0]
    assert len(rows) == 14
    assert float(rows[0]["param.lr"]) == 3.1e-3
    assert rows[-1]["reason"].startswith("CUDA out of memory")
    hostile = built([0.5, 0.4, 0.3], params={"op": ["+sum", -0.5, "-0.5"]}, name="=HYPERLINK(1)")
    rows = list(csv.DictReader(io.StringIO(leaderboard_csv([hostile]))))
    assert [row["sweep"] for row in rows] == ["'=HYPERLINK(1)"] * 3  # text, no formula
    assert [row["param.op"] for row in rows] == ["'+sum", "-0.5", "-0.5"]


def test_a_page_that_cannot_be_made_leaves_both_files_as_they_were(tmp_path, monkeypatch):
    write_report(built([0.5]), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(*arguments, **values):
        raise ValueError("no page")

    monkeypatch.setattr("analysis.report.render", broken)
    with pytest.raises(ValueError, match="no page"):
        write_report(built([0.5, 0.6]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_lines_of_one_colour_differ_in_their_markers():
    sweeps = [built([0.5, 0.6], name=f"s{n}") for n in range(11)]
    best = [trace for trace in best_so_far_figure(sweeps).data if trace.name.endswith("trial")]
    looks = [(trace.line.color, trace.mode, trace.marker.symbol) for trace in best]
    assert len(set(looks)) == 11
    assert len({colour for colour, _, _ in looks}) == 5


def test_several_sweeps_are_compared(recorded, tmp_path):
    other = dataclasses.replace(recorded, info={**recorded.info, "name": "other"})
    markup = Markup(write_report([recorded, other], tmp_path).read_text("utf-8"))
    assert "Comparison" in markup.text
    assert markup.text.count("Configuration and versions") == 2
    figures = markup.figures()
    assert len(figures) == 2 * 18 + 3
    names = {trace["name"] for trace in figures["all-images"]["data"]}
    assert {"planted: best report", "other: best completed trial"} <= names


def test_sweeps_of_other_data_sets_share_no_curves(recorded, tmp_path):
    other = dataclasses.replace(recorded, info={**recorded.info, "dataset": "<b>cifar10"})
    page = write_report([recorded, other], tmp_path).read_text("utf-8")
    markup = Markup(page)
    assert "their values are not comparable" in markup.text
    assert "all-images" not in markup.figures()
    assert "<b>cifar10" in markup.text
    assert "<b>" not in page


def test_sweeps_of_other_objectives_share_no_page(recorded, tmp_path):
    info = {**recorded.info, "name": "other\none", "objective": "val_loss"}
    other = dataclasses.replace(recorded, info=info)
    with pytest.raises(ValueError, match="one objective") as caught:
        write_report([recorded, recorded, other], tmp_path / "report")
    message = str(caught.value)
    assert "got 'knn_top1' of sweep 'planted' and 'val_loss' of sweep 'other\\none'" in message
    assert "\n" not in message
    assert not (tmp_path / "report").exists()
    write_report([other], tmp_path / "report")


def test_a_sweep_that_has_just_begun(sweep_store, record_sweep, tmp_path):
    record_sweep("begun", [], state="running")
    markup = read(sweep_store, "begun", tmp_path)
    assert "No trial has reported a value" in markup.text
    assert "still running" in markup.text
    assert markup.figures() == {}


def test_a_sweep_in_which_everything_failed(sweep_store, record_sweep, fake_trial, tmp_path):
    trials = [
        fake_trial(0, "error", {"lr": 1e-3}, (), "ValueError: no", True),
        fake_trial(1, "lost", {"lr": 1e-2}, ()),
    ]
    record_sweep("broken", trials)
    markup = read(sweep_store, "broken", tmp_path)
    assert "ValueError: no" in markup.text
    assert "No trial has reported a value" in markup.text


def test_a_sweep_without_stopping_and_with_one_parameter(
    sweep_store, record_sweep, fake_trial, tmp_path
):
    trials = [fake_trial(n, "completed", {"lr": 1e-3 * (n + 1)}, [0.1 * n] * 8) for n in range(3)]
    record_sweep("simple", trials, tags={"rungs": "[]", "scheduler": "none"})
    markup = read(sweep_store, "simple", tmp_path)
    assert "ran without early stopping" in markup.text
    assert "needs 10 trials" in markup.text
    assert len(markup.figures()) == 5


def test_a_small_gain_is_called_chance(sweep_store, record_sweep, fake_trial, tmp_path):
    trials = [
        fake_trial(0, "completed", {"lr": 1e-3}, [0.80] * 8, is_default=True),
        fake_trial(1, "completed", {"lr": 1e-2}, [0.81] * 8),
    ]
    record_sweep("close", trials)
    assert "it may be chance" in read(sweep_store, "close", tmp_path).text


def test_the_error_of_the_default_counts_beside_the_winners(
    sweep_store, record_sweep, fake_trial, tmp_path
):
    # of 300 images: 1.7 errors of the difference, but 3.5 of the winner's own
    trials = [
        fake_trial(0, "completed", {"lr": 1e-3}, [0.9767] * 8, is_default=True),
        fake_trial(1, "completed", {"lr": 1e-2}, [0.9933] * 8),
    ]
    record_sweep("of 300", trials, tags={"val_images": "300"})
    assert "it may be chance" in read(sweep_store, "of 300", tmp_path).text
    record_sweep("of 5000", trials, tags={"val_images": "5000"})
    assert "it may be chance" not in read(sweep_store, "of 5000", tmp_path).text


def test_an_empty_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one sweep"):
        write_report([], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_learning_curves_tell_how_each_trial_ended(recorded):
    names = [trace.name for trace in learning_curves(recorded).data if trace.mode == "markers"]
    assert names == [
        *("unfinished (1)", "failed (1)", "stopped early (6)"),
        *("completed (4)", "winner, trial 10"),
    ]


def test_parameter_axes_follow_the_searched_scale(recorded):
    assert parameter_figure(recorded, "lr").layout.xaxis.type == "log"
    assert parameter_figure(recorded, "margin").layout.xaxis.type != "log"
    assert parameter_figure(recorded, "batch_size").layout.xaxis.ticktext == ("64", "128", "256")
    with pytest.raises(ValueError, match="batch_size, loss, lr"):
        parameter_figure(recorded, "momentum")


def test_figures_say_what_their_axes_are(recorded):
    by_time, by_images = (best_so_far_figure(recorded, by) for by in ("time", "images"))
    assert by_time.layout.xaxis.title.text == "wall time (minutes)"
    assert by_images.layout.xaxis.title.text == "images, all trials together"
    assert by_time.layout.yaxis.title.text == "knn_top1 (higher is better)"
    bars = {trace.name: list(trace.y) for trace in rung_figure(recorded).data}
    assert bars == {"passed": [7, 5], "stopped": [4, 2]}


def test_numbers_for_the_eye():
    assert [format_value(v) for v in (None, float("nan"), 512, 0.00031234, True, "x")] == [
        *("–", "–", "512", "0.0003123", "True", "x")
    ]
    assert [format_duration(v) for v in (None, 3.21, 59, 61, 7_260, 200_000)] == [
        *("–", "3.2 s", "59 s", "1 min 1 s", "2 h 1 min", "2 d 7 h")
    ]


def test_a_warm_start_is_told_with_its_sweeps(sweep_store, record_sweep, markup, tmp_path):
    record_sweep("warm", [], tags={"warm_start": json.dumps({"cifar": 37, "<b>old": 1})})
    told = " ".join(read(sweep_store, "warm", tmp_path).text.split())
    assert "began with 37 trials of sweep cifar and 1 trial of sweep <b>old;" in told
    assert "Warm start" not in markup.text


def test_brackets_are_a_column_where_there_are_several(
    sweep_store, record_sweep, fake_trial, tmp_path
):
    trials = [
        fake_trial(n, "completed", {"lr": 1e-3 * (n + 1)}, [0.9 - n / 9] * 8, tags={"bracket": at})
        for n, at in enumerate("102")
    ]
    for brackets in ("3", "1"):
        record_sweep(f"brackets {brackets}", trials, params={"brackets": brackets})
    several, one = (read(sweep_store, f"brackets {n}", tmp_path / n) for n in "31")
    assert "bracket" in headings(several, 1)
    assert "bracket" not in headings(one, 1)
    rows = leaderboard_rows(load_sweep(sweep_store, "brackets 3"))
    assert [row["bracket"] for row in rows] == [1, 0, 2]
    assert "Bracket 0 has all rungs" in several.text
    assert "bracket" not in (tmp_path / "1" / "leaderboard.csv").read_text().splitlines()[0]


def test_a_trial_stopped_by_command_is_never_called_stopped_early(
    sweep_store, record_sweep, fake_trial, tmp_path
):
    by_command = {"reason": "stopped by command", "rung": ""}
    trials = [
        fake_trial(0, "completed", {"lr": 1e-3}, [0.5] * 8),
        fake_trial(1, "pruned", {"lr": 1e-2}, [0.4], tags=by_command),
        *(fake_trial(n, "completed", {"lr": 1e-4 * n}, [n / 30] * 8) for n in range(2, 12)),
    ]
    record_sweep("by hand", trials, tags={"rungs": "[]", "scheduler": "none"})
    frames = load_sweep(sweep_store, "by hand")
    saved = saving(frames)
    assert (saved["stopped"], saved["by_command"], saved["samples_saved"]) == (0, 1, 0)
    markup = read(sweep_store, "by hand", tmp_path)
    text = " ".join(markup.text.split())
    assert "stopped early" not in text
    assert "early" not in json.dumps(markup.figures())
    assert text.count("stopped by command") == 4  # card, leaderboard, legend, early stopping
    assert "Values compared at the full resource" in text
    curves = {trace.get("name") for trace in markup.figures()["s0-curves"]["data"]}
    assert "stopped by command (1)" in curves
    assert "stopped by command" in str(markup.figures()["s0-param-0"])
    assert ",pruned," in (tmp_path / "leaderboard.csv").read_text()


def test_pages_call_stopped_trials_stopped_early(markup):
    text = " ".join(markup.text.split())
    assert "6 stopped early" in text
    assert text.count("pruned") == 1
    assert "the state of a stopped trial is called pruned" in text
    assert "pruned" not in json.dumps(markup.figures())


@pytest.mark.parametrize(
    ("state", "reason", "why"),
    [
        ("pruned", "weak", "where the default was stopped early"),
        ("pruned", "stopped by command", "where the default was stopped by command"),
        ("diverged", "nan", "the last report of the default, which failed"),
        (None, "", "the furthest that both have reached"),
    ],
)
def test_the_gain_is_told_where_the_default_ended(
    sweep_store, record_sweep, fake_trial, tmp_path, state, reason, why
):
    trials = [
        fake_trial(0, state, {"lr": 1e-3}, [0.3, 0.4], reason, is_default=True),
        fake_trial(1, "completed", {"lr": 1e-2}, [0.35, 0.42, *[0.9] * 6]),
    ]
    record_sweep(f"default {why}", trials)
    text = " ".join(read(sweep_store, f"default {why}", tmp_path).text.split())
    told = f"+2.0 points at 1,000 images, {why}: trial 1 had 0.4200, trial 0, the default, 0.4000"
    assert told in text
    assert f"won with knn_top1 0.9000; at 1,000 images, {why}, it was 0.0200 better" in text
    assert "it may be chance" in text  # of values at 1,000 images, not of the winner's last


def test_what_tells_trials_apart_stands_first_in_the_leaderboard(
    sweep_store, record_sweep, fake_trial, tmp_path
):
    trials = [
        fake_trial(n, "completed", {"lr": 1e-3 * (n + 1), "batch_size": 64}, [0.9 - n / 9] * 8)
        for n in range(3)
    ]
    record_sweep("constant", trials)
    markup = read(sweep_store, "constant", tmp_path)
    assert headings(markup, 1) == [
        *("trial", "state", "knn_top1", "lr", "rank", "epochs", "wall"),
    ]
    assert "The same in every trial: batch_size 64." in markup.text
    assert ("div", "class", "board") in markup.attributes
    page = (tmp_path / "index.html").read_text("utf-8")
    assert ".board td:first-child { position: sticky; left: 0;" in page
    record_sweep("constant alone", trials[:1])
    assert "batch_size" in headings(read(sweep_store, "constant alone", tmp_path), 1)


def test_audited_trials_are_told_beside_what_was_not_to_be_stopped(
    sweep_store, record_sweep, fake_trial, tmp_path
):
    def trial(number, values, level, state="completed", **tags):
        tags, rungs = {"stratum": level, **tags}, {1_000: (0.6, 3, state == "pruned")}
        return fake_trial(number, state, {"lr": 1e-3}, values, decisions=rungs, tags=tags)

    trials = [
        trial(0, [0.5] * 8, "margin"),
        trial(1, [0.7] * 8, "margin", audited="1000"),  # would have won its level
        trial(2, [0.9] * 8, "nt_xent", default="true"),
        trial(3, [0.8] * 8, "nt_xent", audited="1000"),
        trial(4, [0.99] * 8, "byol", audited="1000"),  # alone in its level
        trial(5, [0.3] * 2, "nt_xent", "pruned"),
        trial(6, [0.3] * 1, "nt_xent", "pruned", rung="", reason="stopped by command"),
    ]
    record_sweep("audit", trials, tags={"stratify": "loss"})
    frames = load_sweep(sweep_store, "audit")
    saved = saving(frames)
    assert (saved["audited"], saved["audited_compared"], saved["audited_above"]) == (3, 2, 1)
    assert saved["stopped"] == 1
    at_first = rung_table(frames).set_index("rung").loc[1000]
    assert list(at_first[["arrived", "passed", "stopped", "audited"]]) == [6, 2, 1, 3]
    levels = [(r["level"], r["trials"], r["best"], r["best_number"]) for r in level_rows(frames)]
    assert levels == [("byol", 1, 0.99, 4), ("nt_xent", 4, 0.9, 2), ("margin", 2, 0.7, 1)]
    assert [row["default"] for row in level_rows(frames)] == [None, 0.9, None]
    text = " ".join(read(sweep_store, "audit", tmp_path).text.split())
    assert "2 ran on to show what that costs; 1 of them ended above every trial of its" in text


def test_more_levels_than_can_be_compared_are_said(tmp_path):
    levels = [f"loss{n}" for n in range(12)] * 2
    frames = built(
        [0.5 + n / 100 for n in range(24)],
        params={"loss": levels},
        config={"stratify": f"loss={','.join(levels[:12])}"},
    )
    markup = Markup(write_report(frames, tmp_path).read_text("utf-8"))
    assert "Not compared: loss has 12 levels" in markup.text
