"""What the next trial is made of: what a user asked for, the default, given points, the sampler's.

In this order: parameters that were enqueued in mid-sweep, the default configuration (of each
stratum), given points, points of the grid, and then suggestions of the sampler, none of which
repeats an earlier trial.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from search.brackets import bracket_of
from search.config import SweepConfig
from search.points import check_point
from search.seeds import derived_seed
from search.state import SweepState
from search.strata import Strata, StratifiedStudy, counts_of
from search.study import Study, Suggestion, WarmTrial
from spaces import Space, default_params, with_fixed
from trainer.config import TrainConfig, parse_config


class Proposals:
    """The fold of a sweep's journal that makes new trials."""

    def __init__(
        self,
        config: SweepConfig,
        state: SweepState,
        space: Space,
        defaults: Mapping[str, Any] | None,
        strata: Strata,
        grid: Sequence[Mapping[str, Any]],
    ) -> None:
        self._config, self._state, self._space = config, state, space
        self._strata, self._grid = strata, grid
        self._defaults = self._default_of_each_stratum(defaults)
        self._default_stratum = strata.names()[0]
        if defaults is not None and strata.field is not None:
            level = str(defaults[strata.field])
            if level in strata.names():
                self._default_stratum = level
        self.exhausted: str | None = None
        """Why there is nothing new to try any more."""
        trials = list(state.trials.values())
        self._sources = Counter(trial.source for trial in trials)
        self._strata_counts = counts_of(trials)
        self.newly_exhausted: list[str] = []
        """Strata of which that was found and is not yet journaled."""
        now = TrainConfig().model_dump()  # with fields that an older version's trials lack
        self._seen = {_key({**now, **trial.config}) for trial in trials}
        self._tried = {_params_key(trial.params) for trial in trials}
        self.study = StratifiedStudy(space, strata, self._make_study)
        self.study.restore(trials, [WarmTrial.from_event(event) for event in state.warm])

    def next(self, number: int) -> dict[str, Any] | None:
        """The fields of trial `number`'s `suggested` event; None: nothing new, see `exhausted`."""
        while (choice := self._choose(number)) is not None:
            source, stratum, point = choice
            suggestion = self.study.ask(
                number, stratum, point, is_new=lambda fields: self._is_new(number, fields)
            )
            if suggestion is not None:
                return self._event(number, source, stratum, suggestion)
            self.newly_exhausted.append(stratum)
        return None

    def _event(
        self, number: int, source: str, stratum: str, suggestion: Suggestion
    ) -> dict[str, Any]:
        failure = suggestion.failure
        try:
            fields = self._fields(number, suggestion.fields)
        except ValueError as error:
            failure = failure or str(error)
            fields = self._config.base_fields()
        self._seen.add(_key(fields))
        self._tried.add(_params_key(suggestion.params))
        self._sources[source] += 1
        if source != "enqueued":
            self._strata_counts[stratum] += 1
        event = asdict(suggestion)
        del event["fields"]
        rungs = self._state.header["rungs"]
        return {
            **event,
            "failure": failure,
            "config": fields,
            "default": source == "default",
            "source": source,
            "stratum": stratum,
            "bracket": bracket_of(self._config, rungs, number),
        }

    def refusal(self, params: Any) -> str | None:
        """Why a user cannot enqueue these parameters; None: they can."""
        if not isinstance(params, Mapping):
            return "an enqueued trial needs parameters"
        field = self._strata.field
        if field is not None and str(params.get(field)) not in self._strata.names():
            return f"the sweep is stratified: {field} must be one of {self._strata.names()}"
        try:
            check_point(self._space, params)
        except ValueError as error:
            return str(error)
        return None

    def _choose(self, number: int) -> tuple[str, str, Mapping[str, Any] | None] | None:
        """Source, stratum and given parameters of the next trial; None: see `exhausted`."""
        if self._state.enqueued:
            point = check_point(self._space, self._state.enqueued[0])
            return "enqueued", self._stratum_of(point), point
        done = self._state.exhausted.union(self.newly_exhausted)
        if done and not self._others_have_a_turn(done):
            where = "" if self._strata.field is None else f" of {', '.join(sorted(done))}"
            self.exhausted = f"the space{where} seems exhausted: draws repeat earlier trials"
            return None
        stratum = self._strata.next_name(self._strata_counts, self._config.seed, done)
        if number == 0 and self._defaults:
            stratum = self._default_stratum
        if self._defaults and not self._strata_counts[stratum]:
            return "default", stratum, self._defaults[stratum]
        points = self._config.points
        if self._sources["point"] < len(points):
            point = check_point(self._space, points[self._sources["point"]])
            return "point", self._stratum_of(point), point
        if self._config.sampler == "grid":
            untried = (each for each in self._grid if _params_key(each) not in self._tried)
            if (each := next(untried, None)) is not None:
                return "grid", self._stratum_of(each), each
            self.exhausted = f"all {len(self._grid)} points of the grid were tried"
            return None
        return "sampler", stratum, None

    def _others_have_a_turn(self, done: Collection[str]) -> bool:
        """Whether a stratum that is not `done` has fewer trials than its even share."""
        names = self._strata.names()
        enqueued = self._sources["enqueued"] + len(self._state.enqueued)
        share = (self._state.planned - enqueued) // len(names)
        return any(self._strata_counts[name] < share for name in names if name not in done)

    def _stratum_of(self, point: Mapping[str, Any]) -> str:
        return (
            self._strata.names()[0]
            if self._strata.field is None
            else str(point[self._strata.field])
        )

    def _default_of_each_stratum(
        self, defaults: Mapping[str, Any] | None
    ) -> dict[str, Mapping[str, Any]]:
        field = self._strata.field
        if defaults is None:
            return {}
        if field is None:
            return dict.fromkeys(self._strata.names(), defaults)
        base = parse_config(self._config.base_fields()).model_dump()
        fixed = {name: {field: self._strata.level(name)} for name in self._strata.names()}
        return {
            name: default_params(with_fixed(self._space, fixing), base)
            for name, fixing in fixed.items()
        }

    def _make_study(self, space: Space, stratum: str) -> Study:
        header, config = self._state.header, self._config
        return Study(
            f"{header['sweep_id']} {stratum}".strip(),
            space,
            sampler=config.sampler,
            modes=config.modes,
            seed=derived_seed(config.seed, 0, f"stratum {stratum}") if stratum else config.seed,
            objectives=config.objectives,
            rungs=(*header["rungs"], header["total_images"]),
        )

    def _fields(self, number: int, suggested: Mapping[str, Any]) -> dict[str, Any]:
        seed = derived_seed(self._config.seed, number, "trial")
        fields = {**self._config.base_fields(), "seed": seed, **suggested}
        return parse_config(fields).model_dump()

    def _is_new(self, number: int, suggested: dict[str, Any]) -> bool:
        try:
            return _key(self._fields(number, suggested)) not in self._seen
        except ValueError:
            return True  # it will fail, and say why


def _key(fields: Mapping[str, Any]) -> str:
    """What makes two configurations the same: all fields but the trial's seed."""
    return json.dumps({**fields, "seed": None}, sort_keys=True, default=str)


def _params_key(params: Mapping[str, Any]) -> str:
    return json.dumps(dict(params), sort_keys=True, default=str)
