"""A comparison -> plotly figures: expected best over a budget, and the differences of pairs.

Every text that comes from MLflow is escaped, since plotly reads a subset of HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Literal

import plotly.graph_objects as go

from analysis.compare import Comparison, Pair, Point, Span
from analysis.style import BLUE, GREEN, GREY, ORANGE, SERIES_COLOURS, finish, objective_title
from analysis.tables import is_accuracy

DASHES = ("solid", "dash", "dot", "dashdot")
"""A second sign beside the colour, of which there are fewer than levels."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "pentagon")
RESULT_STYLE = {
    "better": ("shown", GREEN, "circle"),
    "better_on_these_images": ("shown on these images only", ORANGE, "square"),
    "undecided": ("not shown", GREY, "circle-open"),
}


def expected_best_figure(
    comparison: Comparison, by: Literal["trials", "images"] = "trials"
) -> go.Figure:
    """Expected best of each level over trials or images spent, with its band up to half of them."""
    figure = go.Figure()
    shown: list[float] = []
    for place, row in enumerate(comparison["levels"]):
        points = row["by_trials"] if by == "trials" else row["by_images"]
        if not points:
            continue
        name = escape(row["level"])
        colour = SERIES_COLOURS[place % len(SERIES_COLOURS)]
        _band(figure, points, colour, name)
        figure.add_scatter(
            x=[point["budget"] for point in points],
            y=[point["value"] for point in points],
            mode="lines+markers",
            line={"color": colour, "width": 2.4, "dash": DASHES[place // 5 % len(DASHES)]},
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7 if len(points) < 20 else 4},
            name=name,
            legendgroup=name,
            hovertemplate="%{y:.4f} after %{x:,.0f} " + by + f"<extra>{name}</extra>",
        )
        shown += [point["value"] for point in points]
    figure = finish(
        figure,
        title=f"Expected best over {by} spent",
        x="trials of the level" if by == "trials" else "images that the level's trials cost",
        y=objective_title(comparison["objective"], comparison["mode"]),
        y_range=_room_for(shown),
        x_images=by == "images",
    )
    budgets = [
        point["budget"]
        for row in comparison["levels"]
        for point in (row["by_trials"] if by == "trials" else row["by_images"])
    ]
    if by == "trials" and budgets and max(budgets) <= 10:
        figure.update_xaxes(dtick=1)
    return figure


def differences_figure(comparison: Comparison) -> go.Figure | None:
    """Each tested pair's difference with its interval; None where no pair was tested."""
    tested = [pair for pair in comparison["pairs"] if pair["difference"] is not None]
    if not tested:
        return None
    scale = 100.0 if is_accuracy(comparison["objective"]) else 1.0
    figure = go.Figure()
    order = [_label(pair) for pair in tested]
    for result, (label, colour, symbol) in RESULT_STYLE.items():
        rows = [pair for pair in tested if pair["result"] == result]
        spans = [pair["difference"] for pair in rows if pair["difference"] is not None]
        if not spans:
            continue
        values = [scale * span["value"] for span in spans]
        lows, highs = zip(*(_ends(span, scale) for span in spans), strict=True)
        figure.add_scatter(
            x=values,
            y=[_label(pair) for pair in rows],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - value for high, value in zip(highs, values, strict=True)],
                "arrayminus": [value - low for low, value in zip(lows, values, strict=True)],
                "color": colour,
                "thickness": 2,
            },
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 10},
            name=label,
            customdata=list(zip((pair["n"] for pair in rows), lows, highs, strict=True)),
            hovertemplate="%{x:.3g} (%{customdata[1]:.3g} to %{customdata[2]:.3g}) at "
            "%{customdata[0]} trials each<extra>" + label + "</extra>",
        )
    unit = "points of " if scale == 100.0 else ""
    figure.add_vline(x=0, line={"color": BLUE, "width": 1, "dash": "dot"})
    figure = finish(
        figure,
        title="Differences in the expected best",
        x=f"{unit}{escape(comparison['objective'])}, right of 0: the first is better",
        y="",
        height=max(200, 120 + 46 * len(tested)),
    )
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1], ticks="", type="category")
    return figure


def _ends(span: Span, scale: float) -> tuple[float, float]:
    low, high = (span["value"] if end is None else end for end in (span["low"], span["high"]))
    return scale * low, scale * high


def _label(pair: Pair) -> str:
    """On two lines, so that a narrow figure has room for the difference."""
    return f"{escape(pair['first'])}<br>– {escape(pair['second'])}"


def _band(figure: go.Figure, points: Sequence[Point], colour: str, name: str) -> None:
    known = [p for p in points if p["low"] is not None and p["high"] is not None]
    if len(known) < 2:
        for point in known:
            figure.add_scatter(
                x=[point["budget"]] * 2,
                y=[point["low"], point["high"]],
                mode="lines",
                line={"color": colour, "width": 2},
                opacity=0.5,
                legendgroup=name,
                showlegend=False,
                hoverinfo="skip",
            )
        return
    figure.add_scatter(
        x=[p["budget"] for p in known] + [p["budget"] for p in known[::-1]],
        y=[p["high"] for p in known] + [p["low"] for p in known[::-1]],
        fill="toself",
        mode="lines",
        line={"color": colour, "width": 0},
        opacity=0.18,
        legendgroup=name,
        name=f"{name}, 95 % interval",
        showlegend=False,
        hoverinfo="skip",
    )


def _room_for(values: Sequence[float]) -> list[float] | None:
    """The curves decide the axis; a band of few trials may be wider than all of them together."""
    if not values:
        return None
    low, high = min(values), max(values)
    pad = 0.4 * (high - low) or 0.05 * abs(high) or 1.0
    return [low - pad, high + pad]
