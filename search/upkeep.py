"""`contrasweep check | sync`: whether a sweep is whole, and its record brought up to date.

A composition root as `search.cli` is: the leaderboard in MLflow is read with `analysis`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from search.console import out_console, print_json
from search.options import CacheDir, Json, SweepDir

if TYPE_CHECKING:
    from search.run import Sweep
    from search.state import SweepState

MOST_SHOWN = 20

upkeep = typer.Typer()


@upkeep.command()
def check(
    directory: SweepDir,
    suggestions: Annotated[
        bool, typer.Option(help="Make the suggestions anew, too, which runs the sweep's space.")
    ] = True,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Whether journal, decisions and record of a sweep agree; exit code 1 if not."""
    from search.check import check_checkpoints, check_journal, check_record
    from search.folders import is_running
    from search.journal import FILE_NAME, load_state
    from search.plan import make_plan_again
    from search.run import Sweep
    from search.store import connect

    sweep = Sweep.open(directory)
    path = sweep.dir / FILE_NAME
    plan = None
    if suggestions:
        plan = make_plan_again(
            sweep.config, load_state(path), sweep.dir, storage=sweep.storage, cache_dir=cache_dir
        )
    state, findings = check_journal(path, plan)
    check_checkpoints(state, sweep.storage, findings)
    if not is_running(sweep.dir):  # a driver records with a delay
        sweep.record_rest()
        check_record(state, connect(sweep.tracking_uri), findings)
        if sweep.config.confirmation is None:  # which has no leaderboard
            findings.faults += _leaderboard_faults(sweep, state)
    if as_json:
        print_json({"dir": str(sweep.dir), **findings.to_json()})
    else:
        recorded = "MLflow was not looked at: the sweep runs"
        if findings.children is not None:
            recorded = f"{findings.children} runs of trials in MLflow"
        anew = f"{findings.suggestions} suggestions made anew, " if suggestions else ""
        out_console.print(
            f"{sweep.config.name}: {findings.trials} trials, {findings.reports} decisions and "
            f"{anew}{recorded}: {len(findings.faults) or 'no'} faults",
            soft_wrap=True,
        )
        for fault in findings.faults[:MOST_SHOWN]:
            out_console.print(f"  {fault}", soft_wrap=True)
        if len(findings.faults) > MOST_SHOWN:
            out_console.print(f"  and {len(findings.faults) - MOST_SHOWN} more")
    if findings.faults:
        raise typer.Exit(1)


@upkeep.command()
def sync(directory: SweepDir, as_json: Json = False) -> None:
    """Upload to MLflow what it lacks of a sweep, as after an outage."""
    from search.folders import is_running
    from search.run import Sweep
    from search.uris import without_credentials

    sweep = Sweep.open(directory)
    if is_running(sweep.dir):
        raise ValueError(f"the sweep {sweep.dir} runs: its driver uploads by itself")
    sweep.record_rest()
    store = without_credentials(sweep.tracking_uri)
    if as_json:
        print_json({"dir": str(sweep.dir), "tracking_uri": store})
    else:
        out_console.print(f"{store} has all of {sweep.config.name}", soft_wrap=True)


def _leaderboard_faults(sweep: Sweep, state: SweepState) -> list[str]:
    """Where the leaderboard that MLflow gives is not the journal's."""
    from analysis import leaderboard_rows, load_sweep

    frames = load_sweep(
        sweep.tracking_uri, str(sweep.config.name), sweep_id=sweep.sweep_id(), metrics=()
    )
    rows = {int(row["number"]): row for row in leaderboard_rows(frames)}
    faults = []
    for trial in state.trials.values():
        row = rows.pop(trial.number, None)
        told = row and (row["state"], row["objective"])
        value = trial.value(sweep.config.objective)
        if told != (trial.state or "unfinished", value):
            journaled = f"{trial.state} with {value}"
            faults.append(f"the leaderboard has {told} for trial {trial.number}, not {journaled}")
    return faults + [f"the leaderboard has a trial {number} that is not known" for number in rows]
