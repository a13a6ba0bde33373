"""`contrasweep stop | enqueue`: a sweep steered from outside, by its command file.

Leaves out: the driver's side, which takes the commands at its next step.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.commands import append_command
from search.console import out_console, print_json
from search.options import Json, SweepDir

if TYPE_CHECKING:
    from search.config import SweepConfig
    from search.state import SweepState
    from spaces import Space

steering = typer.Typer()

Values = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Of what the space searches; repeatable."),
]


@steering.command()
def stop(
    directory: SweepDir,
    trial: Annotated[int | None, typer.Option(min=0, help="Stop this one alone.")] = None,
    as_json: Json = False,
) -> None:
    """Stop a running sweep, or one of its trials, at the next report."""
    from search.folders import sweep_folder
    from search.journal import FILE_NAME, load_state

    directory = sweep_folder(directory)
    state = load_state(directory / FILE_NAME)
    if trial is not None:
        _check_not_ended(state, trial)
    if not _takes_commands(directory, state):
        raise ValueError(f"the sweep {directory} does not run: there is nothing to stop")
    if trial is None:
        append_command(directory, {"command": "stop"})
        told = (
            f"stopping {directory.name}: running trials end at their next report, no other starts"
        )
    else:
        append_command(directory, {"command": "stop", "trial": trial})
        told = f"stopping trial {trial} of {directory.name}: it ends at its next report"
    if as_json:
        print_json({"dir": str(directory), "command": "stop", "trial": trial})
    else:
        out_console.print(told, soft_wrap=True)


@steering.command()
def enqueue(directory: SweepDir, settings: Values = None, as_json: Json = False) -> None:
    """Have a sweep try a configuration of yours next; what is not set, the sampler fills in."""
    from search.config import parse_sweep
    from search.folders import sweep_folder
    from search.journal import FILE_NAME, load_state
    from search.points import parse_point

    directory = sweep_folder(directory)
    texts = _texts(settings)
    state = load_state(directory / FILE_NAME)
    config = parse_sweep(state.header["config"])
    if config.confirmation is not None:
        raise ValueError(f"{directory} is a confirmation, which has its trials; enqueue in a sweep")
    params = parse_point(_searched(config, directory, state.header["space_sha256"]), texts)
    field = config.stratified_by
    if field is not None and field not in params:
        raise ValueError(
            f"the sweep is stratified by {field}: set it, too, such as --set {field}=VALUE"
        )
    append_command(directory, {"command": "enqueue", "params": params})
    running = _takes_commands(directory, state)
    resume = None if running else f"contrasweep resume {directory}"
    if as_json:
        told = {"dir": str(directory), "command": "enqueue", "params": params}
        print_json({**told, "running": running, "resume": resume})
        return
    values = ", ".join(f"{name}={value}" for name, value in params.items())
    when = "one trial more than planned" if running else f"tried by: {resume}"
    out_console.print(f"enqueued {values}; {when}", soft_wrap=True)


def _takes_commands(directory: Path, state: SweepState) -> bool:
    """Whether a driver runs that still looks for commands.

    One that has journaled the sweep's end goes on to record it for a while; a stop that it no
    longer takes would end the next `resume`.
    """
    from search.folders import is_running

    return state.ended is None and is_running(directory)


def _check_not_ended(state: SweepState, number: int) -> None:
    if number not in state.trials:
        known = f"trials 0 to {max(state.trials)}" if state.trials else "no trial yet"
        raise ValueError(f"there is no trial {number}; the sweep has {known}")
    trial = state.trials[number]
    if trial.state is not None:
        why = f" ({trial.reason})" if trial.reason else ""
        raise ValueError(f"trial {number} has ended already: {trial.state}{why}")


def _texts(settings: list[str] | None) -> dict[str, str]:
    """FIELD=VALUE -> what is to be set, still as text: the space knows its type."""
    if not settings:
        raise ValueError("give at least one --set FIELD=VALUE, such as --set lr=0.001")
    texts: dict[str, str] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ValueError(f"--set takes FIELD=VALUE, such as --set lr=0.001; got {setting!r}")
        if name in texts:
            raise ValueError(f"{name} is set twice")
        texts[name] = text
    return texts


def _searched(config: SweepConfig, directory: Path, began_with: str | None) -> Space:
    """The space of a sweep as it began, with its fixed fields taken out.

    A user's own file that has changed since then, or is gone, is read from the folder's copy;
    `began_with` is the hash of the file's bytes, None for a space of the package.
    """
    from search.plan import SPACE_COPY
    from search.user_files import sha256, space_file
    from spaces import load_space, with_fixed

    copy = directory / SPACE_COPY
    copied = f"{copy}:{config.space.rpartition(':')[2]}"
    try:
        space = load_space(config.space)
    except ValueError:
        if not copy.exists():
            raise
        space = load_space(copied)
    if copy.exists() and sha256(space_file(space)) != began_with:
        space = load_space(copied)
    return with_fixed(space, config.base_fields())
