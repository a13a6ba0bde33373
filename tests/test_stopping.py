from __future__ import annotations

import dataclasses
import math

import pytest

from analysis.load import load_sweep
from analysis.stopping import rung_table, saving

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
