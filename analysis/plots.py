"""Frames -> plotly figures: best so far, learning curves.

Every text that comes from MLflow is escaped, since plotly reads a subset of HTML. How they look
stands in `style`; a figure's own template is the light one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go

from analysis.compare_plots import SYMBOLS
from analysis.cost import gpus_per_trial
from analysis.load import SweepFrames
from analysis.style import (
    BLUE,
    DRAWN_ORDER,
    ENDING_STYLE,
    GREY,
    SERIES_COLOURS,
    WINNER_COLOUR,
    finish,
    finite,
    group_of,
    objective_title,
    robust_range,
    time_unit,
    upper_range,
)
from analysis.tables import Axis, best_so_far, default_number, trial_row, winner_of
from analysis.thinning import MAX_CURVES, changes, sample, shares, thin_curve, thin_dots


def best_so_far_figure(sweeps: SweepFrames | Sequence[SweepFrames], by: Axis = "time") -> go.Figure:
    """Best value over wall time, images spent or cost; one colour a sweep where there are several.

    From the sixth sweep on the colours repeat, and markers tell the lines apart.

    The line is the best completed trial, the thin one the best report of any trial; dots are
    the single reports (one sweep only, at most MAX_DOTS of them). Cost is the trials' time
    together, in GPU-hours where every sweep's GPUs a trial are known, else in slot-hours.
    """
    several = [sweeps] if isinstance(sweeps, SweepFrames) else list(sweeps)
    info = several[0].info
    tables = [best_so_far(frames, by) for frames in several]
    weights, title, over = _axis(several, tables, by)
    figure = go.Figure()
    for index, (frames, table) in enumerate(zip(several, tables, strict=True)):
        name = escape(frames.info["name"])
        x = table["x"] * weights[index]
        if len(several) == 1:
            dots = thin_dots(table)
            figure.add_scatter(
                x=x[dots.index].tolist(),
                y=finite(dots["value"]).tolist(),
                mode="markers",
                marker={"color": GREY, "size": 5 if len(dots) < 500 else 3, "opacity": 0.55},
                name="one report",
                customdata=dots["number"].tolist(),
                hovertemplate="trial %{customdata}<br>%{y:.4f}<extra></extra>",
            )
        colour = BLUE if len(several) == 1 else SERIES_COLOURS[index % len(SERIES_COLOURS)]
        turn = index // len(SERIES_COLOURS)
        prefix = "" if len(several) == 1 else f"{name}: "
        for column, label, width, dash in (
            ("best", "best report", 1.5, "dot"),
            ("best_completed", "best completed trial", 3, "solid"),
        ):
            line = changes(x, table[column])
            if len(line):
                figure.add_scatter(
                    x=line["x"].tolist(),
                    y=line["y"].tolist(),
                    mode="lines+markers" if turn else "lines",
                    line={"color": colour, "width": width, "dash": dash, "shape": "hv"},
                    marker={"symbol": SYMBOLS[(turn - 1) % len(SYMBOLS)], "size": 7}
                    if turn
                    else None,
                    name=prefix + label,
                    legendgroup=name,
                    hovertemplate="%{y:.4f}<extra>" + prefix + label + "</extra>",
                )
    if len(several) == 1:
        _default_line(figure, several[0])
    return finish(
        figure,
        title=f"Best so far over {over}",
        x=title,
        y=objective_title(info["objective"], info["mode"]),
        y_range=upper_range(several, tables),
        x_images=by == "images",
    )


def _axis(
    sweeps: Sequence[SweepFrames], tables: Sequence[pd.DataFrame], by: Axis
) -> tuple[list[float], str, str]:
    """What each sweep's `x` is multiplied by, the axis title, and what the figure is over."""
    if by == "images":
        return [1.0] * len(sweeps), "images, all trials together", "images spent"
    gpus = [gpus_per_trial(frames) for frames in sweeps]
    of_gpus = by == "cost" and None not in gpus
    weights = [each or 1.0 for each in gpus] if of_gpus else [1.0] * len(sweeps)
    ends = [table["x"].max() * w for table, w in zip(tables, weights, strict=True)]
    longest = max((float(end) for end in ends if not math.isnan(end)), default=1.0)
    divisor, unit = time_unit(longest)
    weights = [weight / divisor for weight in weights]
    if by == "time":
        return weights, f"wall time ({unit})", "wall time"
    what = "GPU" if of_gpus else "slot"
    return weights, f"{what}-{unit}, all trials together", f"{what} time"


def learning_curves(frames: SweepFrames, metric: str | None = None) -> go.Figure:
    """A metric (default: the objective) of every trial over the images it has seen.

    The winner is drawn last and thick; a marker ends each curve and tells how it ended. Of more
    than MAX_CURVES trials a seeded sample of each ending is drawn, and the legend says of how
    many.
    """
    info = frames.info
    metric = metric or info["objective"]
    curves = frames.curves[frames.curves["metric"] == metric]
    won = winner_of(frames)
    reported = frames.trials[frames.trials["number"].isin(curves["number"].unique())]
    reported = reported[reported["number"] != won]
    ending = reported["ending"].map(lambda name: group_of(str(name)))
    groups = {str(g): rows["number"].tolist() for g, rows in reported.groupby(ending)}
    few = shares({group: len(numbers) for group, numbers in groups.items()}, MAX_CURVES)
    figure = go.Figure()
    for group in DRAWN_ORDER:
        if group in groups:
            label, colour, symbol = ENDING_STYLE[group]
            numbers = sample(groups[group], few[group])
            of = f" of {len(groups[group]):,}" if len(numbers) < len(groups[group]) else ""
            name = f"{label} ({len(numbers)}{of})"
            _add_curves(figure, curves, numbers, name, colour, symbol, 1.3)
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
        rows = thin_curve(rows.sort_values("samples_seen"))
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
