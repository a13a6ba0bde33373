"""Optuna's TPE without a walk through all trials for each suggestion.

`QuickTPE` suggests what `optuna.samplers.TPESampler` does, to the last bit: the same split into
better and worse trials, the same groups, densities and random numbers. Optuna sorts all trials,
converts all their parameters and looks for groups among all their names anew for each suggestion,
and most of it once a group. A finished trial never changes, so `History` does this once a trial:
it keeps the trials in order of merit, their parameters as columns of numbers, and their distinct
sets of names.

Bergstra et al., Algorithms for Hyper-Parameter Optimization (2011). Leaves out: several
objectives, and studies that other processes write to.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers._tpe.sampler import default_gamma
from optuna.search_space.group_decomposed import _SearchSpaceGroup
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

Distributions = dict[str, BaseDistribution]
Params = Callable[[FrozenTrial, Study], dict[str, Any]]
Merit = tuple[int, float, float, int]
COMPLETE, PRUNED, INFEASIBLE = 0, 1, 2
"""First of a merit: TPE counts any completed trial as better than any stopped one."""


class History:
    """One study's trials as TPE needs them; `update` takes in what is new."""

    def __init__(self) -> None:
        self._merits: list[Merit] = []
        """Of the finished trials, best first; the last item is the trial's number."""
        self._open: list[int] = []
        self._taken_in = 0
        self._counts = np.zeros(0, dtype=bool)
        """By number: whether TPE counts the trial; failed and waiting ones it does not."""
        self._columns: dict[str, NDArray[np.float64]] = {}
        """Parameter -> its internal value by number, NaN where a trial has none."""
        self._names: list[str] = []
        self._name_sets: dict[int, int] = {}
        """Names as bits of a number -> the first finished trial that has these."""
        self._first: dict[str, tuple[int, BaseDistribution]] = {}
        self._groups: list[Distributions] | None = None

    @property
    def finished(self) -> int:
        """How many trials TPE learns from, running ones aside."""
        return len(self._merits)

    def update(self, study: Study, current: int, drawn: Params) -> None:
        """Take in the trials that finished since, and those that run beside trial `current`.

        `drawn` gives a running trial's parameters, with those that TPE drew for it unasked.
        """
        trials = study._get_trials(deepcopy=False, use_cache=True)
        self._make_room(len(trials))
        waiting = [*self._open, *range(self._taken_in, len(trials))]
        self._open, self._taken_in = [], len(trials)
        running = []
        for number in waiting:
            trial = trials[number]
            self._forget(number)
            if not trial.state.is_finished():
                self._open.append(number)
                if trial.state == TrialState.RUNNING and number != current:
                    running.append(trial)
            elif trial.state != TrialState.FAIL:
                self._learn(trial, study.direction)
        for trial in running:  # what they will need may be known only since then
            self._enter(trial, drawn(trial, study))

    def split(self, n_below: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Numbers of the `n_below` best finished trials, and of all others, each ascending."""
        below = np.zeros_like(self._counts)
        below[[merit[-1] for merit in self._merits[:n_below]]] = True
        return np.flatnonzero(below), np.flatnonzero(self._counts & ~below)

    def observations(self, names: list[str], numbers: NDArray[np.intp]) -> dict[str, Any]:
        """Internal values of these parameters in those of the trials that have them all."""
        absent = np.full(len(self._counts), np.nan)
        values = np.array([self._columns.get(name, absent)[numbers] for name in names])
        values = values[:, ~np.isnan(values).any(axis=0)]
        return dict(zip(names, values, strict=True))

    def groups(self) -> list[Distributions]:
        """The parameters in the smallest groups that every finished trial has whole or not."""
        if self._groups is None:
            groups: list[int] = []
            for names in sorted(self._name_sets, key=self._name_sets.__getitem__):
                rest, divided = names, []
                for group in groups:
                    divided += [part for part in (group & names, group & ~names) if part]
                    rest &= ~group
                groups = [*divided, rest] if rest else divided
            self._groups = [
                {
                    name: self._first[name][1]
                    for bit, name in enumerate(self._names)
                    if group >> bit & 1
                }
                for group in groups
            ]
        return self._groups

    def _make_room(self, size: int) -> None:
        more = max(size, 2 * len(self._counts)) - len(self._counts)
        if size > len(self._counts):
            self._counts = np.append(self._counts, np.zeros(more, dtype=bool))
            for name, column in self._columns.items():
                self._columns[name] = np.append(column, np.full(more, np.nan))

    def _forget(self, number: int) -> None:
        if self._counts[number]:
            self._counts[number] = False
            for column in self._columns.values():
                column[number] = np.nan

    def _enter(self, trial: FrozenTrial, params: dict[str, Any]) -> None:
        self._counts[trial.number] = True
        for name, value in params.items():
            first = self._first.get(name)
            distribution = first[1] if first else trial.distributions[name]
            if name not in self._columns:
                self._columns[name] = np.full(len(self._counts), np.nan)
            self._columns[name][trial.number] = distribution.to_internal_repr(value)

    def _learn(self, trial: FrozenTrial, direction: StudyDirection) -> None:
        number = trial.number
        bisect.insort(self._merits, _merit(trial, direction))
        for name, distribution in trial.distributions.items():
            if name not in self._first:
                self._names.append(name)
            if name not in self._first or number < self._first[name][0]:
                self._first[name] = (number, distribution)
                self._groups = None
        names = sum(1 << self._names.index(name) for name in trial.distributions)
        if number < self._name_sets.get(names, math.inf):
            self._name_sets[names] = number
            self._groups = None
        self._enter(trial, trial.params)


def _merit(trial: FrozenTrial, direction: StudyDirection) -> Merit:
    sign = -1.0 if direction == StudyDirection.MAXIMIZE else 1.0
    violated = sum(value for value in trial.constraints.values() if value > 0)
    if violated > 0:
        return INFEASIBLE, violated, 0.0, trial.number
    if trial.state == TrialState.COMPLETE:
        assert trial.value is not None
        return COMPLETE, sign * trial.value, 0.0, trial.number
    if not trial.intermediate_values:
        return PRUNED, 1.0, 0.0, trial.number
    step, value = max(trial.intermediate_values.items())
    return PRUNED, -step, math.inf if math.isnan(value) else sign * value, trial.number


class QuickTPE(optuna.samplers.TPESampler):
    """Multivariate TPE with groups and constant liar, fed from `history`; one for each ask."""

    def __init__(self, seed: int, history: History) -> None:
        super().__init__(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=10
        )
        self._history = history

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Distributions:
        self._history.update(study, trial.number, self._get_params)
        groups = self._history.groups()
        self._search_space_group = _SearchSpaceGroup()
        self._search_space_group._search_spaces = groups
        return {
            name: distribution
            for group in groups
            for name, distribution in sorted(group.items())
            if not distribution.single()
        }

    def _sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Distributions
    ) -> dict[str, Any]:
        if not search_space or self._history.finished < self._n_startup_trials:
            return {}
        return self._sample(study, trial, search_space)

    def _sample(
        self, study: Study, trial: FrozenTrial, search_space: Distributions
    ) -> dict[str, Any]:
        n_below = default_gamma(self._history.finished)
        below, above = (
            self._parzen_estimator_cls(
                self._history.observations(list(search_space), numbers),
                search_space,
                self._parzen_estimator_parameters,
            )
            for numbers in self._history.split(n_below)
        )
        samples = below.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(samples, self._compute_acquisition_func(samples, below, above))
        return {
            name: distribution.to_external_repr(best[name])
            for name, distribution in search_space.items()
        }
