"""A search apart for each level of a choice that is being compared: equal trials, equal chances.

With `--stratify loss` every loss gets the same number of trials and a study of its own, in which
the loss is fixed: what is learned of one does not decide what is tried of another, and conditional
parameters are searched where they count. Levels take turns, in an order that is shuffled anew for
each turn, so that none is always first on a cluster that grows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.distributions import CategoricalDistribution, distribution_to_json

from search.seeds import derived_seed
from search.state import TrialState
from search.study import Study, Suggestion, WarmTrial
from spaces import Space, with_fixed

ONE = ""
"""The stratum of all trials where nothing is compared."""


@dataclass(frozen=True)
class Strata:
    """The levels of `field`, in the order of the space; no field: one stratum of all trials."""

    field: str | None = None
    levels: tuple[Any, ...] = ()

    def names(self) -> tuple[str, ...]:
        """Name of each stratum, as the journal has it."""
        return tuple(str(level) for level in self.levels) or (ONE,)

    def check_even(self, trials: int) -> None:
        """ValueError if so many trials cannot be spread evenly over the levels."""
        if self.field is not None and trials % len(self.levels):
            raise ValueError(
                f"trials must be a multiple of the {len(self.levels)} levels of {self.field}, "
                f"which get equal numbers, got {trials}"
            )

    def level(self, name: str) -> Any:
        """The level of that name."""
        return self.levels[self.names().index(name)]

    def next_name(self, counts: Mapping[str, int], seed: int, without: Collection[str] = ()) -> str:
        """Whose turn it is when each stratum has had so many trials: of the fewest, a drawn one.

        Strata `without` a turn are passed over; one must be left.
        """
        names = [name for name in self.names() if name not in without]
        fewest = min(counts.get(name, 0) for name in names)
        random.Random(derived_seed(seed, fewest, "turn")).shuffle(names)
        return next(name for name in names if counts.get(name, 0) == fewest)


class StratifiedStudy:
    """One `Study` a stratum; `make(space, name)` makes them."""

    def __init__(self, space: Space, strata: Strata, make: Callable[[Space, str], Study]) -> None:
        self._strata = strata
        self._studies = {
            name: make(with_fixed(space, self._fixed(name)), name) for name in strata.names()
        }
        self._of: dict[int, str] = {}

    def ask(
        self,
        number: int,
        stratum: str,
        point: Mapping[str, Any] | None = None,
        *,
        is_new: Callable[[dict[str, Any]], bool] = lambda fields: True,
    ) -> Suggestion | None:
        """Suggest trial `number` of a stratum; see `Study.ask`."""
        fixed = self._fixed(stratum)
        if point is not None:
            point = {name: value for name, value in point.items() if name not in fixed}
        self._of[number] = stratum
        suggestion = self._studies[stratum].ask(number, point, is_new=is_new)
        if suggestion is None or not fixed:
            return suggestion
        distribution = distribution_to_json(CategoricalDistribution(self._strata.levels))
        return replace(
            suggestion,
            params={**fixed, **suggestion.params},
            distributions={**dict.fromkeys(fixed, distribution), **suggestion.distributions},
        )

    def report(self, number: int, mark: int, value: float | None) -> None:
        """See `Study.report`."""
        self._studies[self._of[number]].report(number, mark, value)

    def tell(self, number: int, state: str, values: Sequence[float | None]) -> None:
        """See `Study.tell`."""
        self._studies[self._of[number]].tell(number, state, values)

    def restore(self, trials: Sequence[TrialState], warm: Sequence[WarmTrial] = ()) -> None:
        """See `Study.restore`; a trial of an earlier sweep goes to the study of its level."""
        self._of.update({trial.number: trial.stratum for trial in trials})
        for name, study in self._studies.items():
            fixed = self._fixed(name)
            study.restore(
                [
                    replace(trial, **_without(fixed, trial))
                    for trial in trials
                    if trial.stratum == name
                ],
                [
                    replace(each, **_without(fixed, each))
                    for each in warm
                    if all(each.params.get(key) == value for key, value in fixed.items())
                ],
            )

    def _fixed(self, name: str) -> dict[str, Any]:
        field = self._strata.field
        return {} if field is None else {field: self._strata.level(name)}


def _without(fixed: Mapping[str, Any], trial: TrialState | WarmTrial) -> dict[str, Any]:
    return {
        "params": {k: v for k, v in trial.params.items() if k not in fixed},
        "distributions": {k: v for k, v in trial.distributions.items() if k not in fixed},
    }


def counts_of(trials: Sequence[TrialState]) -> Counter[str]:
    """How many trials each stratum has had, those that a user enqueued left out."""
    return Counter(trial.stratum for trial in trials if trial.source != "enqueued")
