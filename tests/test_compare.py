"""Comparisons of levels: what counts for what, known answers, edge cases, words and page."""

from __future__ import annotations

import itertools
import json
import math
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.best_of import (
    Budget,
    Sample,
    _estimates,
    draw_weights,
    expected_best,
    probability_better,
)
from analysis.compare import ALPHA, Comparison, compare
from analysis.compare_page import compare_section, section_of, write_comparison
from analysis.compare_plots import differences_figure, expected_best_figure
from analysis.frames import CURVE_COLUMNS, DECISION_COLUMNS, TRIAL_COLUMNS, SweepFrames, SweepInfo
from analysis.levels import levels_of, stratified_field
from analysis.page import Figures, render

TOTAL = 4_000
TIME = pd.Timestamp(0, tz="UTC")
Trial = tuple[Any, str, float, int]  # level, ending, objective, images


def sweep(
    trials: list[Trial],
    field: str = "loss",
    *,
    default: int | None = None,
    config: dict[str, str] | None = None,
    **more: Any,
) -> SweepFrames:
    """A sweep in memory; each trial reported at 1,000 images and at its end."""
    info: dict[str, Any] = {
        **{"name": "s", "run_id": "", "tracking_uri": "", "state": "finished"},
        **{"objective": "knn_top1", "also": (), "also_modes": (), "warm_start": {}},
        **{"mode": "max", "total_images": TOTAL, "train_images": 1_000, "val_images": 400},
        **{"rungs": (1_000,), "reduction": 3.0, "slots": 1, "wall_s": 1.0, "start": TIME},
        **{"end": None, "dataset": "digits", "space": "", "sampler": "random"},
        **{"scheduler": "asha", "versions": {}, "commit": None, "config": config or {}},
        **{"distributions": {}, **more},
    }
    info = {"sweep_id": f"id-{info['name']}", **info}
    states = ["pruned" if ending == "by_command" else ending for _, ending, _, _ in trials]
    table = pd.DataFrame(
        {
            "number": range(len(trials)),
            "state": states,
            "ending": [ending for _, ending, _, _ in trials],
            "is_default": [number == default for number in range(len(trials))],
            "objective": [float(value) for _, _, value, _ in trials],
            "samples_seen": [images for _, _, _, images in trials],
            "mark": [images for _, _, _, images in trials],
        }
    ).reindex(columns=list(TRIAL_COLUMNS))
    if field:
        table[f"param.{field}"] = [level for level, _, _, _ in trials]
    curves = [
        (number, info["objective"], mark, mark, float(value), TIME)
        for number, (_, _, value, images) in enumerate(trials)
        for mark in sorted({min(1_000, images), images})
    ]
    return SweepFrames(
        SweepInfo(**info),  # type: ignore[typeddict-item]
        table,
        pd.DataFrame(curves, columns=list(CURVE_COLUMNS)),
        pd.DataFrame(columns=list(DECISION_COLUMNS)),
    )


def completed(level: Any, *values: float) -> list[Trial]:
    return [(level, "completed", value, TOTAL) for value in values]


def normal(level: str, mean: float, count: int, seed: int) -> list[Trial]:
    drawn = np.random.default_rng(seed).normal(mean, 0.01, count)
    return completed(level, *drawn)


def sample(*values: float) -> Sample:
    return Sample.of(np.array(values), np.ones(len(values)))


# ---- best of n


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_expected_best_is_the_mean_over_all_subsets(n: int) -> None:
    values = [0.3, 0.9, 0.1, 0.9, 0.5, 0.2]
    every = [max(subset) for subset in itertools.combinations(values, n)]
    assert expected_best(sample(*values), Budget(trials=n)) == pytest.approx(np.mean(every))
    assert draw_weights(6, n).sum() == pytest.approx(1)


def test_the_error_is_the_jackknifes() -> None:
    values = np.array([0.9, 0.7, 0.65, 0.3, 0.2])
    left_out = [
        expected_best(sample(*np.delete(values, place)), Budget(trials=2)) for place in range(5)
    ]
    _, errors = _estimates(values[None], np.ones((1, 5)), Budget(trials=2))
    spread = np.array(left_out) - np.mean(left_out)
    assert errors[0] == pytest.approx(math.sqrt(4 / 5 * np.sum(spread**2)))


def test_the_jackknife_of_a_budget_of_images_leaves_out_its_costs_too() -> None:
    values, costs = np.array([0.9, 0.7, 0.65, 0.3, 0.2, 0.1]), np.array([400.0] * 3 + [360.0] * 3)
    budget = Budget(images=900.0)
    left_out = [
        expected_best(Sample.of(np.delete(values, i), np.delete(costs, i)), budget)
        for i in range(6)
    ]
    _, errors = _estimates(values[None], costs[None], budget)
    spread = np.array(left_out) - np.mean(left_out)
    assert errors[0] == pytest.approx(math.sqrt(5 / 6 * np.sum(spread**2)), rel=1e-6)


def test_a_budget_of_images_is_what_trials_in_random_order_find() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    costs = np.where(values > 0.3, 4_000.0, 1_000.0)  # the weak ones were stopped early
    here = Sample.of(values, costs)
    budget = 12 * costs.mean()
    found = []
    for _ in range(4_000):
        order = rng.permutation(40)
        spent = np.cumsum(costs[order])
        inside = np.searchsorted(spent, budget, side="right")
        share = (budget - spent[inside - 1]) / costs[order[inside]]
        more = inside + (rng.random() < share)  # the last one with the chance that it is paid
        found.append(values[order[:more]].max())
    spread = here.values_N.std()
    assert expected_best(here, Budget(images=budget)) == pytest.approx(
        np.mean(found), abs=0.05 * spread
    )


def test_equal_costs_make_images_and_trials_the_same() -> None:
    here = Sample.of(np.array([0.1, 0.5, 0.4, 0.8]), np.full(4, 500.0))
    for n in (1, 2, 3):
        by_trials = expected_best(here, Budget(trials=n))
        assert expected_best(here, Budget(images=500.0 * n)) == pytest.approx(by_trials)
    between = expected_best(here, Budget(images=750.0))
    ends = [expected_best(here, Budget(trials=n)) for n in (1, 2)]
    assert between == pytest.approx(np.mean(ends))


def test_probability_is_that_of_all_pairs_of_subsets() -> None:
    first, second = [0.9, 0.5, 0.5, 0.2], [0.5, 0.6, 0.1]
    wins = [
        1.0 if max(a) > max(b) else 0.5 if max(a) == max(b) else 0.0
        for a in itertools.combinations(first, 2)
        for b in itertools.combinations(second, 2)
    ]
    found = probability_better(sample(*first), sample(*second), 2)
    assert found.value == pytest.approx(np.mean(wins))
    assert 0 <= found.low < found.value < found.high <= 1
    certain = probability_better(sample(2, 3, 4, 5), sample(1, 0, 1, 0), 2)
    assert (certain.value, certain.high) == pytest.approx((1, 1))
    assert certain.low < 0.9  # four trials a side prove no certainty


# ---- which trial counts for what


def outcomes(frames: SweepFrames, level: str, field: str = "loss") -> list[float]:
    found = {each.name: each for each in levels_of([frames], field).levels}[level].outcomes
    assert found is not None
    return [float(value) for value in found.values_N]


def test_a_stopped_trial_is_none_of_the_winners() -> None:
    stopped = [("a", "pruned", 0.97, 1_000), ("a", "pruned", 0.3, 1_000)]
    assert outcomes(sweep([*completed("a", 0.9, 0.8, 0.7), *stopped]), "a") == [
        *(0.9, 0.8, 0.8, 0.7, 0.3),
    ]


def test_a_failed_trial_is_spent_for_the_worst_value_of_all() -> None:
    failed = [("a", "oom", math.nan, 200), ("a", "diverged", 0.95, 600)]
    frames = sweep([*completed("a", 0.9, 0.8), *failed, *completed("b", 0.4, 0.5)])
    assert outcomes(frames, "a") == [0.9, 0.8, 0.4, 0.4]
    level = levels_of([frames], "loss").levels[0]
    assert (level.trials, level.completed, level.failed, level.images) == (4, 2, 2, 8_800)


def test_where_less_is_better_the_worst_is_the_most() -> None:
    frames = sweep(
        [*completed("a", 2.0, 3.0), ("a", "oom", math.nan, 0), *completed("b", 5.0)],
        mode="min",
        objective="val_loss",
    )
    assert outcomes(frames, "a") == [-2.0, -3.0, -5.0]
    assert compare([frames], "loss")["levels"][0]["best"] == 2.0


def test_trials_without_an_end_are_left_out_and_said() -> None:
    running = [("a", "unfinished", 0.99, 500), ("b", "by_command", 0.99, 500)]
    found = levels_of([sweep([*completed("a", 0.9), *completed("b", 0.8), *running])], "loss")
    assert [each.trials for each in found.levels] == [1, 1]
    assert found.notes == ("2 trials are left out whose end is not known.",)


def test_a_default_that_only_one_level_has_is_left_out() -> None:
    trials = [*completed("a", 0.99, 0.8), *completed("b", 0.7)]
    found = levels_of([sweep(trials, default=0)], "loss")
    assert [each.best for each in found.levels] == [0.8, 0.7]
    assert "default configuration is left out" in found.notes[0]
    both = [sweep(trials[:2], name=name, default=0) for name in ("x", "y")]
    assert [each.best for each in levels_of(both, "sweep").levels] == [0.99, 0.99]


def test_of_many_trials_some_stand_for_all_and_differences_are_still_shown() -> None:
    trials = [
        trial
        for place, level in enumerate("abcd")
        for trial in normal(level, 0.9 - 0.1 * (place == 3), 320, place)
    ]
    found = compare([sweep(trials)], "loss")
    assert found["notes"][0].startswith("300 trials, drawn by chance, stand for all of a, b, ")
    assert found["levels"][0]["trials"] == 320
    assert found["levels"][0]["by_trials"][-1]["budget"] == 300
    worse = [pair for pair in found["pairs"] if pair["second"] == "d"]
    assert [pair["result"] for pair in worse] == ["better"] * 3


def test_early_values_are_compared_at_one_mark() -> None:
    trials = [*completed("a", 0.9, 0.8), ("b", "pruned", 0.85, 1_000), *completed("b", 0.7)]
    found = levels_of([sweep(trials)], "loss")
    assert found.early_mark == 1_000
    assert [list(each.early.values_N) for each in found.levels] == [[0.9, 0.8], [0.85, 0.7]]


# ---- levels and sweeps


def test_sweeps_are_pooled_where_one_searched_and_one_fixed_the_field() -> None:
    searched = sweep([*completed(256, 0.9), *completed(512, 0.8)], "batch_size", name="x")
    fixed = sweep(completed("", 0.7, 0.6), "", name="y")
    fields = pd.DataFrame({"batch_size": ["256", "256"]}, index=pd.Index([0, 1], name="number"))
    fixed = SweepFrames(fixed.info, fixed.trials, fixed.curves, fixed.decisions, fields=fields)
    found = compare([searched, fixed], "batch_size")
    assert [(row["level"], row["trials"]) for row in found["levels"]] == [("256", 3), ("512", 1)]
    assert (found["levels"][0]["best_sweep"], found["levels"][0]["best_number"]) == ("x", 0)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"objective": "rankme"}, "one objective, got knn_top1 of sweep 's' and rankme of 't'"),
        ({"mode": "min"}, "one mode, got max"),
        ({"dataset": "stl10"}, "one data set, got digits of sweep 's' and stl10 of 't'"),
        ({"total_images": 8_000}, "one full resource, got 4000 of sweep 's' and 8000 of 't'"),
        ({"sweep_id": "id-s"}, "each sweep must be given once"),
    ],
)
def test_sweeps_that_measure_something_else_are_refused(more: dict[str, Any], words: str) -> None:
    trials = completed("a", 0.9)
    with pytest.raises(ValueError, match="sweep") as error:
        compare([sweep(trials), sweep(trials, name="t", **more)], "loss")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_field_names_those_that_differ() -> None:
    with pytest.raises(ValueError, match="its trials differ in loss; sweep compares whole sweeps"):
        compare([sweep(completed("a", 0.9))], "colour")


def test_many_numbers_are_cut_into_groups_and_many_names_refused() -> None:
    many = [(0.1 * place, "completed", 0.5, TOTAL) for place in range(12)]
    found = compare([sweep(many, "lr")], "lr")
    assert [row["level"] for row in found["levels"]] == ["up to 0.3", "0.3 to 0.7", "above 0.7"]
    assert [row["trials"] for row in found["levels"]] == [4, 4, 4]
    assert found["notes"] == [
        "lr has 12 values, cut into 3 groups of as many trials each as ties allow."
    ]
    few = [(64 * place, "completed", 0.5, TOTAL) for place in (1, 2, 10)]
    levels = compare([sweep(few, "batch_size")], "batch_size")["levels"]
    assert [row["level"] for row in levels] == ["64", "128", "640"]
    names = [(f"n{place}", "completed", 0.5, TOTAL) for place in range(12)]
    with pytest.raises(ValueError, match="loss has 12 levels in these sweeps, of which at most 8"):
        compare([sweep(names)], "loss")


def test_a_sweep_was_stratified_by_its_field() -> None:
    assert stratified_field(sweep([], config={"stratify": "loss=a,b"})) == "loss"
    assert stratified_field(sweep([], config={"stratify": "None"})) is None
    assert stratified_field(sweep([])) is None


# ---- verdicts


def verdict(trials: list[Trial], **more: Any) -> Comparison:
    return compare([sweep(trials, **more)], "loss")


def test_a_large_difference_is_shown() -> None:
    found = verdict([*normal("a", 0.9, 20, 1), *normal("b", 0.7, 20, 2)])
    (pair,) = found["pairs"]
    assert (pair["first"], pair["result"], pair["n"]) == ("a", "better", 6)
    assert pair["difference"] is not None
    low, high = pair["difference"]["low"], pair["difference"]["high"]
    assert low is not None
    assert high is not None
    assert 0.15 < low < 0.2 < high < 0.25
    assert found["verdict"].startswith("a beats b by ")
    assert "points at 6 trials each (95 % interval " in found["verdict"]
    assert pair["probability"] is not None
    assert pair["probability"]["value"] == pytest.approx(1)
    assert (pair["trials_needed"], pair["beyond"]) == (None, False)


def test_no_difference_is_not_made_one() -> None:
    found = verdict([*normal("a", 0.9, 12, 3), *normal("b", 0.9, 12, 4)])
    assert found["verdict"].startswith("No difference between ")
    assert "that 24 trials could show" in found["verdict"]
    (pair,) = found["pairs"]
    assert pair["result"] == "undecided"
    assert pair["beyond"] or (pair["trials_needed"] or 0) > 12


def test_a_difference_within_the_measurement_is_said_to_be_one() -> None:
    trials = [*normal("a", 0.93, 30, 5), *normal("b", 0.89, 30, 6)]
    (pair,) = verdict(trials, val_images=10_000)["pairs"]
    assert pair["result"] == "better"
    found = verdict(trials, val_images=100)
    (pair,) = found["pairs"]
    assert pair["result"] == "better_on_these_images"
    assert "On these validation images, that is." in found["verdict"]
    assert "The 100 validation images tell accuracies apart from" in found["verdict"]
    assert pair["images_needed"] is not None
    assert 300 < pair["images_needed"] < 1_000
    assert verdict(trials, val_images=None)["pairs"][0]["measurement"] is None


def test_several_pairs_are_corrected_after_holm() -> None:
    trials = [
        *normal("a", 0.9, 16, 7),
        *normal("b", 0.9, 16, 8),
        *normal("c", 0.8, 16, 9),
    ]
    found = verdict(trials)
    raw = sorted(pair["p"] or 0.0 for pair in found["pairs"])
    corrected = sorted(pair["p_holm"] or 0.0 for pair in found["pairs"])
    assert corrected[0] == pytest.approx(min(1, 3 * raw[0]))
    assert corrected[1] == pytest.approx(max(corrected[0], 2 * raw[1]))
    assert corrected[2] == pytest.approx(max(corrected[1], raw[2]))
    assert corrected[1] <= ALPHA < corrected[2]
    assert "a and b were beaten by none, and 48 trials cannot tell them apart" in found["verdict"]
    best = verdict([*normal("a", 0.9, 16, 7), *normal("b", 0.7, 16, 8), *normal("c", 0.8, 16, 9)])
    assert best["verdict"].startswith("a is the best of the 3 levels of loss compared.")


def test_shared_rungs_are_said_where_the_sweep_was_not_stratified() -> None:
    trials = [*normal("a", 0.9, 10, 1), *normal("b", 0.9, 10, 2), ("b", "pruned", 0.5, 1_000)]
    assert "shared their rungs" in verdict(trials)["verdict"]
    assert "shared their rungs" not in verdict(trials, config={"stratify": "loss"})["verdict"]
    assert "shared their rungs" not in verdict(trials[:-1])["verdict"]


def test_less_is_better_turns_everything_but_the_sign_of_the_difference() -> None:
    losses = [
        (level, how, 1 - value, images)
        for level, how, value, images in (*normal("a", 0.9, 12, 1), *normal("b", 0.8, 12, 2))
    ]
    found = verdict(losses, mode="min", objective="val_loss")
    (pair,) = found["pairs"]
    assert (pair["first"], pair["result"]) == ("a", "better")
    assert pair["difference"] is not None
    assert pair["difference"]["value"] == pytest.approx(0.1, abs=0.02)
    values = [point["value"] for point in found["levels"][0]["by_trials"]]
    assert values == sorted(values, reverse=True)


EDGES: dict[str, list[Trial]] = {
    "an empty sweep": [],
    "one trial": completed("a", 0.9),
    "one level": completed("a", 0.9, 0.8, 0.7),
    "one trial a level": [*completed("a", 0.9), *completed("b", 0.8)],
    "few trials a level": [*completed("a", 0.9, 0.8, 0.8), *completed("b", 0.7, 0.6, 0.5)],
    "all failed": [(level, "oom", math.nan, 0) for level in "aabb"],
    "one level failed": [*completed("a", *[0.9] * 6), *[("b", "oom", math.nan, 0)] * 6],
    "all stopped": [(level, "pruned", 0.5, 1_000) for level in "aabb"],
    "all equal": [*completed("a", *[0.9] * 8), *completed("b", *[0.9] * 8)],
    "equal within levels": [*completed("a", *[0.9] * 8), *completed("b", *[0.8] * 8)],
    "nan and inf": [*completed("a", math.nan, math.inf, 0.9), *completed("b", -math.inf, 0.5)],
    "nothing ended": [(level, "unfinished", 0.5, 100) for level in "ab"],
    "no level": [(None, "completed", 0.5, TOTAL)] * 3,
}
SAID = {
    "an empty sweep": "No trial has ended: there is nothing to compare.",
    "one level": "There is one level of loss, a: nothing to compare it with.",
    "one trial a level": "a and b are not compared: a level of one trial cannot be compared.",
    "few trials a level": "3 and 3 trials are too few to show any difference.",
    "all failed": "a and b are not compared: no trial of a and b was completed.",
    "one level failed": "a and b are not compared: no trial of b was completed.",
    "all equal": "their expected best at 2 trials each is the same (p = 1).",
    "equal within levels": "a beats b by 10.0 points at 2 trials each (p < 0.001)",
}


@pytest.mark.parametrize("case", EDGES)
def test_every_sweep_gets_a_sensible_answer_and_section(case: str) -> None:
    found = verdict(EDGES[case], val_images=10_000)
    json.dumps(found, allow_nan=False)
    assert SAID.get(case, "") in found["verdict"]
    figures = Figures()
    section = section_of(found, figures, "s0")
    shown = render("compare.html.j2", figures, s={"compare": section})
    assert found["verdict"] in unescape(shown)


# ---- figures and pages


def test_bands_end_at_half_of_the_trials() -> None:
    found = verdict([*normal("a", 0.9, 12, 1), *normal("b", 0.8, 20, 2)])
    known = [
        [point["budget"] for point in row["by_trials"] if point["low"] is not None]
        for row in found["levels"]
    ]
    assert [each[-1] for each in known] == [6, 10]
    assert [row["by_trials"][-1]["budget"] for row in found["levels"]] == [12, 20]
    assert [point["budget"] for point in found["levels"][0]["by_images"]] == [
        TOTAL * n for n in range(1, 13)
    ]
    band, line = expected_best_figure(found).data[:2]
    assert max(band.x) == 6
    assert list(line.y) == pytest.approx([p["value"] for p in found["levels"][0]["by_trials"]])


def test_many_trials_make_thin_figures() -> None:
    trials = [
        *normal("a", 0.9, 150, 1),
        *normal("b", 0.9, 120, 2),
    ]
    figure = expected_best_figure(verdict(trials), "images")
    assert all(len(trace.x) <= 50 for trace in figure.data)


def test_texts_of_the_store_are_escaped_and_the_page_is_the_same_each_time(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    trials = [*normal(name, 0.9, 10, 1), *normal("b", 0.7, 10, 2)]
    pages = [
        write_comparison(verdict(trials, name=name), tmp_path / str(i)).read_text("utf-8")
        for i in range(2)
    ]
    assert pages[0] == pages[1]
    assert name not in pages[0]
    assert "&lt;script&gt;alert(1)&lt;/script&gt; beats b" in pages[0]
    assert name not in str(differences_figure(verdict(trials)).to_json())  # type: ignore[union-attr]


def test_the_section_is_left_out_where_there_is_none() -> None:
    figures = Figures()
    frames = sweep([*normal("a", 0.9, 10, 1), *normal("b", 0.8, 10, 2)])
    section = compare_section([frames], "loss", figures, "s0-compare")
    assert sorted(figures.drawn) == [
        *("s0-compare-differences", "s0-compare-images", "s0-compare-trials"),
    ]
    shown = render("compare.html.j2", figures, s={"compare": section})
    assert section["result"]["verdict"] in shown
    pair = section["result"]["pairs"][0]
    for found in (pair["difference"], pair["probability"], pair["cliffs_delta"]):
        assert f'<td data-sort="{found["value"]}">' in shown  # not by "+10.0 (+9.1 to +11.0)"
    assert not render("compare.html.j2", figures, s={"compare": None}).strip()


def test_the_verb_prints_the_verdict_and_writes_the_page(
    sweep_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from search.comparisons import comparisons
    from search.run import Sweep

    opened = SimpleNamespace(
        tracking_uri=sweep_store,
        config=SimpleNamespace(name="planted"),
        dir=tmp_path,
        record_rest=lambda: None,
        sweep_id=lambda: None,
    )
    monkeypatch.setattr(Sweep, "open", lambda directory: opened)
    shown = CliRunner().invoke(comparisons, [str(tmp_path), "--by", "loss"])
    assert shown.exit_code == 0, shown.output
    assert "nt_xent" in shown.output
    plain = CliRunner().invoke(comparisons, [str(tmp_path), "--by", "loss", "--json"])
    answer = json.loads(plain.stdout)
    assert [row["level"] for row in answer["levels"]] == ["margin", "nt_xent"]
    assert answer["verdict"] in " ".join(shown.output.split())
    assert Path(answer["page"]) == tmp_path / "report" / "compare-loss.html"
    assert Path(answer["page"]).exists()


def test_wins_that_go_round_are_told_as_such() -> None:
    """Each pair has a budget of its own, so that a beats b, b beats c, and c beats a."""
    trials = completed("a", *[0.95] * 10, *[0.1] * 80) + completed("b", *[0.8] * 90)
    found = verdict(trials + completed("c", *[0.76] * 6))
    assert "depends on the budget: each was beaten by another" in found["verdict"]
    assert {pair["result"] for pair in found["pairs"]} <= {"better", "better_on_these_images"}


def test_sweeps_of_one_level_each_shared_no_rungs() -> None:
    stopped = [("x", "pruned", 0.1, 1_000)] * 3
    one = sweep(normal("a", 0.8, 9, 1) + [("a", *t[1:]) for t in stopped], name="one")
    other = sweep(normal("b", 0.8, 9, 2) + [("b", *t[1:]) for t in stopped], name="other")
    assert levels_of([one, other], "loss").apart
    both = sweep([*normal("a", 0.8, 9, 1), *normal("b", 0.8, 9, 2)], name="both")
    assert not levels_of([one, both], "loss").apart


def test_a_level_that_is_none_is_one() -> None:
    searched = sweep([(v, "completed", 0.8, TOTAL) for v in ["None", 0.5] * 6], "ema_decay")
    fixed = sweep([("x", "completed", 0.8, TOTAL)] * 3, name="fixed")
    fields = pd.DataFrame({"ema_decay": ["None"] * 3}, index=range(3))
    fixed = SweepFrames(fixed.info, fixed.trials, fixed.curves, fixed.decisions, fields=fields)
    levels = levels_of([searched, fixed], "ema_decay").levels
    assert {level.name: level.trials for level in levels} == {"None": 9, "0.5": 6}


def test_lost_trials_are_nobodys_fault() -> None:
    trials = [*normal("a", 0.8, 9, 1), ("b", "lost", 0.1, 1_000), *normal("b", 0.8, 9, 2)]
    assert [level.failed for level in levels_of([sweep(trials)], "loss").levels] == [0, 0]


def test_budgets_in_images_that_buy_no_trial_are_not_compared() -> None:
    dear = [("a", "completed", 0.9 + i / 1_000, 40_000) for i in range(12)]
    cheap = [("b", "completed", 0.8 + i / 1_000, 1_000) for i in range(12)]
    (pair,) = verdict(dear + cheap)["pairs"]
    assert pair["images"] is None
    assert pair["difference_by_images"] is None
