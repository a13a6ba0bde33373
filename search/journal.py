"""The append-only event log of a sweep, and the state that is its fold.

`events.jsonl` is the truth: one JSON object a line, written and flushed before anything acts on
it. What a sweep knows (`SweepState`) is computed from these lines alone, so a driver that was
killed loses nothing that it had acted upon. A torn last line, left by a kill in mid-write, is
dropped; anything else that is malformed is an error that names the line.

Events: sweep_started, resumed, suggested, started, report, checkpoint, died, finished,
sweep_finished. Left out: mirroring to other storage.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
FILE_NAME = "events.jsonl"
FINAL_STATES = ("completed", "pruned", "diverged", "oom", "error", "lost")

Event = dict[str, Any]


class JournalError(ValueError):
    """The journal cannot be read or written; the message names file and line."""


@dataclass
class TrialState:
    """What the journal says of one trial."""

    number: int
    params: dict[str, Any]
    distributions: dict[str, str]
    system_attrs: dict[str, Any]
    config: dict[str, Any]
    is_default: bool
    suggested_at: float
    reports: dict[int, Event] = field(default_factory=dict)
    """mark -> its report, in the order of the marks."""
    checkpoint: str | None = None
    checkpoint_mark: int = 0
    attempts: int = 0
    deaths: int = 0
    node: str | None = None
    pid: int | None = None
    state: str | None = None
    reason: str = ""
    finished_at: float | None = None
    samples_at_end: int = 0

    @property
    def samples_seen(self) -> int:
        """Images trained on, as of the last report or of the failure after it."""
        reported = [int(report["samples_seen"]) for report in self.reports.values()]
        return max([*reported, self.samples_at_end])

    @property
    def last_report(self) -> Event | None:
        """The report at the highest mark."""
        return self.reports[max(self.reports)] if self.reports else None

    def stop_recorded(self) -> Event | None:
        """The report on which a stop was decided, if there is one."""
        return next((r for r in self.reports.values() if r["decision"]["stop"]), None)

    def value(self, metric: str) -> float | None:
        """Last reported value of `metric`; None before the first report and for a NaN."""
        last = self.last_report
        value = None if last is None else last["metrics"].get(metric)
        return None if value is None else float(value)


@dataclass
class SweepState:
    """The fold of a journal: what happened, trial by trial."""

    header: Event = field(default_factory=dict)
    trials: dict[int, TrialState] = field(default_factory=dict)
    reports: list[Event] = field(default_factory=list)
    """All reports in the order in which they were decided upon."""
    planned: int = 0
    slots: int = 0
    """Segments that run at once, as of the last start or resume."""
    ended: Event | None = None
    """The sweep_finished event, until a `resumed` reopens the sweep."""
    wall_before_s: float = 0.0
    """Driver's time in earlier sessions: up to each one's last event."""
    session_started: float = 0.0
    last_time: float = 0.0

    def apply(self, event: Event) -> None:
        """Take in one event; a KeyError or ValueError means that it is malformed."""
        kind = event["event"]
        now = float(event["time"])
        handler = _HANDLERS.get(kind)
        if handler is None:
            raise ValueError(f"unknown event {kind!r}")
        if kind in ("sweep_started", "resumed"):
            if self.session_started:
                self.wall_before_s += max(0.0, self.last_time - self.session_started)
            self.session_started = now
        handler(self, event)
        self.last_time = now

    @property
    def wall_s(self) -> float:
        """Seconds that drivers ran, up to the last event."""
        return self.wall_before_s + max(0.0, self.last_time - self.session_started)

    @property
    def samples_seen(self) -> int:
        """Images that all trials together were trained on."""
        return sum(trial.samples_seen for trial in self.trials.values())

    def unfinished(self) -> list[TrialState]:
        """Trials without a final state, in the order of their numbers."""
        return [trial for trial in self.trials.values() if trial.state is None]

    def counts(self) -> dict[str, int]:
        """How many trials are in each state; those without a final one count as unfinished."""
        counts: dict[str, int] = {}
        for trial in self.trials.values():
            state = trial.state or "unfinished"
            counts[state] = counts.get(state, 0) + 1
        return counts

    def best(self, metric: str, mode: str) -> TrialState | None:
        """The best trial: of those that got furthest, the one with the best value.

        Values at fewer images are not comparable, so a completed trial comes before all others,
        and without one the furthest mark decides first.
        """
        sign = 1.0 if mode == "max" else -1.0
        with_value = [t for t in self.trials.values() if t.value(metric) is not None]
        pool = [t for t in with_value if t.state == "completed"] or [
            t for t in with_value if t.state in (None, "pruned")
        ]

        def rank(trial: TrialState) -> tuple[int, float, int]:
            furthest = 0 if trial.state == "completed" else max(trial.reports)
            return furthest, sign * float(trial.value(metric) or 0.0), -trial.number

        return max(pool, key=rank, default=None)


def _on_sweep_started(state: SweepState, event: Event) -> None:
    if event["schema"] != SCHEMA:
        raise ValueError(f"schema {event['schema']} is not {SCHEMA}, the one this version reads")
    state.header = event
    state.planned = int(event["config"]["trials"])
    state.slots = int(event["slots"])


def _on_resumed(state: SweepState, event: Event) -> None:
    state.planned = int(event["trials"])
    state.slots = int(event["slots"])
    state.ended = None


def _on_suggested(state: SweepState, event: Event) -> None:
    number = int(event["number"])
    if number in state.trials:
        raise ValueError(f"trial {number} is suggested twice")
    state.trials[number] = TrialState(
        number=number,
        params=event["params"],
        distributions=event["distributions"],
        system_attrs=event["system_attrs"],
        config=event["config"],
        is_default=bool(event["default"]),
        suggested_at=float(event["time"]),
    )


def _on_started(state: SweepState, event: Event) -> None:
    trial = state.trials[int(event["number"])]
    trial.attempts = int(event["attempt"])
    trial.node = event.get("node") or trial.node
    trial.pid = event.get("pid") or trial.pid


def _on_report(state: SweepState, event: Event) -> None:
    trial = state.trials[int(event["number"])]
    mark = int(event["mark"])
    if mark in trial.reports:
        raise ValueError(f"mark {mark} of trial {trial.number} is reported twice")
    if trial.state is not None:
        raise ValueError(f"trial {trial.number} reports after it was {trial.state}")
    trial.reports[mark] = event
    state.reports.append(event)
    trial.node = event.get("node") or trial.node
    trial.pid = event.get("pid") or trial.pid


def _on_checkpoint(state: SweepState, event: Event) -> None:
    trial = state.trials[int(event["number"])]
    trial.checkpoint = str(event["path"])
    trial.checkpoint_mark = int(event["mark"])


def _on_died(state: SweepState, event: Event) -> None:
    state.trials[int(event["number"])].deaths += 1


def _on_finished(state: SweepState, event: Event) -> None:
    trial = state.trials[int(event["number"])]
    if trial.state is not None:
        raise ValueError(f"trial {trial.number} is finished twice")
    if event["state"] not in FINAL_STATES:
        raise ValueError(f"unknown state {event['state']!r}")
    trial.state = event["state"]
    trial.reason = str(event.get("reason", ""))
    trial.finished_at = float(event["time"])
    trial.samples_at_end = int(event.get("samples_seen", 0))


def _on_sweep_finished(state: SweepState, event: Event) -> None:
    state.ended = event


_HANDLERS: dict[str, Callable[[SweepState, Event], None]] = {
    "sweep_started": _on_sweep_started,
    "resumed": _on_resumed,
    "suggested": _on_suggested,
    "started": _on_started,
    "report": _on_report,
    "checkpoint": _on_checkpoint,
    "died": _on_died,
    "finished": _on_finished,
    "sweep_finished": _on_sweep_finished,
}


class Journal:
    """A sweep's log and its fold. One writer; opened anew for each line, so it can be pickled."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.state = SweepState()
        self._clock = clock
        self._failure: str | None = None
        for event in read_events(path):
            self.state.apply(event)

    @classmethod
    def create(cls, path: Path, *, clock: Callable[[], float] = time.time) -> Journal:
        """A new, empty journal; an existing file is an error."""
        path.touch(exist_ok=False)
        return cls(path, clock=clock)

    def append(self, event: str, **fields: Any) -> Event:
        """Write one event to the disk, then take it into the state.

        A write that fails stays failed: every later append raises the same JournalError, so
        that a sweep cannot act on what it could not record.
        """
        if self._failure:
            raise JournalError(self._failure)
        record: Event = {"event": event, "time": self._clock(), **_finite(fields)}
        line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                _write_all(handle, line.encode())
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            self._failure = f"cannot write {self.path}: {error.strerror}"
            raise JournalError(self._failure) from error
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
            event = json.loads(line)
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


def _finite(value: Any) -> Any:
    """Plain JSON values: no NaN and no infinity (null instead), no numpy scalars."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
