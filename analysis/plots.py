"""Frames -> plotly figures: best so far, learning curves, parameters, importance, rungs.

Every text that comes from MLflow is escaped, since plotly reads a subset of HTML. How they look
stands in `style`; a figure's own template is the light one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go

from analysis.effects import Importance, is_categorical, is_log, parameter_frame
from analysis.load import SweepFrames
from analysis.stopping import rung_table
from analysis.style import (
    BLUE,
    DRAWN_ORDER,
    ENDING_STYLE,
    GREY,
    ORANGE,
    SERIES_COLOURS,
    WINNER_COLOUR,
    finish,
    finite,
    group_of,
    log_ticks,
    objective_title,
    robust_range,
    time_unit,
    upper_range,
)
from analysis.tables import Axis, best_so_far, default_number, summarise, trial_row


def best_so_far_figure(sweeps: SweepFrames | Sequence[SweepFrames], by: Axis = "time") -> go.Figure:
    """Best value over wall time or over images spent; one colour a sweep where there are several.

    The line is the best completed trial, the thin one the best report of any trial; dots are
    the single reports (one sweep only).
    """
    several = [sweeps] if isinstance(sweeps, SweepFrames) else list(sweeps)
    info = several[0].info
    tables = [best_so_far(frames, by) for frames in several]
    longest = max((table["x"].max() for table in tables if len(table)), default=1.0)
    divisor, unit = time_unit(longest) if by == "time" else (1.0, "images, all trials together")
    figure = go.Figure()
    for index, (frames, table) in enumerate(zip(several, tables, strict=True)):
        name = escape(frames.info["name"])
        x = table["x"] / divisor
        if len(several) == 1:
            figure.add_scatter(
                x=x,
                y=finite(table["value"]),
                mode="markers",
                marker={"color": GREY, "size": 5, "opacity": 0.55},
                name="one report",
                customdata=table["number"],
                hovertemplate="trial %{customdata}<br>%{y:.4f}<extra></extra>",
            )
        colour = BLUE if len(several) == 1 else SERIES_COLOURS[index % len(SERIES_COLOURS)]
        prefix = "" if len(several) == 1 else f"{name}: "
        for column, label, width, dash in (
            ("best", "best report", 1.5, "dot"),
            ("best_completed", "best completed trial", 3, "solid"),
        ):
            if table[column].notna().any():
                figure.add_scatter(
                    x=x,
                    y=table[column],
                    mode="lines",
                    line={"color": colour, "width": width, "dash": dash, "shape": "hv"},
                    name=prefix + label,
                    legendgroup=name,
                    hovertemplate="%{y:.4f}<extra>" + prefix + label + "</extra>",
                )
    if len(several) == 1:
        _default_line(figure, several[0])
    over = "wall time" if by == "time" else "images spent"
    title = f"wall time ({unit})" if by == "time" else unit
    return finish(
        figure,
        title=f"Best so far over {over}",
        x=title,
        y=objective_title(info["objective"], info["mode"]),
        y_range=upper_range(several, tables),
        x_images=by == "images",
    )


def learning_curves(frames: SweepFrames, metric: str | None = None) -> go.Figure:
    """A metric (default: the objective) of every trial over the images it has seen.

    The winner is drawn last and thick; a marker ends each curve and tells how it ended.
    """
    info = frames.info
    metric = metric or info["objective"]
    curves = frames.curves[frames.curves["metric"] == metric]
    trials = frames.trials.set_index("number")
    winner = summarise(frames)["winner"]
    won = winner["number"] if winner else None
    groups: dict[str, list[int]] = {group: [] for group in ENDING_STYLE}
    for number, ending in trials["ending"].items():
        if number != won and number in set(curves["number"]):
            groups[group_of(str(ending))].append(int(str(number)))
    figure = go.Figure()
    for group in DRAWN_ORDER:
        if groups[group]:
            label, colour, symbol = ENDING_STYLE[group]
            count = len(groups[group])
            _add_curves(figure, curves, groups[group], f"{label} ({count})", colour, symbol, 1.3)
    if won is not None:
        _add_curves(
            figure, curves, [won], f"winner, trial {won}", WINNER_COLOUR, "star", 3.2, size=13
        )
    for rung in info["rungs"]:
        figure.add_vline(x=rung, line={"color": GREY, "width": 1, "dash": "dot"}, opacity=0.6)
    is_objective = metric == info["objective"]
    return finish(
        figure,
        title="Learning curves" if is_objective else f"Learning curves: {escape(metric)}",
        x="images seen by the trial",
        y=objective_title(metric, info["mode"]) if is_objective else escape(metric),
        y_range=robust_range([frames]) if is_objective else None,
        x_images=True,
    )


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


def rung_figure(frames: SweepFrames) -> go.Figure:
    """Stacked bars: trials that passed, were stopped and were audited at each rung."""
    table = rung_table(frames)
    rungs = [f"{rung:,}" for rung in table["rung"]]
    figure = go.Figure()
    for column, colour in (("passed", BLUE), ("stopped", ORANGE), ("audited", GREY)):
        counts, label = [int(count) for count in table[column]], column
        if column == "audited" and not any(counts):
            continue
        figure.add_bar(
            x=rungs,
            y=counts,
            name=label,
            marker={"color": colour},
            text=[str(count) if count else "" for count in counts],
            textposition="inside",
            insidetextanchor="middle",
            textfont={"color": "#ffffff"},
            textangle=0,
            constraintext="none",
            hovertemplate="rung %{x} images<br>%{y} " + label + "<extra></extra>",
        )
    figure = finish(
        figure,
        title="Stopping at the rungs",
        x="rung (images seen by the trial)",
        y="trials",
        height=300,
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero", tickformat="d")
    return figure.update_layout(barmode="stack", bargap=0.5, legend={"traceorder": "normal"})


def _default_line(figure: go.Figure, frames: SweepFrames) -> None:
    """The default configuration's value, where it reached its full resource."""
    default = default_number(frames)
    row = None if default is None else trial_row(frames, default)
    if row is None or row["state"] != "completed":
        return
    value = float(row["objective"])
    if math.isfinite(value):
        figure.add_hline(
            y=value,
            line={"color": GREY, "width": 1.5, "dash": "dash"},
            annotation={"text": "default configuration", "font": {"size": 12, "color": GREY}},
            annotation_position="bottom right",
        )


def _add_curves(
    figure: go.Figure,
    curves: pd.DataFrame,
    numbers: Sequence[int],
    name: str,
    colour: str,
    symbol: str,
    width: float,
    size: int = 8,
) -> None:
    """All curves of a group as one trace with gaps, and one trace of markers at their ends."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    who: list[int | None] = []
    ends: list[tuple[int, float, int]] = []
    for number, rows in curves[curves["number"].isin(numbers)].groupby("number"):
        rows = rows.sort_values("samples_seen")
        trial = int(str(number))
        xs += [*rows["samples_seen"].tolist(), None]
        ys += [*finite(rows["value"]).tolist(), None]
        who += [*[trial] * len(rows), None]
        known = rows[finite(rows["value"]).notna()]
        if len(known):
            ends.append((int(known["samples_seen"].iloc[-1]), known["value"].iloc[-1], trial))
    hover = "trial %{customdata}<br>%{x:,} images<br>%{y:.4f}<extra></extra>"
    figure.add_scatter(
        x=xs,
        y=ys,
        customdata=who,
        mode="lines",
        line={"color": colour, "width": width},
        opacity=0.9 if width > 2 else 0.6,
        legendgroup=name,
        showlegend=False,
        hovertemplate=hover,
    )
    figure.add_scatter(
        x=[end[0] for end in ends],
        y=[end[1] for end in ends],
        customdata=[end[2] for end in ends],
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": size},
        legendgroup=name,
        name=name,
        hovertemplate=hover,
    )


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
