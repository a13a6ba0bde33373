"""`contrasweep train`: one configuration, without Ray."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.config import absolute_paths, parse_settings
from search.console import err_console, print_json, print_training
from search.options import (
    CacheDir,
    DataDir,
    Download,
    InMemory,
    Json,
    Labelled,
    Settings,
    TestLimit,
    TrainLimit,
    ValLimit,
)

if TYPE_CHECKING:
    from search.train import Run

training = typer.Typer()


@training.command()
def train(
    dataset: Annotated[str | None, typer.Option(help="Source of images. (default: digits)")] = None,
    labelled: Labelled = None,
    settings: Settings = None,
    epochs: Annotated[float | None, typer.Option(help="Length of the run. (default: 10)")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, views, order. (default: 0)")] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder. (default: runs/train-TIME)", show_default=False)
    ] = None,
    in_memory: InMemory = None,
    train_limit: TrainLimit = None,
    val_limit: ValLimit = None,
    test_limit: TestLimit = None,
    data_dir: DataDir = None,
    download: Download = False,
    cache_dir: CacheDir = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many reports without a better one; keep that."),
    ] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Use the test split once, at the end.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Go on with an unfinished run.")
    ] = None,
    repeat: Annotated[
        Path | None, typer.Option("--from", metavar="RUNS/NAME", help="Repeat a trial of a sweep.")
    ] = None,
    trial: Annotated[int | None, typer.Option(help="Which trial, with --from.", min=0)] = None,
    as_json: Json = False,
) -> None:
    """Train one configuration, without Ray; with --from and --trial, one of a sweep's again."""
    from search.train import plan_run, read_run, trial_to_repeat
    from search.train import train as run_training
    from search.train_display import TrainDisplay

    given = {
        "dataset": dataset,
        "labelled": labelled,
        "epochs": epochs,
        "seed": seed,
        "in_memory": in_memory,
        "train_limit": train_limit,
        "val_limit": val_limit,
        "test_limit": test_limit,
        "data_dir": data_dir,
    }
    fields = {key: value for key, value in given.items() if value is not None}
    fixed = parse_settings(settings)
    if twice := [name for name in fixed if name in fields]:
        raise ValueError(f"{twice[0]} is given twice, by --set and by its own option")
    fields = absolute_paths(fields | fixed)
    if (repeat is None) != (trial is None):
        raise ValueError("--from and --trial go together: --from runs/NAME --trial 17")
    recorded = None
    if resume is not None:
        others = {"--out": out, "--patience": patience, "--test": test or None, "--from": repeat}
        if taken := [name for name, value in others.items() if value is not None] + [*fields]:
            raise ValueError(f"--resume goes on with a run as it was; leave out {', '.join(taken)}")
        folder = resume.expanduser().resolve()
        run = read_run(folder)
    elif repeat is not None and trial is not None:
        if fields:
            raise ValueError(f"--from repeats a trial as it was; leave out {', '.join(fields)}")
        source = trial_to_repeat(repeat.expanduser().resolve(), trial)
        run = dataclasses.replace(source.run, patience=patience, test=test)
        recorded = source.recorded
    else:
        run = plan_run(fields, set(fixed), patience=patience, test=test)
    data = _load_data(run, download, cache_dir)
    if resume is None:
        folder = (out or Path("runs") / f"train-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
        folder = folder.resolve()
    try:
        with TrainDisplay(err_console) as display:
            result = run_training(run, data, folder, resume=resume is not None, progress=display)
    except KeyboardInterrupt:
        err_console.print(f"go on with: contrasweep train --resume {folder}", soft_wrap=True)
        raise
    result["curves"] = str(_write_curves(folder)) if result["metrics"] else None
    if recorded is not None:
        result["recorded"] = recorded.last_report["metrics"] if recorded.last_report else {}
    if as_json:
        print_json(result)
    else:
        print_training(result)
    if result["diverged"]:
        err_console.print(f"diverged: {result['diverged']}", soft_wrap=True)
        raise typer.Exit(1)


def _write_curves(folder: Path) -> Path:
    """The page of a run's learning curves, from its metrics.csv."""
    from analysis.training import write_curves

    return write_curves(folder / "metrics.csv", folder / "curves.html")


def _load_data(run: Run, download: bool, cache_dir: Path | None) -> Any:
    """The data of one run; without labels nothing but label-free measures is left of it."""
    from search.progress import DataProgress
    from trainer.datasets import load_for
    from trainer.loop import check_names

    config = run.loading()
    check_names(config)
    data = load_for(
        config,
        labels_needed=False,
        labelled_in_memory=run.labelled_in_memory,
        download=download,
        cache_dir=cache_dir,
        progress=DataProgress(err_console),
    )
    if data.skipped:
        names = ", ".join(data.skipped[:5])
        err_console.print(f"skipped {len(data.skipped)} corrupt images: {names}, ...")
    if not len(data.bank):
        err_console.print("no labels: no accuracies; --labelled SOURCE names some")
    return data
