"""What replayed settings of early stopping save and cost, as one HTML page.

The rows come from whoever replayed the recorded curves, one a setting; the page needs no network,
as plotly.js stands in it and its content security policy forbids every request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from analysis.style import BLUE, GREEN, GREY, ORANGE, finish

Row = Mapping[str, Any]
COLOURS = {"asha": BLUE, "promote": ORANGE, "median": GREEN, "none": GREY}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
"""One a reduction, in the order in which they come."""
HEIGHT_PX = 440
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
       max-width: 1120px; margin: 2rem auto; padding: 0 1rem; color: #2a2f38; background: #fff }
h1 { font-size: 1.6rem; overflow-wrap: anywhere } h2 { font-size: 1rem; margin: 1.2rem 0 0 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr));
       gap: 0 1.5rem }
section { min-width: 0 } p, figcaption { color: #5c6470; max-width: 75ch } figure { margin: 0 }
figcaption { font-size: 0.88rem }
.box { overflow-x: auto } table { border-collapse: collapse; font-size: 0.9rem }
th, td { padding: 0.2rem 0.5rem; text-align: right; border-bottom: 1px solid #dfe3e8;
         white-space: nowrap }
th { color: #5c6470; font-weight: 600 } .text { text-align: left }
"""


def survival_figure(rows: Sequence[Row]) -> go.Figure:
    """Images saved against the chance that the best trial reaches the full resource."""
    figure = _figure(rows, "survival")
    figure = finish(
        figure,
        title="Does the best trial survive?",
        x="images saved, of those without early stopping",
        y="orders in which the best trial reaches the end",
        height=HEIGHT_PX,
    )
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.05])
    return figure.update_xaxes(tickformat=".0%")


def regret_figure(rows: Sequence[Row], objective: str) -> go.Figure:
    """Images saved against how much worse than the best the chosen trial is at its end."""
    figure = _figure([row for row in rows if row["regret"] is not None], "regret")
    figure = finish(
        figure,
        title="What does the choice lose?",
        x="images saved, of those without early stopping",
        y=f"regret in {escape(objective)} (lower is better)",
        height=HEIGHT_PX,
    )
    figure.update_yaxes(rangemode="tozero")
    return figure.update_xaxes(tickformat=".0%")


def _figure(rows: Sequence[Row], measure: str) -> go.Figure:
    """A trace a scheduler and reduction; bars are the rows' ranges, hollow where unknown > 0."""
    figure = go.Figure()
    reductions = list(dict.fromkeys(row["reduction"] for row in rows))
    for scheduler, reduction in dict.fromkeys((r["scheduler"], r["reduction"]) for r in rows):
        shown = [
            row for row in rows if (row["scheduler"], row["reduction"]) == (scheduler, reduction)
        ]
        symbol = SYMBOLS[reductions.index(reduction) % len(SYMBOLS)]
        colour = COLOURS.get(scheduler, GREY)
        figure.add_scatter(
            x=[row["saving"] for row in shown],
            y=[row[measure] for row in shown],
            error_x=_bars(shown, "saving", colour),
            error_y=_bars(shown, measure, colour),
            mode="markers+text",
            text=["" if row["grace"] is None else f"{row['grace']:g}" for row in shown],
            textposition="top right",
            textfont={"size": 11},
            cliponaxis=False,
            marker={
                "color": colour,
                "size": 10,
                "symbol": [symbol + ("-open" if row["unknown"] else "") for row in shown],
                "line": {"width": 1.5, "color": colour},
            },
            name=escape(f"{scheduler}, reduction {reduction}" if reduction else str(scheduler)),
            hovertext=[_hover(row) for row in shown],
            hoverinfo="text",
        )
    return figure


def _bars(rows: Sequence[Row], measure: str, colour: str) -> dict[str, Any]:
    """From `_low` to `_high`, which a mean may lie outside of where one order is extreme."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, row[f"{measure}_high"] - row[measure]) for row in rows],
        "arrayminus": [max(0.0, row[measure] - row[f"{measure}_low"]) for row in rows],
        "thickness": 1,
        "width": 3,
        "color": colour,
    }


def _hover(row: Row) -> str:
    return "<br>".join(
        escape(f"{heading}: {text}") for heading, text in _cells(row).items() if text != "–"
    )


def _cells(row: Row, train_images: int | None = None) -> dict[str, str]:
    """Heading -> text of one row."""

    def ranged(measure: str, form: str) -> str:
        if row[measure] is None:
            return "–"
        low, high = row[f"{measure}_low"], row[f"{measure}_high"]
        return f"{row[measure]:{form}} ({low:{form}} to {high:{form}})"

    cells = {
        "scheduler": str(row["scheduler"]),
        "grace": "–" if row["grace"] is None else f"{row['grace']:g}{'*' if row['moved'] else ''}",
        "reduction": str(row["reduction"] or "–"),
        "brackets": str(row["brackets"] or "–"),
    }
    if train_images is not None:
        rungs = [f"{rung / train_images:.3g}" for rung in row["rungs"]]
        cells["rungs, epochs"] = (
            ", ".join(rungs if len(rungs) <= 5 else [*rungs[:3], "…", rungs[-1]]) or "–"
        )
    return cells | {
        "images": f"{row['images']:,.0f}",
        "saving": ranged("saving", ".0%"),
        "saving at most": f"{row['saving_at_most']:.0%}",
        "regret": ranged("regret", ".4f"),
        "best survives": ranged("survival", ".1%"),
        "unknown": f"{row['unknown']:.0%}",
    }


def write_replay(rows: Sequence[Row], about: Mapping[str, Any], out: Path) -> Path:
    """Write the page of a replay, whole or not at all; returns its path.

    `rows`: one a setting, as `contrasweep replay --json` prints them; `about`: `name`,
    `objective`, `trials`, of which `in_full`, `failed` and `stopped`, `workers`, `shuffles` and
    `train_images` of the sweep. ValueError if there is no row.
    """
    if not rows:
        raise ValueError("a replay needs at least one setting, got none")
    n = (
        f"n = {about['shuffles']} orders of {about['trials']} trials, of which {about['in_full']} "
        f"are known to their full resource and {about['failed']} failed."
    )
    bars = "A number is the grace in epochs. Bars: across, the middle 95 of 100 orders; upright, "
    hollow = " Hollow: some trial runs ended where the records do, and are charged in full."
    hollow = hollow if any(row["unknown"] for row in rows) else ""
    figures = [
        (survival_figure(rows), f"{bars}Wilson's 95 % interval. {n}{hollow}"),
        (regret_figure(rows, about["objective"]), f"{bars}the same of the regret. {n}{hollow}"),
    ]
    page = _page(rows, about, n, figures)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.part")
    beside.write_text(page, encoding="utf-8")
    beside.replace(out)
    return out


def _page(
    rows: Sequence[Row],
    about: Mapping[str, Any],
    n: str,
    figures: Sequence[tuple[go.Figure, str]],
) -> str:
    sections = []
    for number, (figure, caption) in enumerate(figures):
        title = figure.layout.title.text
        figure.update_layout(title=None, margin={"t": 40})
        drawn = figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{number}",  # else random: the same rows give the same page
            config={"displayModeBar": False, "responsive": True},
        )
        sections.append(
            f"<section><h2>{escape(title)}</h2><figure>{drawn}"
            f"<figcaption>{escape(caption)}</figcaption></figure></section>"
        )
    table = [_cells(row, about["train_images"]) for row in rows]
    if all((row["brackets"] or 1) == 1 for row in rows):
        for cells in table:
            del cells["brackets"]
    head = "".join(f"<th>{escape(heading)}</th>" for heading in table[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in cells.values()) + "</tr>"
        for cells in table
    )
    notes = [
        f"The same {about['shuffles']} random orders of arrival for each setting, as many trials "
        f"at once as there were ({about['workers']}), the scheduler of real sweeps, the recorded "
        "curves. It tells of these trials; another setting would have led the sampler to others.",
        "Saving: share of the images that a sweep without early stopping takes. Regret: final "
        f"{about['objective']} of the best recorded trial less that of the trial chosen.",
        *_caveats(rows, about),
    ]
    name = escape(str(about["name"]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{name}: replay</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><h1>{name}: replay of early stopping</h1>"
        f"<p>{escape(n)}</p><main>{''.join(sections)}</main>"
        f'<h2>Settings</h2><div class="box"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f"{''.join(f'<p>{escape(note)}</p>' for note in notes)}</body></html>"
    )


def _caveats(rows: Sequence[Row], about: Mapping[str, Any]) -> list[str]:
    caveats = []
    if any(row["moved"] for row in rows):
        caveats.append("* A rung moved up to the next recorded report: no value is known between.")
    if any(row["unknown"] for row in rows):
        caveats.append(
            "Unknown: share of the trial runs that a setting lets go on beyond what was recorded. "
            "They end there, cannot be chosen, and are charged their full resource; “saving at "
            "most” charges them what is known."
        )
    if about["stopped"]:
        caveats.append(
            f"{about['stopped']} trials were stopped or cut off when they were recorded. A sweep "
            "recorded with --scheduler none, or with --audit, makes better material."
        )
    return caveats
