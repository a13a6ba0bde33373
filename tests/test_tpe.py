"""The TPE of rungs against Optuna's own, given its split of the trials and its groups."""

import math
import random
from typing import Any

import optuna
import pytest
from optuna.samplers._tpe import sampler as optunas
from optuna.search_space.group_decomposed import _SearchSpaceGroup
from optuna.trial import FrozenTrial, TrialState

from search.tpe import FAIR_SHARE, RANDOM_SHARE, History, RungTPE
from spaces import SPACES, Space, run_space
from tests.extent import long

RUNGS = (100, 300, 900)
STATES = [optuna.trial.TrialState[name] for name in ("COMPLETE", "PRUNED", "PRUNED", "FAIL")]


def dynamic(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Ranges and names that change from trial to trial, steps, choices of mixed types."""
    for layer in range(trial.suggest_int("layers", 1, 4)):
        trial.suggest_float(f"width{layer}", 0, 1 + trial.number % 3)
    if trial.suggest_categorical("kind", [None, True, 1.5, "x"]) == "x":
        trial.suggest_int("power", 1, 64, log=True)
        trial.suggest_float("share", 0, 1, step=0.25)
    trial.suggest_categorical("fixed", ["only"])
    return {}


def is_ranked(trial: FrozenTrial, rung: int) -> bool:
    failed = trial.state == TrialState.FAIL
    return rung in trial.intermediate_values and not (failed or trial.constraints)


def rung_of(trials: list[FrozenTrial]) -> int | None:
    ranked = {rung: sum(is_ranked(trial, rung) for trial in trials) for rung in RUNGS}
    failed = sum(bool(trial.constraints) for trial in trials)
    enough = [rung for rung in RUNGS if ranked[rung] >= 10]
    if ranked[RUNGS[0]] >= 3 and ranked[RUNGS[0]] + failed >= 10:
        enough.append(RUNGS[0])
    return max(enough, default=None)


class Oracle(optuna.samplers.TPESampler):
    """Optuna's sampler, with the rules of the module's text written out once more."""

    def __init__(self, seed: int, *, at_random: bool, as_far: bool) -> None:
        startup = 10**9 if at_random else 0
        super().__init__(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=startup
        )
        self.as_far = as_far

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
        self._search_space_group = _SearchSpaceGroup()
        for other in study.get_trials(deepcopy=False):
            known = other.intermediate_values or other.state in (
                TrialState.COMPLETE,
                TrialState.PRUNED,
            )
            if known and other.number != trial.number:
                self._search_space_group.add_distributions(other.distributions)
        spaces = self._search_space_group.search_spaces
        return {name: each for space in spaces for name, each in space.items()}

    def split(
        self, study: Any, trials: list[FrozenTrial], n_below: int
    ) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        rung = rung_of(trials)
        assert rung is not None
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        ranked = sorted(
            (trial for trial in trials if is_ranked(trial, rung)),
            key=lambda trial: (sign * trial.intermediate_values[rung], trial.number),
        )
        good = ranked[: min(25, max(3, math.ceil(0.15 * len(ranked))))]
        others = [trial for trial in trials if trial not in good]
        if self.as_far:
            others = [
                trial
                for trial in others
                if trial in ranked
                or trial.constraints
                or (trial.state == TrialState.RUNNING and not trial.intermediate_values)
            ]
        return [trial for trial in trials if trial in good], others


SEARCHED = [
    dynamic,
    SPACES["losses"],
    *(pytest.param(space, marks=long) for name, space in SPACES.items() if name != "losses"),
]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("space", SEARCHED)
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_suggestions_are_optunas_own_for_these_good_and_other_trials(
    space: Space, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four trials at a time end out of order in every state; the history is lost at times."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rng = random.Random(direction)
    studies = [optuna.create_study(direction=direction) for _ in range(2)]
    history, running, number, kinds = History(RUNGS), [], 0, set()
    while number < 60:
        if rng.random() < 0.02:
            history = History(RUNGS)
        if len(running) < 4 and rng.random() < 0.6:
            ours = RungTPE(number, history)
            studies[0].sampler = ours
            trials = [studies[0].ask()]
            run_space(space, trials[0])
            trials_known = studies[0].get_trials(deepcopy=False)[:-1]
            assert history.rung == rung_of(trials_known)
            if history.rung is None:
                assert ours._at_random
            oracle = Oracle(number, at_random=ours._at_random, as_far=ours._as_far)
            monkeypatch.setattr(optunas, "_split_trials", oracle.split)
            studies[1].sampler = oracle
            trials.append(studies[1].ask())
            run_space(space, trials[1])
            assert trials[0].params == trials[1].params
            drawn = [study.get_trials(deepcopy=False)[number].system_attrs for study in studies]
            assert drawn[0] == drawn[1]
            kinds.add((ours._at_random, ours._as_far))
            running.append(trials)
            number += 1
        elif running:
            trials = running[rng.randrange(len(running))]
            value, step = round(rng.random(), 1), rng.choice([100, 300])
            state = rng.choice(STATES) if rng.random() < 0.5 else None
            violated = state == optuna.trial.TrialState.PRUNED and rng.random() < 0.2
            for study, trial in zip(studies, trials, strict=True):
                known = study.get_trials(deepcopy=False)[trial.number].intermediate_values
                if state is None and step not in known:
                    trial.report(value, step)
                if state == TrialState.COMPLETE:
                    trial.report(value, 900)
                if violated:
                    trial.set_constraint("diverged", 1.0)
                if state is not None:
                    complete = state == optuna.trial.TrialState.COMPLETE
                    study.tell(trial, value if complete else None, state=state)
            if state is not None:
                running.remove(trials)
    assert {(False, False), (False, True)} <= kinds


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_one_suggestion_in_ten_is_random_and_of_the_others_most_compare_equals() -> None:
    samplers = [RungTPE(seed, History(RUNGS)) for seed in range(2000)]
    at_random = sum(each._at_random for each in samplers) / 2000
    as_far = sum(each._as_far and not each._at_random for each in samplers) / 2000
    assert at_random == pytest.approx(RANDOM_SHARE, abs=0.03)
    assert as_far == pytest.approx((1 - RANDOM_SHARE) * FAIR_SHARE, abs=0.04)


def test_what_was_stopped_before_the_rung_counts_only_where_all_others_do() -> None:
    """Ten trials got to 300 images, five were stopped at 100, one runs, one diverged."""
    study = optuna.create_study(direction="maximize")
    history = History(RUNGS)
    for number in range(17):
        trial = study.ask()
        trial.suggest_float("lr", 0, 1)
        if number < 16:
            trial.report(number / 100, 100)
        if number < 10:
            trial.report(1 - number / 100, 300)
        if number == 15:
            trial.set_constraint("diverged", 1.0)
        if number not in (3, 16):
            study.tell(trial, state=TrialState.PRUNED)
    history.update(study, 99, lambda trial, study: trial.params)
    assert history.rung == 300
    good, others = (list(each) for each in history.split(as_far=True))
    assert (good, others) == ([0, 1, 2], [3, 4, 5, 6, 7, 8, 9, 15, 16])
    good, others = (list(each) for each in history.split(as_far=False))
    assert (good, others) == ([0, 1, 2], list(range(3, 17)))
