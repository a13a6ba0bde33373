"""One sweep as pandas frames: its columns, the names of how trials end, and its tables as files."""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pandas as pd

from analysis.spreadsheet import inert

UNFINISHED = "unfinished"
"""State of a trial without a final state: it runs, or its sweep was interrupted."""

FAILED_STATES = ("diverged", "oom", "error", "lost")

BY_COMMAND = "by_command"
COMMAND_REASON = "stopped by command"
"""The recorded reason of a trial in the state `pruned` that the user stopped, not the scheduler."""

ENDINGS = ("completed", "pruned", BY_COMMAND, UNFINISHED, *FAILED_STATES)
"""How a trial ended: its state, or BY_COMMAND."""

RUNG_METRICS = ("rung_cutoff", "rung_competitors", "rung_stop", "rung_pause")

TRIAL_COLUMNS = (
    *("number", "state", "ending", "reason", "is_default", "objective", "best_objective"),
    *("samples_seen", "mark", "wall_s", "images_per_s", "start", "end"),
    *("node", "seed", "rung", "audited", "bracket", "stratum", "pareto", "run_id"),
)
CURVE_COLUMNS = ("number", "metric", "samples_seen", "mark", "value", "time")
DECISION_COLUMNS = (
    "number",
    "mark",
    "samples_seen",
    "value",
    "cutoff",
    "competitors",
    "stop",
    "pause",
)


class SweepInfo(TypedDict):
    """What is known of a sweep as a whole; images are images of the train split."""

    name: str
    sweep_id: str
    run_id: str
    tracking_uri: str  # without user and password
    state: str  # running, finished or interrupted
    objective: str
    also: tuple[str, ...]  # further objectives
    also_modes: tuple[str, ...]  # max or min of each, empty where it was not recorded
    warm_start: dict[str, int]  # earlier sweep -> number of its trials taken over
    mode: str  # max or min
    total_images: int  # full resource of one trial
    train_images: int  # images an epoch
    val_images: int | None  # images behind the objective, None where it was not recorded
    rungs: tuple[int, ...]
    reduction: float | None
    slots: int | None  # trials at once
    wall_s: float | None  # driver's wall, without the pauses between interrupt and resume
    start: pd.Timestamp
    end: pd.Timestamp | None
    dataset: str
    space: str
    sampler: str
    scheduler: str
    versions: dict[str, str]
    commit: str | None
    config: dict[str, str]
    distributions: dict[str, str]  # searched parameter -> Optuna's JSON of its range
    several_ranges: NotRequired[tuple[str, ...]]  # whose range, the widest, is not each trial's


def _no_rows() -> pd.DataFrame:
    return pd.DataFrame(index=pd.Index([], name="number", dtype="int64"))


@dataclass(frozen=True)
class SweepFrames:
    """One sweep.

    `trials`: one row a trial, TRIAL_COLUMNS and one column `param.NAME` for each searched
    parameter (missing where a conditional parameter was not drawn, the text "None" where None was
    drawn), and `also.NAME` for each further objective. `ending` is one of ENDINGS, `objective` the
    last value reported, `rung` the images of the rung where the scheduler stopped the trial.
    `curves`: one row a trial, metric and report, CURVE_COLUMNS, in order of time.
    `decisions`: one row a trial and rung reached, DECISION_COLUMNS.
    `last`: by `number`, one float64 column a metric: its last value (missing: never reported).
    `fields`: by `number`, one column a field of the trainer's configuration, text as recorded.
    """

    info: SweepInfo
    trials: pd.DataFrame
    curves: pd.DataFrame
    decisions: pd.DataFrame
    last: pd.DataFrame = field(default_factory=_no_rows)
    fields: pd.DataFrame = field(default_factory=_no_rows)

    @property
    def parameters(self) -> list[str]:
        """Names of the searched parameters, first those that most trials have."""
        names = [str(name) for name in self.trials.columns if str(name).startswith("param.")]
        names.sort(key=lambda name: -len(self.trials[name].dropna()))
        return [name.removeprefix("param.") for name in names]


Format = Literal["parquet", "csv"]
TABLES = ("trials", "curves", "decisions", "last", "fields")


def write_frames(
    sweeps: Sequence[SweepFrames], folder: Path, format: Format = "parquet"
) -> dict[str, Path]:
    """Write TABLES of one or more sweeps into `folder`; returns their paths.

    Of several sweeps the first column is `sweep`, its name (with its id, where two have one name),
    and a column that one of them lacks is empty there. A parameter whose values are of several
    kinds is text. In CSV, text that a spreadsheet would compute begins with an apostrophe. Each
    file is there as a whole or not at all, and none before all are written.
    """
    tables = {name: _joined(sweeps, name) for name in TABLES}
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.{format}" for name in tables}
    mark = uuid.uuid4().hex[:8]
    beside = {name: folder / f".{name}.{mark}" for name in tables}
    try:
        for name, table in tables.items():
            if format == "parquet":
                table.to_parquet(beside[name], index=False)
            else:
                inert(table).to_csv(beside[name], index=False)
        for name, path in paths.items():
            os.replace(beside[name], path)
    finally:
        for left in beside.values():
            left.unlink(missing_ok=True)
    return paths


def _joined(sweeps: Sequence[SweepFrames], name: str) -> pd.DataFrame:
    parts = [getattr(frames, name).copy(deep=False) for frames in sweeps]
    if name in ("last", "fields"):
        parts = [part.reset_index() for part in parts]
    if len(parts) > 1:
        for part, label in zip(parts, _labels(sweeps), strict=True):
            part.insert(0, "sweep", [label] * len(part))
    joined: pd.DataFrame = pd.concat(parts, ignore_index=True)
    for column in joined.columns[joined.dtypes == "object"]:
        joined[column] = [_as_text(value) for value in joined[column]]
    return joined


def _labels(sweeps: Sequence[SweepFrames]) -> list[str]:
    names = Counter(frames.info["name"] for frames in sweeps)
    return [
        name if names[name] == 1 else f"{name} {frames.info['sweep_id']}"
        for frames in sweeps
        for name in [frames.info["name"]]
    ]


def _as_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return None if value is None or value is pd.NA or value != value else json.dumps(value)
