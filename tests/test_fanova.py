"""Shares of parameters against Optuna's evaluators and against what is known."""

from __future__ import annotations

import warnings

import numpy as np
import optuna
import optuna.distributions as d
import pytest
from optuna.importance import (
    FanovaImportanceEvaluator,
    PedAnovaImportanceEvaluator,
    get_param_importances,
)
from sklearn.ensemble import RandomForestRegressor

from analysis.effects import MAX_TRIALS, importance
from analysis.fanova import fanova_variances, forest_variances
from tests.effect_sweeps import SPACE, planted, sweep

UNIT = d.FloatDistribution(0, 1)


def optuna_shares(frames, ranges, evaluator):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for row in frames.trials.to_dict("records"):
        drawn = {name: row[f"param.{name}"] for name in ranges}
        drawn = {name: v for name, v in drawn.items() if v is not None and v == v}
        study.add_trial(
            optuna.trial.create_trial(
                params=drawn,
                distributions={name: ranges[name] for name in drawn},
                value=row["objective"],
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_param_importances(study, evaluator=evaluator)


def test_the_marginals_of_a_forest_are_those_of_optuna():
    rng = np.random.default_rng(0)
    x = rng.random((40, 3))
    y = -((x[:, 0] - 0.5) ** 2) + 0.2 * x[:, 1] + 0.02 * rng.normal(size=40)
    ranges = dict.fromkeys("abc", UNIT)
    frames = sweep(dict(zip("abc", x.T.tolist(), strict=True)), y.tolist(), ranges=ranges)
    theirs = optuna_shares(frames, ranges, FanovaImportanceEvaluator(n_trees=8, seed=3))
    forest = RandomForestRegressor(n_estimators=8, max_depth=64, random_state=3).fit(x, y)
    ours = forest_variances([tree.tree_ for tree in forest.estimators_], 3)
    assert ours is not None
    for name, share in zip("abc", ours / ours.sum(), strict=True):
        assert share == pytest.approx(theirs[name], abs=1e-6)


def test_ped_anova_agrees_with_optuna_on_every_kind_of_range():
    rng = np.random.default_rng(1)
    n = 80
    ranges = {
        "lr": d.FloatDistribution(1e-4, 1e-1, log=True),
        "strength": d.FloatDistribution(0.1, 1.5),
        "step": d.FloatDistribution(0.0, 1.0, step=0.25),
        "width": d.IntDistribution(16, 512, log=True),
        "layers": d.IntDistribution(1, 4),
        "loss": d.CategoricalDistribution(["nt_xent", "margin"]),
        "margin": d.FloatDistribution(0.1, 2.0),
    }
    loss = rng.choice(["nt_xent", "margin"], n)
    settings = {
        "lr": (10 ** rng.uniform(-4, -1, n)).tolist(),
        "strength": rng.uniform(0.1, 1.5, n).tolist(),
        "step": (0.25 * rng.integers(0, 5, n)).tolist(),
        "width": (2 ** rng.integers(4, 10, n)).tolist(),
        "layers": rng.integers(1, 5, n).tolist(),
        "loss": loss.tolist(),
        "margin": [float(rng.uniform(0.1, 2)) if each == "margin" else None for each in loss],
    }
    values = (-((np.log10(settings["lr"]) + 2.5) ** 2) + 0.3 * (loss == "margin")).tolist()
    frames = sweep(settings, values, ranges=ranges)
    ours = importance(frames, "ped_anova", resamples=0)
    theirs = optuna_shares(frames, ranges, PedAnovaImportanceEvaluator())
    assert ours.shares is not None
    assert set(ours.shares) == set(theirs)
    for name, share in theirs.items():
        assert ours.shares[name] == pytest.approx(share, abs=1e-6), name


def test_a_log_range_is_measured_on_its_scale():
    rng = np.random.default_rng(2)
    decades, strength = rng.uniform(-4, -1, 150), rng.uniform(0.1, 1.5, 150)
    values = (decades + 4) / 3 + (strength - 0.1) / 1.4  # equal parts of the variance
    settings = {"lr": (10**decades).tolist(), "strength": strength.tolist()}
    frames = sweep(settings, values.tolist(), ranges={name: SPACE[name] for name in settings})
    shares = importance(frames, resamples=0).shares
    assert shares is not None
    assert shares["lr"] == pytest.approx(0.5, abs=0.05)


def test_a_forest_without_splits_has_no_shares():
    once = np.ones(5, dtype=np.int64)
    assert fanova_variances(np.zeros((5, 1)), np.arange(5.0), once, trees=3, seed=0) is None


@pytest.mark.parametrize("evaluator", ["fanova", "ped_anova"])
def test_planted_importance_stands_out_and_noise_does_not(evaluator):
    result = importance(planted(200), evaluator)
    stability = result.stability
    assert stability is not None
    assert stability.first == "lr"
    assert stability.first_count >= 0.95 * stability.resamples
    low, middle, high = stability.intervals["lr"]
    assert stability.floor < low < middle < high
    assert stability.intervals["strength"][1] < stability.floor
    assert next(iter(stability.intervals)) == "lr"


def test_few_parameters_without_effect_rise_above_the_noise_floor():
    below, above = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x = rng.random((40, 3))
        values = -np.abs(x[:, 0] - 0.5) + 0.05 * rng.normal(size=40)
        ranges = dict.fromkeys("abc", UNIT)
        frames = sweep(dict(zip("abc", x.T.tolist(), strict=True)), values.tolist(), ranges=ranges)
        stability = importance(frames, resamples=20).stability
        assert stability is not None
        middle = {name: share for name, (_, share, _) in stability.intervals.items()}
        below += [middle[name] < stability.floor for name in "bc"]
        above.append(middle["a"] > stability.floor)
    assert sum(below) >= 15  # of 16; measured: 99 of 100
    assert sum(above) >= 7  # of 8; measured: 98 of 100


def test_the_same_records_give_the_same_intervals():
    first, again = (importance(planted(30), resamples=10) for _ in range(2))
    assert first == again
    assert first.stability is not None


def test_many_trials_are_sampled():
    result = importance(planted(1_500), resamples=2)
    assert (result.n > MAX_TRIALS, result.drawn) == (True, MAX_TRIALS)
    assert result.shares is not None
    assert next(iter(result.shares)) == "lr"


def test_ties_at_the_top_have_no_best_tenth():
    settings = {"strength": np.linspace(0.1, 1.5, 60).tolist()}
    values = [0.9] * 40 + [0.1] * 20
    frames = sweep(settings, values, ranges={"strength": SPACE["strength"]})
    result = importance(frames, "ped_anova")
    assert (result.shares, result.reason) == (None, "too many trials share the best value")


def test_a_single_parameter_has_no_rivals():
    settings = {"strength": np.linspace(0.1, 1.5, 20).tolist()}
    values = np.linspace(0, 1, 20).tolist()
    result = importance(sweep(settings, values, ranges={"strength": SPACE["strength"]}))
    assert (result.shares, result.stability) == ({"strength": 1.0}, None)
