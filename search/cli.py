"""The command line, `contrasweep VERB`: the one place that knows every room.

Each verb prints for people on a terminal, or with --json one JSON object on standard output;
progress and messages go to the error stream. A mistake of the user's is one line and exit code 2.
Rooms are imported by the verb that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from search.config import (
    SweepConfig,
    absolute_paths,
    parse_settings,
    parse_sweep,
    read_sweep_yaml,
)
from search.console import (
    err_console,
    out_console,
    print_json,
    print_leaderboard,
    print_result,
    print_status,
    print_training,
)
from search.listings import listings
from search.mistakes import INTERRUPTED, run_app
from search.options import (
    CacheDir,
    DataDir,
    Download,
    InMemory,
    Json,
    Labelled,
    Settings,
    SweepDir,
    TestLimit,
    TrainLimit,
    ValLimit,
    sweep_option,
)

if TYPE_CHECKING:
    from search.run import Sweep, SweepResult
    from search.train import Run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distributed hyperparameter search for contrastive image pre-training.",
)
app.add_typer(listings)


def main() -> NoReturn:
    """Entry point."""
    run_app(app)


@app.command()
def sweep(
    space: Annotated[str | None, sweep_option("space", "--space")] = None,
    dataset: Annotated[str | None, sweep_option("dataset", "--dataset")] = None,
    trials: Annotated[int | None, sweep_option("trials", "--trials")] = None,
    epochs: Annotated[float | None, sweep_option("epochs", "--epochs")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A sweep.yaml; options given here override it.")
    ] = None,
    name: Annotated[str | None, sweep_option("name", "--name")] = None,
    out: Annotated[str | None, sweep_option("out", "--out")] = None,
    sampler: Annotated[str | None, sweep_option("sampler", "--sampler")] = None,
    scheduler: Annotated[str | None, sweep_option("scheduler", "--scheduler")] = None,
    grace: Annotated[float | None, sweep_option("grace", "--grace")] = None,
    reduction: Annotated[int | None, sweep_option("reduction", "--reduction")] = None,
    objective: Annotated[str | None, sweep_option("objective", "--objective")] = None,
    report_every: Annotated[float | None, sweep_option("report_every", "--report-every")] = None,
    settings: Settings = None,
    labelled: Labelled = None,
    in_memory: InMemory = None,
    train_limit: TrainLimit = None,
    val_limit: ValLimit = None,
    test_limit: TestLimit = None,
    data_dir: DataDir = None,
    download: Download = False,
    cache_dir: CacheDir = None,
    seed: Annotated[int | None, sweep_option("seed", "--seed")] = None,
    default_trial: Annotated[
        bool | None, sweep_option("default_trial", "--default-trial/--no-default-trial")
    ] = None,
    cpus_per_trial: Annotated[
        float | None, sweep_option("cpus_per_trial", "--cpus-per-trial")
    ] = None,
    gpus_per_trial: Annotated[
        float | None, sweep_option("gpus_per_trial", "--gpus-per-trial")
    ] = None,
    max_hours: Annotated[float | None, sweep_option("max_hours", "--max-hours")] = None,
    address: Annotated[str | None, sweep_option("address", "--address")] = None,
    tracking_uri: Annotated[str | None, sweep_option("tracking_uri", "--tracking-uri")] = None,
    as_json: Json = False,
) -> None:
    """Search: try many configurations, stop the weak ones early, report."""
    from search.run import Sweep

    given = {field: value for field, value in locals().items() if field in SweepConfig.model_fields}
    fields = read_sweep_yaml(config) if config else {}
    fields |= {field: value for field, value in given.items() if value is not None}
    fields["fixed"] = {**(fields.get("fixed") or {}), **parse_settings(settings)}
    plan = parse_sweep(fields)
    _carry_out(lambda **more: Sweep(plan, **more), Sweep.run, as_json, download, cache_dir)


@app.command()
def resume(
    directory: SweepDir,
    trials: Annotated[int, typer.Option(min=0, help="Trials beyond those planned.")] = 0,
    download: Download = False,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Go on with a sweep that was interrupted, or extend a finished one."""
    from search.run import Sweep

    def go_on(sweep: Sweep) -> SweepResult:
        return sweep.resume(trials)

    _carry_out(lambda **more: Sweep.open(directory, **more), go_on, as_json, download, cache_dir)


@app.command()
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


@app.command()
def status(directory: SweepDir, as_json: Json = False) -> None:
    """How far a sweep is: trials by state, unfinished ones, the best so far."""
    from search.journal import FILE_NAME, load_state
    from search.run import is_running, sweep_folder

    directory = sweep_folder(directory)
    state = load_state(directory / FILE_NAME)
    objective = state.header["config"]["objective"]
    best = state.best(objective, state.header["mode"])
    ended = state.ended["state"] if state.ended else "interrupted"
    answer = {
        "name": state.header["config"]["name"],
        "dir": str(directory),
        "state": "running" if is_running(directory) else ended,
        "planned": state.planned,
        "trials": state.counts(),
        "unfinished": [
            {"trial": t.number, "samples_seen": t.samples_seen, "value": t.value(objective)}
            for t in state.unfinished()
        ],
        "objective": objective,
        "best": best
        and {"trial": best.number, "value": best.value(objective), "params": best.params},
        "samples_seen": state.samples_seen,
        "wall_s": round(state.wall_s, 3),
    }
    if as_json:
        print_json(answer)
        return
    print_status(answer)


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="RUNS/NAME...", help="Sweeps.")],
    as_json: Json = False,
) -> None:
    """Write report/index.html and leaderboard.csv from MLflow, and print the leaderboard."""
    from search.run import Sweep

    sweeps = [Sweep.open(directory) for directory in directories]
    page, boards = _report(sweeps)
    if as_json:
        print_json({"report": str(page), "leaderboards": boards})
    else:
        for each, rows in zip(sweeps, boards.values(), strict=True):
            if len(sweeps) > 1:
                out_console.print(f"\n{each.config.name}", style="bold")
            print_leaderboard(rows, each.config.objective)
        out_console.print(f"report: {page}", soft_wrap=True)


# ---- what the verbs share


def _carry_out(
    make: Callable[..., Sweep],
    act: Callable[[Sweep], SweepResult],
    as_json: bool,
    download: bool,
    cache_dir: Path | None,
) -> None:
    """Run or resume a sweep under a display, then report on it."""
    from search.progress import DataProgress, SweepDisplay

    # Ray prints the news of its workers to standard output, which is for results alone
    with contextlib.redirect_stdout(sys.stderr), SweepDisplay(err_console) as display:
        sweep = make(
            download=download,
            cache_dir=cache_dir,
            data_progress=DataProgress(err_console),
            on_step=display,
            on_note=display.note,
        )
        try:
            result = act(sweep)
        except KeyboardInterrupt:
            display.note(f"ended at once; go on with: contrasweep resume {sweep.dir}")
            raise
    _conclude(sweep, result, as_json)


def _conclude(finished: Sweep, result: SweepResult, as_json: bool) -> None:
    page, boards = (None, {}) if result.unrecorded else _report([finished])
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
    if result.state != "finished":
        err_console.print(f"go on with: contrasweep resume {result.dir}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    if result.best is None and result.trials:
        err_console.print(f"no trial came to a result; see {result.dir / 'trials'}/*/log.txt")
        raise typer.Exit(1)


def _report(sweeps: list[Sweep]) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Bring MLflow up to date, read it, write the page into the first sweep's folder.

    Returns the page and each sweep's leaderboard.
    """
    from analysis import leaderboard_rows, load_sweep, write_report

    frames = []
    for each in sweeps:
        each.record_rest()
        frames.append(
            load_sweep(each.tracking_uri, str(each.config.name), sweep_id=each.sweep_id())
        )
    folder = sweeps[0].dir / "report"
    if len(sweeps) > 1:  # a page of its own: the sweep's stays
        folder /= "with-" + "-".join(each.dir.name for each in sweeps[1:])
    page = write_report(frames, folder)
    boards = {
        str(each.config.name): leaderboard_rows(frame)
        for each, frame in zip(sweeps, frames, strict=True)
    }
    return page, boards


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
