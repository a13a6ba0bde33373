"""What replayed settings of early stopping save and cost, as one HTML page.

The rows come from whoever replayed the recorded curves, one a setting; the page needs no network,
as plotly.js stands in it and its content security policy forbids every request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from analysis.style import BLUE, GREEN, GREY, ORANGE, finish

Row = Mapping[str, Any]
COLOURS = {"asha": BLUE, "promote": ORANGE, "median": GREEN, "none": GREY}
SYMBOLS = (
    ("circle", "●"),
    ("square", "■"),
    ("diamond", "◆"),
    ("triangle-up", "▲"),
    ("cross", "✚"),
    ("star", "★"),
)
"""One a grace, the shortest first: plotly's name and a letter that looks like it."""
SIZES_PX = (8, 11, 14, 17)
"""One a reduction, the smallest first."""
NO_REGRET_SPAN = 0.01
"""Height of the axis where no setting has a regret: one point of accuracy."""
HEIGHT_PX = 380
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
       max-width: 1120px; margin: 2rem auto; padding: 0 1rem; color: #2a2f38; background: #fff }
h1 { font-size: 1.6rem; overflow-wrap: anywhere } h2 { font-size: 1rem; margin: 1.2rem 0 0 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr));
       gap: 0 1.5rem }
section { min-width: 0 } p, figcaption { color: #5c6470; max-width: 75ch } figure { margin: 0 }
figcaption { font-size: 0.88rem }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.1rem; font-size: 0.88rem }
.legend i { font-style: normal; vertical-align: middle; line-height: 1 }
.box { overflow-x: auto } table { border-collapse: collapse; font-size: 0.9rem; width: 100% }
th, td { padding: 0.25rem 0.5rem; text-align: right; border-bottom: 1px solid #dfe3e8;
         vertical-align: top }
td { white-space: nowrap } small { display: block; color: #5c6470 }
th { color: #5c6470; font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; text-align: left }
"""


def survival_figure(rows: Sequence[Row]) -> go.Figure:
    """Images saved against the chance that the best trial reaches the full resource."""
    figure = _figure(rows, "survival")
    figure = finish(
        figure,
        title="Does the best trial survive?",
        x="images saved",
        y="orders in which the best trial survives",
        height=HEIGHT_PX,
    )
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.05])
    return figure.update_xaxes(tickformat=".0%")


def regret_figure(rows: Sequence[Row], objective: str) -> go.Figure:
    """Images saved against how much worse than the best the chosen trial is at its end."""
    known = [row for row in rows if row["regret"] is not None]
    figure = _figure(known, "regret")
    figure = finish(
        figure,
        title="What does the choice lose?",
        x="images saved",
        y=f"regret in {escape(objective)} (lower is better)",
        height=HEIGHT_PX,
    )
    if any(row["regret_high"] > 0 for row in known):
        figure.update_yaxes(rangemode="tozero")
    else:  # plotly's own range would be -1 to 1, which nothing here measures
        figure.update_yaxes(range=[-0.05 * NO_REGRET_SPAN, NO_REGRET_SPAN])
        figure.add_annotation(
            text="no regret in any setting" if known else "no regret is known",
            xref="paper",
            yref="paper",
            x=0.5,
            y=0.6,
            showarrow=False,
            font={"size": 15, "color": GREY},
        )
    return figure.update_xaxes(tickformat=".0%")


def _figure(rows: Sequence[Row], measure: str) -> go.Figure:
    """A trace a scheduler (colour) and reduction (size), a symbol a grace.

    Bars are the rows' ranges, symbols hollow where unknown > 0.
    """
    figure = go.Figure()
    symbols, sizes = _symbols(rows), _sizes(rows)
    for scheduler, reduction in dict.fromkeys((r["scheduler"], r["reduction"]) for r in rows):
        shown = [
            row for row in rows if (row["scheduler"], row["reduction"]) == (scheduler, reduction)
        ]
        colour = COLOURS.get(scheduler, GREY)
        figure.add_scatter(
            x=[row["saving"] for row in shown],
            y=[row[measure] for row in shown],
            error_x=_bars(shown, "saving", colour),
            error_y=_bars(shown, measure, colour),
            mode="markers",
            cliponaxis=False,
            marker={
                "color": colour,
                "size": sizes[reduction],
                "symbol": [
                    symbols[row["grace"]][0] + ("-open" if row["unknown"] else "") for row in shown
                ],
                "line": {"width": 1.5, "color": colour},
            },
            name=escape(f"{scheduler}, reduction {reduction}" if reduction else str(scheduler)),
            hovertext=[_hover(row) for row in shown],
            hoverinfo="text",
        )
    return figure


def _symbols(rows: Sequence[Row]) -> dict[float | None, tuple[str, str]]:
    """Grace -> its symbol, the shortest grace first; a setting without one has a circle, too."""
    graces = sorted({row["grace"] for row in rows if row["grace"] is not None})
    symbols = {grace: SYMBOLS[place % len(SYMBOLS)] for place, grace in enumerate(graces)}
    return {None: SYMBOLS[0], **symbols}


def _sizes(rows: Sequence[Row]) -> dict[int | None, int]:
    """Reduction -> size of its symbols in pixels, the smallest reduction first."""
    reductions = sorted({row["reduction"] for row in rows if row["reduction"]})
    sizes = {each: SIZES_PX[min(at, len(SIZES_PX) - 1)] for at, each in enumerate(reductions)}
    return {None: SIZES_PX[0], **sizes}


def _legend(rows: Sequence[Row]) -> str:
    """One for both figures, as HTML, which wraps on a phone as a figure's own legend does not."""
    colours = {str(row["scheduler"]): COLOURS.get(row["scheduler"], GREY) for row in rows}
    keys = [_key(SYMBOLS[0][1], colour, 11, name) for name, colour in colours.items()]
    sizes = [(each, px) for each, px in _sizes(rows).items() if each is not None]
    keys += [_key(SYMBOLS[0][1], GREY, px, f"reduction {each}") for each, px in sizes]
    symbols = [(each, symbol) for each, symbol in _symbols(rows).items() if each is not None]
    keys += [_key(symbol, GREY, 11, f"grace {each:g}") for each, (_, symbol) in symbols]
    return f'<p class="legend">{"".join(keys)}</p>'


def _key(symbol: str, colour: str, size_px: int, name: str) -> str:
    style = f"color: {colour}; font-size: {1.5 * size_px:g}px"  # a letter's disc is smaller
    return f'<span><i style="{style}">{symbol}</i> {escape(name)}</span>'


def _bars(rows: Sequence[Row], measure: str, colour: str) -> dict[str, Any]:
    """From `_low` to `_high`, which a mean may lie outside of where one order is extreme."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, row[f"{measure}_high"] - row[measure]) for row in rows],
        "arrayminus": [max(0.0, row[measure] - row[f"{measure}_low"]) for row in rows],
        "thickness": 1,
        "width": 0,
        "color": f"rgba({red},{green},{blue},0.45)",
    }


def _hover(row: Row) -> str:
    return "<br>".join(
        escape(" ".join((f"{heading}:", *texts)))
        for heading, texts in _cells(row).items()
        if texts != ("–",)
    )


def _cells(row: Row, train_images: int | None = None) -> dict[str, tuple[str, ...]]:
    """Heading -> text, and the text of its range where it has one; what matters most first."""

    def ranged(measure: str, told: Callable[[float], str]) -> tuple[str, ...]:
        if row[measure] is None:
            return ("–",)
        low, high = told(row[f"{measure}_low"]), told(row[f"{measure}_high"])
        return told(row[measure]), f"({low} to {high})"

    grace = "–" if row["grace"] is None else f"{row['grace']:g}{'*' if row['moved'] else ''}"
    cells = {
        "scheduler": (str(row["scheduler"]),),
        "grace, epochs": (grace,),
        "reduction": (str(row["reduction"] or "–"),),
        "brackets": (str(row["brackets"] or "–"),),
        "best survives": ranged("survival", _percent),
        "saving": ranged("saving", _percent),
        "regret": ranged("regret", lambda value: f"{value:.4f}" if value else "0"),
    }
    if train_images is not None:
        rungs = [f"{rung / train_images:.3g}" for rung in row["rungs"]]
        shown = ", ".join(rungs if len(rungs) <= 5 else [*rungs[:3], "…", rungs[-1]])
        cells["rungs, epochs"] = (shown or "–",)
    return cells | {
        "images": (f"{row['images']:,.0f}",),
        "unknown": (_percent(row["unknown"]),),
        "saving at most": (_percent(row["saving_at_most"]),),
    }


def _percent(share: float) -> str:
    """Whole per cent, but never 0 or 100 for what is only near them."""
    whole, finer = f"{share:.0%}", f"{share:.1%}"
    if share in (0, 1) or whole not in ("0%", "100%"):
        return whole
    return {"0.0%": "<0.1%", "100.0%": ">99.9%"}.get(finer, finer)


def write_replay(rows: Sequence[Row], about: Mapping[str, Any], out: Path) -> Path:
    """Write the page of a replay, whole or not at all; returns its path.

    `rows`: one a setting, as `contrasweep replay --json` prints them; `about`: `name`,
    `objective`, `trials`, of which `in_full`, `failed` and `stopped`, `workers`, `shuffles` and
    `train_images` of the sweep, and `min_competitors` of the settings if that is known. ValueError
    if there is no row.
    """
    if not rows:
        raise ValueError("a replay needs at least one setting, got none")
    n = (
        f"n = {about['shuffles']} orders of {about['trials']} trials, of which {about['in_full']} "
        f"are known to their full resource and {about['failed']} failed."
    )
    bars = (
        "Colour: scheduler; size: reduction; symbol: grace in epochs. Bars: across, the middle 95 "
        "of 100 orders; upright, "
    )
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
        figure.update_layout(title=None, margin={"t": 14}, showlegend=False)
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
    left_out = ["brackets"] if all((row["brackets"] or 1) == 1 for row in rows) else []
    left_out += [] if any(row["unknown"] for row in rows) else ["unknown", "saving at most"]
    headings = [heading for heading in table[0] if heading not in left_out]
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        "<tr>" + "".join(_td(*cells[heading]) for heading in headings) + "</tr>" for cells in table
    )
    notes = [
        f"The same {about['shuffles']} random orders of arrival for each setting, as many trials "
        f"at once as there were ({about['workers']}), the scheduler of real sweeps, the recorded "
        "curves. It tells of these trials; another setting would have led the sampler to others.",
        "Hover over a point for its setting. Best survives: share of the orders in which the best "
        "recorded trial reaches the end. "
        "Saving: share of the images that a sweep without early stopping takes. Regret: final "
        f"{about['objective']} of the best recorded trial less that of the trial chosen. In "
        "brackets: the range, as the bars of the figures.",
        *_decides_from(about),
        *_caveats(rows, about),
    ]
    name = escape(str(about["name"]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{name}: replay</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><h1>{name}: replay of early stopping</h1>"
        f"<p>{escape(n)}</p>{_legend(rows)}<main>{''.join(sections)}</main>"
        f'<h2>Settings</h2><div class="box"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f"{''.join(f'<p>{escape(note)}</p>' for note in notes)}</body></html>"
    )


def _decides_from(about: Mapping[str, Any]) -> list[str]:
    least = about.get("min_competitors")
    return [] if least is None else [f"A rung decides from {least} values on."]


def _td(text: str, span: str = "") -> str:
    small = f"<small>{escape(span)}</small>" if span else ""
    return f"<td>{escape(text)}{small}</td>"


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
            "recorded with --scheduler none, or a larger --audit, makes better material."
        )
    return caveats
