"""`contrasweep replay`: what other settings of early stopping would have made of a recorded sweep.

A composition root as `search.cli` is: it reads the sweep with `analysis`, hands its curves to
`search.replay`, prints the table and has `analysis` draw the page.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.progress import Progress
from rich.table import Table

from search.console import err_console, out_console, print_json
from search.options import Json, SweepDir
from search.reporting import read_back

if TYPE_CHECKING:
    from analysis import SweepFrames
    from search.replay import Recording, Row, Setting

T = TypeVar("T", int, float)
USUAL_GRACES = (1.0, 2.0, 4.0)
BETTER = "a sweep recorded with --scheduler none, or a larger --audit, makes better material"

replays = typer.Typer()


@replays.command()
def replay(
    directory: SweepDir,
    grace: Annotated[
        str | None,
        typer.Option(metavar="EPOCHS,...", help="(default: 1,2,4, as far as a trial is longer)"),
    ] = None,
    reduction: Annotated[str, typer.Option(metavar="N,...", help="Of asha and promote.")] = "2,3,4",
    scheduler: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of asha, promote, median, none.")
    ] = "asha",
    brackets: Annotated[int, typer.Option(min=1, max=16, help="Of asha and promote.")] = 1,
    min_competitors: Annotated[
        int | None,
        typer.Option(min=1, help="Values at a rung before it decides. (default: as recorded)"),
    ] = None,
    shuffles: Annotated[int, typer.Option(min=1, help="Orders in which the trials arrive.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of these orders.")] = 0,
    as_json: Json = False,
) -> None:
    """Try other early stopping on a recorded sweep: what it saves, and what that costs."""
    from analysis.replay import write_replay
    from search.replay import replay as replay_settings
    from search.run import Sweep

    graces = None if grace is None else _numbers("--grace", grace, float, "1,2,4")
    reductions = _numbers("--reduction", reduction, int, "2,3,4")
    schedulers = list(dict.fromkeys(name.strip() for name in scheduler.split(",")))
    sweep = Sweep.open(directory)
    frames = read_back(sweep)
    recording = recording_of(frames)
    epochs = recording.total_images / recording.train_images
    if graces is None:
        graces = usual_graces(epochs)
    competitors = min_competitors or sweep.config.min_competitors
    settings = settings_of(schedulers, graces, reductions, brackets, competitors)
    with contextlib.ExitStack() as stack:
        display = Progress(console=err_console, transient=True, disable=as_json)
        task = display.add_task("replaying", total=len(settings))

        def show(done: int, total: int) -> None:
            if not done:  # from here on no setting is refused
                stack.enter_context(display)
            display.update(task, completed=done)

        rows = replay_settings(recording, settings, shuffles=shuffles, seed=seed, progress=show)
    about = _about(frames, recording) | {
        "shuffles": shuffles,
        "seed": seed,
        "min_competitors": competitors,
    }
    plain = [row.to_json() for row in rows]
    page = write_replay(plain, about, sweep.dir / "report" / "replay.html")
    if as_json:
        print_json({"dir": str(sweep.dir), **about, "settings": plain, "page": str(page)})
        return
    _print_rows(rows, recording)
    _print_about(rows, about)
    out_console.print(f"page: {page}", soft_wrap=True)


def usual_graces(epochs: float) -> list[float]:
    """The graces to try where none is asked for, for trials of so many epochs."""
    return [usual for usual in USUAL_GRACES if usual < epochs] or [epochs / 2]


def recording_of(frames: SweepFrames) -> Recording:
    """A sweep's curves of the objective, as they are replayed."""
    from analysis.load import FAILED_STATES
    from search.replay import RecordedTrial, Recording

    info = frames.info
    curves = frames.curves[frames.curves["metric"] == info["objective"]]
    values: dict[int, dict[int, float | None]] = {}
    for row in curves.to_dict("records"):
        known = float(row["value"]) if math.isfinite(row["value"]) else None
        values.setdefault(int(row["number"]), {})[int(row["mark"])] = known
    trials = []
    for row in frames.trials.to_dict("records"):
        seen, wall_s = int(row["samples_seen"]), float(row["wall_s"])
        timed = seen > 0 and math.isfinite(wall_s) and wall_s > 0
        trials.append(
            RecordedTrial(
                number=int(row["number"]),
                values=values.get(int(row["number"]), {}),
                failed=str(row["state"]) if row["state"] in FAILED_STATES else None,
                samples_seen=seen,
                stratum=str(row["stratum"]),
                **({"s_per_image": wall_s / seen} if timed else {}),
            )
        )
    return Recording(
        trials=tuple(trials),
        objective=info["objective"],
        total_images=info["total_images"],
        train_images=info["train_images"],
        workers=info["slots"] or 1,
    )


def settings_of(
    schedulers: list[str],
    graces: list[float],
    reductions: list[int],
    brackets: int,
    min_competitors: int | None = None,
) -> list[Setting]:
    """Every combination that makes a difference: `none` has no grace, `median` no reduction."""
    from search.replay import Setting

    settings = []
    for name in schedulers:
        for grace in graces[:1] if name == "none" else graces:
            settings += [
                Setting(name, grace, reduction, brackets, min_competitors)
                for reduction in (reductions if name in ("asha", "promote") else reductions[:1])
            ]
    return settings


def _numbers(option: str, text: str, kind: Callable[[str], T], example: str) -> list[T]:
    """Numbers between commas, each once; ValueError for what is none."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(each) for each in found):
        raise ValueError(f"{option} takes numbers such as {example}, got {text!r}")
    return list(dict.fromkeys(found))


def _about(frames: SweepFrames, recording: Recording) -> dict[str, Any]:
    """What the rows rest on, for the printout and the page."""
    full = [recording.total_images in trial.values for trial in recording.trials]
    failed = [trial.failed is not None for trial in recording.trials]
    return {
        "name": frames.info["name"],
        "objective": recording.objective,
        "mode": frames.info["mode"],
        "scheduler": frames.info["scheduler"],
        "trials": len(recording.trials),
        "in_full": sum(full),
        "failed": sum(failed),
        "stopped": sum(not (a or b) for a, b in zip(full, failed, strict=True)),
        "workers": recording.workers,
        "total_images": recording.total_images,
        "train_images": recording.train_images,
    }


def _print_rows(rows: list[Row], recording: Recording) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    several = any((row.brackets or 1) > 1 for row in rows)
    table.add_column("scheduler")
    for heading in ("grace", "reduc-\ntion", *(["brack-\nets"] if several else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("rungs\n(epochs)", no_wrap=True)
    for heading in ("saving\n%", "regret", "best one\nsurvives %", "un-\nknown %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        rungs = [f"{rung / recording.train_images:.3g}" for rung in row.rungs]
        shown = rungs if len(rungs) <= 4 else [*rungs[:2], "..", rungs[-1]]
        table.add_row(
            row.scheduler,
            "-" if row.grace is None else f"{row.grace:g}{'*' if row.moved else ''}",
            "-" if row.reduction is None else str(row.reduction),
            *([str(row.brackets or "-")] if several else []),
            " ".join(shown) or "-",
            _saving(row),
            "-" if row.regret is None else f"{row.regret:.4f} (..{row.regret_high:.3f})",
            _percent(row.survival, row.survival_low, row.survival_high),
            f"{100 * row.unknown:.0f}",
        )
    out_console.print(table)


def _saving(row: Row) -> str:
    if row.unknown:  # two bounds: what the trials of which no more is known would have cost
        return f"{100 * row.saving:.0f} to {100 * row.saving_at_most:.0f}"
    return _percent(row.saving, row.saving_low, row.saving_high)


def _percent(value: float, low: float, high: float) -> str:
    return f"{100 * value:.0f} ({100 * low:.0f}..{100 * high:.0f})"


def _print_about(rows: list[Row], about: dict[str, Any]) -> None:
    lines = [
        f"{about['shuffles']} orders of {about['trials']} trials ({about['in_full']} known to the "
        f"full resource, {about['failed']} failed), {about['workers']} at once; means, and in "
        "brackets the middle 95 % of the orders, of survival the 95 % interval; regret: final "
        f"{about['objective']} of the best trial less that of the one chosen",
    ]
    if about["min_competitors"] is not None:
        lines.append(f"a rung decides from {about['min_competitors']} values on")
    if any(row.moved for row in rows):
        lines.append("* a rung moved up to the next recorded report: nothing is known in between")
    if any(row.unknown for row in rows):
        lines.append(
            "unknown: trial runs that a setting lets go on beyond what was recorded; the lower "
            "saving charges them their full resource, and none of them can be chosen"
        )
    if about["stopped"]:
        told = "trials were stopped or cut off when they were recorded"
        lines.append(f"{about['stopped']} {told}: {BETTER}")
    for line in lines:
        out_console.print(line, style="dim", soft_wrap=True)
