"""`contrasweep embed`: the features of a folder of images, in one Parquet file."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from search.console import err_console, out_console, print_json
from search.options import Json
from search.progress import duration

if TYPE_CHECKING:
    from trainer.embed import Embedded
    from trainer.feature_parts import Skipped

LINE_EVERY_S = 10.0
SHOWN = 5
"""Skipped files that are named to people; --json and the file's metadata name a hundred."""

embedding = typer.Typer()


@embedding.command()
def embed(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="encoder.safetensors, or a folder with one.")
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Images, in folders of any depth.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A new .parquet file.")],
    batch_size: Annotated[int, typer.Option(help="Images encoded at a time, 1 to 512.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that decode. (default: one a core, at most 16)"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace FILE, and parts of other images or encoders.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the features of all images below a folder to a Parquet file, a row for each.

    Columns: file, class (the first folder below FOLDER) and features. The same command
    goes on with a run that was interrupted.
    """
    from search.folders import encoder_of
    from trainer.embed import embed_folder

    try:
        with EmbedDisplay(err_console) as display:
            done = embed_folder(
                encoder_of(model),
                folder,
                out,
                batch_size=batch_size,
                device=device,
                workers=workers,
                force=force,
                progress=display,
            )
    except KeyboardInterrupt:
        err_console.print("interrupted; the same command goes on from here", soft_wrap=True)
        raise
    if as_json:
        print_json(
            {
                "out": str(done.out),
                "rows": done.rows,
                "feature_dim": done.feature_dim,
                "images": done.images,
                "continued": done.continued,
                "skipped": {
                    "corrupt": done.corrupt.to_json(),
                    "not_images": done.not_images.to_json(),
                },
                "encoder_digest": done.encoder_digest,
                "wall_s": round(done.wall_s, 3),
                "images_per_s": round(done.images_per_s, 1),
            }
        )
    else:
        _tell(done)


def _tell(done: Embedded) -> None:
    kinds = ((done.corrupt, "unreadable images"), (done.not_images, "other files"))
    for skipped, what in kinds:
        if skipped.count:
            out_console.print(f"skipped {what}: {skipped.count:,}", soft_wrap=True)
            _tell_first(skipped)
    out_console.print(
        f"{done.rows:,} rows of {done.feature_dim} features in {done.wall_s:,.1f} s, "
        f"{done.images_per_s:,.0f} images/s; written to {done.out}",
        soft_wrap=True,
    )


def _tell_first(skipped: Skipped) -> None:
    for each in skipped.first[:SHOWN]:
        out_console.print(f"  {each['file']}: {each['why']}", soft_wrap=True)
    if skipped.count > SHOWN:
        out_console.print(f"  and {skipped.count - SHOWN:,} more", style="dim")


class EmbedDisplay:
    """Shows the images done: a bar on a terminal, a line every ten seconds elsewhere.

    Call it with (images done, images in all), first with those that an earlier run has done.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._bar = Progress(
            TextColumn("{task.fields[doing]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, doing="listing images")
        self._first: int | None = None
        self._began_at = self._told_at = 0.0

    def __enter__(self) -> EmbedDisplay:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if self._first is None:
            self._first, self._began_at, self._told_at = done, now, now
            if done:
                line = f"going on: {done:,} of {total:,} images are done"
                self._console.print(line, soft_wrap=True)
            self._bar.reset(self._task, total=total, completed=done)
        self._bar.update(self._task, completed=done, doing="encoding images")
        if not self._console.is_terminal and now - self._told_at >= LINE_EVERY_S:
            self._told_at = now
            per_s = (done - self._first) / (now - self._began_at)
            left = duration((total - done) / per_s) if per_s else "-"
            self._console.print(
                f"{done:>9,} of {total:,} images  {per_s:,.0f}/s  {left} left", soft_wrap=True
            )
