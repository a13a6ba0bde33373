"""The report's section on effects: what it holds, and sweeps of which little can be said."""

from __future__ import annotations

import warnings

import jinja2
import pytest

from analysis.effects_section import MAX_SHOWN, effects_section
from analysis.page import Figures, embedded
from analysis.words import ENDING_LABELS
from tests.effect_sweeps import degenerate, planted
from tests.pages import Markup


def section(frames):
    """The section, its figures by id, and its markup."""
    figures = Figures()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = effects_section(frames, figures, "s0")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("effects.html.j2").render(
        s={"effects": found}, info=frames.info, labels=ENDING_LABELS
    )
    return found, figures.drawn, html


@pytest.mark.parametrize("name", degenerate())
def test_of_little_little_is_said(name):
    found, figures, html = section(degenerate()[name])
    embedded(figures)  # no NaN and no infinity
    assert "nan" not in Markup(html).text.split()
    assert "<b>a&" not in html + str(figures)
    if name in ("empty", "nothing searched"):
        assert "No parameter was searched." in html
        assert not figures
    elif name in ("no trial, known ranges", "all failed"):
        assert "No trial has reported a value yet." in html
    else:
        assert [item["id"] for item in found["slices"]]
    if name == "all equal":
        assert found["importance"]["reason"] == "every trial has the same value"
    if name == "hardly any completed":
        assert "the 12 trials that reached 1,000 images" in html
    if name == "all failed":
        assert "12 diverged" in html


@pytest.fixture(scope="module")
def sixty():
    return section(planted(60))


def test_a_sweep_is_told_in_order_of_importance(sixty):
    found, figures, html = sixty
    assert found["parameters"][0] == "lr"
    assert found["slices"][0]["title"] == "lr"
    assert "lr came first in 60 of 60 by fANOVA" in found["importance"]["sentences"][0]
    assert "strength" in found["importance"]["sentences"][1]
    assert "had lr at or above" in found["failures"]["sentence"]
    assert found["failures"]["figures"][0]["title"] == "Failures by lr"
    assert [item["title"] for item in found["pairs"][:2]] == [
        "temperature × batch_size",
        "temperature × lr",
    ]
    assert [item["id"] for item in found["resources"]["figures"]] == [
        "s0-images_per_s",
        "s0-peak_mem_bytes",
    ]
    assert "2 trials ran at once" in found["resources"]["figures"][0]["caption"]
    drawn = {value for _, name, value in Markup(html).attributes if name == "id"}
    assert set(figures) == drawn
    for item in (*found["slices"], *found["pairs"], found["parallel"], *found["failures"]["more"]):
        assert "n = " in item["caption"] or "One line a trial" in item["caption"]


def test_captions_say_what_is_compared(sixty):
    found, _, _ = sixty
    completed = (planted(60).trials["state"] == "completed").sum()
    assert f"the last values of the {completed} completed trials" in found["compared"]
    assert "early stopping has chosen" in found["compared"]
    assert f"Trend of {completed} trials, band: its 95 %" in found["slices"][0]["caption"]


def test_many_parameters_are_unfolded_on_demand():
    frames = planted(9)
    for index in range(4):
        frames.trials[f"param.extra_{index}"] = [(index + 3) * n % 10 / 10 for n in range(9)]
    found, _, html = section(frames)
    assert (len(found["slices"]), len(found["more_slices"])) == (MAX_SHOWN, 8 - MAX_SHOWN)
    assert f"{8 - MAX_SHOWN} less important parameters</summary>" in html


def test_the_same_records_give_the_same_section(sixty):
    assert section(planted(60))[1:] == sixty[1:]


@pytest.mark.slow
def test_ten_thousand_trials_are_thinned():
    found, figures, _ = section(planted(10_000))
    assert len(embedded(figures)) < 600_000
    assert "n = 10,000 trials, 500 of them drawn" in found["slices"][0]["caption"]
    assert "500 of them drawn at random" in found["importance"]["figure"]["caption"]
    assert "the best 200 of" in found["parallel"]["caption"]
    assert "400 of them, drawn at random" in found["compared"]
