"""Frames of a sweep of several objectives -> its Pareto set, as a table and as a figure.

Which trials are in the set was decided by the recorder, once the sweep had ended: while it runs,
there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, TypedDict

import pandas as pd
import plotly.graph_objects as go

from analysis.load import SweepFrames
from analysis.style import (
    DRAWN_ORDER,
    ENDING_STYLE,
    WINNER_COLOUR,
    finish,
    finite,
    group_of,
    objective_title,
)
from analysis.tables import trial_params
from analysis.thinning import thin_dots


class ParetoRow(TypedDict):
    """A trial that no other one beats in all objectives."""

    number: int
    values: list[float]
    params: dict[str, Any]


def pareto_rows(frames: SweepFrames) -> list[ParetoRow]:
    """The Pareto set of a sweep of several objectives, best first in the first one; else empty."""
    mode, also = frames.info["mode"], frames.info["also"]
    in_set = frames.trials["pareto"].astype(bool)
    front = frames.trials[in_set].sort_values("objective", ascending=mode == "min")
    columns = ["objective", *(f"also.{name}" for name in also)]
    return [
        ParetoRow(
            number=int(row["number"]),
            values=[float(row[column]) for column in columns],
            params=trial_params(frames, int(row["number"])),
        )
        for row in front.to_dict("records")
    ]


def pareto_figure(frames: SweepFrames) -> go.Figure | None:
    """The first objective of each trial against the second; None if no trial has both.

    With two objectives a step line bounds what the Pareto set beats. With more it is drawn
    without one: what is best in all of them can be beaten in these two. Of each ending at most
    MAX_DOTS trials are drawn, and all of the Pareto set.
    """
    info = frames.info
    if not info["also"]:
        return None
    second = info["also"][0]
    points = pd.DataFrame(
        {
            "number": frames.trials["number"],
            "group": [group_of(str(ending)) for ending in frames.trials["ending"]],
            "pareto": frames.trials["pareto"].astype(bool),
            "samples_seen": frames.trials["samples_seen"],
            "x": finite(frames.trials["objective"]),
            "y": finite(frames.trials[f"also.{second}"]),
        }
    ).dropna(subset=["x", "y"])
    if points.empty:
        return None
    figure = go.Figure()
    names = (info["objective"], second)
    for group in DRAWN_ORDER:
        rows = thin_dots(points[(points["group"] == group) & ~points["pareto"]])
        if len(rows):
            label, colour, symbol = ENDING_STYLE[group]
            marker = {"color": colour, "symbol": symbol, "size": 9, "opacity": 0.75}
            _add(figure, rows, names, label, marker=marker, mode="markers")
    front = points[points["pareto"]].sort_values(["x", "y"])
    if len(front):
        _add(
            figure,
            front,
            names,
            "Pareto set",
            mode="lines+markers" if len(info["also"]) == 1 else "markers",
            marker={"color": WINNER_COLOUR, "symbol": "star", "size": 13},
            line={
                "color": WINNER_COLOUR,
                "width": 2,
                "shape": "vh" if info["mode"] == "max" else "hv",
            },
        )
    modes = info["also_modes"]
    figure = finish(
        figure,
        title=f"{escape(second)} against {escape(info['objective'])}",
        x=objective_title(info["objective"], info["mode"]),
        y=objective_title(second, modes[0]) if modes else escape(second),
    )
    if points["y"].abs().max() >= 1e4:
        figure.update_yaxes(tickformat="~s")
    return figure


def _add(
    figure: go.Figure, rows: pd.DataFrame, names: Sequence[str], label: str, **look: Any
) -> None:
    x, y = (escape(name) for name in names)
    figure.add_scatter(
        x=rows["x"],
        y=rows["y"],
        customdata=rows[["number", "samples_seen"]].to_numpy().tolist(),
        meta=["trial", "images"],
        name=label,
        hovertemplate="trial %{customdata[0]}, "
        + label
        + f"<br>{x} %{{x:.4f}}<br>{y} %{{y:,.5~g}}<br>"
        + "%{customdata[1]:,} images<extra></extra>",
        **look,
    )
