"""Frames -> speed and memory of training by batch size, and by encoder where that varies.

Left out: prices, and what else changes speed (augmentations, precision, a slow node).
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.load import SweepFrames
from analysis.style import SERIES_COLOURS, finish

SPEED, MEMORY = "images_per_s", "peak_mem_bytes"
MAX_DOTS = 300
MAX_ENCODERS = len(SERIES_COLOURS)


@dataclass(frozen=True)
class Usage:
    """A resource of trials: `table` has `number`, `batch_size`, `encoder`, `value` in `unit`."""

    metric: str
    title: str
    unit: str
    table: pd.DataFrame

    @property
    def batch_sizes(self) -> list[int]:
        return sorted(int(size) for size in self.table["batch_size"].unique())

    @property
    def encoders(self) -> list[str]:
        return sorted(self.table["encoder"].unique())

    def drawn(self) -> str:
        """What the figure leaves out, for a caption; empty where it shows every trial."""
        more = self.encoders[MAX_ENCODERS:]
        shown = self.table[~self.table["encoder"].isin(more)]
        told = ""
        if (shown["encoder"].value_counts() > MAX_DOTS).any():
            of = " of an encoder" if len(self.encoders) > 1 else ""
            told = f" Of more than {MAX_DOTS} trials{of} {MAX_DOTS} dots are drawn at random."
        if more:
            rest = len(self.table) - len(shown)
            told += f" Not drawn: {', '.join(more)} (n = {rest:,})."
        return told

    def sentence(self) -> str:
        """The median where there is nothing to compare."""
        values = self.table["value"]
        return (
            f"{self.title}: median {values.median():,.4g} {self.unit} "
            f"(n = {len(values)} trials, all with batch size {self.batch_sizes[0]})."
        )


def usage(frames: SweepFrames, metric: str) -> Usage | None:
    """SPEED or MEMORY of every trial that reported it and whose batch size is known."""
    if metric not in frames.last or not len(frames.trials):
        return None
    batch_size = pd.to_numeric(_field(frames, "batch_size"), errors="coerce")
    encoder = _field(frames, "encoder").fillna("").astype(str)
    table = pd.DataFrame(
        {
            "batch_size": batch_size,
            "encoder": encoder,
            "value": frames.last[metric].reindex(batch_size.index),
        }
    )
    table = table[np.isfinite(table["value"]) & (table["value"] > 0) & table["batch_size"].notna()]
    if table.empty:
        return None
    table = table.rename_axis("number").reset_index()
    if metric == SPEED:
        return Usage(metric, "Throughput", "images/s", table)
    unit, size = ("GiB", 2**30) if table["value"].max() >= 2**30 else ("MiB", 2**20)
    return Usage(metric, "Peak memory", unit, table.assign(value=table["value"] / size))


def usage_figure(found: Usage) -> go.Figure:
    """Dots and medians by batch size, a colour an encoder."""
    sizes = found.batch_sizes
    places = {size: float(place) for place, size in enumerate(sizes)}
    encoders = found.encoders[:MAX_ENCODERS]
    figure = go.Figure()
    slot = 0.8 / max(1, len(encoders))
    for index, encoder in enumerate(encoders):
        rows = found.table[found.table["encoder"] == encoder]
        colour = SERIES_COLOURS[index]
        shift = slot * (index - (len(encoders) - 1) / 2)
        label = escape(encoder) or "all trials"
        dots = rows
        if len(rows) > MAX_DOTS:
            kept = np.random.default_rng(0).choice(len(rows), MAX_DOTS, replace=False)
            dots = rows.iloc[np.sort(kept)]
        figure.add_scatter(
            x=[
                places[int(size)] + shift + 0.5 * slot * (number * 0.618034 % 1 - 0.5)
                for size, number in zip(dots["batch_size"], dots["number"], strict=True)
            ],
            y=dots["value"],
            customdata=dots[["number", "batch_size"]].to_numpy(dtype=int).tolist(),
            mode="markers",
            marker={"color": colour, "size": 6, "opacity": 0.6},
            name=label,
            hovertemplate="trial %{customdata[0]}, batch size %{customdata[1]}<br>%{y:,.4g} "
            + found.unit
            + "<extra></extra>",
        )
        medians = rows.groupby("batch_size")["value"].agg(["median", "size"])
        figure.add_scatter(
            x=[places[int(size)] + shift for size in medians.index],
            y=medians["median"],
            customdata=medians["size"].tolist(),
            mode="markers",
            marker={
                "color": colour,
                "symbol": "line-ew",
                "size": 30 if len(encoders) == 1 else 18,
                "line": {"color": colour, "width": 3},
            },
            showlegend=False,
            hovertemplate="median %{y:,.4g} "
            + found.unit
            + "<br>n = %{customdata}<extra>"
            + label
            + "</extra>",
        )
    figure = finish(
        figure,
        title=f"{found.title} by batch size",
        x="batch size",
        y=f"{found.title.lower()} ({found.unit})",
        height=290,
    )
    figure.update_xaxes(
        tickvals=list(places.values()),
        ticktext=[f"{size:g}" for size in sizes],
        range=[-0.6, len(sizes) - 0.4],
        showgrid=False,
    )
    figure.update_yaxes(rangemode="tozero")
    return figure.update_layout(showlegend=len(encoders) > 1)


def _field(frames: SweepFrames, name: str) -> pd.Series[Any]:
    """A field of each trial's configuration by its number: as searched, else as recorded."""
    numbers = frames.trials["number"]
    empty = pd.Series(None, index=numbers.to_list(), dtype="object")
    if name in frames.fields:
        empty = frames.fields[name].reindex(numbers.to_list()).astype("object")
    if f"param.{name}" not in frames.trials:
        return empty
    drawn = frames.trials.set_index("number")[f"param.{name}"].astype("object")
    return drawn.where(drawn.notna(), empty)
