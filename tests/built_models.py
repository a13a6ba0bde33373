"""Sweeps and confirmations with real checkpoints, written as their drivers write them, no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search.config import SweepConfig, write_atomically
from search.confirmation import Candidate, Confirmation, packed
from search.journal import FILE_NAME, Journal
from search.provenance import describe_data
from trainer.checkpoint import save_checkpoint
from trainer.config import TrainConfig
from trainer.datasets import DataSplits, load_for
from trainer.loop import Trainer

MARK = 100
FIELDS: dict[str, Any] = {
    "image_size": 8,
    "train_limit": 100,
    "val_limit": 40,
    "test_limit": 30,
    "batch_size": 32,
    "epochs": 1.0,
}
METRICS = ("knn_top1", "linear_top1", "test_knn_top1", "test_linear_top1")


def small_data() -> DataSplits:
    """A hundred digits of 8 pixels."""
    return load_for(TrainConfig(**FIELDS))


def plan(name: str, out: Path, **changes: Any) -> SweepConfig:
    """A sweep of those digits."""
    fields = {"trials": 6, "epochs": 1.0, "scheduler": "none", "sampler": "random"}
    limits = {key: FIELDS[key] for key in ("train_limit", "val_limit", "test_limit")}
    fixed = {"image_size": FIELDS["image_size"], "batch_size": FIELDS["batch_size"]}
    given = {"name": name, "out": str(out), **fields, **limits, "fixed": fixed, **changes}
    return SweepConfig.model_validate(given)


def begin(
    config: SweepConfig,
    data: DataSplits,
    *,
    described: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Journal:
    """The sweep's folder, with a journal that has begun; `described`: what it says of the data."""
    folder = Path(config.out) / str(config.name)
    folder.mkdir(parents=True)
    write_atomically(folder / "sweep.yaml", config.to_yaml({}))
    journal = Journal.create(folder / FILE_NAME, durable=False)
    journal.append(
        "sweep_started",
        **{
            "schema": 1,
            "sweep_id": f"id-{config.name}",
            "config": config.model_dump(),
            "mode": config.mode,
            "total_images": MARK,
            "marks": [MARK],
            "rungs": [],
            "slots": 1,
            "planned": config.trials,
            "data": described or describe_data(data),
            "space_sha256": None,
            "loss_files": [],
            "versions": {"torch": "2.15.0", "<b>contrasweep</b>": "0.1.0"},
            "git_commit": "c0ffee",
            "tracking": "embedded",
            **changes,
        },
    )
    return journal


def add_trial(
    journal: Journal,
    data: DataSplits,
    value: float,
    *,
    state: str | None = "completed",
    kept: bool = True,
    params: Mapping[str, Any] | None = None,
    right: bool = False,
    **fields: Any,
) -> int:
    """One more trial, with the checkpoint of a trainer that has made its first weights."""
    number = len(journal.state.trials)
    config = TrainConfig(**{**FIELDS, "seed": number, **fields})
    params = dict(params or {"lr": config.lr})
    journal.append(
        "suggested", number=number, params=params, distributions={}, system_attrs={},
        config=config.model_dump(), default=number == 0,
    )  # fmt: skip
    correct = {}
    if right:
        rng = np.random.default_rng(number)
        sizes = [len(data.test if name.startswith("test_") else data.val) for name in METRICS]
        drawn = {n: rng.random(s) < value for n, s in zip(METRICS, sizes, strict=True)}
        correct = {"correct": {name: packed(each) for name, each in drawn.items()}}
    journal.append(
        "report", number=number, mark=MARK, samples_seen=MARK + 1,
        metrics={"knn_top1": value, "linear_top1": value / 2, "train_loss": 1.0},
        decision={"stop": False, "rung": None, "cutoff": None, "competitors": 0}, **correct,
    )  # fmt: skip
    if kept:
        place = f"trials/{number}/checkpoint_{MARK}"
        path = journal.path.parent / place / "checkpoint.pt"
        save_checkpoint(path, Trainer(config, data).state_dict(), config, MARK)
        journal.append("checkpoint", number=number, path=place, mark=MARK)
    if state is not None:
        journal.append("finished", number=number, state=state, reason="", mark=MARK)
    return number


def end(journal: Journal) -> None:
    """The sweep's end."""
    journal.append("sweep_finished", state="finished", reason="", why="")


def built_sweep(out: Path, data: DataSplits, name: str = "cifar", **changes: Any) -> Path:
    """Trial 0 was completed and dropped, 1 is the best, 2 was pruned, 3 has not ended."""
    journal = begin(plan(name, out), data, **changes)
    add_trial(journal, data, 0.5, kept=False)
    add_trial(journal, data, 0.8)
    add_trial(journal, data, 0.9, state="pruned")
    add_trial(journal, data, 0.7, state=None)
    end(journal)
    return journal.path.parent


TRAININGS = (("default", 0, 0.9), ("trial 1", 0, 0.7), ("trial 1", 1, 0.75), ("default", 1, 0.3))


def built_confirmation(
    sweep: Path,
    data: DataSplits,
    trainings: Sequence[tuple[str, int, float]] = TRAININGS,
    *,
    ends: bool = True,
) -> Path:
    """Trial 1 and the default with two seeds each; trial 1 is the better, its second seed best.

    Others by `trainings`: candidate, repeat and accuracy.
    """
    candidates = [
        Candidate(
            name=name, trial=trial, top=top, baseline=not top, searched_value=searched,
            params={}, fields={},
        )
        for name, trial, top, searched in (("trial 1", 1, True, 0.8), ("default", 0, False, 0.5))
    ]  # fmt: skip
    confirmation = Confirmation(
        sweep_id=f"id-{sweep.name}",
        sweep=sweep.name,
        ordinal=1,
        data_digest=describe_data(data)["digest"],
        candidates=tuple(candidates),
        seeds=tuple(range(11, 12 + max(1, *(repeat for _, repeat, _ in trainings)))),
    )
    more = {"space": "confirm", "trials": len(trainings), "default_trial": False, "sampler": "grid"}
    config = plan("confirm-1", sweep, **more, confirmation=confirmation.model_dump())
    journal = begin(config, data, sweep_id=f"id-{sweep.name}-confirm-1")
    for name, repeat, value in trainings:
        params = {"candidate": name, "repeat": repeat}
        add_trial(journal, data, value, params=params, right=True)
    if ends:
        end(journal)
    return journal.path.parent
