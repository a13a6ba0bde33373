"""What a confirmation found, from its journal: the record for MLflow, and the winner to be used.

The winner: eligible are the sweep's best configurations with at least two completed seeds, and of
these those with the most completed seeds; if none has two, those with the most. Of them it is the
one with the best mean of the objective on val over its seeds, so that one lucky seed does not win.
Without a completed seed of any of them it is the baseline. Test has no part in that choice. The
statistics are `analysis.confirmation`'s.
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
LEAST_SEEDS = 2
"""Completed ones of a winner that is confirmed."""


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
    """Of a sweep's latest finished confirmation; None if there is none, or nothing came of it.

    Nothing came of one whose winner has fewer than two completed seeds.
    """
    for directory in reversed(confirmations(sweep_dir).values()):
        state = load_state(directory / FILE_NAME)
        config = SweepConfig.model_validate(state.header["config"])
        if state.ended is None or state.ended["state"] != "finished" or not config.confirmation:
            continue
        found = confirmed_model(directory, state, config)
        if found is not None:
            return found
    return None


def confirmed_model(
    directory: Path, state: SweepState, config: SweepConfig
) -> ConfirmedModel | None:
    """A confirmation's winner; None without one, and with fewer than two completed seeds of it."""
    assert config.confirmation is not None
    best = winner(state, config)
    if best is None:
        return None
    candidate = str(best.params["candidate"])
    if len(_completed(state, config)[candidate]) < LEAST_SEEDS:
        return None
    record = to_record(state, config.confirmation)
    return ConfirmedModel(directory, best.number, candidate, record)


def winner(state: SweepState, config: SweepConfig) -> TrialState | None:
    """The best trial on val of the winning candidate; see above for which that is."""
    assert config.confirmation is not None
    completed = _completed(state, config)
    tops = [each.name for each in config.confirmation.candidates if each.top]
    names = [name for name in tops if name in completed] or list(completed)
    if not names:
        return None
    most = max(len(completed[name]) for name in names)
    eligible = [name for name in names if len(completed[name]) == most]
    best = max(eligible, key=lambda name: fmean(score for score, _ in completed[name].values()))
    return max(completed[best].values(), key=lambda each: (each[0], -each[1].number))[1]


def _completed(
    state: SweepState, config: SweepConfig
) -> dict[str, dict[int, tuple[float, TrialState]]]:
    """Candidate -> repeat -> the objective, as a score, of the completed trial, and that trial."""
    found: dict[str, dict[int, tuple[float, TrialState]]] = {}
    for _, trial in sorted(state.trials.items()):
        value = trial.value(config.objective)
        if trial.state == "completed" and value is not None:
            seeds = found.setdefault(str(trial.params["candidate"]), {})
            seeds[int(trial.params["repeat"])] = (score_of(value, config.mode), trial)
    return found


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
        # the full resource, in images, of the search's trials (None: not known) and of these
        "searched_images": confirmation.searched_images,
        "total_images": state.header["total_images"],
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
