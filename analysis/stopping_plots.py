"""Frames -> plotly figures of early stopping: what each rung let through."""

from __future__ import annotations

import plotly.graph_objects as go

from analysis.load import SweepFrames
from analysis.stopping import rung_table
from analysis.style import BLUE, GREY, ORANGE, finish


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
