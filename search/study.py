"""Optuna's ask and tell, made reproducible: the same history gives the same next suggestion.

A study lives in memory and is a fold of the journal. Before each ask the sampler is made anew
with a seed from (sweep seed, trial number), so no sampler state needs saving; what TPE keeps of a
running trial (its relative sample, in the trial's system attributes) and NSGA-II of a generation
(its parents, in the study's) is journaled with the suggestion.

Optuna hears: COMPLETE with the value for a trial that reached the full resource; PRUNED, after
its values were reported, for a stopped one; PRUNED with a violated constraint for one that
diverged or ran out of memory, which steers TPE away (told FAIL, TPE forgets it); FAIL for the
rest; nothing for an unfinished one. Steps are nominal marks, whatever a batch overshot, since
trials are compared where their steps are the same. A study of several objectives has no
intermediate values.
"""

from __future__ import annotations

import copy
import json
import math
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import TrialState as OptunaState

from search.seeds import derived_seed
from search.state import Event, TrialState
from search.tpe import History, RungTPE
from spaces import Space, run_space

INFEASIBLE = ("diverged", "oom")
REDRAWS = 32
"""Draws that only repeat earlier trials, before a space is called exhausted."""
OWN_REDRAWS = 4
"""Of these by the sampler itself, which is slow and may insist; the others are random."""


@dataclass(frozen=True)
class Suggestion:
    """A new trial, with what is needed to rebuild it in Optuna."""

    params: dict[str, Any]
    distributions: dict[str, str]
    system_attrs: dict[str, Any]
    fields: dict[str, Any]
    """The space's `TrainConfig` fields."""
    failure: str | None = None
    """What the space raised instead of returning fields, and where."""
    study_attrs: dict[str, Any] = field(default_factory=dict)
    """What the sampler remembered of the whole study meanwhile."""
    redraws: int = 0
    """Draws that were thrown away before this one."""


@dataclass(frozen=True)
class WarmTrial:
    """A finished trial of an earlier sweep, with the new space's parameters and ranges."""

    params: dict[str, Any]
    distributions: dict[str, str]
    state: str
    reports: dict[int, float]
    """Nominal mark in images -> the objective there."""

    @property
    def value(self) -> float | None:
        """The objective at the last mark; None if the trial never had one."""
        return self.reports[max(self.reports)] if self.reports else None

    @classmethod
    def from_event(cls, event: Event) -> WarmTrial:
        """As the journal keeps it, with the marks as text."""
        return cls(
            params=event["params"],
            distributions=event["distributions"],
            state=event["state"],
            reports={int(mark): float(value) for mark, value in event["reports"].items()},
        )


Make = Callable[[int], optuna.samplers.BaseSampler]
"""A sampler from its seed."""


def _tpe(rungs: Sequence[int]) -> Make:
    history = History(rungs)

    def make(seed: int) -> optuna.samplers.BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return RungTPE(seed, history)

    return make


def _random(rungs: Sequence[int]) -> Make:
    return lambda seed: optuna.samplers.RandomSampler(seed=seed)


def _gp(rungs: Sequence[int]) -> Make:
    def make(seed: int) -> optuna.samplers.BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)

    return make


def _nsga2(rungs: Sequence[int]) -> Make:
    # Sweeps have tens of trials, not thousands: with the default of 50 most would be random.
    return lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20)


SAMPLERS: dict[str, Callable[[Sequence[int]], Make]] = {
    "tpe": _tpe,
    "random": _random,
    "grid": _random,  # of points that are given one by one
    "gp": _gp,
    "nsga2": _nsga2,
}


class Study:
    """The sampler's side of a sweep: `ask` for trial after trial, `report` and `tell` of them.

    `modes` are the directions (max, min) of `objectives`; of several, none is reported before
    a trial's end. `rungs` are the marks at which trials are compared, with the full resource.
    """

    def __init__(
        self,
        name: str,
        space: Space,
        *,
        sampler: str,
        modes: Sequence[str],
        seed: int,
        objectives: Sequence[str],
        rungs: Sequence[int],
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._make_sampler = SAMPLERS[sampler](rungs)
        self._make_random = SAMPLERS["random"](rungs)
        self._seed = seed
        self._objectives = tuple(objectives)
        self._ids: dict[int, int] = {}
        self._study = optuna.create_study(
            study_name=name,
            directions=["maximize" if mode == "max" else "minimize" for mode in modes],
            sampler=self._make_sampler(0),
        )

    def ask(
        self,
        number: int,
        point: Mapping[str, Any] | None = None,
        *,
        is_new: Callable[[dict[str, Any]], bool] = lambda fields: True,
    ) -> Suggestion | None:
        """Suggest trial `number`: what `point` gives, and the sampler's for what it leaves out.

        A draw whose fields are not new is thrown away and drawn anew; None if nothing new is
        found. What a `point` asks for is taken as it is, new or not.
        """
        before = set(self._study_attrs())
        for redraws in range(REDRAWS):
            if point is not None:
                self._study.enqueue_trial(dict(point))
            use = f"sampler {redraws}" if redraws else "sampler"
            make = self._make_sampler if redraws < OWN_REDRAWS else self._make_random
            self._study.sampler = make(derived_seed(self._seed, number, use))
            trial = self._study.ask()
            fields, failure = {}, None
            try:
                fields = run_space(self._space, trial)
            except Exception as error:  # the user's code: this trial fails, the sweep goes on
                where = traceback.extract_tb(error.__traceback__)[-1]
                failure = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            if point is not None or failure is not None or is_new(fields):
                self._ids[number] = trial._trial_id
                return self._suggestion(number, fields, failure, before, redraws)
            self._study.tell(trial, state=OptunaState.FAIL)
        return None

    def _suggestion(
        self,
        number: int,
        fields: dict[str, Any],
        failure: str | None,
        attrs_before: set[str],
        redraws: int,
    ) -> Suggestion:
        frozen = self._frozen(number)
        new = {k: v for k, v in self._study_attrs().items() if k not in attrs_before}
        return Suggestion(
            params=dict(frozen.params),
            distributions={k: distribution_to_json(d) for k, d in frozen.distributions.items()},
            system_attrs=json.loads(json.dumps(frozen.system_attrs)),
            fields=fields,
            failure=failure,
            study_attrs=json.loads(json.dumps(new)),
            redraws=redraws,
        )

    def report(self, number: int, mark: int, value: float | None) -> None:
        """Enter an intermediate value at its nominal mark."""
        if value is not None and math.isfinite(value) and len(self._objectives) == 1:
            self._storage.set_trial_intermediate_value(self._ids[number], mark, value)

    def tell(self, number: int, state: str, values: Sequence[float | None]) -> None:
        """Say how trial `number` ended; `state` is one of the journal's final states."""
        told = _optuna_state(state, values)
        if state in INFEASIBLE:
            self._violate(number, state)
        final = _final(told, values, {})
        self._study.tell(self._frozen(number).number, final, state=told)

    def restore(self, trials: Sequence[TrialState], warm: Sequence[WarmTrial] = ()) -> None:
        """Take in earlier sweeps' trials, then those of a journal in the order of their numbers."""
        for each in warm:
            self._study.add_trial(self._warmed(each))
        added = len(warm)
        for trial in sorted(trials, key=lambda t: t.number):
            for _ in range(trial.redraws):
                self._study.add_trial(optuna.trial.create_trial(state=OptunaState.FAIL))
            added += trial.redraws
            self._study.add_trial(self._rebuilt(trial))
            self._ids[trial.number] = self._storage.get_trial_id_from_study_id_trial_number(
                self._study._study_id, added
            )
            added += 1
            for key, value in trial.study_attrs.items():
                self._storage.set_study_system_attr(self._study._study_id, key, value)

    def _rebuilt(self, trial: TrialState) -> optuna.trial.FrozenTrial:
        values = trial.values(self._objectives)
        state = trial.told_state
        told = OptunaState.RUNNING if state is None else _optuna_state(state, values)
        reported = trial.told_reports(self._objectives[0]) if len(self._objectives) == 1 else {}
        return optuna.trial.create_trial(
            state=told,
            values=_final(told, values, reported),
            params=trial.params,
            distributions={k: json_to_distribution(d) for k, d in trial.distributions.items()},
            system_attrs=trial.system_attrs,
            intermediate_values=reported,
            constraints={state: 1.0} if state in INFEASIBLE else None,
        )

    def _warmed(self, trial: WarmTrial) -> optuna.trial.FrozenTrial:
        told = _optuna_state(trial.state, [trial.value])
        return optuna.trial.create_trial(
            state=told,
            values=_final(told, [trial.value], trial.reports),
            params=trial.params,
            distributions={k: json_to_distribution(d) for k, d in trial.distributions.items()},
            intermediate_values=trial.reports,
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
            self._storage.set_trial_system_attr(self._ids[number], key, value)

    @property
    def _storage(self) -> optuna.storages.BaseStorage:
        return self._study._storage

    def _study_attrs(self) -> dict[str, Any]:
        return self._storage.get_study_system_attrs(self._study._study_id)

    def _frozen(self, number: int) -> optuna.trial.FrozenTrial:
        return self._storage.get_trial(self._ids[number])


def _final(
    told: OptunaState, values: Sequence[float | None], reported: Mapping[int, float]
) -> list[float] | None:
    """What a finished trial's values are in Optuna; a stopped one's is its last report."""
    if told == OptunaState.COMPLETE:
        return [float(value) for value in values if value is not None]
    if told == OptunaState.PRUNED and reported:
        return [reported[max(reported)]]
    return None


def _optuna_state(state: str, values: Sequence[float | None]) -> OptunaState:
    if state == "completed" and None not in values:
        return OptunaState.COMPLETE
    if state == "pruned" or state in INFEASIBLE:
        return OptunaState.PRUNED
    return OptunaState.FAIL
