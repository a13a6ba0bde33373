from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest

from analysis.load import load_sweep
from analysis.tables import (
    best_so_far,
    leaderboard,
    leaderboard_rows,
    standard_error,
    summarise,
)

WINNER = 0.9 - 0.2 * (math.log10(3.1e-3) - math.log10(3e-3)) ** 2
DEFAULT = 0.9 - 0.2 * (math.log10(1e-3) - math.log10(3e-3)) ** 2
AT_END = 1 - math.exp(-4)


def test_completed_trials_lead_then_who_got_further_and_failed_ones_have_no_rank(recorded):
    table = leaderboard(recorded)
    assert table["number"].tolist() == [10, 2, 0, 3, 1, 9, 8, 5, 7, 4, 6, 13, 11, 12]
    assert table["rank"].tolist()[:12] == list(range(1, 13))
    assert table["rank"].isna().tolist()[12:] == [True, True]
    assert table["epochs"].iloc[0] == 4.024


def test_a_stopped_trial_never_outranks_a_completed_one(sweep_store, record_sweep, fake_trial):
    short = fake_trial(0, "pruned", {"lr": 1e-3}, [0.5, 0.95])
    full = fake_trial(1, "completed", {"lr": 1e-2}, [0.1] * 8)
    record_sweep("tempting", [short, full])
    frames = load_sweep(sweep_store, "tempting")
    assert leaderboard(frames)["number"].tolist() == [1, 0]
    winner = summarise(frames)["winner"]
    assert winner is not None
    assert winner["number"] == 1


def test_lower_is_better_when_the_mode_says_so(sweep_store, record_sweep, fake_trial):
    trials = [
        fake_trial(n, "completed", {"lr": 1e-3}, [3.0, *[v] * 7], is_default=n == 0)
        for n, v in enumerate([2.0, 1.0, 1.5])
    ]
    record_sweep("loss", trials, tags={"mode": "min", "objective": "val_loss"})
    frames = load_sweep(sweep_store, "loss")
    assert leaderboard(frames)["number"].tolist() == [1, 2, 0]
    summary = summarise(frames)
    assert summary["gain"] is not None
    assert summary["gain"]["value"] == 1.0
    assert summary["winner"] is not None
    assert summary["winner"]["standard_error"] is None
    assert best_so_far(frames)["best"].iloc[-1] == 1.0


def test_rows_are_plain_values(recorded):
    rows = leaderboard_rows(recorded, limit=2)
    assert [row["number"] for row in rows] == [10, 2]
    assert rows[1]["margin"] is None
    assert {type(value) for row in rows for value in row.values()} <= {
        *(int, float, str, bool, type(None))
    }


def test_best_so_far_by_images_counts_all_trials_together(sweep_store, record_sweep, fake_trial):
    slow = fake_trial(0, "completed", {"lr": 1e-3}, [0.2, 0.5, *[0.6] * 5, 0.55], start_s=0)
    late = fake_trial(1, "pruned", {"lr": 1e-2}, [0.4, 0.7], start_s=5)
    record_sweep("two", [slow, late])
    frames = load_sweep(sweep_store, "two")
    images = best_so_far(frames, "images")
    # reports alternate: slow at 10 s, late at 15 s, slow at 20 s, late at 25 s, then slow alone
    assert images["number"].tolist() == [0, 1, 0, 1, *[0] * 6]
    assert images["x"].tolist() == [524, 1_048, 1_548, 2_048, *range(2_548, 5_049, 500)]
    assert images["best"].tolist() == [0.2, 0.4, 0.5, *[0.7] * 7]
    assert images["best_completed"].isna().tolist() == [True] * 9 + [False]
    assert images["best_completed"].iloc[-1] == 0.55
    time = best_so_far(frames, "time")
    assert time["x"].tolist()[:5] == [10.0, 15.0, 20.0, 25.0, 30.0]


def test_best_so_far_ignores_what_is_not_finite(recorded):
    best = best_so_far(recorded, "images")
    assert best["best"].notna().all()
    assert best["best"].iloc[-1] == pytest.approx(WINNER * AT_END)
    assert best["x"].iloc[-1] == recorded.trials["samples_seen"].sum()


def test_summary_of_the_planted_sweep(recorded):
    summary = summarise(recorded)
    assert summary["trials"] == {
        **{"completed": 5, "pruned": 6, "unfinished": 1},
        **{"diverged": 1, "oom": 1},
    }
    winner, gain = summary["winner"], summary["gain"]
    assert winner is not None
    assert gain is not None
    assert winner["number"] == 10
    assert winner["value"] == pytest.approx(WINNER * AT_END)
    assert winner["standard_error"] == pytest.approx(
        math.sqrt(winner["value"] * (1 - winner["value"]) / 400)
    )
    assert winner["params"]["lr"] == 3.1e-3
    assert summary["leading"] is None
    assert gain["value"] == pytest.approx((WINNER - DEFAULT) * AT_END)
    assert gain["full"]
    assert summary["samples_seen"] == 5 * 4_024 + 4 * 1_024 + 2 * 2_024 + 2 * 524
    assert summary["wall_s"] == 700.5


def test_gain_is_measured_where_both_were(sweep_store, record_sweep, fake_trial):
    default = fake_trial(0, "pruned", {"lr": 1e-3}, [0.3, 0.4], is_default=True)
    winner = fake_trial(1, "completed", {"lr": 1e-2}, [0.35, 0.5, *[0.9] * 6])
    record_sweep("stopped-default", [default, winner])
    gain = summarise(load_sweep(sweep_store, "stopped-default"))["gain"]
    assert gain is not None
    assert (gain["mark"], gain["full"]) == (1_000, False)
    assert gain["value"] == pytest.approx(0.1)


def test_without_a_completed_trial_there_is_a_leader_and_no_winner(
    sweep_store, record_sweep, fake_trial
):
    record_sweep(
        "young",
        [fake_trial(0, None, {"lr": 1e-3}, [0.9]), fake_trial(1, None, {"lr": 1e-3}, [0.1, 0.2])],
        state="running",
    )
    summary = summarise(load_sweep(sweep_store, "young"))
    assert summary["winner"] is None
    assert summary["leading"] is not None
    assert summary["leading"]["number"] == 1
    assert summary["gain"] is None


def test_wall_falls_back_to_the_last_report(recorded):
    frames = dataclasses.replace(recorded, info={**recorded.info, "wall_s": None, "end": None})
    # trial 13 starts after 1,300 s and reports once, 10 s later
    assert summarise(frames)["wall_s"] == pytest.approx(1_310)


def test_standard_error_of_known_accuracies():
    assert standard_error(0.85, 1_000) == pytest.approx(0.0113, abs=1e-4)
    assert standard_error(0.85, 5_000) == pytest.approx(0.0050, abs=1e-4)
    assert standard_error(0.85, None) is None
    assert standard_error(1.7, 100) is None


def test_an_empty_sweep_has_an_empty_leaderboard(sweep_store, record_sweep):
    record_sweep("nothing", [], state="running")
    frames = load_sweep(sweep_store, "nothing")
    assert leaderboard_rows(frames) == []
    assert isinstance(best_so_far(frames), pd.DataFrame)
    assert summarise(frames)["trials"] == {}
