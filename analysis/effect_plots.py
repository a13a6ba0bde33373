"""Frames -> plotly figures of effects: a parameter against the objective, importance.

Every text that comes from MLflow is escaped, since plotly reads a subset of HTML.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go

from analysis.effects import Importance, is_categorical, is_log, parameter_frame
from analysis.load import SweepFrames
from analysis.style import (
    DRAWN_ORDER,
    ENDING_STYLE,
    SERIES_COLOURS,
    WINNER_COLOUR,
    finish,
    finite,
    group_of,
    log_ticks,
    robust_range,
)
from analysis.tables import summarise


def parameter_figure(frames: SweepFrames, parameter: str) -> go.Figure:
    """Last objective of each trial against one parameter, by ending; log axis where searched so.

    ValueError for a parameter that was not searched.
    """
    if parameter not in frames.parameters:
        known = ", ".join(frames.parameters) or "none"
        raise ValueError(f"parameter must be one of {known}; got {parameter!r}")
    info = frames.info
    table = parameter_frame(frames)
    table = table[table["parameter"] == parameter]
    choice = is_categorical(frames, parameter)
    order = _levels(table["setting"].tolist()) if choice else None
    winner = summarise(frames)["winner"]
    won = winner["number"] if winner else None
    figure = go.Figure()
    for group in DRAWN_ORDER:
        rows = table[[group_of(ending) == group for ending in table["ending"]]]
        rows = rows[rows["number"] != won]
        _add_points(figure, rows, group, order)
    _add_points(figure, table[table["number"] == won], "winner", order)
    if order is not None:
        figure.update_xaxes(
            tickvals=list(order.values()),
            ticktext=[escape(level) for level in order],
            range=[-0.5, len(order) - 0.5],
            showgrid=False,
        )
    elif is_log(frames, parameter):
        figure.update_xaxes(type="log", **log_ticks([float(v) for v in table["setting"]]))
    title = escape(parameter)
    scale = " (log scale)" if not choice and is_log(frames, parameter) else ""
    figure = finish(
        figure,
        title=title,
        x=title + scale,
        y=escape(info["objective"]),
        y_range=robust_range([frames]),
        height=290,
    )
    return figure.update_layout(showlegend=False)


def importance_figure(results: Sequence[Importance]) -> go.Figure:
    """Horizontal bars, one colour an evaluator; results without shares are left out."""
    drawn = [result for result in results if result.shares]
    order = list(dict.fromkeys(name for result in drawn for name in result.shares or {}))
    figure = go.Figure()
    labels = {"fanova": "fANOVA: share of variance", "ped_anova": "PED-ANOVA: best tenth"}
    for result, colour in zip(drawn, SERIES_COLOURS, strict=False):
        shares = {name: (result.shares or {}).get(name, math.nan) for name in order}
        figure.add_bar(
            y=[escape(name) for name in order],
            x=list(shares.values()),
            orientation="h",
            marker={"color": colour},
            name=labels[result.evaluator],
            text=["" if math.isnan(v) else f"{v:.0%}" for v in shares.values()],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.1%}<extra>" + labels[result.evaluator] + "</extra>",
        )
    figure = finish(
        figure,
        title="Parameter importance",
        x="share",
        y="",
        height=max(200, 110 + len(order) * (20 + 20 * len(drawn))),
    )
    figure.update_yaxes(autorange="reversed", type="category", ticks="", showgrid=False)
    longest = max(
        (share for result in drawn for share in (result.shares or {}).values()), default=1
    )
    figure.update_xaxes(range=[0, 1.15 * longest], tickformat=".0%", nticks=6)
    return figure.update_layout(showlegend=len(drawn) > 1, bargap=0.35)


def _add_points(
    figure: go.Figure, rows: pd.DataFrame, group: str, order: dict[str, int] | None
) -> None:
    label, colour, symbol = ENDING_STYLE.get(group, ("winner", WINNER_COLOUR, "star"))
    if rows.empty:
        return
    full = group in ("completed", "winner")
    settings = rows["setting"].tolist()
    numbers = rows["number"].tolist()
    x = (
        [float(value) for value in settings]
        if order is None
        else [
            order[str(value)] + _sideways(number)
            for number, value in zip(numbers, settings, strict=True)
        ]
    )
    shown = [escape(f"{v:.4g}" if isinstance(v, float) else str(v)) for v in settings]
    figure.add_scatter(
        x=x,
        y=finite(rows["objective"]),
        customdata=list(zip(numbers, rows["mark"].tolist(), shown, strict=True)),
        mode="markers",
        marker={
            "color": colour,
            "symbol": symbol,
            "size": 14 if group == "winner" else 9,
            "opacity": 0.95 if full else 0.75,
        },
        name=label,
        hovertemplate="trial %{customdata[0]}, "
        + label
        + "<br>%{customdata[2]}<br>%{y:.4f} at %{customdata[1]:,} images<extra></extra>",
    )


def _levels(settings: Sequence[object]) -> dict[str, int]:
    """Each level's place on a categorical axis: numbers by size, everything else by name."""
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in settings)
    levels = sorted(set(settings), key=float if numeric else str)  # type: ignore[arg-type]
    return {str(level): place for place, level in enumerate(levels)}


def _sideways(number: int) -> float:
    """A fixed shift for each trial, so that equal levels do not hide one another."""
    return 0.36 * (number * 0.618034 % 1 - 0.5)
