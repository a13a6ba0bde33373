"""The learning curves of one run, from the metrics.csv that it wrote, as one HTML page."""

from __future__ import annotations

import html
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from analysis.style import BLUE, GREEN, ORANGE, theme

PANELS = (
    ("accuracy on validation images", ("knn_top1", "linear_top1", "top1")),
    ("training loss", ("train_loss",)),
    ("loss on validation images", ("val_loss",)),
    ("alignment, uniformity (lower is better)", ("alignment", "uniformity")),
    ("effective rank of the features", ("rankme",)),
    ("spread of the features (0: collapsed)", ("feature_std",)),
    ("learning rate", ("lr",)),
)
FROM_ZERO = ("feature_std", "lr", "rankme")
"""Measures whose distance from 0 is what matters."""
COLOURS = (BLUE, ORANGE)
HEIGHT_PX = 280
STYLE = """
body { font-family: system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
       color: #2a2f38 }
h2 { font-size: 1rem; margin: 1rem 0 0 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr));
       gap: 0 1.5rem }
section { min-width: 0 }
"""


def training_figures(reports: pd.DataFrame) -> dict[str, go.Figure]:
    """Title -> figure of a measure over epochs; measures that no report has are left out.

    `reports`: a row a report, with the columns of metrics.csv. The best kNN accuracy is marked.
    """
    figures = {}
    for title, names in PANELS:
        known = [name for name in names if name in reports and reports[name].notna().any()]
        if known:
            figures[title] = _figure(reports, known)
    return figures


def _figure(reports: pd.DataFrame, names: list[str]) -> go.Figure:
    figure = go.Figure()
    for name, colour in zip(names, COLOURS, strict=False):
        known = reports[reports[name].notna()]
        figure.add_scatter(
            x=known["epoch"],
            y=known[name],
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 5},
        )
    if "knn_top1" in names:
        # the first of equals, as patience has it
        best = reports.iloc[int(reports["knn_top1"].argmax())]
        figure.add_scatter(
            x=[best["epoch"]],
            y=[best["knn_top1"]],
            name=f"best kNN {best['knn_top1']:.4f}",
            mode="markers",
            marker={"size": 13, "color": GREEN, "symbol": "star"},
        )
    figure.update_layout(
        template={"layout": theme(dark=False)},
        height=HEIGHT_PX,
        margin={"l": 10, "r": 14, "t": 34, "b": 10},
        showlegend=len(figure.data) > 1,
        hovermode="x unified",
    )
    figure.update_xaxes(title={"text": "epochs"})
    if names[0] in FROM_ZERO:
        figure.update_yaxes(range=[0, 1.1 * max(float(reports[names[0]].max()), 1e-12)])
    return figure


def write_curves(metrics_csv: Path, out: Path) -> Path:
    """Write the page of a run's curves, self-contained; returns its path.

    A ValueError if `metrics_csv` has no report.
    """
    reports = pd.read_csv(metrics_csv)
    if reports.empty:
        raise ValueError(f"{metrics_csv} has no report yet; nothing to draw")
    sections = []
    for number, (title, figure) in enumerate(training_figures(reports).items()):
        drawn = figure.to_html(
            full_html=False,
            include_plotlyjs=number == 0,
            config={"displayModeBar": False, "responsive": True},
        )
        sections.append(f"<section><h2>{html.escape(title)}</h2>{drawn}</section>")
    name = html.escape(metrics_csv.parent.name)
    last = reports.iloc[-1]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head><body>"
        f"<h1>{name}</h1><p>Reports: {len(reports)}; {int(last['samples_seen']):,} images, "
        f"{last['epoch']:.1f} epochs, {last['wall_s']:,.0f} s.</p>"
        f"<main>{''.join(sections)}</main></body></html>"
    )
    beside = out.with_name(f".{out.name}.part")
    beside.write_text(page, encoding="utf-8")
    beside.replace(out)
    return out
