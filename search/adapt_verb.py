"""`contrasweep adapt`: a classifier on an encoder, from all labels of a data set or a fraction.

A composition root as `search.cli` is: intervals are computed by `analysis`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from search.adapt import EPOCHS, LEAST_STEPS, MANY, SCRATCH, SCRATCH_PREFIX, AdaptPlan, Row
from search.adapt import Progress as Listener
from search.config import absolute_paths, parse_settings
from search.console import err_console, out_console, print_json
from search.options import (
    CacheDir,
    DataDir,
    Download,
    InMemory,
    Json,
    Settings,
    TestLimit,
    TrainLimit,
    ValLimit,
)

if TYPE_CHECKING:
    from trainer.loop import Report

adapting = typer.Typer()
SHOWN_CLASSES = 20
OWN = ("labels_fraction", "labels_seed", "seed", "task", "encoder_weights", "epochs", "encoder")
"""Fields that the verb's own arguments decide."""


@adapting.command()
def adapt(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An encoder.safetensors, a folder with one, or scratch:ENCODER.",
        ),
    ],
    dataset: Annotated[str, typer.Option(help="Labelled source of images.")] = "digits",
    task: Annotated[
        str, typer.Option(metavar="TASK[,TASK...]", help="Of knn, linear and finetune.")
    ] = "linear",
    labels_fraction: Annotated[
        str, typer.Option(metavar="SHARE[,SHARE...]", help="Shares of the train labels to use.")
    ] = "1.0",
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Each draws labels, head and order anew.")
    ] = 3,
    compare_scratch: Annotated[
        bool,
        typer.Option(
            "--compare-scratch", help="Also train the same encoder without pre-training, alike."
        ),
    ] = False,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Of fine-tuning: passes over the labels that are used; "
            f"--least-steps may ask for more. (default: {EPOCHS:g})"
        ),
    ] = None,
    least_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of fine-tuning, whatever --epochs says: few labels need many passes. "
            f"(default: {LEAST_STEPS})",
        ),
    ] = None,
    class_weights: Annotated[
        Literal["none", "balanced"] | None,
        typer.Option(help="balanced: every class counts alike. (default: none)"),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="Of fine-tuning: linear, mlp, file.py:function, module:function. (default: linear)"
        ),
    ] = None,
    settings: Settings = None,
    in_memory: InMemory = None,
    train_limit: TrainLimit = None,
    val_limit: ValLimit = None,
    test_limit: TestLimit = None,
    data_dir: DataDir = None,
    download: Download = False,
    cache_dir: CacheDir = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder; one with rows goes on. (default: runs/adapt-MODEL-TIME)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Adapt an encoder to labels: kNN, linear classifier, fine-tuning; tested, with intervals."""
    from search.adapt import adapt as run_rows
    from search.adapt import plan_adaptation
    from search.adapted import conclude
    from search.progress import DataProgress
    from trainer.config import TrainConfig
    from trainer.datasets import load_for

    given = {
        "dataset": dataset,
        "in_memory": in_memory,
        "train_limit": train_limit,
        "val_limit": val_limit,
        "test_limit": test_limit,
        "data_dir": data_dir,
        "class_weights": class_weights,
        "head": head,
    }
    fields = {key: value for key, value in given.items() if value is not None}
    fixed = parse_settings(settings)
    for name in fixed:
        if name in OWN or name in fields:
            raise ValueError(f"{name} is not for --set here; the verb's own arguments decide it")
    fields = absolute_paths(fields | fixed)
    tasks = tuple(each.strip() for each in task.split(","))
    tunes = "finetune" in tasks or compare_scratch or model.startswith(SCRATCH_PREFIX)
    for option, value in {"--epochs": epochs, "--least-steps": least_steps}.items():
        if value is not None and not tunes:
            raise ValueError(f"{option} has no effect without --task finetune; leave it out")
    plan = plan_adaptation(
        model,
        fields,
        {name for name in ("class_weights", "head", *fixed) if name in fields},
        tasks=tasks,
        fractions=_fractions(labels_fraction),
        seeds=seeds,
        compare_scratch=compare_scratch,
        epochs=EPOCHS if epochs is None else epochs,
        least_steps=LEAST_STEPS if least_steps is None else least_steps,
    )
    config: TrainConfig = plan.config(plan.rows()[0], MANY)
    data = load_for(
        config, download=download, cache_dir=cache_dir, progress=DataProgress(err_console)
    )
    if data.skipped:
        names = ", ".join(data.skipped[:5])
        err_console.print(f"skipped {len(data.skipped)} corrupt images: {names}, ...")
    folder = out or Path("runs") / f"adapt-{_name(plan)}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = folder.expanduser().resolve()
    try:
        with AdaptDisplay(err_console) as display:
            rows = run_rows(plan, data, folder, display)
    except KeyboardInterrupt:
        err_console.print(f"go on with the same command and --out {folder}", soft_wrap=True)
        raise
    result = conclude(folder, rows, data)
    if as_json:
        print_json(result)
    else:
        print_adaptations(result)
    if all(entry["test_top1"] is None for entry in result["results"]):
        err_console.print("every adaptation diverged; lower the learning rate by --set lr=VALUE")
        raise typer.Exit(1)


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--labels-fraction must be numbers such as 0.01,0.1,1.0, got {text!r}"
        ) from None


def _name(plan: AdaptPlan) -> str:
    if plan.model.startswith(SCRATCH_PREFIX):
        return plan.model.replace(":", "-").replace("/", "-")
    return Path(plan.model).parent.name or "encoder"


class AdaptDisplay(Listener):
    """Shows adaptations: a bar for the one that runs on a terminal, a line for each everywhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.fields[text]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("adapting", total=None, text="")
        self._place = ""

    def __enter__(self) -> AdaptDisplay:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def on_row(self, row: Row, number: int, total: int, images: int) -> None:
        """Begin the bar anew, and say at first what is not done again."""
        if number > 1 and not self._place:
            self._console.print(f"{number - 1} of {total} were done before")
        self._place = f"{number}/{total} {_told(row.task)}, {row.fraction:.3g} of the labels"
        self._bar.reset(self._task, total=images or None, text=self._place)

    def on_step(self, samples_seen: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=samples_seen)

    def on_report(self, report: Report) -> None:
        """Say beside the bar what val gave."""
        self._bar.update(self._task, text=f"{self._place}, val {report.top1:.4f}")

    def on_done(self, row: Row, done: Mapping[str, Any]) -> None:
        """Print a row's line."""
        found = f"diverged: {done['diverged']}"
        if done["diverged"] is None:
            found = f"val {done['val_top1']:.4f}  test {done['test_top1']:.4f}"
        line = f"{self._place}, seed {row.seed}: {found}  {done['wall_s']:.1f} s"
        self._console.print(line, soft_wrap=True)


def print_adaptations(result: dict[str, Any]) -> None:
    """Accuracies on test with their intervals, and the recall of each class."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    headings = ("labels", "", "task", "seeds", "test", "95 % interval", "balanced", "val")
    for heading in headings:
        left = heading == "task"
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for entry in result["results"]:
        found = entry["test_top1"]
        row = [f"{100 * entry['fraction']:.3g} %", f"{entry['labels']:,}", _told(entry["task"])]
        row += [str(entry["seeds"])]
        if found is None:
            table.add_row(*row, "diverged", "", "", "")
            continue
        interval = f"{found['low']:.3f} to {found['high']:.3f}"
        rest = (entry["test_balanced_top1"], entry["val_top1"])
        told = [f"{found['mean']:.4f}", interval, *(f"{each:.4f}" for each in rest)]
        table.add_row(*row, *told)
    out_console.print(table)
    below = (
        f"{result['test_images']:,} test images, used once by each adaptation; intervals hold "
        "seeds and images, of one seed images alone"
    )
    if any(entry["task"] in ("finetune", SCRATCH) for entry in result["results"]):
        below += (
            "; rate and length of fine-tuning were chosen by the labels of "
            f"{result['val_images']:,} validation images"
        )
    out_console.print(below, style="dim", soft_wrap=True)
    for entry in result["results"]:
        if (gain := entry.get("over_scratch")) is not None:
            out_console.print(
                f"{_told(entry['task'])} at {100 * entry['fraction']:.3g} %: {gain['mean']:+.4f} "
                f"({gain['low']:+.4f} to {gain['high']:+.4f}) over training from scratch",
                soft_wrap=True,
            )
    _print_recall(result)
    if result["classifier"]:
        out_console.print(f"classifier: {result['classifier']}", soft_wrap=True)
    out_console.print(f"written to {result['dir']}", soft_wrap=True)


def _print_recall(result: dict[str, Any]) -> None:
    """Of all tasks at the largest fraction; of many classes the ones that the first knows least."""
    largest = max(entry["fraction"] for entry in result["results"])
    entries = [
        entry
        for entry in result["results"]
        if entry["fraction"] == largest and entry["recall"] is not None
    ]
    if not entries:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    first = entries[0]["recall"]
    longest = max(len(name) for name in first)
    # where a terminal is narrow, an interval goes below its value and a name stays whole
    table.add_column("recall", min_width=min(longest, 16), overflow="fold")
    table.add_column("images", justify="right", no_wrap=True, min_width=6)
    for entry in entries:
        table.add_column(_told(entry["task"]), justify="right", min_width=11)
    classes = [name for name in first if first[name]["recall"] is not None]
    if len(classes) > SHOWN_CLASSES:
        classes = sorted(classes, key=lambda name: float(first[name]["recall"]))[:SHOWN_CLASSES]
    for name in classes:
        cells = (
            f"{each['recall']:.2f} ({each['low']:.2f}-{each['high']:.2f})"
            for each in (entry["recall"][name] for entry in entries)
        )
        table.add_row(name, f"{first[name]['images']:,}", *cells)
    out_console.print(table)
    if len(classes) < len(first):
        out_console.print(f"of {len(first)} classes; results.json has all", style="dim")


def _told(task: str) -> str:
    return "from scratch" if task == SCRATCH else task
