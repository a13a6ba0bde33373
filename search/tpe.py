"""Optuna's TPE for trials that are stopped early: it compares them at one rung.

Optuna's own sampler counts any completed trial as better than any stopped one, and of stopped ones
those as worse that were stopped earlier. So it learns who passed the scheduler rather than who is
good, and where curves cross it shuns the slow starters that would have won. `RungTPE` calls those
trials good that have the best values at the highest rung that enough trials have reached, whatever
became of them since, as BOHB does (Falkner et al. 2018, https://arxiv.org/abs/1807.01774). What it
holds against them is drawn anew for each suggestion: mostly those alone that got as far, which is
fair to slow starters, and else all others, those stopped before that rung, too, which leads away
from what early values were right to stop. One suggestion in ten is random, so that none of this
can lock the search in. The shares were chosen on simulated sweeps (`search.families`).

Densities, acquisition and sampling are Optuna's (Bergstra et al., Algorithms for Hyper-Parameter
Optimization, 2011). Optuna sorts and converts all trials anew for each suggestion, most of it once
a group of conditional parameters; `History` does so once a trial.

Leaves out: several objectives, and studies that other processes write to.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.search_space.group_decomposed import _SearchSpaceGroup
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.seeds import derived_fraction

Distributions = dict[str, BaseDistribution]
Params = Callable[[FrozenTrial, Study], dict[str, Any]]
Numbers = NDArray[np.intp]

ENOUGH = 10
"""Values at a rung from which on it is learned from; before that, suggestions are random. At the
first rung failures count, too: where most of a space fails, they are what there is to learn."""
GOOD_SHARE, LEAST_GOOD, MOST_GOOD = 0.15, 3, 25
"""How many of a rung's values are good ones: BOHB's share, and Optuna's upper limit."""
RANDOM_SHARE = 0.1
FAIR_SHARE = 0.75
"""Of the other suggestions, those that hold only trials against a good one that got as far."""
NOT_YET = -1
"""Values of an open trial that was not looked at."""


class History:
    """One study's trials as `RungTPE` needs them; `update` takes in what is new.

    `rungs`: marks, in images, at which trials are compared, with the full resource.
    """

    def __init__(self, rungs: Sequence[int]) -> None:
        self._ranked: dict[int, list[tuple[float, int]]] = {rung: [] for rung in sorted(rungs)}
        """rung -> what reached it, best first: (-score, number)."""
        self._ranks: dict[int, dict[int, float]] = {rung: {} for rung in self._ranked}
        """rung -> number -> the -score under which it is ranked there."""
        self._silent: set[int] = set()
        """Running trials that have no value at any rung yet."""
        self._infeasible: set[int] = set()
        self._open: dict[int, int] = {}
        """Unfinished trials -> how many values each had when it was last looked at."""
        self._taken_in = 0
        self._counts = np.zeros(0, dtype=bool)
        """By number: whether the trial is learned from; failed and waiting ones are not."""
        self._columns: dict[str, NDArray[np.float64]] = {}
        """Parameter -> its internal value by number, NaN where a trial has none."""
        self._names: list[str] = []
        self._name_sets: dict[int, int] = {}
        """Names as bits of a number -> the first trial that has these."""
        self._first: dict[str, tuple[int, BaseDistribution]] = {}
        self._groups: list[Distributions] | None = None

    @property
    def rung(self) -> int | None:
        """The rung to be learned from; None while none has enough values."""
        enough = [rung for rung, ranked in self._ranked.items() if len(ranked) >= ENOUGH]
        first, values = next(iter(self._ranked.items()))
        if len(values) >= LEAST_GOOD and len(values) + len(self._infeasible) >= ENOUGH:
            enough.append(first)
        return max(enough, default=None)

    def update(self, study: Study, current: int, drawn: Params) -> None:
        """Take in what happened since the last time, to all trials but the `current` one.

        `drawn` gives a running trial's parameters, with those that TPE drew for it unasked.
        """
        trials = study._get_trials(deepcopy=False, use_cache=True)
        self._make_room(len(trials))
        waiting = [*self._open, *range(self._taken_in, len(trials))]
        self._taken_in = len(trials)
        known = []
        for number in waiting:
            trial, values = trials[number], len(trials[number].intermediate_values)
            finished = trial.state.is_finished()
            if not finished and self._open.get(number) == values:
                continue
            self._open.pop(number, None)
            self._silent.discard(number)
            self._forget(number)
            if number == current or trial.state == TrialState.WAITING:
                self._open[number] = NOT_YET
                continue
            if not finished:
                self._open[number] = values
            self._rank(trial, study.direction)
            if trial.state != TrialState.FAIL:
                known.append(trial)
        for trial in known:  # what tells one name from another may be known only since then
            running = trial.state == TrialState.RUNNING
            self._enter(trial, drawn(trial, study) if running else trial.params)

    def split(self, *, as_far: bool) -> tuple[Numbers, Numbers]:
        """Numbers of the good trials, and of those held against them, each ascending.

        These are all others, or, with `as_far`, those that got to the same rung, infeasible ones
        and those that run without a value yet.
        """
        assert self.rung is not None
        ranked = self._ranked[self.rung]
        count = min(MOST_GOOD, max(LEAST_GOOD, math.ceil(GOOD_SHARE * len(ranked))))
        good = np.zeros_like(self._counts)
        good[[number for _, number in ranked[:count]]] = True
        others = self._counts
        if as_far:
            others = np.zeros_like(self._counts)
            others[[number for _, number in ranked]] = True
            others[[*self._infeasible, *self._silent]] = True
        return np.flatnonzero(good), np.flatnonzero(others & ~good)

    def observations(self, names: list[str], numbers: Numbers) -> dict[str, Any]:
        """Internal values of these parameters in those of the trials that have them all."""
        absent = np.full(len(self._counts), np.nan)
        values = np.array([self._columns.get(name, absent)[numbers] for name in names])
        values = values[:, ~np.isnan(values).any(axis=0)]
        return dict(zip(names, values, strict=True))

    def groups(self) -> list[Distributions]:
        """The parameters in the smallest groups that every known trial has whole or not at all."""
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

    def _rank(self, trial: FrozenTrial, direction: StudyDirection) -> None:
        """Enter a trial at the rungs that it reached, or strike it there if it failed."""
        number = trial.number
        failed = trial.state == TrialState.FAIL
        infeasible = any(value > 0 for value in trial.constraints.values())
        if infeasible:
            self._infeasible.add(number)
        sign = -1.0 if direction == StudyDirection.MAXIMIZE else 1.0
        reached = [rung for rung in self._ranked if rung in trial.intermediate_values]
        for rung in reached:
            ranked, ranks = self._ranked[rung], self._ranks[rung]
            if failed or infeasible:
                if number in ranks:
                    del ranked[bisect.bisect_left(ranked, (ranks.pop(number), number))]
            elif number not in ranks:
                ranks[number] = sign * trial.intermediate_values[rung]
                bisect.insort(ranked, (ranks[number], number))
        if reached or trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            self._learn_names(trial)
        elif trial.state == TrialState.RUNNING:
            self._silent.add(number)

    def _learn_names(self, trial: FrozenTrial) -> None:
        number = trial.number
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


class RungTPE(optuna.samplers.TPESampler):
    """Multivariate TPE with groups and constant liar, fed from `history`; one for each ask."""

    def __init__(self, seed: int, history: History) -> None:
        super().__init__(seed=seed, multivariate=True, group=True, constant_liar=True)
        self._history = history
        drawn = derived_fraction(seed, 0, "kind of suggestion")
        self._at_random = drawn < RANDOM_SHARE
        self._as_far = drawn < RANDOM_SHARE + (1 - RANDOM_SHARE) * FAIR_SHARE

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Distributions:
        self._history.update(study, trial.number, self._get_params)
        self._at_random = self._at_random or self._history.rung is None
        groups = self._history.groups()
        self._search_space_group = _SearchSpaceGroup()
        self._search_space_group._search_spaces = groups
        return {
            name: distribution
            for group in groups
            for name, distribution in sorted(group.items())
            if not distribution.single()
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """A parameter that no known trial has, or any one of a random suggestion."""
        if self._at_random:
            return self._random_sampler.sample_independent(
                study, trial, param_name, param_distribution
            )
        return self._sample(study, trial, {param_name: param_distribution})[param_name]

    def _sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Distributions
    ) -> dict[str, Any]:
        if not search_space or self._at_random:
            return {}
        return self._sample(study, trial, search_space)

    def _sample(
        self, study: Study, trial: FrozenTrial, search_space: Distributions
    ) -> dict[str, Any]:
        good, others = (
            self._parzen_estimator_cls(
                self._history.observations(list(search_space), numbers),
                search_space,
                self._parzen_estimator_parameters,
            )
            for numbers in self._history.split(as_far=self._as_far)
        )
        samples = good.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(samples, self._compute_acquisition_func(samples, good, others))
        return {
            name: distribution.to_external_repr(best[name])
            for name, distribution in search_space.items()
        }
