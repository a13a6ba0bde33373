"""MLflow -> tidy frames: one sweep as `SweepFrames`. The only reader of the store.

The tags, parameters and metrics read here are the ones that the recorder of sweeps writes:
one parent run a sweep, one child run a trial, metrics at step = images seen. Only MLflow's
public client is used, one request a trial and metric; artifacts are not read.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.frames import (
    BY_COMMAND,
    COMMAND_REASON,
    CURVE_COLUMNS,
    DECISION_COLUMNS,
    ENDINGS,
    FAILED_STATES,
    RUNG_METRICS,
    TRIAL_COLUMNS,
    UNFINISHED,
    SweepFrames,
    SweepInfo,
)
from analysis.store import (
    EXPERIMENT,
    TAG,
    connect,
    first_line,
    search,
    store_errors,
    without_credentials,
)

__all__ = [
    "BY_COMMAND",
    "COMMAND_REASON",
    "CURVE_COLUMNS",
    "DECISION_COLUMNS",
    "ENDINGS",
    "FAILED_STATES",
    "RUNG_METRICS",
    "TRIAL_COLUMNS",
    "UNFINISHED",
    "SweepFrames",
    "SweepInfo",
    "load_sweep",
]


def load_sweep(
    tracking_uri: str,
    name: str,
    *,
    sweep_id: str | None = None,
    metrics: Iterable[str] | None = None,
) -> SweepFrames:
    """Read a sweep by its name; of several with one name the newest, or the one of `sweep_id`.

    `metrics` limits the learning curves to these and the objective (None: every metric; about
    a millisecond a trial and metric); the report's page needs none beside the objective.
    Raises ValueError, in one line, for a store that cannot be read and for a sweep that is not
    in it.
    """
    shown = without_credentials(tracking_uri)
    client = connect(tracking_uri)
    wanted = None if metrics is None else frozenset(metrics)
    try:
        parent = _find_parent(client, shown, name, sweep_id)
        info = _sweep_info(parent, shown)
        runs = search(client, [parent.info.experiment_id], "trial", info["sweep_id"])
        by_number = {int(run.data.tags[TAG + "number"]): run for run in runs}
        histories = {
            number: _histories(client, run, info["objective"], wanted)
            for number, run in sorted(by_number.items())
        }
    except store_errors() as error:
        raise ValueError(f"cannot read tracking store {shown}: {first_line(error)}") from None
    except KeyError as error:
        raise ValueError(f"sweep {name!r}: its records lack the tag {error}") from None
    for run in by_number.values():
        info["distributions"].update(_json_tag(run, "distributions", {}))

    curves = _curves_frame(histories)
    ordered = [by_number[number] for number in histories]
    trials = _trials_frame(ordered, info, curves)
    decisions = _decisions_frame(histories, info)
    numbers = pd.Index(list(histories), name="number", dtype="int64")
    return SweepFrames(
        info,
        trials,
        curves,
        decisions,
        _last_frame(ordered, numbers),
        _fields_frame(ordered, numbers),
    )


def _find_parent(client: Any, uri: str, name: str, sweep_id: str | None) -> Any:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    parents = [] if experiment is None else search(client, [experiment.experiment_id], "sweep")
    for parent in parents:  # whatever its folder is called by now
        if sweep_id is not None and parent.data.tags.get(TAG + "sweep_id") == sweep_id:
            return parent
    names = sorted({parent.data.tags.get(TAG + "sweep", "") for parent in parents})
    named = [parent for parent in parents if parent.data.tags.get(TAG + "sweep") == name]
    if not named:
        there = f"sweeps there: {', '.join(names)}" if names else "it holds no sweep"
        raise ValueError(f"no sweep {name!r} in {uri}; {there}")
    if sweep_id is None:
        return named[-1]
    ids = ", ".join(parent.data.tags.get(TAG + "sweep_id", "?") for parent in named)
    raise ValueError(f"no sweep {name!r} with id {sweep_id!r} in {uri}; ids of that name: {ids}")


def _json_tag(run: Any, tag: str, default: Any) -> Any:
    text = run.data.tags.get(TAG + tag)
    if text is None:
        return default
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        message = f"run {run.info.run_id}: tag {TAG}{tag} must be JSON, got {text[:80]!r}"
        raise ValueError(message) from None


def _number_tag(tags: Mapping[str, str], tag: str) -> float | None:
    try:
        value = float(tags[TAG + tag])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _timestamp(milliseconds: int | None) -> pd.Timestamp | None:
    return None if milliseconds is None else pd.Timestamp(milliseconds, unit="ms", tz="UTC")


def _sweep_info(parent: Any, tracking_uri: str) -> SweepInfo:
    tags = parent.data.tags
    version = TAG + "version."
    start = _timestamp(parent.info.start_time)
    assert start is not None
    return SweepInfo(
        name=tags[TAG + "sweep"],
        sweep_id=tags[TAG + "sweep_id"],
        run_id=parent.info.run_id,
        tracking_uri=tracking_uri,
        state=tags.get(TAG + "state", "interrupted"),
        objective=tags[TAG + "objective"],
        also=tuple(_json_tag(parent, "also", [])),
        also_modes=tuple(_json_tag(parent, "also_modes", [])),
        warm_start=_json_tag(parent, "warm_start", {}),
        mode=tags[TAG + "mode"],
        total_images=int(tags[TAG + "total_images"]),
        train_images=int(tags[TAG + "train_images"]),
        val_images=_whole(_number_tag(tags, "val_images")),
        rungs=tuple(int(rung) for rung in _json_tag(parent, "rungs", [])),
        reduction=_number_tag(tags, "reduction"),
        slots=_whole(_number_tag(tags, "slots")),
        wall_s=_number_tag(tags, "wall_s"),
        start=start,
        end=_timestamp(parent.info.end_time),
        dataset=tags.get(TAG + "dataset", ""),
        space=tags.get(TAG + "space", ""),
        sampler=tags.get(TAG + "sampler", ""),
        scheduler=tags.get(TAG + "scheduler", ""),
        versions={
            key.removeprefix(version): tags[key] for key in sorted(tags) if key.startswith(version)
        },
        commit=tags.get("mlflow.source.git.commit"),
        config=dict(sorted(parent.data.params.items())),
        distributions={},
    )


Point = tuple[int, int, float]  # samples_seen, time in ms, value


def _histories(
    client: Any, run: Any, objective: str, wanted: frozenset[str] | None
) -> dict[str, list[Point]]:
    """Metric -> its points by time. Two marks within one batch share a step, not a time."""
    needed = {objective, "mark", *RUNG_METRICS}
    histories: dict[str, list[Point]] = {}
    for metric in sorted(run.data.metrics):
        if wanted is None or metric in wanted or metric in needed:
            points = client.get_metric_history(run.info.run_id, metric)
            histories[metric] = sorted(
                {
                    (p.step, p.timestamp): (p.step, p.timestamp, _unclipped(p.value))
                    for p in points
                }.values(),
                key=lambda point: (point[1], point[0]),
            )
    return histories


def _unclipped(value: float) -> float:
    """SQL stores keep an infinity as the largest float."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else float(value)


def _curves_frame(histories: Mapping[int, Mapping[str, list[Point]]]) -> pd.DataFrame:
    rows = []
    for number, metrics in histories.items():
        marks = {(step, t): int(value) for step, t, value in metrics.get("mark", [])}
        for metric, points in metrics.items():
            if metric == "mark" or metric in RUNG_METRICS:
                continue
            rows += [
                (number, metric, step, marks.get((step, t), step), v, t) for step, t, v in points
            ]
    frame = pd.DataFrame(rows, columns=list(CURVE_COLUMNS)).astype(
        {"number": "int64", "samples_seen": "int64", "mark": "int64", "value": "float64"}
    )
    frame["time"] = pd.to_datetime(frame["time"], unit="ms", utc=True)
    return frame.sort_values(["time", "number", "samples_seen", "metric"], ignore_index=True)


def _decisions_frame(
    histories: Mapping[int, Mapping[str, list[Point]]], info: SweepInfo
) -> pd.DataFrame:
    rows = []
    for number, metrics in histories.items():
        at = {
            metric: {(step, t): value for step, t, value in points}
            for metric, points in metrics.items()
        }
        for point, stop in at.get("rung_stop", {}).items():
            rows.append(
                (
                    number,
                    int(at.get("mark", {}).get(point, point[0])),
                    point[0],
                    at.get(info["objective"], {}).get(point, math.nan),
                    at.get("rung_cutoff", {}).get(point, math.nan),
                    at.get("rung_competitors", {}).get(point, math.nan),
                    bool(stop),
                    bool(at.get("rung_pause", {}).get(point, 0)),
                )
            )
    frame = pd.DataFrame(rows, columns=list(DECISION_COLUMNS)).astype(
        {
            "number": "int64",
            "mark": "int64",
            "samples_seen": "int64",
            "stop": "bool",
            "pause": "bool",
        }
    )
    for column in ("value", "cutoff"):
        frame[column] = frame[column].astype("float64")
    frame["competitors"] = frame["competitors"].astype("float64").astype("Int64")
    return frame.sort_values(["mark", "number"], ignore_index=True)


def _trials_frame(runs: Sequence[Any], info: SweepInfo, curves: pd.DataFrame) -> pd.DataFrame:
    objective = curves[curves["metric"] == info["objective"]].sort_values("samples_seen")
    by_trial = objective.groupby("number")["value"]
    best = by_trial.max() if info["mode"] == "max" else by_trial.min()
    ends = objective.drop_duplicates("number", keep="last")
    last = {row["number"]: row for row in ends.to_dict("records")}
    rows = []
    for run in runs:
        tags, metrics = run.data.tags, run.data.metrics
        number = int(tags[TAG + "number"])
        state, reason = tags.get(TAG + "state", UNFINISHED), tags.get(TAG + "reason", "")
        by_command = state == "pruned" and reason == COMMAND_REASON
        start, end = _timestamp(run.info.start_time), _timestamp(run.info.end_time)
        reached = last.get(number, {"value": math.nan, "samples_seen": 0, "mark": 0})
        rows.append(
            {
                "number": number,
                "state": state,
                "ending": BY_COMMAND if by_command else state,
                "reason": reason,
                "is_default": tags.get(TAG + "default") == "true",
                "objective": float(reached["value"]),
                "best_objective": float(best.get(number, math.nan)),
                "samples_seen": max(
                    int(reached["samples_seen"]), int(_number_tag(tags, "samples_seen") or 0)
                ),
                "mark": int(reached["mark"]),
                "wall_s": _wall_s(metrics, start, end),
                "images_per_s": metrics.get("images_per_s", math.nan),
                "start": start,
                "end": end,
                "node": tags.get(TAG + "node", ""),
                "seed": tags.get(TAG + "seed", ""),
                "rung": _whole(_number_tag(tags, "rung")),
                "audited": _whole(_number_tag(tags, "audited")),
                "bracket": _whole(_number_tag(tags, "bracket")),
                "stratum": tags.get(TAG + "stratum", ""),
                "pareto": tags.get(TAG + "pareto") == "true",
                "run_id": run.info.run_id,
            }
        )
    frame = pd.DataFrame(rows, columns=list(TRIAL_COLUMNS))
    for column in ("rung", "audited", "bracket"):
        frame[column] = frame[column].astype("Int64")
    for column in ("start", "end"):
        frame[column] = pd.to_datetime(frame[column], utc=True)
    frame["pareto"] = frame["pareto"].astype(bool)
    for name in info["also"]:
        frame[f"also.{name}"] = [_unclipped(run.data.metrics.get(name, math.nan)) for run in runs]
    drawn = [_json_tag(run, "params", {}) for run in runs]
    names = dict.fromkeys(name for params in drawn for name in params)
    for name in sorted(names):
        frame[f"param.{name}"] = _typed([params.get(name) for params in drawn])
    return frame.sort_values("number", ignore_index=True)


def _last_frame(runs: Sequence[Any], numbers: pd.Index[int]) -> pd.DataFrame:
    """The last value of every figure that trials reported."""
    kept = {name for run in runs for name in run.data.metrics} - {"mark", *RUNG_METRICS}
    columns = {
        name: [_unclipped(run.data.metrics.get(name, math.nan)) for run in runs]
        for name in sorted(kept)
    }
    return pd.DataFrame(columns, index=numbers, dtype="float64")


def _fields_frame(runs: Sequence[Any], numbers: pd.Index[int]) -> pd.DataFrame:
    """The trainer's whole configuration of each trial, as text."""
    names = sorted({name for run in runs for name in run.data.params})
    columns = {name: [run.data.params.get(name) for run in runs] for name in names}
    return pd.DataFrame(columns, index=numbers, dtype="object")


def _wall_s(
    metrics: Mapping[str, float], start: pd.Timestamp | None, end: pd.Timestamp | None
) -> float:
    """Training and evaluation; the run's own clock where no report tells."""
    if "wall_s" in metrics:
        return metrics["wall_s"]
    return math.nan if start is None or end is None else (end - start).total_seconds()


def _typed(values: Sequence[object]) -> pd.Series[Any]:
    """A column in the narrowest of boolean, Int64, float64 and object that holds the values."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, bool) for value in present):
        return pd.Series(values, dtype="boolean")
    if not any(isinstance(value, bool) for value in present):
        if present and all(isinstance(value, int) for value in present):
            return pd.Series(values, dtype="Int64")
        if present and all(isinstance(value, int | float) for value in present):
            return pd.Series(values, dtype="float64")
    return pd.Series(values, dtype="object")
