"""MLflow -> tidy frames: one sweep as `SweepFrames`. The only reader of the store.

The tags, parameters and metrics read here are the ones that the recorder of sweeps writes:
one parent run a sweep, one child run a trial, metrics at step = images seen. Artifacts are not
read. Runs come with their tags, parameters and last values; learning curves beside the
objective's are read where they are asked for.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
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
from analysis.histories import (
    REPORT,
    counted_marks,
    decisions_frame,
    in_order,
    placed,
    points_of,
    times,
)
from analysis.store import TAG, Run, Store, in_one_line, json_tag, parsed_tag, whole_tag

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
    "load_sweeps",
    "with_metrics",
]

KINDS: tuple[Literal["sweep", "confirmation"], ...] = ("sweep", "confirmation")
"""Of runs that have trials."""


def load_sweep(
    tracking_uri: str,
    name: str,
    *,
    sweep_id: str | None = None,
    metrics: Iterable[str] | Literal["all"] = (),
) -> SweepFrames:
    """Read a sweep by its name; of several with one name the newest, or the one of `sweep_id`.

    A confirmation, which is a sweep too, is found by its `sweep_id` alone.
    The learning curves are those of the objective and of `metrics`, each a request a trial over
    HTTP; the last value of every metric is there without that, in `last`. Raises ValueError, in
    one line, for a store that cannot be read, for a sweep that is not in it and for a metric that
    no trial reported.
    """
    store = Store(tracking_uri)
    with in_one_line(store.shown):
        try:
            parent = _find_parent(store, name, sweep_id)
            info = _sweep_info(parent, store.shown)
            marks = json_tag(parent.data.tags, "marks", [], parent.info.run_id)
            found = store.trials(parent.info.experiment_id, info["sweep_id"])
            by_number = {run.number: run for run in found}
        except KeyError as error:
            raise ValueError(f"sweep {name!r}: its records lack the tag {error}") from None
        runs = [by_number[number] for number in sorted(by_number)]
        objective = info["objective"]
        reporting = {run.number: run.run_id for run in runs if objective in run.metrics}
        points = points_of(store, reporting, [objective])
        curves = placed(store, reporting, points, counted_marks(points, runs, marks))
        decisions = decisions_frame(store, runs, curves)
    texts = dict.fromkeys(whole_tag(run.tags, "distributions") or "{}" for run in runs)
    ranges: dict[str, dict[str, None]] = {}
    for text in texts:
        for key, each in parsed_tag("distributions", text, info["run_id"]).items():
            ranges.setdefault(key, {})[each] = None
    info["distributions"] |= {key: _widest(list(several)) for key, several in ranges.items()}
    info["several_ranges"] = tuple(key for key, several in ranges.items() if len(several) > 1)
    last = _last_frame(runs)
    trials = _trials_frame(runs, info, curves, last)
    frames = SweepFrames(info, trials, curves, decisions, last, _fields_frame(runs))
    return with_metrics(frames, metrics, tracking_uri)


def load_sweeps(
    tracking_uri: str, names: Iterable[str], *, metrics: Iterable[str] | Literal["all"] = ()
) -> list[SweepFrames]:
    """Several sweeps of one store, in this order; see `load_sweep`."""
    return [load_sweep(tracking_uri, name, metrics=metrics) for name in names]


def with_metrics(
    frames: SweepFrames,
    metrics: Iterable[str] | Literal["all"],
    tracking_uri: str | None = None,
) -> SweepFrames:
    """The frames with the learning curves of these metrics, too, read from the store.

    Over HTTP a metric is a request a trial (some milliseconds), from an SQL store it is read as a
    whole (ten thousand trials in a second). What is there already is not read again.
    `tracking_uri` is needed where it has a user and a password, which frames do not keep.
    Raises ValueError for a metric that no trial reported; before the first report all are taken.
    """
    known = [str(name) for name in frames.last.columns]
    named = [metrics] if isinstance(metrics, str) else list(metrics)
    names = known if named == ["all"] else list(dict.fromkeys(named))
    for name in names:
        if known and name not in known:
            raise ValueError(f"metric must be one of {', '.join(known)}; got {name!r}")
    there = {frames.info["objective"], *frames.curves["metric"].unique()}
    missing = [name for name in names if name not in there]
    if not missing or not known:
        return frames
    store = Store(tracking_uri or frames.info["tracking_uri"])
    run_ids = dict(zip(frames.trials["number"], frames.trials["run_id"], strict=True))
    reports = frames.curves[[*REPORT, "mark"]].drop_duplicates(REPORT)
    with in_one_line(store.shown):
        new = placed(store, run_ids, points_of(store, run_ids, missing), reports)
    return dataclasses.replace(frames, curves=in_order(pd.concat([frames.curves, new])))


def _find_parent(store: Store, name: str, sweep_id: str | None) -> Any:
    parents = store.sweeps()
    for kind in KINDS if sweep_id is not None else ():
        for parent in parents if kind == "sweep" else store.sweeps(kind):
            # whatever its folder is called by now
            if parent.data.tags.get(TAG + "sweep_id") == sweep_id:
                return parent
    names = sorted({parent.data.tags.get(TAG + "sweep", "") for parent in parents})
    named = [parent for parent in parents if parent.data.tags.get(TAG + "sweep") == name]
    if not named:
        there = f"sweeps there: {', '.join(names)}" if names else "it holds no sweep"
        raise ValueError(f"no sweep {name!r} in {store.shown}; {there}")
    if sweep_id is None:
        return named[-1]
    ids = ", ".join(parent.data.tags.get(TAG + "sweep_id", "?") for parent in named)
    raise ValueError(f"no sweep {name!r} with id {sweep_id!r} in {store.shown}; ids: {ids}")


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
    tags, run_id = parent.data.tags, parent.info.run_id
    version = TAG + "version."
    start = _timestamp(parent.info.start_time)
    assert start is not None
    return SweepInfo(
        name=tags[TAG + "sweep"],
        sweep_id=tags[TAG + "sweep_id"],
        run_id=run_id,
        tracking_uri=tracking_uri,
        state=tags.get(TAG + "state", "interrupted"),
        objective=tags[TAG + "objective"],
        also=tuple(json_tag(tags, "also", [], run_id)),
        also_modes=tuple(json_tag(tags, "also_modes", [], run_id)),
        warm_start=json_tag(tags, "warm_start", {}, run_id),
        mode=tags[TAG + "mode"],
        total_images=int(tags[TAG + "total_images"]),
        train_images=int(tags[TAG + "train_images"]),
        val_images=_whole(_number_tag(tags, "val_images")),
        rungs=tuple(int(rung) for rung in json_tag(tags, "rungs", [], run_id)),
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


def _trials_frame(
    runs: Sequence[Run], info: SweepInfo, curves: pd.DataFrame, last: pd.DataFrame
) -> pd.DataFrame:
    objective = curves.sort_values(["number", "samples_seen", "mark"])
    by_trial = objective.groupby("number")
    best = by_trial["value"].max() if info["mode"] == "max" else by_trial["value"].min()
    ends = objective.drop_duplicates("number", keep="last").set_index("number")

    def column(tag: str, default: str = "") -> list[str]:
        return [run.tags.get(TAG + tag, default) for run in runs]

    def whole(tag: str) -> pd.Series[Any]:
        return pd.Series([_whole(_number_tag(run.tags, tag)) for run in runs], dtype="Int64")

    frame = pd.DataFrame({"number": last.index.to_numpy(dtype="int64")})
    number, reason = frame["number"], column("reason")
    frame["state"] = state = column("state", UNFINISHED)
    frame["ending"] = [
        BY_COMMAND if (each, why) == ("pruned", COMMAND_REASON) else each
        for each, why in zip(state, reason, strict=True)
    ]
    frame["reason"] = reason
    frame["is_default"] = [text == "true" for text in column("default")]
    frame["objective"] = number.map(ends["value"]).astype("float64")
    frame["best_objective"] = number.map(best).astype("float64")
    reached = number.map(ends["samples_seen"]).fillna(0).astype("int64")
    frame["samples_seen"] = np.maximum(reached, whole("samples_seen").fillna(0).astype("int64"))
    frame["mark"] = number.map(ends["mark"]).fillna(0).astype("int64")
    frame["start"] = times([run.start for run in runs])
    frame["end"] = times([run.end for run in runs])
    clock = (frame["end"] - frame["start"]).dt.total_seconds()  # where no report tells
    absent = pd.Series(math.nan, index=last.index)
    frame["wall_s"] = pd.Series(last.get("wall_s", absent).to_numpy()).fillna(clock)
    frame["images_per_s"] = last.get("images_per_s", absent).to_numpy()
    for tag in ("node", "seed", "stratum"):
        frame[tag] = column(tag)
    for tag in ("rung", "audited", "bracket"):
        frame[tag] = whole(tag)
    frame["pareto"] = [text == "true" for text in column("pareto")]
    frame["run_id"] = [run.run_id for run in runs]
    frame = frame[list(TRIAL_COLUMNS)]
    more: dict[str, Any] = {
        f"also.{name}": last.get(name, absent).to_numpy() for name in info["also"]
    }
    drawn = [json_tag(run.tags, "params", {}, run.run_id) for run in runs]
    for name in sorted({name for params in drawn for name in params}):
        # a None that was drawn is a level of its choice; one without the parameter is missing
        more[f"param.{name}"] = _typed(
            ["None" if params.get(name, "") is None else params.get(name) for params in drawn]
        )
    return pd.concat([frame, pd.DataFrame(more, index=frame.index)], axis="columns")


def _widest(ranges: Sequence[str]) -> str:
    """The range of numbers that holds all of these, as Optuna's JSON; of choices the last."""
    if len(ranges) == 1:
        return ranges[0]
    found = [json.loads(text) for text in ranges]
    if any("low" not in each["attributes"] for each in found):
        return ranges[-1]
    whole = all(each["name"] == "IntDistribution" for each in found)
    low = min(each["attributes"]["low"] for each in found)
    high = max(each["attributes"]["high"] for each in found)
    attributes = {
        "log": all(each["attributes"].get("log", False) for each in found),
        "step": 1 if whole else None,  # steps from several starts have no grid in common
        "low": low,
        "high": high,
    }
    name = "IntDistribution" if whole else "FloatDistribution"
    return json.dumps({"name": name, "attributes": attributes})


def _last_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """The last value of every figure that trials reported."""
    names = sorted({name for run in runs for name in run.metrics} - {"mark", *RUNG_METRICS})
    columns = {name: np.array([run.metrics.get(name, math.nan) for run in runs]) for name in names}
    return pd.DataFrame(columns, index=_numbers(runs), dtype="float64")


def _fields_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """The trainer's whole configuration of each trial, as text."""
    names = sorted({name for run in runs for name in run.params})
    columns = {name: [run.params.get(name) for run in runs] for name in names}
    return pd.DataFrame(columns, index=_numbers(runs), dtype="object")


def _numbers(runs: Sequence[Run]) -> pd.Index[int]:
    return pd.Index([run.number for run in runs], name="number", dtype="int64")


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
