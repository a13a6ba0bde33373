from __future__ import annotations

import json
import math
import random

import numpy as np
import optuna.distributions as d
import pandas as pd
import pytest

from analysis.effects import (
    importance,
    is_categorical,
    is_log,
    parameter_frame,
    shared_mark,
)
from analysis.frames import write_frames
from analysis.levels import levels_of
from analysis.load import load_sweep
from analysis.next_steps import next_steps
from analysis.scales import distribution_of, scale_of
from analysis.summary import sureness
from analysis.tables import leaderboard_rows, summarise, trial_params
from tests.effect_sweeps import sweep


def test_importance_finds_the_planted_parameter(recorded):
    result = importance(recorded)
    assert result.shares is not None
    assert next(iter(result.shares)) == "lr"
    assert result.shares["lr"] > 0.5
    assert sum(result.shares.values()) == pytest.approx(1)
    assert (result.mark, result.n) == (1_000, 11)
    assert result.left_out == ("margin",)


@pytest.mark.parametrize("evaluator", ["fanova", "ped_anova"])
def test_both_evaluators_find_a_strong_parameter_among_many_trials(
    sweep_store, record_sweep, fake_trial, evaluator
):
    rng = random.Random(0)
    trials = []
    for number in range(60):
        lr, temperature = 10 ** rng.uniform(-4, -1), 10 ** rng.uniform(-1.3, 0)
        top = 0.9 - 0.1 * (math.log10(lr) + 2) ** 2 + 0.002 * temperature
        params = {"lr": lr, "temperature": temperature}
        trials.append(fake_trial(number, "completed", params, [top] * 8))
    name = f"sixty-{evaluator}"
    record_sweep(name, trials)
    result = importance(load_sweep(sweep_store, name), evaluator)
    assert result.shares is not None
    assert result.shares["lr"] > 0.8
    assert (result.mark, result.n) == (4_000, 60)


def test_values_are_compared_at_one_mark(recorded):
    mark, values = shared_mark(recorded)
    assert mark == 1_000
    assert sorted(values.index) == list(range(11))  # 11 and 12 failed, 13 is not that far
    assert values[10] == pytest.approx(
        (0.9 - 0.2 * (math.log10(3.1e-3) - math.log10(3e-3)) ** 2) * (1 - math.exp(-1))
    )


def test_a_trial_stopped_by_command_moves_no_mark(sweep_store, record_sweep, fake_trial):
    by_command = {"reason": "stopped by command", "rung": ""}
    trials = [
        fake_trial(0, "completed", {"lr": 1e-3}, [0.1] * 8),
        fake_trial(1, "pruned", {"lr": 1e-2}, [0.2], tags=by_command),
    ]
    record_sweep("cut short", trials)
    mark, values = shared_mark(load_sweep(sweep_store, "cut short"))
    assert (mark, list(values.index)) == (4_000, [0])


def test_too_few_trials_are_said(sweep_store, record_sweep, fake_trial):
    few = [fake_trial(n, "completed", {"lr": 1e-3 * (n + 1)}, [0.1 * n] * 8) for n in range(5)]
    record_sweep("few", few)
    result = importance(load_sweep(sweep_store, "few"))
    assert result.shares is None
    assert result.reason == "needs 10 trials that reached the same mark, there are 5"


def test_equal_values_have_no_importance(sweep_store, record_sweep, fake_trial):
    flat = [fake_trial(n, "completed", {"lr": 1e-3 * (n + 1)}, [0.5] * 8) for n in range(12)]
    record_sweep("flat", flat)
    result = importance(load_sweep(sweep_store, "flat"))
    assert (result.shares, result.reason) == (None, "every trial has the same value")


def test_a_default_outside_the_searched_range_is_left_out(sweep_store, record_sweep, fake_trial):
    trials = [fake_trial(0, "completed", {"lr": 5.0}, [0.9] * 8, is_default=True)]
    trials += [
        fake_trial(n, "completed", {"lr": 1e-3 * n, "temperature": 0.1}, [0.03 * n] * 8)
        for n in range(1, 12)
    ]
    record_sweep("outside", trials)
    result = importance(load_sweep(sweep_store, "outside"))
    assert result.n == 11
    assert result.shares is not None


@pytest.fixture(scope="module")
def conditional(sweep_store, record_sweep, fake_trial):
    """A choice that has None, a parameter of one loss alone, another whose range is the loss's."""
    low, high = d.FloatDistribution(1e-4, 1e-2, log=True), d.FloatDistribution(0.1, 2.0, log=True)
    average = d.CategoricalDistribution([None, 0.99, 0.999])
    loss = d.CategoricalDistribution(["byol", "margin"])
    trials = []
    for n in range(12):
        margin = n % 2 == 1
        params = {
            "loss": "margin" if margin else "byol",
            "lr": 0.1 * 1.2**n if margin else 1e-4 * 1.3**n,
            "ema_decay": average.choices[n % 3],
        }
        ranges = {"loss": loss, "lr": high if margin else low, "ema_decay": average}
        if margin:
            params["margin"], ranges["margin"] = 0.5 + n / 10, d.FloatDistribution(0.1, 2.0)
        tags = {
            "distributions": json.dumps({k: d.distribution_to_json(r) for k, r in ranges.items()})
        }
        values = [0.5 + 0.02 * n + (0.2 if n % 3 == 0 else 0.0)]
        trials.append(fake_trial(n, "completed", params, values, tags=tags))
    every = dict.fromkeys(("loss", "lr", "ema_decay", "margin"), "")
    record_sweep("conditional", trials, ranges=every)
    return load_sweep(sweep_store, "conditional")


def test_a_none_that_was_drawn_is_a_level_and_one_that_was_not_is_missing(conditional, tmp_path):
    drawn = conditional.trials["param.ema_decay"]
    assert drawn.tolist() == ["None", 0.99, 0.999] * 4
    assert conditional.trials["param.margin"].isna().tolist() == [True, False] * 6
    assert scale_of(conditional, "ema_decay").levels == ("0.99", "0.999", "None")
    assert len(parameter_frame(conditional).query("parameter == 'ema_decay'")) == 12
    found = importance(conditional, "fanova", resamples=0)
    assert found.shares is not None
    assert found.shares["ema_decay"] > 0.1
    assert found.left_out == ("margin",)
    levels = levels_of([conditional], "ema_decay").levels
    assert [(level.name, level.trials) for level in levels] == [
        *(("0.99", 4), ("0.999", 4), ("None", 4))
    ]
    assert trial_params(conditional, 9)["ema_decay"] == "None"
    assert "margin" not in trial_params(conditional, 6)
    assert leaderboard_rows(conditional)[0]["ema_decay"] == "None"  # of trial 9
    table = pd.read_parquet(write_frames([conditional], tmp_path)["trials"])
    assert table["param.ema_decay"].tolist() == ["None", "0.99", "0.999"] * 4


def test_of_several_ranges_the_widest_counts_and_is_not_to_be_widened(conditional):
    assert conditional.info.get("several_ranges") == ("lr",)
    assert distribution_of(conditional, "lr") == d.FloatDistribution(1e-4, 2.0, log=True)
    assert importance(conditional, resamples=0).n == 12
    steps = next_steps(conditional, sureness(conditional, summarise(conditional)), 9)
    assert not any("Widen the range of lr" in step["action"] for step in steps)


def test_unknown_evaluator_lists_the_known(recorded):
    with pytest.raises(ValueError, match="fanova, ped_anova, got 'shap'"):
        importance(recorded, "shap")


def test_parameter_frame_is_tidy(recorded):
    tidy = parameter_frame(recorded)
    assert list(tidy.columns) == ["number", "ending", "parameter", "setting", "objective", "mark"]
    lr = tidy[tidy["parameter"] == "lr"].set_index("number")
    assert sorted(lr.index) == [*range(11), 13]  # those with a value
    assert (lr.loc[4, "setting"], lr.loc[4, "ending"], lr.loc[4, "mark"]) == (
        1.5e-4,
        "pruned",
        1_000,
    )
    margin = tidy[tidy["parameter"] == "margin"]
    assert sorted(margin["number"]) == [1, 4, 7, 10, 13]


def test_scales_come_from_the_searched_distributions(recorded):
    assert is_log(recorded, "lr")
    assert not is_log(recorded, "margin")
    assert is_categorical(recorded, "batch_size")
    assert not is_categorical(recorded, "lr")


def test_a_choice_of_whole_numbers_and_fractions_keeps_its_levels() -> None:
    """In a column of floats the choice 0 is 0.0."""
    rng = np.random.default_rng(0)
    drawn = [(0, 0.1, 0.5)[n % 3] for n in range(60)]
    ranges = {"drop": d.CategoricalDistribution([0, 0.1, 0.5]), "x": d.FloatDistribution(0, 1)}
    settings = {"drop": [float(v) for v in drawn], "x": rng.uniform(size=60).tolist()}
    found = importance(sweep(settings, [0.9 if v == 0 else 0.5 for v in drawn], ranges=ranges))
    assert found.n == 60
    assert found.shares is not None
    assert found.shares["drop"] > 0.9
