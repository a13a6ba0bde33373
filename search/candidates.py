"""Which configurations of a sweep are confirmed, and the plan of the sweep that does so.

`plan_confirmation` gives the configuration of a new one, or the folder of one that was begun alike
and is unfinished. Nothing is written, and no trial is touched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FixedTrial

from search.asha import score_of
from search.config import SHARED_FIELDS, SweepConfig, parse_sweep
from search.confirmation import FOLDER, MOST_TRIALS, NO_LABELS, SPACE, Candidate, Confirmation
from search.confirmed import confirmations
from search.folders import is_running
from search.journal import FILE_NAME, load_state
from search.objectives import LABEL_FREE, OF_ADAPTATION
from search.plan import SPACE_COPY
from search.provenance import held_in_memory
from search.run import Sweep
from search.seeds import derived_seed
from search.state import SweepState, TrialState
from search.storage import joined
from search.user_files import check_loss_files, from_json, with_copied_loss
from spaces import Space, default_params, load_space, run_space, with_fixed
from trainer.config import TrainConfig, parse_config

DEFAULT, NONE = "default", "none"
OBJECTIVE = "knn_top1"
"""Judges where the sweep's own objective needs no labels."""


@dataclass(frozen=True)
class Wish:
    """What the user asks for. `baseline`: default, none, or a trial's number."""

    top: int = 3
    seeds: int = 5
    epochs: float | None = None
    baseline: str = DEFAULT
    again: bool = False
    address: str | None = None


@dataclass(frozen=True)
class ConfirmationPlan:
    """The sweep that confirms another: a new one, or with `resumes` one that goes on."""

    config: SweepConfig
    resumes: Path | None = None
    notes: tuple[str, ...] = ()


def plan_confirmation(sweep: Sweep, wish: Wish, recorded: int = 0) -> ConfirmationPlan:
    """Choose candidates and seeds; ValueError where the sweep has nothing to confirm.

    Also where it still runs, where an earlier confirmation is unfinished that was to be another
    one, and where there is a finished one and `again` is not wished. `recorded`: how many
    confirmations MLflow knows, of which folders may be gone.
    """
    if sweep.config.confirmation is not None:
        raise ValueError(f"{sweep.dir} is a confirmation itself; confirm its sweep")
    if sweep.config.objective in OF_ADAPTATION:
        raise ValueError(
            f"{sweep.dir} searched for {sweep.config.objective}, and encoders are confirmed before "
            "they are adapted; 'contrasweep adapt' measures one with its labels, on test"
        )
    if is_running(sweep.dir):
        raise ValueError(
            f"the sweep {sweep.dir} runs, and its best trials may still change; wait for its end, "
            f"or stop it by 'contrasweep stop {sweep.dir}'"
        )
    state = load_state(sweep.dir / FILE_NAME)
    if not (state.header["data"].get("bank", 1) and state.header["data"]["test"]):
        raise ValueError(NO_LABELS.format(state.header["data"]["name"]))
    if (wish.top + 1) * wish.seeds > MOST_TRIALS:
        raise ValueError(
            f"--top {wish.top} with --seeds {wish.seeds} and a baseline are more than "
            f"{MOST_TRIALS:,} trainings; confirm fewer"
        )
    begun = confirmations(sweep.dir)
    unfinished = [number for number, path in begun.items() if not _is_finished(path)]
    if wish.again:  # beside what will not be finished
        unfinished = []
    used = max([*begun, recorded])
    ordinal = unfinished[-1] if unfinished else used + 1
    candidates, notes = _candidates(sweep, state, wish)
    config = _configuration(sweep, state, wish, candidates, ordinal)
    if unfinished:
        return _continued(begun[ordinal], config, notes)
    if used and not wish.again:
        raise ValueError(
            f"the sweep {sweep.dir} is confirmed already; 'contrasweep report {sweep.dir}' tells "
            "what was found. --again uses the test split once more, and is marked as such"
        )
    if used:
        notes.append(f"the test split was used {used} times before, which the record says")
    return ConfirmationPlan(config, notes=tuple(notes))


def _is_finished(directory: Path) -> bool:
    ended = load_state(directory / FILE_NAME).ended
    return ended is not None and ended["state"] == "finished"


def _continued(directory: Path, config: SweepConfig, notes: list[str]) -> ConfirmationPlan:
    begun = parse_sweep(load_state(directory / FILE_NAME).header["config"])
    if _plan_of(begun) != _plan_of(config):
        raise ValueError(
            f"{directory} is unfinished and was to be another one (other candidates, seeds or "
            f"epochs); end it first by 'contrasweep resume {directory}', or begin another beside "
            "it with --again"
        )
    note = f"goes on with {directory}"
    return ConfirmationPlan(begun, resumes=directory, notes=(*notes, note))


def _plan_of(config: SweepConfig) -> Any:
    """What tells confirmations apart; a newer version may give candidates further fields."""
    assert config.confirmation is not None
    who = {"name", "trial", "top", "baseline"}
    candidates = [each.model_dump(include=who) for each in config.confirmation.candidates]
    return candidates, config.confirmation.seeds, config.epochs


def _configuration(
    sweep: Sweep, state: SweepState, wish: Wish, candidates: list[Candidate], ordinal: int
) -> SweepConfig:
    """The sweep's own configuration, but for what is searched, and how."""
    config, header = sweep.config, state.header
    seeds = [derived_seed(config.seed, n, f"confirm {ordinal}") for n in range(wish.seeds)]
    confirmation = Confirmation(
        sweep_id=header["sweep_id"],
        sweep=str(header["config"]["name"]),
        ordinal=ordinal,
        data_digest=header["data"]["digest"],
        searched_images=header["total_images"],
        candidates=tuple(candidates),
        seeds=tuple(seeds),
    )
    storage = config.storage and joined(config.storage, str(header["config"]["name"]))
    in_memory = held_in_memory(header["data"]) if config.in_memory == "auto" else config.in_memory
    kept = (
        *("dataset", "labelled", "data_dir", "train_limit", "val_limit", "test_limit", "seed"),
        *("report_every", "cpus_per_trial", "gpus_per_trial", "max_concurrent"),
        *("memory_per_trial", "failures_alike", "node_cache", "offline_tracking"),
    )
    return parse_sweep(
        {
            **{name: getattr(config, name) for name in kept},
            "name": f"{FOLDER}{ordinal}",
            "out": str(sweep.dir),
            "space": SPACE,
            "fixed": {k: v for k, v in config.fixed.items() if k in SHARED_FIELDS},
            "in_memory": in_memory,
            "trials": confirmation.trials,
            "epochs": wish.epochs or config.epochs,
            "default_trial": False,
            "sampler": "grid",
            "grid_points": max(2, wish.seeds),
            "scheduler": "none",
            "objective": _objective(config),
            "keep_checkpoints": confirmation.trials,
            "pictures": False,
            "address": config.address if wish.address is None else wish.address,
            "storage": storage,
            "tracking_uri": config.tracking_uri,
            "confirmation": confirmation.model_dump(),
        }
    )


def _objective(config: SweepConfig) -> str:
    return OBJECTIVE if config.objective in LABEL_FREE else config.objective


def _candidates(sweep: Sweep, state: SweepState, wish: Wish) -> tuple[list[Candidate], list[str]]:
    """The best completed trials, each configuration once, and the baseline; notes for the user."""
    objective, own = _objective(sweep.config), sweep.config.objective
    completed = [
        trial
        for trial in state.trials.values()
        if trial.state == "completed" and None not in trial.values((objective, own))
    ]
    if not completed:
        raise ValueError(
            f"{sweep.dir} has no completed trial with a value of {objective}, so there is nothing "
            f"to confirm; go on with 'contrasweep resume {sweep.dir}'"
        )
    completed.sort(key=lambda t: (-score_of(t.value(own), sweep.config.mode), t.number))
    found: dict[str, Candidate] = {}
    for trial in completed:
        each = _candidate(sweep, state, trial, f"trial {trial.number}", top=True)
        found.setdefault(_key(each), each)
        if len(found) == wish.top:
            break
    notes = []
    if len(found) < wish.top:
        notes.append(f"only {len(found)} different configurations were completed; all are taken")
    base = _baseline(sweep, state, wish.baseline)
    if base is not None:
        known = found.get(_key(base))
        if known is not None:
            notes.append(f"the baseline, {base.name}, is {known.name}, one of the best")
        found[_key(base)] = (known or base).model_copy(update={"baseline": True})
    return list(found.values()), notes


def _baseline(sweep: Sweep, state: SweepState, asked: str) -> Candidate | None:
    if asked == NONE:
        return None
    if asked != DEFAULT:
        if not asked.isdecimal() or int(asked) not in state.trials:
            raise ValueError(
                f"--baseline must be default, none or a trial's number (0 to "
                f"{max(state.trials)}), got {asked}"
            )
        return _candidate(sweep, state, state.trials[int(asked)], f"trial {int(asked)}")
    default = next((t for t in state.trials.values() if t.is_default and not t.failure), None)
    if default is not None:
        return _candidate(sweep, state, default, DEFAULT)
    shared = sweep.config.base_fields()
    space = with_fixed(_space(sweep), shared)
    params = default_params(space, parse_config(shared).model_dump())
    fields = {**shared, **run_space(space, FixedTrial(params))}
    return _of(_with_kept_loss(sweep, state, fields), name=DEFAULT, params=params)


def _candidate(
    sweep: Sweep, state: SweepState, trial: TrialState, name: str, *, top: bool = False
) -> Candidate:
    config = _with_kept_loss(sweep, state, trial.config)
    value = trial.value(_objective(sweep.config))
    done = trial.state == "completed"  # else it is that of fewer images
    found = _of(config, name=name, params=trial.params)
    return found.model_copy(
        update={"trial": trial.number, "top": top, "searched_value": value if done else None}
    )


def _with_kept_loss(sweep: Sweep, state: SweepState, fields: dict[str, Any]) -> TrainConfig:
    """A configuration, with a loss of the user's from the copy that the sweep used."""
    files = from_json(state.header.get("loss_files", []))
    check_loss_files(files, sweep.dir, originals=False)
    return with_copied_loss(parse_config(fields), files, sweep.dir)


def _of(config: TrainConfig, *, name: str, params: dict[str, Any]) -> Candidate:
    """All that the configuration sets but what its sweep shares, and the seed."""
    left_out = {*SHARED_FIELDS, "seed"}
    return Candidate(
        name=name,
        trial=None,
        top=False,
        baseline=False,
        searched_value=None,
        params=params,
        fields={k: v for k, v in config.model_dump().items() if k not in left_out},
    )


def _space(sweep: Sweep) -> Space:
    """The sweep's own space, from its copy where that is a file of the user's."""
    copy = sweep.dir / SPACE_COPY
    if not copy.exists():
        return load_space(sweep.config.space)
    return load_space(f"{copy}:{sweep.config.space.rpartition(':')[2]}")


def _key(candidate: Candidate) -> str:
    return json.dumps(candidate.fields, sort_keys=True, default=str)
