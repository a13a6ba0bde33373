"""What the journal says of a sweep and its trials: the fold of its events, one after the other.

Nothing here reads or writes a file. An event that does not fit raises a KeyError or ValueError,
which `search.journal` turns into an error that names the line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
FINAL_STATES = ("completed", "pruned", "diverged", "oom", "error", "lost")

Event = dict[str, Any]


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
    source: str = "sampler"
    """Where its parameters come from: default, point, grid, enqueued or sampler."""
    stratum: str = ""
    bracket: int = 0
    redraws: int = 0
    failure: str | None = None
    """Why the space gave no configuration."""
    study_attrs: dict[str, Any] = field(default_factory=dict)
    reports: dict[int, Event] = field(default_factory=dict)
    """mark -> its report, in the order of the marks."""
    checkpoint: str | None = None
    checkpoint_mark: int = 0
    attempts: int = 0
    deaths: int = 0
    deaths_in_a_row: int = 0
    """Since its last progress: a new mark, or a checkpoint of a higher one."""
    memory_deaths: int = 0
    """Of these, those by Ray's memory monitor."""
    last_death: str = ""
    """What Ray said of it."""
    node: str | None = None
    pid: int | None = None
    state: str | None = None
    reason: str = ""
    finished_at: float | None = None
    samples_seen: int = 0
    """Images trained on, as of the last report or of the failure after it."""
    paused_at: int | None = None
    """The mark at which it waits for a promotion."""
    promoted: list[int] = field(default_factory=list)
    """Rungs from which it went on after having waited there."""
    audited_at: int | None = None
    """The mark at which it would have been stopped, of a trial that went on all the same."""
    stop_asked: bool = False
    """Whether a user's command ends it at its next report."""
    running_since: float | None = None
    """When its segment started, or made its last sign of life."""

    @property
    def last_report(self) -> Event | None:
        """The report at the highest mark."""
        return self.reports[max(self.reports)] if self.reports else None

    def stop_recorded(self) -> Event | None:
        """The report on which a stop was decided, if there is one."""
        return next((r for r in self.reports.values() if r["decision"]["stop"]), None)

    @property
    def stopped_at(self) -> int | None:
        """The rung at which it was stopped, or waited in vain for a promotion."""
        stop = self.stop_recorded()
        if stop is not None:
            return None if stop["decision"]["rung"] is None else int(stop["decision"]["rung"])
        waited = self.state == "pruned" and not self.stop_asked and self.last_report is not None
        last = self.last_report if waited else None
        return int(last["decision"]["rung"]) if last and last["decision"].get("pause") else None

    @property
    def told_state(self) -> str | None:
        """The state as the sampler is told it: an audited trial counts as stopped there."""
        return "pruned" if self.audited_at is not None else self.state

    def told_reports(self, metric: str) -> dict[int, float]:
        """Mark -> value as the sampler is told them: of an audited trial up to the audit."""
        last = math.inf if self.audited_at is None else self.audited_at
        return {
            mark: float(report["metrics"][metric])
            for mark, report in self.reports.items()
            if mark <= last and report["metrics"].get(metric) is not None
        }

    def values(self, metrics: Sequence[str]) -> list[float | None]:
        """`value` of each metric."""
        return [self.value(metric) for metric in metrics]

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
    warm: list[Event] = field(default_factory=list)
    """Trials of earlier sweeps, as they were taken in at the start."""
    open: dict[int, TrialState] = field(default_factory=dict)
    """Trials without a final state."""
    samples_seen: int = 0
    """Images that all trials together were trained on."""
    gpu_s: float = 0.0
    """Time that segments ran times the GPUs that each held, up to each one's last event."""
    gpus_per_trial: float = 0.0
    commands_taken: int = 0
    """Commands of the user's that were obeyed, or refused."""
    enqueued: list[dict[str, Any]] = field(default_factory=list)
    """Parameters that a user asked for in mid-sweep, and that are still to be tried."""
    planned: int = 0
    exhausted: set[str] = field(default_factory=set)
    """Strata that were found to have nothing new, until more trials are planned."""
    slots: int = 0
    """Segments that run at once, as of the last start or resume."""
    budget_spent: str | None = None
    """Which budget ran out in this session."""
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

    def unfinished(self) -> list[TrialState]:
        """Trials without a final state, in the order of their numbers."""
        return list(self.open.values())

    def pareto(self, metrics: Sequence[str], modes: Sequence[str]) -> list[TrialState]:
        """The completed trials that no other one beats or equals in all metrics, and beats in one.

        Best first in the first metric; trials that lack a value are left out.
        """
        signs = [1.0 if mode == "max" else -1.0 for mode in modes]
        points = []
        for trial in self.trials.values():
            values = trial.values(metrics)
            if trial.state == "completed" and None not in values:
                scores = [s * float(v) for s, v in zip(signs, values, strict=True) if v is not None]
                points.append((trial, scores))
        front = [
            (trial, scores)
            for trial, scores in points
            if not any(_dominates(other, scores) for _, other in points)
        ]
        return [trial for trial, _ in sorted(front, key=lambda each: (-each[1][0], each[0].number))]

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


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _on_sweep_started(state: SweepState, event: Event) -> None:
    if event["schema"] != SCHEMA:
        raise ValueError(f"schema {event['schema']} is not {SCHEMA}, the one this version reads")
    state.header = event
    state.planned = int(event.get("planned", event["config"]["trials"]))
    state.slots = int(event["slots"])
    state.gpus_per_trial = float(event.get("gpus_per_trial", 0.0))


def _on_resumed(state: SweepState, event: Event) -> None:
    if int(event["trials"]) > state.planned:
        state.exhausted.clear()
    state.planned = int(event["trials"])
    state.slots = int(event["slots"])
    state.gpus_per_trial = float(event.get("gpus_per_trial", state.gpus_per_trial))
    state.commands_taken = int(event.get("commands_taken", state.commands_taken))
    state.ended = None
    state.budget_spent = None  # it may have been raised
    for trial in state.open.values():  # what ran then was cut off
        trial.running_since = None


def _on_warm_trial(state: SweepState, event: Event) -> None:
    state.warm.append(event)


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
        source=str(event.get("source", "sampler")),
        stratum=str(event.get("stratum", "")),
        bracket=int(event.get("bracket", 0)),
        redraws=int(event.get("redraws", 0)),
        failure=event.get("failure"),
        study_attrs=event.get("study_attrs", {}),
    )
    state.open[number] = state.trials[number]
    if state.trials[number].source == "enqueued":
        state.enqueued.pop(0)


def _on_exhausted(state: SweepState, event: Event) -> None:
    state.exhausted.add(str(event["stratum"]))


def _on_started(state: SweepState, event: Event) -> None:
    trial = state.trials[int(event["number"])]
    trial.attempts = int(event["attempt"])
    if event.get("why") == "promoted":
        trial.promoted.append(int(event["rung"]))
    elif event.get("why") == "audited":
        trial.audited_at = trial.paused_at
    trial.paused_at = None
    trial.running_since = float(event["time"])


def _on_report(state: SweepState, event: Event) -> None:
    trial = state.trials[int(event["number"])]
    mark = int(event["mark"])
    if mark in trial.reports:
        raise ValueError(f"mark {mark} of trial {trial.number} is reported twice")
    if trial.state is not None:
        raise ValueError(f"trial {trial.number} reports after it was {trial.state}")
    trial.reports[mark] = event
    trial.deaths_in_a_row = 0
    state.reports.append(event)
    _count(state, trial, event, int(event["samples_seen"]))
    if event["decision"].get("pause"):
        trial.paused_at = mark
        trial.running_since = None
    if event["decision"].get("audited"):
        trial.audited_at = mark
    trial.node = event.get("node") or trial.node
    trial.pid = event.get("pid") or trial.pid


def _on_checkpoint(state: SweepState, event: Event) -> None:
    trial = state.trials[int(event["number"])]
    if trial.checkpoint is None or int(event["mark"]) > trial.checkpoint_mark:
        trial.deaths_in_a_row = 0
    trial.checkpoint = str(event["path"])
    trial.checkpoint_mark = int(event["mark"])
    _count(state, trial, event, 0)


def _on_checkpoint_dropped(state: SweepState, event: Event) -> None:
    state.trials[int(event["number"])].checkpoint = None


def _on_died(state: SweepState, event: Event) -> None:
    trial = state.trials[int(event["number"])]
    if event.get("charged", True):
        trial.deaths += 1
        trial.deaths_in_a_row += 1
    trial.memory_deaths += bool(event.get("of_memory", False))
    trial.last_death = str(event.get("reason", ""))
    _count(state, trial, event, 0)
    trial.running_since = None


def _on_command(state: SweepState, event: Event) -> None:
    state.commands_taken += 1
    command = event["command"]
    if event.get("refused"):
        return
    if command["command"] == "enqueue":
        state.enqueued.append(command["params"])
        state.planned += 1
    elif command["command"] == "stop" and command.get("trial") is not None:
        state.trials[int(command["trial"])].stop_asked = True


def _on_budget_spent(state: SweepState, event: Event) -> None:
    state.budget_spent = str(event["reason"])


def _on_finished(state: SweepState, event: Event) -> None:
    trial = state.trials[int(event["number"])]
    if trial.state is not None:
        raise ValueError(f"trial {trial.number} is finished twice")
    if event["state"] not in FINAL_STATES:
        raise ValueError(f"unknown state {event['state']!r}")
    trial.state = event["state"]
    trial.reason = str(event.get("reason", ""))
    trial.finished_at = float(event["time"])
    if event["state"] not in ("diverged", "oom", "error"):
        trial.running_since = None  # it had its last report before, maybe long ago
    _count(state, trial, event, int(event.get("samples_seen", 0)))
    trial.running_since = trial.paused_at = None
    del state.open[trial.number]


def _on_sweep_finished(state: SweepState, event: Event) -> None:
    state.ended = event


def _count(state: SweepState, trial: TrialState, event: Event, samples_seen: int) -> None:
    """Add the images and the time since the trial's last sign of life."""
    state.samples_seen += max(0, samples_seen - trial.samples_seen)
    trial.samples_seen = max(samples_seen, trial.samples_seen)
    now = float(event["time"])
    if trial.running_since is not None:
        state.gpu_s += max(0.0, now - trial.running_since) * state.gpus_per_trial
        trial.running_since = now


_HANDLERS: dict[str, Callable[[SweepState, Event], None]] = {
    "sweep_started": _on_sweep_started,
    "resumed": _on_resumed,
    "warm_trial": _on_warm_trial,
    "suggested": _on_suggested,
    "exhausted": _on_exhausted,
    "started": _on_started,
    "report": _on_report,
    "checkpoint": _on_checkpoint,
    "checkpoint_dropped": _on_checkpoint_dropped,
    "died": _on_died,
    "command": _on_command,
    "budget_spent": _on_budget_spent,
    "finished": _on_finished,
    "sweep_finished": _on_sweep_finished,
}
