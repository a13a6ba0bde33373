"""Frames -> which parameters mattered, by Optuna's own evaluators.

Values are compared at one mark only, the furthest that every trial counted has reached: the
trials that early stopping let through are a selection, and a selection hides the parameters
that it was made by. The price is that an early mark favours what learns fast.

Evaluators: fANOVA (Hutter, Hoos, Leyton-Brown 2014) shares out the variance of the objective
over the whole space; PED-ANOVA (Watanabe, Bansal, Hutter 2023) asks what tells the best tenth
from the rest. Left out: interactions, and intervals around the importances.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.load import BY_COMMAND, FAILED_STATES, UNFINISHED, SweepFrames
from analysis.tables import trial_params

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

MIN_TRIALS = {"fanova": 10, "ped_anova": 50}
"""fANOVA's forest needs a handful of points; PED-ANOVA wants 5 trials in its best tenth."""

FOREST_SEED = 0


@dataclass(frozen=True)
class Importance:
    """Shares that sum to one (largest first), or None and the reason.

    `mark` is the images at which the `n` trials were compared, `left_out` the parameters that
    not every trial has or whose range changed.
    """

    evaluator: str
    shares: dict[str, float] | None
    reason: str
    mark: int
    n: int
    left_out: tuple[str, ...] = ()


def parameter_frame(frames: SweepFrames) -> pd.DataFrame:
    """Tidy: `number`, `ending`, `parameter`, `setting`, `objective` (last value), `mark`.

    One row a trial and drawn parameter; trials without a value are left out.
    """
    names = [f"param.{name}" for name in frames.parameters]
    trials = frames.trials[frames.trials["objective"].notna()]
    wide = trials[["number", "ending", "objective", "mark", *names]].astype(
        dict.fromkeys(names, "object")
    )
    tidy = wide.melt(
        id_vars=["number", "ending", "objective", "mark"],
        value_vars=names,
        var_name="parameter",
        value_name="setting",
    )
    tidy["parameter"] = tidy["parameter"].str.removeprefix("param.")
    tidy = tidy[tidy["setting"].notna()]
    columns = ["number", "ending", "parameter", "setting", "objective", "mark"]
    return tidy[columns].reset_index(drop=True)


def shared_mark(frames: SweepFrames) -> tuple[int, pd.Series[Any]]:
    """The furthest mark that every completed or early stopped trial reached, and the values there.

    The series maps trial number to objective; it holds those that are unfinished, or that a
    command stopped, if they got that far. (0, empty) while no trial has ended.
    """
    trials = frames.trials
    usable = trials[~trials["state"].isin(FAILED_STATES) & trials["objective"].notna()]
    ended = usable[~usable["ending"].isin((UNFINISHED, BY_COMMAND))]
    if ended.empty:
        return 0, pd.Series(dtype="float64")
    mark = int(ended["mark"].min())
    curves = frames.curves
    at_mark = curves[
        (curves["metric"] == frames.info["objective"])
        & (curves["mark"] == mark)
        & curves["number"].isin(usable["number"])
    ]
    values = at_mark.drop_duplicates("number", keep="last").set_index("number")["value"]
    return mark, values[np.isfinite(values)]


def importance(frames: SweepFrames, evaluator: str = "fanova") -> Importance:
    """Share of each searched parameter in the objective; ValueError for an unknown evaluator."""
    if evaluator not in MIN_TRIALS:
        raise ValueError(f"evaluator must be one of {', '.join(MIN_TRIALS)}, got {evaluator!r}")
    mark, values = shared_mark(frames)
    least = MIN_TRIALS[evaluator]

    def none(reason: str) -> Importance:
        return Importance(evaluator, None, reason, mark, len(values))

    if not frames.parameters:
        return none("no parameter was searched")
    if len(values) < least:
        return none(f"needs {least} trials that reached the same mark, there are {len(values)}")
    if values.nunique() < 2:
        return none("every trial has the same value")
    study = _study(frames, values)
    found = len(study.trials)
    if found < least:
        return none(f"needs {least} trials inside the searched ranges, there are {found}")

    from optuna import importance as optuna_importance

    judge = (
        optuna_importance.FanovaImportanceEvaluator(seed=FOREST_SEED)
        if evaluator == "fanova"
        else optuna_importance.PedAnovaImportanceEvaluator()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental-API notices
        shares = optuna_importance.get_param_importances(study, evaluator=judge)
    if not shares or not np.isfinite(list(shares.values())).all():
        return none("no parameter varies over all trials")
    left_out = tuple(name for name in frames.parameters if name not in shares)
    exact = {name: float(share) for name, share in shares.items()}
    return Importance(evaluator, exact, "", mark, found, left_out)


def is_log(frames: SweepFrames, parameter: str) -> bool:
    """Whether the parameter was searched on a logarithmic scale."""
    distribution = _distributions(frames.info["distributions"]).get(parameter)
    return bool(getattr(distribution, "log", False))


def is_categorical(frames: SweepFrames, parameter: str) -> bool:
    """Whether the parameter was searched as a choice, or holds something else than numbers."""
    distribution = _distributions(frames.info["distributions"]).get(parameter)
    if distribution is not None:
        return hasattr(distribution, "choices")
    column = frames.trials[f"param.{parameter}"]
    return bool(column.dtype == "boolean") or not pd.api.types.is_numeric_dtype(column)


def _distributions(texts: Mapping[str, str]) -> dict[str, BaseDistribution]:
    from optuna.distributions import json_to_distribution

    return {name: json_to_distribution(text) for name, text in texts.items()}


def _study(frames: SweepFrames, values: pd.Series[Any]) -> Study:
    """A study of completed trials with these values; trials outside their ranges are left out.

    The default configuration is run whether or not the space contains it.
    """
    import optuna

    distributions = _distributions(frames.info["distributions"])
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # "a new study created" is no news
    study = optuna.create_study(
        direction="maximize" if frames.info["mode"] == "max" else "minimize"
    )
    optuna.logging.set_verbosity(level)
    for number, value in values.items():
        drawn = trial_params(frames, int(str(number)))
        params = {name: v for name, v in drawn.items() if name in distributions}
        if not params:
            continue
        try:
            study.add_trial(
                optuna.trial.create_trial(
                    params=params,
                    distributions={name: distributions[name] for name in params},
                    value=float(value),
                )
            )
        except ValueError:
            continue
    return study
