"""The quick TPE against Optuna's own: the same suggestions, whatever has happened."""

import random
from typing import Any

import optuna
import pytest

from search.tpe import History, QuickTPE
from spaces import SPACES, Space, run_space

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


def stock(seed: int) -> optuna.samplers.TPESampler:
    return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=10
    )


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("space", [dynamic, *SPACES.values()])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_suggestions_are_those_of_optunas_own_sampler(space: Space, direction: str) -> None:
    """Four trials at a time end out of order in every state; the history is lost at times."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rng = random.Random(direction)
    studies = [optuna.create_study(direction=direction) for _ in range(2)]
    history, running, number = History(), [], 0
    while number < 60:
        if rng.random() < 0.02:
            history = History()
        if len(running) < 4 and rng.random() < 0.6:
            trials, drawn = [], []
            samplers = stock(number), QuickTPE(number, history)
            for study, sampler in zip(studies, samplers, strict=True):
                study.sampler = sampler
                trials.append(study.ask())
                run_space(space, trials[-1])
                drawn.append(study.get_trials(deepcopy=False)[number].system_attrs)
            assert trials[0].params == trials[1].params
            assert drawn[0] == drawn[1]
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
                if violated:
                    trial.set_constraint("diverged", 1.0)
                if state is not None:
                    complete = state == optuna.trial.TrialState.COMPLETE
                    study.tell(trial, value if complete else None, state=state)
            if state is not None:
                running.remove(trials)
