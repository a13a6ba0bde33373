"""Optuna's ask and tell, made reproducible: the same history gives the same next suggestion.

A study lives in memory and is a fold of the journal. Before each ask the sampler is made anew
with a seed from (sweep seed, trial number), so no sampler state needs saving; what TPE keeps of a
running trial (its relative sample, in the trial's system attributes) is journaled with it.

Optuna hears: COMPLETE with the value for a trial that reached the full resource; PRUNED, after
its values were reported, for a stopped one; PRUNED with a violated constraint for one that
diverged or ran out of memory, which steers TPE away (told FAIL, TPE forgets it); FAIL for the
rest; nothing for an unfinished one. Steps are nominal marks: TPE ranks stopped trials by step
first, and would prefer an overshoot of a hundred images to a better value.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import TrialState as OptunaState

from search.journal import TrialState
from spaces import Space, run_space

INFEASIBLE = ("diverged", "oom")


@dataclass(frozen=True)
class Suggestion:
    """A new trial, with what is needed to rebuild it in Optuna."""

    number: int
    params: dict[str, Any]
    distributions: dict[str, str]
    system_attrs: dict[str, Any]
    fields: dict[str, Any]
    """The space's `TrainConfig` fields."""
    failure: str | None = None
    """What the space raised instead of returning fields, and where."""


def derived_seed(sweep_seed: int, number: int, use: str) -> int:
    """A seed in [0, 2^31) for one trial and one use ("sampler", "trial") of a sweep."""
    text = f"contrasweep {use} {sweep_seed} {number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=10
        )


def _random(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": _tpe,
    "random": _random,
}


class Study:
    """The sampler's side of a sweep: `ask` for trial after trial, `report` and `tell` of them."""

    def __init__(
        self, name: str, space: Space, *, sampler: str, mode: str, seed: int, objective: str
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._make_sampler = SAMPLERS[sampler]
        self._seed = seed
        self._objective = objective
        self._study = optuna.create_study(
            study_name=name,
            direction="maximize" if mode == "max" else "minimize",
            sampler=self._make_sampler(0),
        )

    def ask(self, number: int, defaults: dict[str, Any] | None = None) -> Suggestion:
        """Suggest trial `number`; with `defaults`, these parameters instead of the sampler's."""
        if defaults is not None:
            self._study.enqueue_trial(defaults)
        self._study.sampler = self._make_sampler(derived_seed(self._seed, number, "sampler"))
        trial = self._study.ask()
        assert trial.number == number, (trial.number, number)
        fields, failure = {}, None
        try:
            fields = run_space(self._space, trial)
        except Exception as error:  # the user's code: this trial fails, the sweep goes on
            where = traceback.extract_tb(error.__traceback__)[-1]
            failure = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        frozen = self._frozen(number)
        return Suggestion(
            number=number,
            params=dict(frozen.params),
            distributions={k: distribution_to_json(d) for k, d in frozen.distributions.items()},
            system_attrs=json.loads(json.dumps(frozen.system_attrs)),
            fields=fields,
            failure=failure,
        )

    def report(self, number: int, mark: int, value: float | None) -> None:
        """Enter an intermediate value at its nominal mark."""
        if value is not None and math.isfinite(value):
            storage = self._study._storage
            storage.set_trial_intermediate_value(self._trial_id(number), mark, value)

    def tell(self, number: int, state: str, value: float | None) -> None:
        """Say how trial `number` ended; `state` is one of the journal's final states."""
        told = _optuna_state(state, value)
        if state in INFEASIBLE:
            self._violate(number, state)
        self._study.tell(number, value if told == OptunaState.COMPLETE else None, state=told)

    def restore(self, trials: list[TrialState]) -> None:
        """Take in the trials of a journal, in the order of their numbers."""
        for trial in sorted(trials, key=lambda t: t.number):
            self._study.add_trial(self._rebuilt(trial))

    def _rebuilt(self, trial: TrialState) -> optuna.trial.FrozenTrial:
        value = trial.value(self._objective)
        told = OptunaState.RUNNING if trial.state is None else _optuna_state(trial.state, value)
        reported = {
            mark: float(report["metrics"][self._objective])
            for mark, report in trial.reports.items()
            if report["metrics"].get(self._objective) is not None
        }
        if told == OptunaState.PRUNED:  # as `Study.tell` does with a stopped trial's last report
            value = reported[max(reported)] if reported else None
        return optuna.trial.create_trial(
            state=told,
            value=value if told in (OptunaState.COMPLETE, OptunaState.PRUNED) else None,
            params=trial.params,
            distributions={k: json_to_distribution(d) for k, d in trial.distributions.items()},
            system_attrs=trial.system_attrs,
            intermediate_values=reported,
            constraints={trial.state: 1.0} if trial.state in INFEASIBLE else None,
        )

    def _violate(self, number: int, constraint: str) -> None:
        # A trial taken in by `restore` has no `Trial` object, and making one would sample anew:
        # the attribute is computed on a copy and stored.
        frozen = copy.deepcopy(self._frozen(number))
        before = set(frozen.system_attrs)
        frozen.set_constraint(constraint, 1.0)
        for key in set(frozen.system_attrs) - before:
            value = frozen.system_attrs[key]
            self._study._storage.set_trial_system_attr(self._trial_id(number), key, value)

    def _trial_id(self, number: int) -> int:
        return self._study._storage.get_trial_id_from_study_id_trial_number(
            self._study._study_id, number
        )

    def _frozen(self, number: int) -> optuna.trial.FrozenTrial:
        return self._study._storage.get_trial(self._trial_id(number))


def _optuna_state(state: str, value: float | None) -> OptunaState:
    if state == "completed" and value is not None:
        return OptunaState.COMPLETE
    if state == "pruned" or state in INFEASIBLE:
        return OptunaState.PRUNED
    return OptunaState.FAIL
