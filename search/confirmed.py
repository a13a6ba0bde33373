"""What a confirmation found, from its journal: the record for MLflow, and the winner to be used.

The winner is the candidate with the best mean of the objective on val over the fresh seeds, of
the sweep's best ones; test has no part in the choice. The statistics are `analysis.confirmation`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from search.asha import score_of
from search.config import SweepConfig
from search.confirmation import FOLDER, SCHEMA, Confirmation
from search.journal import FILE_NAME, load_state
from search.state import SweepState, TrialState

ARTIFACT = "confirmation.json"


@dataclass(frozen=True)
class ConfirmedModel:
    """A confirmed winner's best encoder: trial `trial` of the confirmation in `directory`."""

    directory: Path
    trial: int
    candidate: str
    record: dict[str, Any]
    """`to_record` of the confirmation."""


def confirmations(sweep_dir: Path) -> dict[int, Path]:
    """A sweep's confirmations, number -> folder, in the order in which they were begun."""
    numbered = {}
    for path in sweep_dir.glob(f"{FOLDER}*"):
        number = path.name.removeprefix(FOLDER)
        if number.isdecimal() and (path / FILE_NAME).is_file():
            numbered[int(number)] = path
    return dict(sorted(numbered.items()))


def confirmed_winner(sweep_dir: Path) -> ConfirmedModel | None:
    """Of a sweep's latest finished confirmation; None if there is none, or nothing came of it."""
    for directory in reversed(confirmations(sweep_dir).values()):
        state = load_state(directory / FILE_NAME)
        config = SweepConfig.model_validate(state.header["config"])
        if state.ended is None or state.ended["state"] != "finished" or not config.confirmation:
            continue
        best = winner(state, config)
        if best is None:
            continue
        record = to_record(state, config.confirmation)
        return ConfirmedModel(directory, best.number, str(best.params["candidate"]), record)
    return None


def winner(state: SweepState, config: SweepConfig) -> TrialState | None:
    """The best trial on val of the winning candidate, that which is best in the mean of its seeds.

    Without one among the sweep's best, the baseline wins.
    """
    assert config.confirmation is not None
    values: dict[str, list[tuple[float, TrialState]]] = {}
    for trial in state.trials.values():
        value = trial.value(config.objective)
        if trial.state == "completed" and value is not None:
            score = score_of(value, config.mode)
            values.setdefault(str(trial.params["candidate"]), []).append((score, trial))
    tops = [each.name for each in config.confirmation.candidates if each.top]
    names = [name for name in tops if name in values] or list(values)
    if not names:
        return None
    best = max(names, key=lambda name: fmean(score for score, _ in values[name]))
    return max(values[best], key=lambda each: (each[0], -each[1].number))[1]


def to_record(state: SweepState, confirmation: Confirmation) -> dict[str, Any]:
    """`confirmation.json`: candidates, seeds and every answer, for whoever reads MLflow alone."""
    config, data = state.header["config"], state.header["data"]
    return {
        "schema": SCHEMA,
        "sweep_id": confirmation.sweep_id,
        "sweep": confirmation.sweep,
        "ordinal": confirmation.ordinal,
        "objective": config["objective"],
        "mode": state.header["mode"],
        "epochs": config["epochs"],
        "seeds": list(confirmation.seeds),
        "val_images": data["val"],
        "test_images": data["test"],
        "candidates": [
            each.model_dump(exclude={"fields"}) | {"config": each.fields}
            for each in confirmation.candidates
        ],
        "trials": [
            {
                "number": trial.number,
                "candidate": trial.params["candidate"],
                "repeat": trial.params["repeat"],
                "state": trial.state or "unfinished",
                **_correct(trial),
            }
            for trial in state.trials.values()
            if "candidate" in trial.params
        ],
    }


def _correct(trial: TrialState) -> dict[str, Any]:
    last = trial.last_report
    return {"correct": last["correct"]} if last is not None and "correct" in last else {}
