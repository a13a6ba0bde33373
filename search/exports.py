"""`contrasweep export-frames`: what is recorded of sweeps, as tables for other programs.

A composition root as `search.cli` is: `analysis` reads the sweeps and writes the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from search.console import out_console, print_json
from search.options import Json
from search.reporting import read_each

if TYPE_CHECKING:
    from analysis import SweepFrames

ALL = "all"

exports = typer.Typer()


@exports.command()
def export_frames(
    directories: Annotated[list[Path], typer.Argument(metavar="RUNS/NAME...", help="Sweeps.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="(default: frames in the first sweep's folder)"),
    ] = None,
    format: Annotated[
        Literal["parquet", "csv"], typer.Option(help="Parquet keeps types and times.")
    ] = "parquet",
    metrics: Annotated[
        str,
        typer.Option(
            metavar="NAME,...|all",
            help="Curves beside the objective's, a millisecond a trial and metric; last values "
            "of all metrics are there in any case.",
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Write trials, curves, decisions, last values and configurations as tables."""
    from analysis import with_metrics
    from analysis.frames import write_frames
    from search.run import Sweep

    sweeps = [Sweep.open(directory) for directory in directories]
    frames = read_each(sweeps)
    wanted = _metrics(metrics, frames)
    full = [
        with_metrics(
            frame, [name for name in wanted if name in frame.last.columns], each.tracking_uri
        )
        for each, frame in zip(sweeps, frames, strict=True)
    ]
    folder = out or sweeps[0].dir / "frames"
    paths = write_frames(full, folder, format)
    rows = {name: sum(len(getattr(frame, name)) for frame in full) for name in paths}
    if as_json:
        files = {name: str(path) for name, path in paths.items()}
        print_json({"out": str(folder), "format": format, "files": files, "rows": rows})
        return
    for name, path in paths.items():
        out_console.print(f"{path}: {rows[name]} rows", soft_wrap=True)


def _metrics(text: str, frames: list[SweepFrames]) -> list[str]:
    """The metrics asked for; ValueError for one that no trial of these sweeps reported."""
    known = list(dict.fromkeys(name for frame in frames for name in map(str, frame.last.columns)))
    if text == ALL:
        return known
    names = [name for part in text.split(",") if (name := part.strip())]
    for name in names:
        if name not in known:
            there = ", ".join(sorted(known)) or "none: there is no report yet"
            raise ValueError(f"--metrics: {name!r} must be one of {there}, or {ALL}")
    return names
