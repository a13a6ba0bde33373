"""The learning curves of one run, from the metrics.csv that it wrote, as one HTML page."""

from __future__ import annotations

import html
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.style import BLUE, GREEN, GREY, ORANGE, PURPLE, theme

PANELS = (
    ("accuracy on validation images", ("knn_top1", "linear_top1")),
    ("training loss", ("train_loss",)),
    ("views: alignment, uniformity (lower is better)", ("alignment", "uniformity")),
    ("features: effective rank", ("rankme",)),
    ("features: spread (1: over the sphere, 0: collapsed)", ("feature_std",)),
    ("learning rate", ("lr",)),
)
COLOURS = {
    "knn_top1": BLUE,
    "linear_top1": ORANGE,
    "train_loss": PURPLE,
    "alignment": GREEN,
    "uniformity": PURPLE,
}
COLUMNS, ROW_PX = 2, 290


def training_figure(reports: pd.DataFrame) -> go.Figure:
    """A panel a measure over epochs; measures that no report has are left out.

    `reports`: a row a report, with the columns of metrics.csv. The best kNN accuracy is marked.
    """
    panels = [
        (title, [name for name in names if name in reports and reports[name].notna().any()])
        for title, names in PANELS
    ]
    panels = [(title, names) for title, names in panels if names]
    rows = -(-len(panels) // COLUMNS)
    figure = make_subplots(
        rows=rows,
        cols=COLUMNS,
        subplot_titles=[title for title, _ in panels],
        vertical_spacing=0.26 / rows,
        horizontal_spacing=0.09,
    )
    for index, (_, names) in enumerate(panels):
        place = {"row": index // COLUMNS + 1, "col": index % COLUMNS + 1}
        for name in names:
            known = reports[reports[name].notna()]
            figure.add_scatter(
                x=known["epoch"],
                y=known[name],
                name=name,
                mode="lines+markers",
                line={"color": COLOURS.get(name, GREY), "width": 2},
                marker={"size": 5},
                showlegend=len(names) > 1,
                **place,
            )
        figure.update_xaxes(title={"text": "epochs"}, **place)
    if "knn_top1" in reports and reports["knn_top1"].notna().any():
        best = reports.sort_values("knn_top1").iloc[-1]
        figure.add_scatter(
            x=[best["epoch"]],
            y=[best["knn_top1"]],
            name="best kNN",
            mode="markers+text",
            text=[f"{best['knn_top1']:.4f}"],
            textposition="bottom center",
            marker={"size": 12, "color": GREEN, "symbol": "star"},
            showlegend=False,
            row=1,
            col=1,
        )
    figure.update_layout(
        template={"layout": theme(dark=False)},
        height=ROW_PX * rows,
        margin={"l": 10, "r": 14, "t": 60, "b": 10},
        hovermode="x unified",
        paper_bgcolor="white",
    )
    figure.update_annotations(font={"size": 13})
    return figure


def write_curves(metrics_csv: Path, out: Path) -> Path:
    """Write the page of a run's curves, self-contained; returns its path.

    A ValueError if `metrics_csv` has no report.
    """
    reports = pd.read_csv(metrics_csv)
    if reports.empty:
        raise ValueError(f"{metrics_csv} has no report yet; nothing to draw")
    body = training_figure(reports).to_html(
        full_html=False, include_plotlyjs=True, config={"displaylogo": False, "responsive": True}
    )
    name = html.escape(metrics_csv.parent.name)
    last = reports.iloc[-1]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title>"
        "<style>body{font-family:system-ui,sans-serif;max-width:1100px;margin:2rem auto;"
        "padding:0 1rem;color:#2a2f38}</style></head><body>"
        f"<h1>{name}</h1><p>{len(reports)} reports, {int(last['samples_seen']):,} images, "
        f"{last['epoch']:.1f} epochs, {last['wall_s']:,.0f} s.</p>{body}</body></html>"
    )
    beside = out.with_name(f".{out.name}.part")
    beside.write_text(page, encoding="utf-8")
    beside.replace(out)
    return out
