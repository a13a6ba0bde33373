"""The append-only event log of a sweep.

`events.jsonl` is the truth: one JSON object a line, written and flushed before anything acts on
it. What a sweep knows (`SweepState`) is computed from these lines alone, so a driver that was
killed loses nothing that it had acted upon. A torn last line, left by a kill in mid-write, is
dropped; anything else that is malformed is an error that names the line.

Events: sweep_started, resumed, warm_trial, suggested, exhausted, started, report, checkpoint,
checkpoint_dropped, died, finished, command, budget_spent, sweep_finished. Left out: the copy on
other storage (`search.mirror`), which `on_written` is for.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from search.state import Event, SweepState

FILE_NAME = "events.jsonl"


class JournalError(ValueError):
    """The journal cannot be read or written; the message names file and line."""


def steady_clock() -> Callable[[], float]:
    """Seconds since the epoch that go on evenly from now, though the system's clock be set."""
    ahead_s = time.time() - time.monotonic()
    return lambda: ahead_s + time.monotonic()


class Journal:
    """A sweep's log and its fold. One writer; opened anew for each line.

    One that is not `durable` leaves it to the system when lines reach the disk: for simulations.
    """

    def __init__(
        self, path: Path, *, clock: Callable[[], float] | None = None, durable: bool = True
    ) -> None:
        self.path = path
        self.state = SweepState()
        self.clock = clock or steady_clock()
        self.on_written: Callable[[str], None] = lambda event: None
        """Called with the kind of an event that is on the disk, before it counts; it may raise."""
        self._durable = durable
        self._failure: str | None = None
        for event in read_events(path):
            self.state.apply(event)

    @classmethod
    def create(
        cls, path: Path, *, clock: Callable[[], float] | None = None, durable: bool = True
    ) -> Journal:
        """A new, empty journal; an existing file is an error."""
        path.touch(exist_ok=False)
        return cls(path, clock=clock, durable=durable)

    def append(self, event: str, **fields: Any) -> Event:
        """Write one event to the disk, then take it into the state.

        A write that fails stays failed: every later append raises the same JournalError, so
        that a sweep cannot act on what it could not record.
        """
        if self._failure:
            raise JournalError(self._failure)
        record: Event = {"event": event, "time": self.clock(), **_finite(fields)}
        line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                _write_all(handle, line.encode())
                if self._durable:
                    os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            self._failure = f"cannot write {self.path}: {error.strerror}"
            raise JournalError(self._failure) from error
        try:
            self.on_written(event)
        except JournalError as error:
            self._failure = str(error)
            raise
        self.state.apply(record)
        return record

    @property
    def failure(self) -> str | None:
        """Why nothing can be written any more; None while all is well."""
        return self._failure

    def drop_torn_line(self) -> None:
        """Cut off what a kill in mid-write left behind, before new lines are added."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)
                file.flush()
                os.fsync(file.fileno())


def read_events(path: Path) -> Iterator[Event]:
    """The events of a journal in order, without a torn last line.

    Raises JournalError for a missing file and for a malformed line, naming it.
    """
    for _, event in read_events_from(path, 0):
        yield event


def read_events_from(path: Path, offset: int) -> Iterator[tuple[int, Event]]:
    """Pairs of (offset in bytes after the line, event), from `offset` on."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
    except OSError as error:
        raise JournalError(f"cannot read {path}: {error.strerror}") from None
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return  # torn by a kill, or being written at this moment
        offset += len(line)
        try:
            event = _DECODER.decode(line.decode())
            if not isinstance(event, dict) or "event" not in event or "time" not in event:
                raise ValueError("not an event")
        except ValueError as error:
            number = path.read_bytes()[:offset].count(b"\n")
            raise JournalError(f"{path}, line {number}: {error}") from None
        yield offset, event


def load_state(path: Path) -> SweepState:
    """Fold the journal at `path`; JournalError names the first line that does not fit."""
    state = SweepState()
    for number, event in enumerate(read_events(path), start=1):
        try:
            state.apply(event)
        except KeyError as error:
            raise JournalError(f"{path}, line {number}: {error} is missing or unknown") from None
        except (TypeError, ValueError) as error:
            raise JournalError(f"{path}, line {number}: {error}") from None
    if not state.header:
        raise JournalError(f"{path} is empty: the sweep never started; delete {path.parent}")
    return state


def _write_all(handle: int, content: bytes) -> None:
    while content:
        content = content[os.write(handle, content) :]


def _interned(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {sys.intern(key): value for key, value in pairs}


_DECODER = json.JSONDecoder(object_pairs_hook=_interned)


def _finite(value: Any) -> Any:
    """Plain JSON values: no NaN and no infinity (null instead), no numpy scalars.

    A name that each event repeats is kept once: the fold holds every report of a sweep.
    """
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {sys.intern(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
