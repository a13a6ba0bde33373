"""How figures look: colours, markers, themes, and the ranges and ticks of their axes.

One colour and one marker symbol for each ending everywhere, so that neither colour alone nor the
background carries meaning: Okabe and Ito's colour-blind safe hues, shifted to at least 3 : 1
contrast on white as well as on the dark background.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis.load import BY_COMMAND, FAILED_STATES, UNFINISHED, SweepFrames
from analysis.words import ENDING_LABELS

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f7fc2", "#c8761a", "#12936c", "#bd5a98", "#858c99"

ENDING_STYLE = {
    # ending: (what the reader is told, colour, marker)
    "completed": (ENDING_LABELS["completed"], BLUE, "circle"),
    "pruned": (ENDING_LABELS["pruned"], ORANGE, "x"),
    BY_COMMAND: (ENDING_LABELS[BY_COMMAND], ORANGE, "square-open"),
    "failed": ("failed", PURPLE, "triangle-up"),
    UNFINISHED: (ENDING_LABELS[UNFINISHED], GREY, "diamond-open"),
}
DRAWN_ORDER = (UNFINISHED, "failed", BY_COMMAND, "pruned", "completed")
"""What matters most is drawn last, above all else."""
WINNER_COLOUR = GREEN
SERIES_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
COLOUR_BAR = {
    "orientation": "h",
    "thickness": 10,
    "y": 1.0,
    "ypad": 6,
    "yanchor": "bottom",
    "x": 0.5,
    "len": 1.0,
    "tickformat": ".3~g",
    "nticks": 5,
    "outlinewidth": 0,
}
"""Above a figure, as wide as it is."""

HEIGHT = 380
MAX_LOG_TICKS = 4
MAX_ROBUST_SPAN = 4.0
"""A value further below the median than this many times the spread of the better half is not
allowed to stretch the axis of the learning curves."""


def theme(dark: bool) -> dict[str, Any]:
    """Layout of a plotly template, for a light or a dark page; backgrounds are transparent."""
    ink, line, grid = (
        ("#d5d9e0", "#4a515c", "#2b3038") if dark else ("#2a2f38", "#b4bac4", "#e6e9ee")
    )
    axis = {
        "gridcolor": grid,
        "linecolor": line,
        "tickcolor": line,
        "zeroline": False,
        "tickfont": {"size": 12},
        "showline": True,
        "ticks": "outside",
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": 13}},
    }
    return {
        "font": {
            "color": ink,
            "size": 13,
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
        },
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {
            "bgcolor": "#20242b" if dark else "#ffffff",
            "bordercolor": line,
            "font": {"color": ink},
            "align": "left",
        },
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
    }


@functools.cache
def _light() -> go.layout.Template:
    """The light theme as plotly's object, which takes a tenth of a second to make from a dict."""
    return go.layout.Template({"layout": theme(dark=False)})


def group_of(ending: str) -> str:
    """The key of ENDING_STYLE: all that failed look alike."""
    if ending in FAILED_STATES:
        return "failed"
    return ending if ending in ENDING_STYLE else UNFINISHED


def finish(
    figure: go.Figure,
    *,
    title: str,
    x: str,
    y: str,
    y_range: list[float] | None = None,
    x_images: bool = False,
    height: int = HEIGHT,
) -> go.Figure:
    """Titles with units, range and template, the same for every figure."""
    figure.update_layout(
        template=_light(),
        title={"text": title},
        height=height,
        margin={"l": 10, "r": 14, "t": 56, "b": 10},
        showlegend=True,
        hovermode="closest",
    )
    figure.update_xaxes(title={"text": x}, tickformat="~s" if x_images else None)
    figure.update_yaxes(title={"text": y}, range=y_range)
    return figure


def objective_title(objective: str, mode: str) -> str:
    """An axis title that says which way is better."""
    return f"{escape(objective)} ({'higher' if mode == 'max' else 'lower'} is better)"


def finite(values: pd.Series[Any]) -> pd.Series[Any]:
    """Infinities made missing, since they cannot be drawn."""
    return values.where(values.abs() < math.inf)


def time_unit(seconds: float) -> tuple[float, str]:
    """Seconds in the unit that suits this duration, and its name."""
    if seconds >= 2 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds >= 120 else (1.0, "seconds")


def robust_range(sweeps: Sequence[SweepFrames]) -> list[float] | None:
    """Axis range in which a few ruined trials do not flatten all others; None: plotly's own."""
    values = pd.concat(
        [f.curves.loc[f.curves["metric"] == f.info["objective"], "value"] for f in sweeps]
    )
    values = finite(values).dropna()
    if len(values) < 4:
        return None
    low, high = float(values.min()), float(values.max())
    middle = float(values.median())
    if sweeps[0].info["mode"] == "max":
        low = max(low, middle - MAX_ROBUST_SPAN * (high - middle))
    else:
        high = min(high, middle + MAX_ROBUST_SPAN * (middle - low))
    pad = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return [low - pad, high + pad]


def outside(frames: SweepFrames, values: pd.Series[Any]) -> str:
    """A sentence on those that the axis of the objective leaves out; empty if there are none."""
    shown = robust_range([frames])
    count = 0 if shown is None else int((~values.dropna().between(shown[0], shown[1])).sum())
    lies = "lies" if count == 1 else "lie"
    return f" {count:,} of them, weak ones, {lies} outside the axis." if count else ""


def upper_range(
    sweeps: Sequence[SweepFrames], tables: Sequence[pd.DataFrame]
) -> list[float] | None:
    """The better half of all reports, and every best completed trial, whatever its value."""
    values = finite(pd.concat([table["value"] for table in tables])).dropna()
    if len(values) < 4:
        return None
    shown = [values.median(), values.max() if sweeps[0].info["mode"] == "max" else values.min()]
    for frames, table in zip(sweeps, tables, strict=True):
        shown += table["best_completed"].dropna().tolist()
        defaults = frames.trials[frames.trials["is_default"]]
        shown += defaults.loc[defaults["state"] == "completed", "objective"].dropna().tolist()
    low, high = float(min(shown)), float(max(shown))
    pad = 0.08 * (high - low) or abs(high) * 0.05 or 1.0
    return [low - pad, high + pad]


def log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 of each decade, at 1 and 3, or at 1: what fits a narrow figure."""
    positive = [value for value in values if value > 0]
    if not positive:
        return {}
    least, most = min(positive) / 1.3, max(positive) * 1.3
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if least <= tick <= most]
        if len(ticks) <= MAX_LOG_TICKS:
            break
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
