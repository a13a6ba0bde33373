"""Frames -> parallel coordinates of the best trials, as horizontal axes one below another.

That way round every parameter keeps its whole width on a phone. Plotly's own parallel
coordinates follow no theme and cannot be read there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go

from analysis.effects import Comparable
from analysis.heat_maps import WORST_TO_BEST, colour_scale
from analysis.load import SweepFrames
from analysis.scales import Scale, scale_of
from analysis.style import COLOUR_BAR, GREY, finish

MAX_AXES = 8
MAX_LINES = 200
MIN_LINES = 3
CLASSES = 8
"""Colours of the lines, one trace each."""
END_CHARS = 9
SIDE_PX = 58
"""Room for the texts of the ends on both sides."""


def best_trials(frames: SweepFrames, compared: Comparable) -> Comparable:
    """The best MAX_LINES of the comparable trials, the worst of them first."""
    ascending = frames.info["mode"] == "max"
    values = compared.values.sort_values(ascending=ascending, kind="stable").tail(MAX_LINES)
    return Comparable(values, compared.completed, compared.mark)


def parallel_figure(
    frames: SweepFrames, by_importance: Sequence[str], drawn: Comparable
) -> go.Figure | None:
    """One line a trial of `drawn` over the MAX_AXES most important parameters that vary.

    None with fewer than MIN_LINES trials or two parameters. A line is broken where its trial
    does not have the parameter.
    """
    values = drawn.values
    settings = frames.trials.set_index("number").loc[values.index]
    names = [n for n in by_importance if settings[f"param.{n}"].map(str).nunique() > 1][:MAX_AXES]
    if len(values) < MIN_LINES or len(names) < 2:
        return None
    scales = [scale_of(frames, name) for name in names]
    x_PN = np.array(
        [
            _fractions(scale, scale.places(settings[f"param.{name}"]))
            for name, scale in zip(names, scales, strict=True)
        ]
    )
    goodness = values.to_numpy(dtype="float64") * (1 if frames.info["mode"] == "max" else -1)
    low, high = float(goodness.min()), float(goodness.max())
    share = (goodness - low) / (high - low) if high > low else np.ones(len(goodness))
    classes = np.minimum((share * CLASSES).astype(int), CLASSES - 1)
    figure = go.Figure()
    rows = [-place for place in range(len(names))]
    for index in range(CLASSES):
        xs: list[float | None] = []
        ys: list[int | None] = []
        told: list[tuple[int, float, str] | None] = []
        for column in np.flatnonzero(classes == index).tolist():
            number = int(values.index[column])
            xs += [None if math.isnan(x) else float(x) for x in x_PN[:, column]] + [None]
            ys += [*rows, None]
            texts = [escape(_shown(settings.loc[number, f"param.{name}"])) for name in names]
            told += [(number, float(values.iloc[column]), text) for text in texts] + [None]
        if xs:
            best = index / (CLASSES - 1)
            figure.add_scatter(
                x=xs,
                y=ys,
                customdata=told,
                mode="lines",
                line={"color": _colour(best), "width": 1 + 1.6 * best},
                opacity=0.35 + 0.6 * best,
                hovertemplate="trial %{customdata[0]}: %{customdata[1]:.4f}<br>"
                "%{customdata[2]}<extra></extra>",
            )
    _colour_bar(figure, frames, values.min(), values.max())
    for row, scale in zip(rows, scales, strict=True):
        figure.add_shape(
            type="line", x0=0, x1=1, y0=row, y1=row, line={"color": GREY, "width": 1.5}
        )
        _label(figure, row, scale)
    figure = finish(
        figure, title="The best trials' settings", x="", y="", height=130 + 62 * len(names)
    )
    figure.update_xaxes(range=[0, 1], visible=False)
    figure.update_yaxes(range=[rows[-1] - 0.3, 0.6], visible=False)
    figure.update_layout(margin={"l": SIDE_PX, "r": SIDE_PX})
    return figure.update_layout(showlegend=False)


def _fractions(scale: Scale, places: np.ndarray) -> np.ndarray:
    width = scale.high - scale.low
    return (places - scale.low) / width if width > 0 else np.where(np.isnan(places), places, 0.5)


def _label(figure: go.Figure, row: int, scale: Scale) -> None:
    """The name above the axis, the ends beside it, the levels between them above it."""
    figure.add_annotation(
        x=0,
        y=row,
        text=f"<b>{escape(scale.parameter)}</b>",
        showarrow=False,
        xref="paper",
        xanchor="left",
        xshift=4 - SIDE_PX,
        yshift=13,
        font={"size": 12},
    )
    ends = ((0.0, scale.low, "right", -4, 0), (1.0, scale.high, "left", 4, 0))
    inner = scale.levels[1:-1] if scale.levels and len(scale.levels) <= 5 else ()
    between = [
        (rank / (len(inner) + 1), float(rank), "center", 0, 9) for rank in range(1, len(inner) + 1)
    ]
    for x, place, anchor, shift, up in [*ends, *between]:
        text = scale.text(place)
        text = text if len(text) <= END_CHARS else text[: END_CHARS - 1] + "…"
        figure.add_annotation(
            x=x,
            y=row,
            text=escape(text),
            showarrow=False,
            xanchor=anchor,
            xshift=shift,
            yshift=up,
            font={"size": 11},
        )


def _colour_bar(figure: go.Figure, frames: SweepFrames, low: float, high: float) -> None:
    """A trace without points, for the bar that tells the colours."""
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        hoverinfo="skip",
        marker={
            "color": [low],
            "cmin": low,
            "cmax": high if high > low else low + 1,
            "colorscale": colour_scale(frames.info["mode"]),
            "showscale": True,
            "colorbar": COLOUR_BAR,
        },
    )


def _colour(share: float) -> str:
    """Colour of a share of the way from the worst to the best."""
    for (start, a), (end, b) in pairwise(WORST_TO_BEST):
        if share <= end:
            part = (share - start) / (end - start)
            mixed = [
                round(int(a[i : i + 2], 16) * (1 - part) + int(b[i : i + 2], 16) * part)
                for i in (1, 3, 5)
            ]
            return "#{:02x}{:02x}{:02x}".format(*mixed)
    return WORST_TO_BEST[-1][1]


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
