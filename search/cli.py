"""The command line, `contrasweep VERB`: the one place that knows every room.

Each verb prints for people on a terminal, or with --json one JSON object on standard output;
progress and messages go to the error stream. A mistake of the user's is one line and exit code 2.
Rooms are imported by the verb that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from search.adapt_verb import adapting
from search.comparisons import comparisons
from search.config import (
    SweepConfig,
    parse_settings,
    parse_sweep,
    read_sweep_yaml,
)
from search.confirm_verb import conclude_confirmation, confirming
from search.console import (
    err_console,
    out_console,
    print_json,
    print_status,
)
from search.embed_verb import embedding
from search.export_verb import exporting
from search.exports import exports
from search.listings import listings
from search.mistakes import run_app
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
    check_read,
    sweep_option,
)
from search.replays import replays
from search.reporting import conclude, reporting
from search.steering import steering
from search.train_verb import training
from search.upkeep import upkeep

if TYPE_CHECKING:
    from search.result import SweepResult
    from search.run import Sweep

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distributed hyperparameter search for contrastive image pre-training.",
)
for verbs in (
    training,
    confirming,
    exporting,
    adapting,
    embedding,
    reporting,
    comparisons,
    replays,
    exports,
    steering,
    upkeep,
    listings,
):
    app.add_typer(verbs)


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
    grid_points: Annotated[int | None, sweep_option("grid_points", "--grid-points")] = None,
    points: Annotated[
        Path | None, typer.Option(help="YAML list of parameters to try first.", show_default=False)
    ] = None,
    warm_start: Annotated[
        list[str] | None, sweep_option("warm_start", "--warm-start", metavar="RUNS/OTHER")
    ] = None,
    scheduler: Annotated[str | None, sweep_option("scheduler", "--scheduler")] = None,
    promote: Annotated[bool | None, sweep_option("promote", "--promote/--no-promote")] = None,
    brackets: Annotated[int | None, sweep_option("brackets", "--brackets")] = None,
    grace: Annotated[float | None, sweep_option("grace", "--grace")] = None,
    reduction: Annotated[int | None, sweep_option("reduction", "--reduction")] = None,
    min_competitors: Annotated[
        int | None, sweep_option("min_competitors", "--min-competitors")
    ] = None,
    stratify: Annotated[str | None, sweep_option("stratify", "--stratify", metavar="FIELD")] = None,
    audit: Annotated[float | None, sweep_option("audit", "--audit", metavar="FRACTION")] = None,
    objective: Annotated[
        str | None,
        sweep_option("objective", "--objective", metavar="NAME[,NAME...]"),
    ] = None,
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
    memory_per_trial: Annotated[
        float | None, sweep_option("memory_per_trial", "--memory-per-trial", metavar="GIB")
    ] = None,
    max_concurrent: Annotated[
        int | None, sweep_option("max_concurrent", "--max-concurrent")
    ] = None,
    max_hours: Annotated[float | None, sweep_option("max_hours", "--max-hours")] = None,
    max_gpu_hours: Annotated[float | None, sweep_option("max_gpu_hours", "--max-gpu-hours")] = None,
    max_images: Annotated[int | None, sweep_option("max_images", "--max-images")] = None,
    on_budget: Annotated[str | None, sweep_option("on_budget", "--on-budget")] = None,
    keep_checkpoints: Annotated[
        int | None, sweep_option("keep_checkpoints", "--keep-checkpoints")
    ] = None,
    failures_alike: Annotated[
        int | None, sweep_option("failures_alike", "--failures-alike")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the sweep would cost; start nothing.")
    ] = False,
    address: Annotated[str | None, sweep_option("address", "--address")] = None,
    storage: Annotated[str | None, sweep_option("storage", "--storage", metavar="URI")] = None,
    node_cache: Annotated[str | None, sweep_option("node_cache", "--node-cache")] = None,
    tracking_uri: Annotated[str | None, sweep_option("tracking_uri", "--tracking-uri")] = None,
    pictures: Annotated[bool | None, sweep_option("pictures", "--pictures/--no-pictures")] = None,
    offline_tracking: Annotated[
        bool | None, sweep_option("offline_tracking", "--offline-tracking/--no-offline-tracking")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search: try many configurations, stop the weak ones early, report."""
    from search.run import Sweep

    given = {field: value for field, value in locals().items() if field in SweepConfig.model_fields}
    given = {field: value for field, value in given.items() if value is not None}
    fields = {**(read_sweep_yaml(config) if config else {}), **given}
    fixed = parse_sweep({"fixed": fields["fixed"]}).fixed if fields.get("fixed") else {}
    fields["fixed"] = {**fixed, **parse_settings(settings)}
    if objective is not None:
        fields["objective"], *fields["also"] = objective.split(",")
    if points is not None:
        fields["points"] = _points(points, fields)
    plan = parse_sweep(fields)
    if plan.confirmation is not None:
        raise ValueError(
            f"{config} is that of a confirmation, which uses the test split; begin one by "
            "'contrasweep confirm RUNS/NAME'"
        )
    check_read(given, plan)
    if dry_run:
        _forecast(plan, as_json, download, cache_dir)
        return
    _carry_out(lambda **more: Sweep(plan, **more), Sweep.run, as_json, download, cache_dir)


@app.command()
def resume(
    directory: Annotated[
        str,
        typer.Argument(metavar="RUNS/NAME", help="A sweep's folder, or its place in a storage."),
    ],
    trials: Annotated[int, typer.Option(min=0, help="Trials beyond those planned.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder that a sweep from a storage is brought to. (default: runs)"),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, if it is another by now; local: none.")
    ] = None,
    download: Download = False,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Go on with a sweep that was interrupted, or extend a finished one."""
    from search.folders import folder_for
    from search.mirror import fetch_sweep, is_mirror
    from search.run import Sweep
    from search.storage import is_bucket

    folder = Path(directory)
    if is_bucket(directory) or is_mirror(folder):
        folder = fetch_sweep(directory, folder_for(directory, out or Path("runs")))
    elif out is not None:
        raise ValueError(f"{directory} is a sweep's own folder; --out is for one from a storage")

    def go_on(sweep: Sweep) -> SweepResult:
        if address is not None:
            sweep.config = sweep.config.model_copy(update={"address": address}).resolved()
        if trials and sweep.config.confirmation is not None:
            raise ValueError(
                "a confirmation has a trial for each candidate and seed; leave out --trials"
            )
        return sweep.resume(trials)

    _carry_out(lambda **more: Sweep.open(folder, **more), go_on, as_json, download, cache_dir)


@app.command()
def status(directory: SweepDir, as_json: Json = False) -> None:
    """How far a sweep is: trials by state, unfinished ones, the best so far."""
    from search.endings import counts_in_words
    from search.folders import is_running, sweep_folder
    from search.journal import FILE_NAME, load_state

    directory = sweep_folder(directory)
    state = load_state(directory / FILE_NAME)
    objective = state.header["config"]["objective"]
    best = state.best(objective, state.header["mode"])
    ended = state.ended["state"] if state.ended else "interrupted"
    answer = {
        "name": state.header["config"]["name"],
        "dir": str(directory),
        "state": "running" if is_running(directory) else ended,
        "reason": state.ended["reason"] if state.ended else state.budget_spent or "",
        "why": state.ended.get("why", "") if state.ended else "",
        "planned": state.planned,
        "trials": state.counts(),
        "unfinished": [
            {
                "trial": t.number,
                "samples_seen": t.samples_seen,
                "value": t.value(objective),
                "waits": t.paused_at is not None,
            }
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
    print_status(answer, counts_in_words(state))


# ---- what the verbs share


def _points(path: Path, fields: dict[str, Any]) -> list[dict[str, Any]]:
    from search.points import read_points
    from spaces import load_space, with_fixed

    config = parse_sweep({**fields, "points": []})
    return read_points(path, with_fixed(load_space(config.space), config.base_fields()))


def _forecast(config: SweepConfig, as_json: bool, download: bool, cache_dir: Path | None) -> None:
    from search.cluster import gpus_per_trial, ray_cluster
    from search.forecast import forecast, print_forecast
    from search.progress import DataProgress
    from search.run import Sweep

    sweep = Sweep(
        config,
        download=download,
        cache_dir=cache_dir,
        data_progress=DataProgress(err_console),
        on_note=lambda text: err_console.print(text, markup=False, soft_wrap=True),
    )
    plan, _ = sweep.plan()
    with contextlib.redirect_stdout(sys.stderr), ray_cluster(plan.config) as slots:
        count, gpus = slots(), gpus_per_trial(plan.config)
    found = forecast(plan, count, gpus_per_trial=gpus)
    if as_json:
        print_json(found.to_json())
    else:
        print_forecast(found)
        if plan.strata.field is not None:
            levels = plan.strata.names()
            out_console.print(
                f"each level of {plan.strata.field} ({', '.join(levels)}) gets "
                f"{plan.trials // len(levels)} trials, and rungs of its own",
                soft_wrap=True,
            )


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
    told = conclude if sweep.config.confirmation is None else conclude_confirmation
    told(sweep, result, as_json)
