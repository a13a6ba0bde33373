"""Histories of metrics -> curves with the mark of each point, and the decisions at rungs.

The history of `mark` is read only of trials the marks of whose reports cannot be told without it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.frames import CURVE_COLUMNS, DECISION_COLUMNS, RUNG_METRICS
from analysis.store import TAG, Run, Store, parsed_tag, unclipped, whole_tag

REPORT = ["number", "samples_seen", "time"]
"""What tells one report from another: two marks within one batch share a step, not a time."""


def points_of(store: Store, run_ids: Mapping[int, str], metrics: Iterable[str]) -> pd.DataFrame:
    """Histories of these metrics of (number -> run): REPORT, `metric` and `value`."""
    numbers, steps, stamps = array("q"), array("q"), array("q")  # a tenth of lists' memory
    values, names = array("d"), []
    for metric in metrics:
        for number, points in store.histories(run_ids, metric):
            numbers.extend([number] * len(points))
            names += [metric] * len(points)
            steps.extend([step for step, _, _ in points])
            stamps.extend([stamp for _, stamp, _ in points])
            values.extend([unclipped(value) for _, _, value in points])
    frame = pd.DataFrame(
        {
            "number": np.array(numbers, dtype="int64"),
            "metric": names,
            "samples_seen": np.array(steps, dtype="int64"),
            "value": np.array(values, dtype="float64"),
            "time": times(stamps),
        }
    )
    return frame.drop_duplicates([*REPORT, "metric"], keep="last", ignore_index=True)


def times(milliseconds: Sequence[int | None]) -> pd.Series[Any]:
    """MLflow's milliseconds since the epoch as a column of times, UTC; None is NaT."""
    at = np.array(milliseconds, dtype="datetime64[ms]").astype("datetime64[us]")
    return pd.Series(at).dt.tz_localize("UTC")


def counted_marks(points: pd.DataFrame, runs: Sequence[Run], marks: Sequence[int]) -> pd.DataFrame:
    """The marks of reports, without a history of `mark`: REPORT and `mark`.

    The i-th report of a trial is at the sweep's i-th mark where it has as many points of the
    objective as there are marks up to its last one; other trials are left out.
    """
    order = points.sort_values(["number", "time", "samples_seen"], ignore_index=True)
    table = np.array([*marks, math.nan])
    nth = order.groupby("number").cumcount().to_numpy()
    count = order["number"].map(order["number"].value_counts()).to_numpy(dtype="int64")
    last = order["number"].map({run.number: run.metrics.get("mark", math.nan) for run in runs})
    order["mark"] = table[np.minimum(nth, len(marks))]
    whole = table[np.minimum(count - 1, len(marks))] == last.to_numpy(dtype="float64")
    found: pd.DataFrame = order.loc[whole, [*REPORT, "mark"]]
    return found


def placed(
    store: Store, run_ids: Mapping[int, str], points: pd.DataFrame, reports: pd.DataFrame
) -> pd.DataFrame:
    """Points -> curves: each with its mark, from `reports` or else from the history of `mark`."""
    mark = points.merge(reports, how="left", on=REPORT)["mark"].astype("float64")
    unknown = points.loc[mark.isna(), "number"].unique()
    if len(unknown):
        asked = {int(number): run_ids[int(number)] for number in unknown}
        told = points_of(store, asked, ["mark"]).rename(columns={"value": "told"})
        mark = mark.fillna(points.merge(told[[*REPORT, "told"]], how="left", on=REPORT)["told"])
    return in_order(points.assign(mark=mark.fillna(points["samples_seen"]).astype("int64")))


def in_order(curves: pd.DataFrame) -> pd.DataFrame:
    """CURVE_COLUMNS in the order of time."""
    order = ["time", "number", "samples_seen", "mark", "metric"]
    return curves.sort_values(order, ignore_index=True)[list(CURVE_COLUMNS)]


def decisions_frame(store: Store, runs: Sequence[Run], curves: pd.DataFrame) -> pd.DataFrame:
    """DECISION_COLUMNS, from the tag `decisions` of each run and, of older records, from metrics.

    `curves` are those of the objective.
    """
    rows = [(run.number, *row) for run in runs for row in _decided(run)]
    frame = pd.DataFrame(rows, columns=list(DECISION_COLUMNS))
    older = {
        run.number: run.run_id
        for run in runs
        if TAG + "decisions" not in run.tags and "rung_stop" in run.metrics
    }
    if older:
        frame = pd.concat([frame, _from_metrics(store, older, curves)])
    frame = frame.astype(
        {
            **dict.fromkeys(("number", "mark", "samples_seen"), "int64"),
            **dict.fromkeys(("value", "cutoff", "competitors"), "float64"),
            **dict.fromkeys(("stop", "pause"), "bool"),
        }
    )
    frame["competitors"] = frame["competitors"].astype("Int64")
    return frame.sort_values(["mark", "number"], ignore_index=True)


def _decided(run: Run) -> list[list[Any]]:
    """The rows of a trial's tag `decisions`, which in older records is a list a part."""
    text = whole_tag(run.tags, "decisions").replace("][", ",")
    return parsed_tag("decisions", text, run.run_id) if text else []


def _from_metrics(store: Store, run_ids: Mapping[int, str], curves: pd.DataFrame) -> pd.DataFrame:
    """Decisions as they were recorded before there was a tag of them: as metrics at rungs."""
    points = points_of(store, run_ids, RUNG_METRICS)
    points = placed(store, run_ids, points, curves[[*REPORT, "mark"]])
    wide = points.pivot(index=[*REPORT, "mark"], columns="metric", values="value")
    wide = wide.reindex(columns=list(RUNG_METRICS)).dropna(subset="rung_stop").reset_index()
    frame = wide.merge(curves[[*REPORT, "value"]], how="left", on=REPORT)
    frame = frame.rename(columns=lambda name: str(name).removeprefix("rung_"))
    return frame.assign(pause=frame["pause"].fillna(0))[list(DECISION_COLUMNS)]
