"""`contrasweep report`, and the report that every sweep ends with.

A composition root as `search.cli` is: it reads sweeps with `analysis`, adds the advice of a small
replay, and has `analysis` write the page.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.console import err_console, out_console, print_json, print_leaderboard, print_result
from search.mistakes import INTERRUPTED, mistake_in
from search.options import Json

if TYPE_CHECKING:
    from analysis import SweepFrames
    from search.result import SweepResult
    from search.run import Sweep

MAX_FOLDER_BYTES = 100
"""Of the name of a folder for pages; file systems take 255."""

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
        named = dict(zip(_labels(sweeps), boards, strict=True))
        print_json({"report": str(page), "leaderboards": named})
    else:
        for each, label, rows in zip(sweeps, _labels(sweeps), boards, strict=True):
            if len(sweeps) > 1:
                out_console.print(f"\n{label}", style="bold")
            print_leaderboard(rows, each.config.objective)
        out_console.print(f"report: {page}", soft_wrap=True)


def conclude(finished: Sweep, result: SweepResult, as_json: bool) -> None:
    """Report on a sweep that has ended; typer.Exit where it did not end well.

    A report that cannot be made costs a note: the result is told all the same.
    """
    page: Path | None = None
    rows: list[dict[str, Any]] = []
    unmade = ""
    if not result.unrecorded:
        try:
            page, (rows,) = make_report([finished])
        except (ValueError, OSError) as error:
            unmade = mistake_in(error)
    if as_json:
        print_json({**result.to_json(), "report": page and str(page)})
    else:
        print_result(result, rows)
        if page is not None:
            out_console.print(f"report: {page}", soft_wrap=True)
    if result.unrecorded:
        err_console.print(
            f"no report: MLflow lacks a part of this sweep ({result.unrecorded}); once the store "
            f"answers, both are made by: contrasweep report {result.dir}",
            soft_wrap=True,
        )
    if unmade:
        err_console.print(
            f"no report: {unmade}; make it by: contrasweep report {result.dir}", soft_wrap=True
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


def make_report(sweeps: Sequence[Sweep]) -> tuple[Path, list[list[dict[str, Any]]]]:
    """Bring MLflow up to date, read it, write the page into the first sweep's folder.

    Returns the page and the sweeps' leaderboards, in the order of the sweeps.
    """
    from analysis import leaderboard_rows, write_report
    from analysis.artifacts import load_pictures
    from analysis.confirmation import read_confirmations
    from search.advice import advise

    frames = read_each(sweeps)
    pictures = [
        load_pictures(each.tracking_uri, frame.info["run_id"])
        for each, frame in zip(sweeps, frames, strict=True)
    ]
    advice = [advise(frame) for frame in frames]
    confirmations = [
        read_confirmations(each.tracking_uri, frame.info["sweep_id"])
        for each, frame in zip(sweeps, frames, strict=True)
    ]
    page = write_report(
        frames,
        pages_folder(sweeps),
        advice=advice,
        pictures=pictures,
        confirmations=confirmations,
    )
    return page, [leaderboard_rows(frame) for frame in frames]


def read_each(sweeps: Sequence[Sweep]) -> list[SweepFrames]:
    """`read_back` of each sweep; ValueError for one given twice, by whatever paths."""
    from analysis.levels import check_given_once

    frames = [read_back(each) for each in sweeps]
    check_given_once(frames)
    return frames


def read_back(sweep: Sweep) -> SweepFrames:
    """Bring MLflow up to date and read the sweep from it, of its curves the objective's alone."""
    from analysis import load_sweep

    sweep.record_rest()
    return load_sweep(sweep.tracking_uri, str(sweep.config.name), sweep_id=sweep.sweep_id())


def pages_folder(sweeps: Sequence[Sweep]) -> Path:
    """Where pages on these sweeps go; those on several have a folder of their own."""
    folder = sweeps[0].dir / "report"
    others = [each.dir.name for each in sweeps[1:]]
    if not others:
        return folder
    named = "with-" + "+".join(others)
    # a + within a name would make two lists look like one
    if len(os.fsencode(named)) > MAX_FOLDER_BYTES or any("+" in name for name in others):
        digest = hashlib.sha256(os.fsencode("/".join(others))).hexdigest()[:8]
        named = f"with-{len(others)}-more-{digest}"
    return folder / named


def _labels(sweeps: Sequence[Sweep]) -> list[str]:
    """The names of sweeps, with their folders those that share one."""
    names = [str(each.config.name) for each in sweeps]
    return [
        name if names.count(name) == 1 else str(each.dir)
        for each, name in zip(sweeps, names, strict=True)
    ]
