"""Commands to a running sweep: lines of `commands.jsonl` in its folder, written by other processes.

One JSON object a line, with the time of writing: {"command": "stop"} (each running trial ends at
its next report, and no other starts), {"command": "stop", "trial": 3} (that trial alone) and
{"command": "enqueue", "params": {...}} (one more trial, of these parameters). The file is only
ever appended to, so a command's place in it says whether it was taken. Leaves out: whether a
command makes sense for the sweep's space, which its writer and its driver check.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from search.state import SweepState

FILE_NAME = "commands.jsonl"
MALFORMED = "malformed"
"""The command that stands for a line that is none; it has its `line`, from 1, and `reason`."""

Command = dict[str, Any]


def append_command(
    sweep_dir: Path, command: Command, *, clock: Callable[[], float] = time.time
) -> None:
    """Add one command to the sweep's file, with its time.

    It is one write, so that processes may do so at once. ValueError for what is no command.
    """
    command = {**command, "time": clock()}
    _check(command)
    line = json.dumps(command, allow_nan=False).encode() + b"\n"
    handle = os.open(sweep_dir / FILE_NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line  # a writer died in mid-write: its line must not swallow this one
        if os.write(handle, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(sweep_dir / FILE_NAME))
        os.fsync(handle)
    finally:
        os.close(handle)


def refusal(
    command: Mapping[str, Any], state: SweepState, of_params: Callable[[Any], str | None]
) -> str | None:
    """Why a sweep in this state cannot obey; None: it can. `of_params` answers for enqueueing."""
    kind, number = command.get("command"), command.get("trial")
    if kind == "enqueue":
        return of_params(command.get("params"))
    if kind == MALFORMED:
        return f"line {command.get('line')} of {FILE_NAME}: {command.get('reason')}"
    if kind != "stop":
        return f"unknown command {kind!r}"
    if number is None:
        asked = command.get("time")
        stale = isinstance(asked, float) and asked < state.session_started
        return "it was meant for an earlier session" if stale else None
    trial = state.trials.get(number) if isinstance(number, int) else None
    if trial is None:
        return f"there is no trial {number!r}"
    return f"trial {number} has ended: {trial.state}" if trial.state else None


class CommandFile:
    """The commands to the sweep in `sweep_dir`, as its driver reads them."""

    def __init__(self, sweep_dir: Path) -> None:
        self._path = sweep_dir / FILE_NAME
        self._commands: list[Command] = []
        self._offset = 0

    def after(self, count: int) -> list[Command]:
        """The whole commands beyond the first `count`; a missing file has none.

        A torn last line is not yet a command. A malformed one is `MALFORMED`, so that it is
        counted like the rest. Nothing is raised: a sweep must not end by its command file.
        """
        try:
            size = self._path.stat().st_size
            if size < self._offset:  # emptied or replaced by hand
                self._commands, self._offset = [], 0
            if size > self._offset:
                self._read()
        except OSError:  # no command yet, or a file system that fails for the moment
            pass
        return self._commands[count:]

    def still_taken(self, count: int) -> int:
        """`count` taken commands, or 0 if the file has fewer: it was deleted, all in it is new."""
        return count if len(self.after(0)) >= count else 0

    def _read(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].split(b"\n"):
            if line:  # an empty one is of a writer that met another one in mid-write
                self._commands.append(_parsed(line, len(self._commands) + 1))
        self._offset += whole


def _parsed(line: bytes, number: int) -> Command:
    try:
        command = json.loads(line.decode(), parse_constant=_not_json)
        _check(command)
    except (ValueError, RecursionError) as error:
        return {"command": MALFORMED, "line": number, "reason": " ".join(str(error).split())[:200]}
    return dict(command)


def _check(command: object) -> None:
    """ValueError for what is not one of the module's commands."""
    if not isinstance(command, dict):
        raise ValueError(f"a command is a JSON object, not {type(command).__name__}")
    kind = command.get("command")
    fields: set[str] = set(command) - {"command", "time"}
    if kind == "stop" and fields <= {"trial"}:
        trial = command.get("trial", 0)
        if type(trial) is not int or trial < 0:
            raise ValueError("stop: trial must be the number of a trial")
    elif kind == "enqueue" and fields == {"params"}:
        params = command["params"]
        if not isinstance(params, dict) or not params:
            raise ValueError("enqueue: params must be a mapping of parameters, not empty")
    else:
        known = "stop, stop with trial, enqueue with params"
        raise ValueError(
            f"unknown command {str(kind)[:40]!r} with {sorted(fields)}; known: {known}"
        )


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")
