"""`contrasweep report`, and the report that every sweep ends with.

A composition root as `search.cli` is: it reads sweeps with `analysis`, adds the advice of a small
replay, and has `analysis` write the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.console import err_console, out_console, print_json, print_leaderboard, print_result
from search.mistakes import INTERRUPTED
from search.options import Json

if TYPE_CHECKING:
    from analysis import SweepFrames
    from search.result import SweepResult
    from search.run import Sweep

reporting = typer.Typer()


@reporting.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="RUNS/NAME...", help="Sweeps.")],
    as_json: Json = False,
) -> None:
    """Write report/index.html and leaderboard.csv from MLflow, and print the leaderboard."""
    from search.run import Sweep

    sweeps = [Sweep.open(directory) for directory in directories]
    page, boards = make_report(sweeps)
    if as_json:
        print_json({"report": str(page), "leaderboards": boards})
    else:
        for each, rows in zip(sweeps, boards.values(), strict=True):
            if len(sweeps) > 1:
                out_console.print(f"\n{each.config.name}", style="bold")
            print_leaderboard(rows, each.config.objective)
        out_console.print(f"report: {page}", soft_wrap=True)


def conclude(finished: Sweep, result: SweepResult, as_json: bool) -> None:
    """Report on a sweep that has ended; typer.Exit where it did not end well."""
    page, boards = (None, {}) if result.unrecorded else make_report([finished])
    if as_json:
        print_json({**result.to_json(), "report": page and str(page)})
    else:
        print_result(result, boards.get(result.name, []))
        if page is not None:
            out_console.print(f"report: {page}", soft_wrap=True)
    if result.unrecorded:
        err_console.print(
            f"no report: MLflow lacks a part of this sweep ({result.unrecorded}); once the store "
            f"answers, both are made by: contrasweep report {result.dir}",
            soft_wrap=True,
        )
    if result.unmirrored:
        err_console.print(
            f"{finished.storage.uri} lacks the end of this sweep's journal ({result.unmirrored}); "
            f"once it works it is brought up to date by: contrasweep sync {result.dir}",
            soft_wrap=True,
        )
    if result.why in ("storage", "node") and as_json:
        err_console.print(result.reason, markup=False, soft_wrap=True)
    if result.state != "finished":
        first = "raise the budget in its sweep.yaml, then " if result.why == "budget" else ""
        err_console.print(f"{first}go on with: contrasweep resume {result.dir}", soft_wrap=True)
        if result.why == "budget":
            return
        raise typer.Exit(1 if result.why in ("failing", "storage", "node") else INTERRUPTED)
    if result.best is None and result.trials:
        err_console.print(f"no trial came to a result; see {result.dir / 'trials'}/*/log.txt")
        raise typer.Exit(1)


def make_report(sweeps: list[Sweep]) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Bring MLflow up to date, read it, write the page into the first sweep's folder.

    Returns the page and each sweep's leaderboard.
    """
    from analysis import leaderboard_rows, write_report
    from analysis.artifacts import load_pictures
    from search.advice import advise

    frames = [read_back(each) for each in sweeps]
    pictures = [
        load_pictures(each.tracking_uri, frame.info["run_id"])
        for each, frame in zip(sweeps, frames, strict=True)
    ]
    advice = [advise(frame) for frame in frames]
    page = write_report(frames, pages_folder(sweeps), advice=advice, pictures=pictures)
    boards = {
        str(each.config.name): leaderboard_rows(frame)
        for each, frame in zip(sweeps, frames, strict=True)
    }
    return page, boards


def read_back(sweep: Sweep) -> SweepFrames:
    """Bring MLflow up to date and read the sweep from it, of its curves the objective's alone."""
    from analysis import load_sweep

    sweep.record_rest()
    return load_sweep(sweep.tracking_uri, str(sweep.config.name), sweep_id=sweep.sweep_id())


def pages_folder(sweeps: Sequence[Sweep]) -> Path:
    """Where pages on these sweeps go; those on several have a folder of their own."""
    folder = sweeps[0].dir / "report"
    if len(sweeps) > 1:
        folder /= "with-" + "-".join(each.dir.name for each in sweeps[1:])
    return folder
