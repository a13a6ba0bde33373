"""Frames -> what two parameters did together: means of comparable values in tiles.

Only what was tried is told: a tile without trials stays empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.effects import Comparable
from analysis.load import SweepFrames
from analysis.scales import Floats, Scale, scale_of
from analysis.style import COLOUR_BAR, finish

USUAL_PAIRS = (("temperature", "batch_size"), ("temperature", "lr"))
"""Of contrastive losses: the temperature that is best depends on both."""
MAX_PAIRS = 4
MIN_TRIALS = 4
TRIALS_A_TILE = 3
"""As many tiles as give each that many trials on average, between 3 x 3 and 7 x 7."""
MAX_DOTS = 300

WORST_TO_BEST = ((0.0, "#55609f"), (0.35, "#2b8fae"), (0.7, "#6cbf84"), (1.0, "#f0d043"))
"""Visible on white and on the dark background at both ends."""


def colour_scale(mode: str) -> list[list[Any]]:
    """Plotly's colours from the lowest value to the highest, of which the better end is yellow."""
    if mode == "min":
        return [[1 - at, colour] for at, colour in reversed(WORST_TO_BEST)]
    return [list(stop) for stop in WORST_TO_BEST]


@dataclass(frozen=True)
class Tiles:
    """Means and counts of trials, [Y, X], over the bins of two parameters; NaN where none is."""

    x: Scale
    y: Scale
    x_edges: Floats
    y_edges: Floats
    means: Floats
    counts: Floats
    x_places: Floats
    y_places: Floats
    numbers: tuple[int, ...]
    values: Floats


def pairs(frames: SweepFrames, by_importance: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs to draw: the usual ones that were searched, then of the most important three."""
    varying = [
        name for name in by_importance if frames.trials[f"param.{name}"].map(str).nunique() > 1
    ]
    found = [pair for pair in USUAL_PAIRS if set(pair) <= set(varying)]
    first = varying[:3]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        if j < len(first) and not any({first[i], first[j]} == set(pair) for pair in found):
            found.append((first[i], first[j]))
    return found[:MAX_PAIRS]


def tiles(frames: SweepFrames, pair: tuple[str, str], compared: Comparable) -> Tiles | None:
    """Tiles of one pair, None with fewer than MIN_TRIALS trials that have both parameters."""
    x, y = scale_of(frames, pair[0]), scale_of(frames, pair[1])
    rows = frames.trials.set_index("number").loc[compared.values.index]
    x_places, y_places = (x.places(rows[f"param.{pair[0]}"]), y.places(rows[f"param.{pair[1]}"]))
    values = compared.values.to_numpy(dtype="float64")
    both = np.isfinite(x_places) & np.isfinite(y_places) & np.isfinite(values)
    if both.sum() < MIN_TRIALS:
        return None
    x_places, y_places, values = x_places[both], y_places[both], values[both]
    most = int(min(7, max(3, math.sqrt(len(values) / TRIALS_A_TILE))))
    x_edges, y_edges = x.edges(most), y.edges(most)
    counts, _, _ = np.histogram2d(y_places, x_places, bins=(y_edges, x_edges))
    sums, _, _ = np.histogram2d(y_places, x_places, bins=(y_edges, x_edges), weights=values)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)
    numbers = tuple(int(number) for number in compared.values.index[both])
    return Tiles(x, y, x_edges, y_edges, means, counts, x_places, y_places, numbers, values)


def heat_map_figure(frames: SweepFrames, found: Tiles) -> go.Figure:
    """The tiles by colour, with the trials as rings over them."""
    info, x, y = frames.info, found.x, found.y
    objective = escape(info["objective"])
    hover = [
        [
            f"{escape(x.parameter)} {escape(x.bin_text(found.x_edges, column))}<br>"
            f"{escape(y.parameter)} {escape(y.bin_text(found.y_edges, row))}<br>"
            f"mean {objective} {found.means[row, column]:.4f}<br>"
            f"n = {int(found.counts[row, column])}"
            for column in range(found.means.shape[1])
        ]
        for row in range(found.means.shape[0])
    ]
    figure = go.Figure()
    figure.add_heatmap(
        x=found.x_edges.tolist(),
        y=found.y_edges.tolist(),
        z=[[None if math.isnan(mean) else mean for mean in row] for row in found.means],
        text=hover,
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        colorscale=colour_scale(info["mode"]),
        xgap=2,
        ygap=2,
        colorbar=COLOUR_BAR,
    )
    rows = list(range(len(found.values)))
    if len(found.values) > MAX_DOTS:
        drawn = np.random.default_rng(0).choice(len(found.values), MAX_DOTS, replace=False)
        rows = sorted(drawn.tolist())
    figure.add_scatter(
        x=[found.x_places[i] + _aside(x, found.numbers[i], 0.618034) for i in rows],
        y=[found.y_places[i] + _aside(y, found.numbers[i], 0.414214) for i in rows],
        mode="markers",
        marker={"color": "#ffffff", "size": 6, "line": {"color": "#20242b", "width": 1.2}},
        customdata=[(found.numbers[i], float(found.values[i])) for i in rows],
        hovertemplate="trial %{customdata[0]}<br>%{customdata[1]:.4f}<extra></extra>",
        name="trial",
    )
    figure = finish(
        figure,
        title=f"{escape(x.parameter)} × {escape(y.parameter)}",
        x=x.title,
        y=y.title,
        height=340,
    )
    figure.update_xaxes(**x.ticks(), range=_outer(found.x_edges), showgrid=False)
    figure.update_xaxes(title={"standoff": 24})  # less may lie upon ticks at the very ends
    figure.update_yaxes(**y.ticks(), range=_outer(found.y_edges), showgrid=False)
    return figure.update_layout(showlegend=False)


def _outer(edges: Floats) -> list[float]:
    return [float(edges[0]), float(edges[-1])]


def _aside(scale: Scale, number: int, step: float) -> float:
    """A fixed shift of a trial within its level, so that trials do not hide one another."""
    if scale.stops is None:
        return 0.0
    stops = np.array(scale.stops)
    width = float(np.diff(stops).min()) if len(stops) > 1 else 1.0
    return 0.7 * width * (number * step % 1 - 0.5)
