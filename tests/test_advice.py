"""Advice on grace and reduction: the rule, and that it replays what `contrasweep replay` does."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from analysis.frames import SweepInfo
from analysis.stopping_section import advice_of
from search import advice as module
from search.advice import MOST_UNKNOWN, SURVIVAL, advise, recommended_of
from search.replay import Row, Setting, replay
from search.replays import recording_of
from tests.asha_sweeps import altered, draw_sweep, frames_of

ROW = Row(
    **{"scheduler": "asha", "grace": 1.0, "reduction": 3, "brackets": 1, "rungs": (1_000,)},
    **{"moved": False, "shuffles": 50, "images": 1.0, "images_low": 1.0, "images_high": 1.0},
    **{"saving": 0.5, "saving_low": 0.5, "saving_high": 0.5, "saving_at_most": 0.5},
    **{"regret": 0.0, "regret_low": 0.0, "regret_high": 0.0, "chosen": 50},
    **{"survival": 1.0, "survival_low": 0.9, "survival_high": 1.0, "unknown": 0.0},
)


def rows(*changes):
    return [dataclasses.replace(ROW, **change) for change in changes]


def test_the_largest_saving_that_keeps_the_best_trial_is_recommended():
    table = rows(
        {"saving": 0.4},
        {"saving": 0.6},
        {"saving": 0.7, "survival": SURVIVAL - 0.01},
        {"saving": 0.8, "regret": 0.021},
        {"saving": 0.9, "unknown": MOST_UNKNOWN + 0.01},
        {"saving": 0.95, "regret": None},
    )
    assert recommended_of(table, 0.02) == (1, "")
    assert recommended_of(table, 0.021)[0] == 3


def test_where_none_will_do_the_reason_is_told():
    assert recommended_of(rows({"survival": 0.5}, {"saving": 0.0}), 0.02)[0] is None
    place, reason = recommended_of(rows({"unknown": 0.5}, {"unknown": 0.4}), 0.02)
    assert place is None
    assert "cannot tell" in reason
    assert "--scheduler none" in reason


@pytest.fixture(scope="module")
def full():
    """A sweep without early stopping, one trial of which diverged on the way."""
    frames = frames_of(draw_sweep(np.random.default_rng(0), 16, rungs=(), noise=0.3))
    curves = frames.curves[(frames.curves["number"] != 5) | (frames.curves["mark"] <= 2_000)]
    fifth = frames.trials["number"] == 5
    trials = frames.trials.assign(
        state=frames.trials["state"].mask(fifth, "diverged"),
        ending=frames.trials["ending"].mask(fifth, "diverged"),
        samples_seen=frames.trials["samples_seen"].mask(fifth, 2_500),
        wall_s=frames.trials["wall_s"].mask(fifth, 25.0),
    )
    return dataclasses.replace(frames, curves=curves, trials=trials)


@pytest.fixture(scope="module")
def given(full):
    return advise(full, shuffles=8)


def test_leaving_out_marks_that_decide_nothing_changes_no_row(full, given):
    settings = [Setting("asha", grace, reduction) for grace in (1, 2, 4) for reduction in (2, 3, 4)]
    expected = replay(recording_of(full), settings, shuffles=8)
    assert [row["current"] for row in given["settings"]] == [False] * 9
    for row, other in zip(given["settings"], expected, strict=True):
        assert row == other.to_json() | {"current": False}


def test_a_sweep_without_early_stopping_gives_advice(full, given):
    assert (given["ends"], given["hidden"], given["trials"]) == (15, 0, 16)
    best = full.trials["objective"].max()
    assert given["allowed"] == pytest.approx(math.sqrt(best * (1 - best) / 400))
    row = given["settings"][given["recommended"]]
    assert row["survival"] >= SURVIVAL
    told = advice_of(given, full.info)
    options = f"--grace {row['grace']:g} --reduction {row['reduction']}"
    assert told["command"] == f"--scheduler asha {options}"
    assert [each["recommended"] for each in told["rows"]].count(True) == 1
    assert f"{row['saving']:.0%} of the images" in told["sentence"]
    for changes, expected in (
        ({"scheduler": "asha"}, options),
        ({"scheduler": "asha", "config": {"brackets": "3"}}, f"--brackets 1 {options}"),
        ({"sampler": "gp"}, f"--sampler tpe --scheduler asha {options}"),
        ({"sampler": "nsga2", "also": ("rankme",)}, None),
    ):
        other: SweepInfo = {**full.info, **changes}
        assert advice_of(given, other)["command"] == expected
    assert "several were searched" in advice_of(given, other)["sentence"]


def test_recorded_stops_hide_what_advice_needs():
    frames = frames_of(draw_sweep(np.random.default_rng(1), 40, audit=0.0))
    given = advise(frames)
    assert given["recommended"] is None
    assert "cannot tell" in given["reason"]
    assert given["hidden"] > 15
    assert given["shuffles"] == module.GLANCE < module.SHUFFLES
    assert [row["current"] for row in given["settings"]].count(True) == 1
    assert advice_of(given, frames.info)["command"] is None


def test_settings_that_are_the_sweeps_own_are_to_be_kept(full):
    config = {"grace": "1.0", "reduction": "3", "min_competitors": "None"}
    info = {**full.info, "scheduler": "asha", "config": config}
    given = advise(dataclasses.replace(full, info=info), shuffles=1)
    own = next(place for place, row in enumerate(given["settings"]) if row["current"])
    told = advice_of(given | {"recommended": own}, info)
    assert told["sentence"].startswith("Keep these settings")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": "pruned", "ending": "pruned"}, "no trial ran to its full resource"),
        ({}, "only 3 trials ran"),
    ],
)
def test_without_ends_there_is_no_advice(full, change, reason):
    if change:
        curves = full.curves[full.curves["mark"] < 9_000]
        frames = dataclasses.replace(altered(full, **change), curves=curves)
    else:
        frames = dataclasses.replace(
            full, curves=full.curves[(full.curves["number"] < 3) | (full.curves["mark"] < 9_000)]
        )
    given = advise(frames)
    assert given["settings"] == []
    assert reason in given["reason"]
    assert reason in advice_of(given, frames.info)["sentence"]


def test_what_takes_too_long_is_left_to_the_command(full, monkeypatch):
    monkeypatch.setattr(module, "MOST_REPORTS", 1_000)
    assert "too long" in advise(full)["reason"]


def test_a_trial_of_a_single_report_has_no_rung(full):
    frames = dataclasses.replace(full, curves=full.curves[full.curves["mark"] == 9_000])
    assert "too short" in advise(frames)["reason"]


def test_another_objective_allows_a_share_of_its_spread(full):
    curves = full.curves.assign(metric="rankme")
    frames = dataclasses.replace(full, curves=curves, info={**full.info, "objective": "rankme"})
    given = advise(frames, shuffles=8)
    ends = pd.Series(recording_of(frames).finals())
    assert given["allowed"] == pytest.approx(0.05 * (ends.max() - ends.median()))
    assert "median" in given["allowed_by"]
