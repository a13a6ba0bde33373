"""`contrasweep compare`: which level of a field finds the better best, and how sure that is.

A composition root as `search.cli` is: it reads the sweeps with `analysis`, prints the table and
has `analysis` draw the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from search.console import out_console, print_json
from search.options import Json
from search.reporting import pages_folder, read_back

if TYPE_CHECKING:
    from analysis.compare import Comparison, Span

comparisons = typer.Typer()


@comparisons.command()
def compare(
    directories: Annotated[
        list[Path], typer.Argument(metavar="RUNS/NAME...", help="Sweeps, pooled into one answer.")
    ],
    by: Annotated[
        str,
        typer.Option(
            metavar="FIELD",
            help="Field of the trainer whose levels are compared, or sweep: whole sweeps.",
        ),
    ],
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare the levels of a field: expected best at equal budgets, and is it real?"""
    from analysis.compare import compare as compare_levels
    from analysis.compare_page import write_comparison
    from analysis.confirmation import read_confirmations
    from search.run import Sweep

    sweeps = [Sweep.open(directory) for directory in directories]
    frames = [read_back(each) for each in sweeps]
    read = [
        read_confirmations(each.tracking_uri, frame.info["sweep_id"])
        for each, frame in zip(sweeps, frames, strict=True)
    ]
    confirmations = [found for each in read for found in each.found]
    comparison = compare_levels(frames, by, seed=seed, confirmations=confirmations)
    comparison["notes"] += [note for each in read for note in each.notes]
    page = write_comparison(comparison, pages_folder(sweeps))
    if as_json:
        print_json({"dir": str(sweeps[0].dir), **comparison, "page": str(page)})
        return
    _print(comparison)
    out_console.print(f"page: {page}", soft_wrap=True, markup=False)


def _print(comparison: Comparison) -> None:
    out_console.print(_levels_table(comparison))
    for pair in comparison["pairs"] if len(comparison["pairs"]) > 1 else []:
        out_console.print(f"- {pair['text']}", soft_wrap=True, markup=False)
    out_console.print(comparison["verdict"], style="bold", soft_wrap=True, markup=False)
    notes = list(comparison["notes"])
    if comparison["adaptive"]:
        notes.append(
            "The sampler learned from earlier trials: they are no independent draws, as the "
            "intervals and the test take them to be."
        )
    notes.append(
        "Expected best of a third of the smallest level's trials, with its 95 % interval; "
        "stopped trials count with their last value, never above the median of their level's "
        "completed ones."
    )
    for note in notes:
        out_console.print(note, style="dim", soft_wrap=True, markup=False)


def _levels_table(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(escape(comparison["field"]))
    rows, n = comparison["levels"], comparison["n"]
    headings = ("trials", "com-\npleted", "stop-\nped", "failed", "images", "best")
    for heading in (*headings, f"expected best of {n} trial{'s' if n > 1 else ''}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        counts = (row["trials"], row["completed"], row["stopped"], row["failed"])
        table.add_row(
            escape(row["level"]),
            *map(str, counts),
            f"{row['images']:,}",
            "-" if row["best"] is None else f"{row['best']:.4f}",
            "-" if row["expected"] is None else _shown(row["expected"]),
        )
    return table


def _shown(span: Span) -> str:
    if span["low"] is None or span["high"] is None:
        return f"{span['value']:.4f}"
    return f"{span['value']:.4f} ({span['low']:.4f}..{span['high']:.4f})"
