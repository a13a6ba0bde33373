"""The command line, `contrasweep VERB`: the one place that knows every room.

Each verb prints for people on a terminal, or with --json one JSON object on standard output;
progress and messages go to the error stream. A mistake of the user's is one line and exit code 2.
Rooms are imported by the verb that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from search.config import (
    SweepConfig,
    absolute_source,
    parse_settings,
    parse_sweep,
    read_sweep_yaml,
)
from search.console import (
    err_console,
    out_console,
    print_json,
    print_known,
    print_leaderboard,
    print_result,
    print_status,
)
from trainer.config import TrainConfig, parse_config

if TYPE_CHECKING:
    from search.run import Sweep, SweepResult

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distributed hyperparameter search for contrastive image pre-training.",
)
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main() -> NoReturn:
    """Entry point: a ValueError is the user's mistake, told in one line."""
    try:
        app()
    except ValueError as error:
        print(f"contrasweep: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a path that cannot be read or written
        print(f"contrasweep: {error.filename}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(0)


def _sweep_option(field: str, *names: str, **more: Any) -> Any:
    """An option whose help and default are those of a `SweepConfig` field."""
    info = SweepConfig.model_fields[field]
    default = "" if info.default is None else f" (default: {info.default})"
    return typer.Option(*names, help=f"{info.description}{default}", show_default=False, **more)


Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of the trainer; repeatable."),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Of decoded folders. (default: the user's cache folder)", show_default=False),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch the data set if it is missing.")]
DataDir = Annotated[str | None, _sweep_option("data_dir", "--data-dir")]
TrainLimit = Annotated[int | None, _sweep_option("train_limit", "--train-limit")]
ValLimit = Annotated[int | None, _sweep_option("val_limit", "--val-limit")]
SweepDir = Annotated[Path, typer.Argument(metavar="RUNS/NAME", help="A sweep's folder.")]


@app.command()
def sweep(
    space: Annotated[str | None, _sweep_option("space", "--space")] = None,
    dataset: Annotated[str | None, _sweep_option("dataset", "--dataset")] = None,
    trials: Annotated[int | None, _sweep_option("trials", "--trials")] = None,
    epochs: Annotated[float | None, _sweep_option("epochs", "--epochs")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A sweep.yaml; options given here override it.")
    ] = None,
    name: Annotated[str | None, _sweep_option("name", "--name")] = None,
    out: Annotated[str | None, _sweep_option("out", "--out")] = None,
    sampler: Annotated[str | None, _sweep_option("sampler", "--sampler")] = None,
    scheduler: Annotated[str | None, _sweep_option("scheduler", "--scheduler")] = None,
    grace: Annotated[float | None, _sweep_option("grace", "--grace")] = None,
    reduction: Annotated[int | None, _sweep_option("reduction", "--reduction")] = None,
    objective: Annotated[str | None, _sweep_option("objective", "--objective")] = None,
    report_every: Annotated[float | None, _sweep_option("report_every", "--report-every")] = None,
    settings: Settings = None,
    train_limit: TrainLimit = None,
    val_limit: ValLimit = None,
    data_dir: DataDir = None,
    download: Download = False,
    cache_dir: CacheDir = None,
    seed: Annotated[int | None, _sweep_option("seed", "--seed")] = None,
    default_trial: Annotated[
        bool | None, _sweep_option("default_trial", "--default-trial/--no-default-trial")
    ] = None,
    cpus_per_trial: Annotated[
        float | None, _sweep_option("cpus_per_trial", "--cpus-per-trial")
    ] = None,
    gpus_per_trial: Annotated[
        float | None, _sweep_option("gpus_per_trial", "--gpus-per-trial")
    ] = None,
    max_hours: Annotated[float | None, _sweep_option("max_hours", "--max-hours")] = None,
    address: Annotated[str | None, _sweep_option("address", "--address")] = None,
    tracking_uri: Annotated[str | None, _sweep_option("tracking_uri", "--tracking-uri")] = None,
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
    settings: Settings = None,
    epochs: Annotated[float | None, typer.Option(help="Length of the run. (default: 10)")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, views, order. (default: 0)")] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder. (default: runs/train-TIME)", show_default=False)
    ] = None,
    train_limit: TrainLimit = None,
    val_limit: ValLimit = None,
    data_dir: DataDir = None,
    download: Download = False,
    cache_dir: CacheDir = None,
    test: Annotated[
        bool, typer.Option("--test", help="Use the test split once, at the end.")
    ] = False,
    repeat: Annotated[
        Path | None, typer.Option("--from", metavar="RUNS/NAME", help="Repeat a trial of a sweep.")
    ] = None,
    trial: Annotated[int | None, typer.Option(help="Which trial, with --from.", min=0)] = None,
    as_json: Json = False,
) -> None:
    """Train one configuration, without Ray; with --from and --trial, one of a sweep's again."""
    from search.train import train as run_training
    from search.train import trial_to_repeat
    from trainer.loop import Diverged

    if (repeat is None) != (trial is None):
        raise ValueError("--from and --trial go together: --from runs/NAME --trial 17")
    given = {
        "dataset": absolute_source(dataset),
        "epochs": epochs,
        "seed": seed,
        "train_limit": train_limit,
        "val_limit": val_limit,
        "data_dir": data_dir and str(Path(data_dir).expanduser().resolve()),
    }
    fields = {key: value for key, value in given.items() if value is not None}
    fields |= parse_settings(settings)
    marks, recorded = None, None
    if repeat is not None and trial is not None:
        if fields:
            raise ValueError(f"--from repeats a trial as it was; leave out {', '.join(fields)}")
        source = trial_to_repeat(repeat.expanduser().resolve(), trial)
        config, marks, recorded = source.config, source.marks, source.recorded
    else:
        config = parse_config(fields)
    data = _load_data(config, download, cache_dir)
    folder = out or Path("runs") / f"train-{time.strftime('%Y%m%d-%H%M%S')}"

    def show(report: Any, total: int) -> None:
        err_console.print(
            f"{report.samples_seen:>9,} of {total:,} images  train_loss {report.train_loss:.3f}  "
            f"knn_top1 {report.knn_top1:.4f}  {report.images_per_s:,.0f}/s",
        )

    folder = folder.expanduser().resolve()
    try:
        result = run_training(config, data, folder, marks=marks, test=test, on_report=show)
    except Diverged as error:
        err_console.print(f"diverged: {error.reason}", soft_wrap=True)
        raise typer.Exit(1) from None
    if recorded is not None:
        result["recorded"] = recorded.last_report["metrics"] if recorded.last_report else {}
    if as_json:
        print_json(result)
        return
    for name, value in result["metrics"].items():
        was = result.get("recorded", {}).get(name)
        recorded_text = "" if was is None else f"   recorded {was:.6g}"
        out_console.print(f"{name:>16}  {value:.6g}{recorded_text}")
    out_console.print(f"written to {result['dir']}", soft_wrap=True)


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


@app.command()
def spaces(as_json: Json = False) -> None:
    """The search spaces there are."""
    from spaces import SPACES

    print_known({name: _first_line(space) for name, space in SPACES.items()}, as_json)


@app.command()
def datasets(as_json: Json = False) -> None:
    """The sources of images there are."""
    from trainer.datasets import SOURCES

    print_known({name: source[0] for name, source in SOURCES.items()}, as_json)


@app.command()
def encoders(as_json: Json = False) -> None:
    """The encoders there are."""
    from trainer.models import ENCODERS

    print_known({name: entry[0] for name, entry in ENCODERS.items()}, as_json)


@app.command()
def losses(as_json: Json = False) -> None:
    """The losses there are."""
    from trainer.losses import LOSSES

    print_known({name: _first_line(loss) for name, loss in LOSSES.items()}, as_json)


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


def _load_data(config: TrainConfig, download: bool, cache_dir: Path | None) -> Any:
    from search.progress import DataProgress
    from trainer.datasets import load_for
    from trainer.loop import check_names

    check_names(config)
    progress = DataProgress(err_console)
    data = load_for(config, download=download, cache_dir=cache_dir, progress=progress)
    if data.skipped:
        names = ", ".join(data.skipped[:5])
        err_console.print(
            f"skipped {len(data.skipped)} corrupt images: {names}, ...",
            soft_wrap=True,
        )
    return data


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]
