"""`contrasweep confirm`: a sweep's best configurations, trained anew with fresh seeds and tested.

A composition root as `search.cli` is: the confirmation is a sweep, and what it found is read back
from MLflow by `analysis`.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from search.console import err_console, out_console, print_json
from search.mistakes import INTERRUPTED, mistake_in
from search.options import CacheDir, Download, Json, SweepDir
from search.reporting import make_report

if TYPE_CHECKING:
    from search.candidates import ConfirmationPlan
    from search.result import SweepResult
    from search.run import Sweep

confirming = typer.Typer()


@confirming.command()
def confirm(
    directory: SweepDir,
    top: Annotated[int, typer.Option(min=1, help="Best configurations to confirm.")] = 3,
    seeds: Annotated[int, typer.Option(min=2, max=100, help="Fresh seeds of each.")] = 5,
    epochs: Annotated[
        float | None, typer.Option(help="Length of each training. (default: the sweep's)")
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="What they are compared with: default, none, or a trial's number.")
    ] = "default",
    again: Annotated[
        bool, typer.Option("--again", help="Use the test split once more, marked as such.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, if it is another by now; local: none.")
    ] = None,
    download: Download = False,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Train the best configurations anew with fresh seeds, and use the test split once."""
    from search.candidates import Wish, plan_confirmation
    from search.progress import DataProgress, SweepDisplay
    from search.run import Sweep
    from search.store import connect, recorded_confirmations

    if epochs is not None and not epochs > 0:
        raise ValueError(f"--epochs must be above 0, got {epochs:g}")
    sweep = Sweep.open(directory)
    recorded = 0
    if not sweep.config.offline_tracking:
        sweep.record_rest()
        recorded = recorded_confirmations(connect(sweep.tracking_uri), sweep.sweep_id())
    wish = Wish(top, seeds, epochs, baseline, again, address)
    plan = plan_confirmation(sweep, wish, recorded)
    for note in plan.notes:
        err_console.print(note, soft_wrap=True)
    # Ray prints the news of its workers to standard output, which is for results alone
    with contextlib.redirect_stdout(sys.stderr), SweepDisplay(err_console) as display:
        options: dict[str, Any] = {
            "download": download,
            "cache_dir": cache_dir,
            "data_progress": DataProgress(err_console),
            "on_step": display,
            "on_note": display.note,
        }
        confirming = _sweep_of(plan, sweep, wish.address, options)
        try:
            result = confirming.run() if plan.resumes is None else confirming.resume()
        except KeyboardInterrupt:
            display.note(f"ended at once; go on with: contrasweep resume {confirming.dir}")
            raise
    conclude_confirmation(confirming, result, as_json)


def _sweep_of(
    plan: ConfirmationPlan, sweep: Sweep, address: str | None, options: dict[str, Any]
) -> Sweep:
    from search.run import Sweep

    if plan.resumes is None:
        confirming = Sweep(plan.config, **options)
        confirming.tracking_uri = sweep.tracking_uri
        return confirming
    confirming = Sweep.open(plan.resumes, **options)
    if address is not None:
        moved = confirming.config.model_copy(update={"address": address})
        confirming.config = moved.resolved()
    return confirming


def conclude_confirmation(confirmation: Sweep, result: SweepResult, as_json: bool) -> None:
    """Tell what a confirmation found, and write its sweep's report; typer.Exit if it went ill.

    A report that cannot be made costs a note, as does what MLflow lacks.
    """
    summary: dict[str, Any] | None = None
    page: Path | None = None
    if not result.unrecorded:
        try:
            summary = read_summary(confirmation)
            page = _report(confirmation)
        except (ValueError, OSError) as error:
            err_console.print(f"no report: {mistake_in(error)}", soft_wrap=True)
    if as_json:
        answer = {**result.to_json(), **(summary or {}), "report": page and str(page)}
        print_json({**answer, "name": result.name, "dir": str(result.dir)})
    elif summary is not None:
        print_confirmation(summary)
        if page is not None:
            out_console.print(f"report: {page}", soft_wrap=True)
    if result.unrecorded:
        err_console.print(
            f"MLflow lacks a part of this confirmation ({result.unrecorded}); once the store "
            f"answers: contrasweep sync {result.dir}",
            soft_wrap=True,
        )
    if result.state != "finished":
        if result.reason:
            err_console.print(result.reason, markup=False, soft_wrap=True)
        err_console.print(f"go on with: contrasweep resume {result.dir}", soft_wrap=True)
        raise typer.Exit(1 if result.why in ("failing", "storage", "node") else INTERRUPTED)
    if not result.trials.get("completed"):
        err_console.print(f"no training came to a result; see {result.dir / 'trials'}/*/log.txt")
        raise typer.Exit(1)


def read_summary(confirmation: Sweep) -> dict[str, Any]:
    """What MLflow has of a confirmation, judged; ValueError where it has nothing yet."""
    from analysis.confirmation import read_confirmations, summarise_confirmation

    assert confirmation.config.confirmation is not None
    own = confirmation.sweep_id()
    read = read_confirmations(confirmation.tracking_uri, confirmation.config.confirmation.sweep_id)
    for each in read.found:
        if each.sweep_id == own:
            return summarise_confirmation(each)
    raise ValueError(" ".join(["MLflow has nothing of it that can be read:", *read.notes]))


def _report(confirmation: Sweep) -> Path:
    """The report of the sweep that was confirmed, which tells this, too."""
    from search.run import Sweep

    page, _ = make_report([Sweep.open(confirmation.dir.parent)])
    return page


def print_confirmation(summary: dict[str, Any]) -> None:
    """The candidates, winner first, and the verdict in sentences."""
    from analysis.confirmation import confirmation_rows

    objective = summary["objective"]
    headings = ("", "seeds", "searched", f"val {objective}", f"test {objective}", "to the baseline")
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    rows = confirmation_rows(summary)
    for row in rows:
        gap = row["against"]
        table.add_row(
            f"{row['name']}{'*' if row['winner'] else ''}{'†' if row['baseline'] else ''}",
            str(row["completed"]),
            "-" if row["searched"] is None else f"{row['searched']:.4f}",
            _interval(row["val"]),
            _interval(row["test"]),
            "-" if gap is None else _interval(gap, "+.4f"),
        )
    out_console.print(table)
    notes = ["* the winner, by val", "† the baseline"][: 1 + any(row["baseline"] for row in rows)]
    notes += ["in parentheses: 95 % intervals over seeds and images"]
    out_console.print("; ".join(notes), style="dim", soft_wrap=True)
    for sentence in summary["verdict"]:
        out_console.print(sentence, markup=False, soft_wrap=True)


def _interval(figure: dict[str, Any] | None, form: str = ".4f") -> str:
    if figure is None:
        return "-"
    mean = f"{figure['mean']:{form}}"
    if figure["low"] is None:
        return mean
    return f"{mean} ({figure['low']:{form}} to {figure['high']:{form}})"
