"""Frames -> plotly figures of effects: a parameter against the objective, importance.

Every text that comes from MLflow is escaped, since plotly reads a subset of HTML.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.effects import Comparable, Importance, settings_of
from analysis.load import SweepFrames
from analysis.scales import Scale, scale_of
from analysis.slices import Trend, trend
from analysis.style import (
    DRAWN_ORDER,
    ENDING_STYLE,
    GREY,
    SERIES_COLOURS,
    WINNER_COLOUR,
    finish,
    finite,
    group_of,
    log_ticks,
    robust_range,
)
from analysis.tables import winner_of

MAX_POINTS, BEST_POINTS = 500, 50
"""Of more trials, the best ones and others at random are drawn."""

MEASURES = {"fanova": "fANOVA: share of variance", "ped_anova": "PED-ANOVA: best tenth"}


def parameter_figure(frames: SweepFrames, parameter: str, found: Trend | None = None) -> go.Figure:
    """Last objective of each trial against one parameter, by ending; log axis where searched so.

    `found` is a trend to draw beneath. ValueError for a parameter that was not searched.
    """
    if parameter not in frames.parameters:
        known = ", ".join(frames.parameters) or "none"
        raise ValueError(f"parameter must be one of {known}; got {parameter!r}")
    info, scale = frames.info, scale_of(frames, parameter)
    won = winner_of(frames)
    whole = settings_of(frames, parameter)
    table = thinned(whole, info["mode"])
    figure = go.Figure()
    if found is not None and found.is_curve:
        _add_band(figure, found, scale)
    groups = table["ending"].map(lambda ending: group_of(str(ending)))
    for group in DRAWN_ORDER:
        _add_points(figure, table[(groups == group) & (table["number"] != won)], group, scale)
    if found is not None:
        _add_trend(figure, found, scale)
    _add_points(figure, whole[whole["number"] == won], "winner", scale)
    if scale.levels is not None:
        figure.update_xaxes(**scale.ticks(), range=[-0.5, len(scale.levels) - 0.5], showgrid=False)
    elif scale.log:
        settings = [float(value) for value in table["setting"]]
        figure.update_xaxes(type="log", **log_ticks(settings))
    figure = finish(
        figure,
        title=escape(parameter),
        x=scale.title,
        y=escape(info["objective"]),
        y_range=robust_range([frames]),
        height=290,
    )
    return figure.update_layout(showlegend=False)


def parameter_trend(frames: SweepFrames, scale: Scale, compared: Comparable) -> Trend | None:
    """The trend of the comparable values over one parameter, None where there is none."""
    setting = frames.trials.set_index("number")[f"param.{scale.parameter}"]
    values = compared.values[compared.values.index.isin(setting.index)]
    places = scale.places(setting.loc[values.index])
    return trend(places, values.to_numpy(dtype="float64"), scale)


def thinned(table: pd.DataFrame, mode: str) -> pd.DataFrame:
    """At most MAX_POINTS rows: those of the best objectives, the others drawn at random."""
    if len(table) <= MAX_POINTS:
        return table
    ordered = table.sort_values("objective", ascending=mode == "min", kind="stable")
    best, others = ordered.head(BEST_POINTS), ordered.iloc[BEST_POINTS:]
    rows = np.random.default_rng(0).choice(len(others), MAX_POINTS - len(best), replace=False)
    return pd.concat([best, others.iloc[np.sort(rows)]]).sort_index()


def _add_band(figure: go.Figure, found: Trend, scale: Scale) -> None:
    x = [scale.setting(place) for place in found.places]
    figure.add_scatter(
        x=[*x, *reversed(x)],
        y=[*found.low, *reversed(found.high)],
        fill="toself",
        fillcolor="rgba(133,140,153,0.25)",
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        name="interval",
    )


def _add_trend(figure: go.Figure, found: Trend, scale: Scale) -> None:
    """A curve, or means with their intervals; the axis is in settings, not places."""
    x = [scale.setting(place) for place in found.places]
    if found.is_curve:
        figure.add_scatter(
            x=x,
            y=found.centre,
            mode="lines",
            line={"color": GREY, "width": 3},
            name="trend",
            customdata=np.column_stack([found.low, found.high]).tolist(),
            hovertemplate="trend %{y:.4f}<br>%{customdata[0]:.4f} to %{customdata[1]:.4f}"
            "<extra></extra>",
        )
        return
    half = (found.high - found.centre).tolist()
    figure.add_scatter(
        x=x,
        y=found.centre,
        error_y={
            "type": "data",
            "array": [0.0 if math.isnan(value) else value for value in half],
            "color": GREY,
            "thickness": 2.5,
            "width": 9,
        },
        mode="markers",
        marker={
            "color": GREY,
            "symbol": "line-ew",
            "size": 34,
            "line": {"color": GREY, "width": 3},
        },
        name="mean",
        customdata=[
            (int(count), "no interval" if math.isnan(value) else f"± {value:.4f}")
            for count, value in zip(found.counts, half, strict=True)
        ],
        hovertemplate="mean %{y:.4f} %{customdata[1]}<br>n = %{customdata[0]}<extra></extra>",
    )


def importance_figure(results: Sequence[Importance]) -> go.Figure:
    """Horizontal bars, one colour an evaluator; results without shares are left out.

    Bars are the medians over bootstrap samples with the interval of 5 to 95 %, or the plain
    shares where there are no samples; a dashed line is the noise floor.
    """
    drawn = [result for result in results if result.shares]
    bars = [_bars(result) for result in drawn]
    order = list(dict.fromkeys(name for bar in bars for name in bar))
    figure = go.Figure()
    longest = 0.0
    for result, bar, colour in zip(drawn, bars, SERIES_COLOURS, strict=False):
        label = MEASURES[result.evaluator]
        shown = [bar.get(name, (math.nan,) * 3) for name in order]
        middle = [share for _, share, _ in shown]
        longest = max([longest, *(high for _, _, high in shown if not math.isnan(high))])
        figure.add_bar(
            y=[escape(name) for name in order],
            x=middle,
            orientation="h",
            marker={"color": colour},
            name=label,
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - share for _, share, high in shown],
                "arrayminus": [share - low for low, share, _ in shown],
                "color": GREY,
                "thickness": 2,
                "width": 4,
            },
            customdata=[(low, high) for low, _, high in shown],
            hovertemplate="%{y}: %{x:.1%} (%{customdata[0]:.1%} to %{customdata[1]:.1%})<extra>"
            + label
            + "</extra>",
        )
        if result.stability is not None:
            floor = result.stability.floor
            longest = max(longest, floor)
            figure.add_vline(x=floor, line={"color": colour, "width": 2, "dash": "dash"})
    figure = finish(
        figure,
        title="Parameter importance",
        x="share",
        y="",
        height=max(200, 110 + len(order) * (20 + 20 * len(drawn))),
    )
    figure.update_yaxes(
        autorange="reversed", type="category", ticks="", ticklabelstandoff=6, showgrid=False
    )
    figure.update_xaxes(range=[0, 1.05 * (longest or 1.0)], tickformat=".0%", nticks=6)
    return figure.update_layout(showlegend=len(drawn) > 1, bargap=0.35)


def _bars(result: Importance) -> dict[str, tuple[float, float, float]]:
    """Name -> low end, middle and high end of the share, the largest first."""
    if result.stability is not None:
        return result.stability.intervals
    return {name: (share, share, share) for name, share in (result.shares or {}).items()}


def _add_points(figure: go.Figure, rows: pd.DataFrame, group: str, scale: Scale) -> None:
    label, colour, symbol = ENDING_STYLE.get(group, ("winner", WINNER_COLOUR, "star"))
    if rows.empty:
        return
    full, few = group in ("completed", "winner"), len(rows) < 150
    settings = rows["setting"].tolist()
    numbers = rows["number"].tolist()
    x = (
        [float(value) for value in settings]
        if scale.levels is None
        else [
            place + _sideways(number)
            for number, place in zip(numbers, scale.places(settings), strict=True)
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
            "size": 14 if group == "winner" else 9 if few else 6,
            "opacity": (0.95 if full else 0.75) if few else 0.4,
        },
        name=label,
        hovertemplate="trial %{customdata[0]}, "
        + label
        + "<br>%{customdata[2]}<br>%{y:.4f} at %{customdata[1]:,} images<extra></extra>",
    )


def _sideways(number: int) -> float:
    """A fixed shift for each trial, so that equal levels do not hide one another."""
    return 0.36 * (number * 0.618034 % 1 - 0.5)
