"""Frames -> plotly figures of early stopping: what each rung let through, and what it foretold."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go

from analysis.audit import Array, Outcomes
from analysis.load import SweepFrames
from analysis.rungs import MarkCorrelation
from analysis.stopping import rung_table
from analysis.style import BLUE, GREEN, GREY, MAX_ROBUST_SPAN, ORANGE, finish, objective_title

MOST_POINTS = 1_500
"""Of more trials in one colour as many are drawn, so that the page stays light."""
BAND = "rgba(47,122,194,0.2)"
DRAW_SEED = 0


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


def correlation_figure(frames: SweepFrames, correlations: Sequence[MarkCorrelation]) -> go.Figure:
    """Kendall's tau between the objective at each mark and at the end, over the images.

    With its interval as a band: of all trials where they are known or audited, else of those
    that passed; where both are known, the latter as a thin line without one.
    """
    known = any(each.all for each in correlations)
    figure = go.Figure()
    main = [(each.early, each.all if known else each.passed) for each in correlations]
    points = [(mark, tau) for mark, tau in main if tau is not None]
    name = "all trials" if known else "trials that passed"
    x = [mark for mark, _ in points]
    figure.add_scatter(
        x=[*x, *reversed(x)],
        y=[*(tau.low for _, tau in points), *(tau.high for _, tau in reversed(points))],
        mode="lines",
        fill="toself",
        fillcolor=BAND,
        line={"width": 0},
        name="95 % interval",
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=x,
        y=[tau.tau for _, tau in points],
        customdata=[[100 * tau.agree, tau.low, tau.high, tau.n] for _, tau in points],
        mode="lines+markers",
        line={"color": BLUE, "width": 2.5},
        marker={"size": 6},
        name=name,
        hovertemplate="%{x:,} images<br>tau %{y:.2f} (%{customdata[1]:.2f} to "
        "%{customdata[2]:.2f})<br>%{customdata[0]:.0f} of 100 pairs in the order of the end"
        "<br>n = %{customdata[3]}<extra></extra>",
    )
    passed = [(each.early, each.passed) for each in correlations if each.passed and each.stopped]
    if known and passed:
        figure.add_scatter(
            x=[mark for mark, _ in passed],
            y=[tau.tau for _, tau in passed if tau],
            mode="lines",
            line={"color": GREY, "width": 1.5, "dash": "dash"},
            name="only those that passed",
            hovertemplate="%{x:,} images<br>tau %{y:.2f}<extra>only those that passed</extra>",
        )
    for rung in frames.info["rungs"][:12]:
        figure.add_vline(x=rung, line={"color": GREY, "width": 1, "dash": "dot"}, opacity=0.6)
    lowest = min([0.0, *(tau.low for _, tau in points)])
    figure = finish(
        figure,
        title="How early does the order show?",
        x="images seen by the trial",
        y="rank correlation with the end",
        y_range=[max(-1.02, lowest - 0.05), 1.03],
        x_images=True,
        height=340,
    )
    return figure.update_xaxes(range=[0, 1.02 * frames.info["total_images"]])


def end_figure(
    frames: SweepFrames, outcomes: Outcomes, rung: int, cutoff: float | None
) -> go.Figure:
    """A dot a trial: its value at the rung, and at the end where that is known.

    `cutoff`: drawn as an upright line; the level one, of one stratum, is the best trial that was
    not stopped. What was audited and ended better is a winner that stopping would have cost.
    Ticks below are stopped trials, of which only the value at the rung is known.
    """
    sign, x_N, y_N = outcomes.sign, outcomes.scores_at(rung), outcomes.end_N
    here = outcomes.stopped_at_N == rung
    ended = np.isfinite(x_N) & np.isfinite(y_N)
    earlier = outcomes.was_stopped & (outcomes.stopped_at_N < rung)
    later = outcomes.was_stopped & (outcomes.stopped_at_N > rung)
    unknown = here & ~outcomes.audited_N & np.isfinite(x_N)
    y_range = _span(y_N[ended], sign)
    floor = y_range[0] + 0.02 * (y_range[1] - y_range[0])
    figure = go.Figure()
    for name, colour, symbol, size, who in (
        ("not stopped", BLUE, "circle", 7, ended & ~outcomes.was_stopped),
        ("audited at another rung", GREY, "diamond-open", 8, ended & (earlier | later)),
        ("audited here", ORANGE, "diamond", 10, ended & here & outcomes.audited_N),
        ("stopped here, end unknown", ORANGE, "line-ns-open", 9, unknown),
    ):
        places = _some(who)
        if not len(places):
            continue
        ends = sign * y_N[places]
        figure.add_scatter(
            x=sign * x_N[places],
            y=np.full(len(places), floor) if who is unknown else ends,
            customdata=outcomes.number_N[places],
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": size, "opacity": 0.85},
            name=name,
            hovertemplate="trial %{customdata}<br>at the rung %{x:.4f}"
            + ("" if who is unknown else "<br>at the end %{y:.4f}")
            + f"<extra>{name}</extra>",
        )
    if outcomes.best_kept is not None:
        figure.add_hline(y=outcomes.best_kept, line={"color": GREEN, "width": 1.5, "dash": "dash"})
    if cutoff is not None:
        figure.add_vline(x=cutoff, line={"color": GREY, "width": 1.5, "dash": "dot"})
    objective = escape(frames.info["objective"])
    figure = finish(
        figure,
        title=f"From {rung:,} images to the end",
        x=f"{objective} at {rung:,} images",
        y=objective_title(frames.info["objective"], frames.info["mode"]).replace(
            objective, f"{objective} at the end", 1
        ),
        y_range=y_range,
    )
    return figure.update_xaxes(range=_span(x_N[ended | unknown], sign))


def _some(who_N: Array) -> Array:
    """The places of these trials; of more than MOST_POINTS, of as many drawn at random."""
    places = np.flatnonzero(who_N)
    if len(places) > MOST_POINTS:
        rng = np.random.default_rng(DRAW_SEED)
        places = np.sort(rng.choice(places, MOST_POINTS, replace=False))
    return places


def _span(scores: Array, sign: float) -> list[float]:
    """An axis of the objective that a few ruined trials do not stretch, as of `robust_range`."""
    high, middle = float(np.max(scores)), float(np.median(scores))
    low = max(float(np.min(scores)), middle - MAX_ROBUST_SPAN * (high - middle))
    pad = 0.08 * (high - low) or abs(high) * 0.05 or 1.0
    return sorted([sign * (low - pad), sign * (high + pad)])
