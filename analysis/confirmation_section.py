"""Confirmations as a section of the report's page: verdict, tables and a forest plot."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from analysis.confirmation import confirmation_rows, summarise_confirmation
from analysis.confirmation_record import Confirmation, SweepConfirmations
from analysis.confirmation_verdict import against_baseline, headline
from analysis.page import Figures
from analysis.style import BLUE, GREEN, GREY, finish, objective_title

MOST_DRAWN = 40
"""Candidates in one figure."""
MOST_NAME = 28
"""Characters of a name beside a figure."""
MOST_SHOWN = 10
"""Confirmations on a page, the newest."""
LIFT = 0.16
"""How far a mark lies above or below its candidate's line, of the way to the next."""


def confirmation_section(
    confirmations: SweepConfirmations | None, figures: Figures, prefix: str
) -> dict[str, Any] | None:
    """What `confirmation.html.j2` takes, its figures added to `figures`; None for nothing to say.

    `head` is of the newest confirmation that has a winner: what a hurried reader is told.
    """
    if confirmations is None or not (confirmations.found or confirmations.notes):
        return None
    shown = confirmations.found[:MOST_SHOWN]
    items = [_item(each, figures, f"{prefix}-confirm{place}") for place, each in enumerate(shown)]
    notes = list(confirmations.notes)
    hidden = len(confirmations.found) - len(shown)
    if hidden:
        notes.append(f"{hidden} older confirmations are not shown.")
    return {"items": items, "notes": notes, "head": next(filter(None, map(_head, items)), None)}


def _item(confirmation: Confirmation, figures: Figures, key: str) -> dict[str, Any]:
    summary = summarise_confirmation(confirmation)
    rows = [row | {"label": _short(row["name"])} for row in confirmation_rows(summary)]
    figure = forest_figure(summary, rows)
    return {
        "id": key,
        "summary": summary,
        "rows": rows,
        "differences": _by_pair(summary["differences"]),
        "date": f"{confirmation.start:%Y-%m-%d %H:%M} UTC",
        "figure": figure and figures.add(key, figure, _caption(summary, rows)),
    }


def _head(item: dict[str, Any]) -> dict[str, Any] | None:
    """The newest winner on test; None where there is no value."""
    summary = item["summary"]
    told = headline(summary)
    if not told:
        return None
    name = summary["winner"]["candidate"]
    return {
        "text": told,
        "against": " ".join(against_baseline(summary)),
        "candidate": name,
        "trial": summary["candidates"][name]["trial"],
        "figure": summary["candidates"][name][f"test_{summary['objective']}"],
        "ordinal": summary["ordinal"],
        "images": summary["test_images"],
        "result": next(
            (
                gap["result"]
                for gap in summary["differences"]
                if gap["split"] == "test" and gap["kind"] == "baseline" and gap["first"] == name
            ),
            None,
        ),
    }


def _by_pair(gaps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a pair, with its difference on test and on val."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for gap in gaps:
        row = found.setdefault((gap["first"], gap["second"]), {"test": None, "val": None})
        row[gap["split"]] = gap
    return [{"first": _short(a), "second": _short(b), **row} for (a, b), row in found.items()]


def forest_figure(summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> go.Figure | None:
    """Each candidate's mean on test and on val with its interval, and what the search had found.

    None where no training was completed.
    """
    drawn = [row for row in rows[:MOST_DRAWN] if row["val"] or row["test"]]
    if not drawn:
        return None
    figure = go.Figure()
    for split, colour, symbol, side in (
        ("test", GREEN, "circle", -LIFT),
        ("val", BLUE, "square", LIFT),
    ):
        found = [(place, row) for place, row in enumerate(drawn) if row[split]]
        values = [row[split] for _, row in found]
        figure.add_scatter(
            x=[value["mean"] for value in values],
            y=[place + side for place, _ in found],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [_end(value, "high") - value["mean"] for value in values],
                "arrayminus": [value["mean"] - _end(value, "low") for value in values],
                "color": colour,
                "thickness": 2,
            },
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 10},
            name=split,
            customdata=[[escape(row["label"]), row[split]["n"]] for _, row in found],
            hovertemplate="%{customdata[0]}: %{x:.4f}, %{customdata[1]} seeds<extra>"
            + split
            + "</extra>",
        )
    searched = [(place, row) for place, row in enumerate(drawn) if row["searched"] is not None]
    if searched:
        figure.add_scatter(
            x=[row["searched"] for _, row in searched],
            y=[place + LIFT for place, _ in searched],
            mode="markers",
            marker={"color": GREY, "symbol": "diamond-open", "size": 11, "line": {"width": 2}},
            name="value of the search, on val",
            customdata=[[escape(row["label"])] for _, row in searched],
            hovertemplate="%{customdata[0]}: %{x:.4f}<extra>search</extra>",
        )
    figure = finish(
        figure,
        title=f"Confirmed {escape(summary['objective'])}",
        x=objective_title(summary["objective"], summary["mode"]),
        y="",
        height=max(220, 130 + 54 * len(drawn)),
    )
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(drawn))),
        ticktext=[_label(row) for row in drawn],
        range=[len(drawn) - 0.5, -0.5],  # the best above
        ticks="",
        showgrid=False,
    )
    return figure


def _caption(summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    done = ", ".join(f"{row['completed']} of {row['label']}" for row in rows[:MOST_DRAWN])
    caption = (
        f"Means over fresh seeds, n = {done}; {summary['test_images']:,} images of test and "
        f"{summary['val_images']:,} of val. Lines: 95 % intervals over the choice of seeds and of "
        "images. Hollow: what the search had found with one seed, on the same images of val."
    )
    hidden = len(rows) - MOST_DRAWN
    return caption + (f" {hidden} further candidates are in the table alone." if hidden > 0 else "")


def _end(value: dict[str, Any], end: str) -> float:
    return float(value["mean"] if value[end] is None else value[end])


def _label(row: dict[str, Any]) -> str:
    """On two lines, so that a narrow figure has room for the marks."""
    roles = ["winner"] if row["winner"] else []
    roles += ["baseline"] if row["baseline"] and row["name"] != "baseline" else []
    second = f"<br>({', '.join(roles)})" if roles else ""
    return escape(row["label"]) + second


def _short(name: str) -> str:
    return name if len(name) <= MOST_NAME else f"{name[: MOST_NAME - 1]}…"
