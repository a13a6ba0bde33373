"""What a person sees of a running sweep: a live table on a terminal, plain lines elsewhere.

A fold over the journal's state like all else; it decides nothing. Everything goes to the error
stream, so that standard output stays free for results.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from search.endings import BY_COMMAND, WORDS, counts_in_words, in_words
from search.state import SweepState, TrialState
from trainer.config import TrainConfig

REFRESH_S = 0.5
SHOWN_TRIALS = 12
DEFAULT_WARMUP = TrainConfig.model_fields["warmup"].default
STYLES = {
    "completed": "green",
    WORDS["pruned"]: "yellow",
    BY_COMMAND: "yellow",
    "unfinished": "cyan",
}
SYMBOLS = {"completed": "✓", WORDS["pruned"]: "✂", BY_COMMAND: "✂", "unfinished": "…"}


def time_left_s(state: SweepState, now: float) -> float | None:
    """Seconds to the end if the trials to come cost what the finished ones did; None: unknown.

    The pace is that since the first report: what came before is the start of Ray and of workers.
    """
    ended = [trial for trial in state.trials.values() if trial.state is not None]
    if not ended or not state.reports:
        return None
    if state.wall_before_s:  # earlier sessions have starts of their own
        images, wall_s = state.samples_seen, state.wall_before_s + now - state.session_started
    else:
        first = state.reports[0]
        images, wall_s = state.samples_seen - first["samples_seen"], now - first["time"]
    if images <= 0:
        return None
    per_trial = sum(trial.samples_seen for trial in ended) / len(ended)
    running = sum(
        max(0.0, per_trial - trial.samples_seen)
        for trial in state.trials.values()
        if trial.state is None
    )
    to_come = (state.planned - len(state.trials)) * per_trial + running
    return max(0.0, to_come * wall_s / images)


def duration(seconds: float) -> str:
    """`73.4` -> `1:13`, `3700` -> `1:01:40`."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class SweepDisplay:
    """Shows a sweep while it runs: `with SweepDisplay(console) as display`, then call it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.time) -> None:
        self._console = console
        self._clock = clock
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._shown_at = -float("inf")
        self._told: set[int] = set()
        self._announced = False
        self._said_hello = False

    def __enter__(self) -> SweepDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, state: SweepState) -> None:
        """Show `state`: at most twice a second on a terminal, each finished trial elsewhere."""
        if not self._announced:
            self._announce(state)
        if self._live is None:
            self._say(state)
        elif self._clock() - self._shown_at >= REFRESH_S or state.ended:
            self._shown_at = self._clock()
            self._live.start()
            self._live.update(self._table(state), refresh=True)

    def note(self, text: str) -> None:
        """A line for the user, above the live table."""
        self._console.print(text, soft_wrap=True)

    def _announce(self, state: SweepState) -> None:
        """What is worth knowing before the first trial ends."""
        self._announced = True
        config, data = state.header["config"], state.header["data"]
        notes = []
        if data["skipped"]:
            names = ", ".join(data["skipped_files"][:5])
            notes.append(f"skipped {data['skipped']} corrupt images: {names}, ...")
        warmup = config["epochs"] * config["fixed"].get("warmup", DEFAULT_WARMUP)
        if config["scheduler"] == "asha" and config["grace"] < warmup:
            notes.append(
                f"grace ({config['grace']:g} epochs) ends within the learning rate's warm-up "
                f"({warmup:g} epochs): values there say little; raise --grace"
            )
        for note in notes:
            self._console.print(note, markup=False, highlight=False, soft_wrap=True)

    def _say(self, state: SweepState) -> None:
        config = state.header["config"]
        if not self._said_hello:
            self._said_hello = True
            data = state.header["data"]
            before = [
                t.number
                for t in state.trials.values()
                if t.finished_at is not None and t.finished_at < state.session_started
            ]
            self._told.update(before)
            if before:
                self.note(f"going on: {len(before)} of {state.planned} trials had ended before")
            self._console.print(
                f"sweep {config['name']}: {state.planned} trials of up to "
                f"{state.header['total_images']:,} images of {data['name']}, "
                f"{state.slots} at a time",
                highlight=False,
                soft_wrap=True,
            )
        for trial in state.trials.values():
            if trial.state and trial.number not in self._told:
                self._told.add(trial.number)
                left_s = time_left_s(state, self._clock())
                left = "" if left_s is None else f", about {duration(left_s)} left"
                self._console.print(
                    f"[{len(self._told)}/{state.planned}] trial {trial.number} {in_words(trial)} "
                    f"after {trial.samples_seen:,} images: {_value(trial, config['objective'])}"
                    f"{_why(trial)}{left}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )

    def _table(self, state: SweepState) -> Group:
        config = state.header["config"]
        objective = config["objective"]
        now = self._clock()
        wall_s = (
            state.wall_before_s + (state.last_time if state.ended else now) - state.session_started
        )
        left_s = None if state.ended else time_left_s(state, now)
        counts = counts_in_words(state)
        line = Text(f"{config['name']}  ", style="bold")
        for name, count in sorted(counts.items()):
            shown = "under way" if name == "unfinished" else name
            line.append(f"{count} {shown}  ", style=STYLES.get(name, "red"))
        line.append(f"of {state.planned} trials", style="dim")
        images = state.samples_seen
        spent = Text(
            f"{images:,} images, {images / max(wall_s, 1e-9):,.0f} a second, "
            f"{duration(wall_s)} elapsed"
            + ("" if left_s is None else f", about {duration(left_s)} left"),
            style="dim",
        )
        best = state.best(objective, state.header["mode"])
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("trial", "state", "images", "", objective):
            align: JustifyMethod = "left" if heading == "state" else "right"
            table.add_column(heading, justify=align, no_wrap=True)
        table.add_column("parameters")  # the only one that gives way on a narrow terminal
        for trial in _worth_showing(state, objective):
            name = in_words(trial) or "unfinished"
            style = STYLES.get(name, "red")
            table.add_row(
                f"{'★ ' if trial is best else ''}{trial.number}",
                Text(f"{SYMBOLS.get(name, '✗')} {in_words(trial) or _doing(trial)}", style=style),
                f"{trial.samples_seen:,}",
                ProgressBar(
                    total=state.header["total_images"], completed=trial.samples_seen, width=10
                ),
                _value(trial, objective),
                Text(_params(trial), style="dim", no_wrap=True, overflow="ellipsis"),
            )
        return Group(line, spent, table)


class DataProgress:
    """A progress bar for decoding a folder of images: call it with (done, total)."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bar.add_task("decoding", total=None)

    def __call__(self, done: int, total: int) -> None:
        self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
        if done >= total:
            self._bar.stop()


def _doing(trial: TrialState) -> str:
    if trial.paused_at is not None:
        return "waiting"
    return "running" if trial.audited_at is None else "audited"


def _worth_showing(state: SweepState, objective: str) -> list[TrialState]:
    """Running trials, then the best of the others."""
    running = [trial for trial in state.open.values() if trial.paused_at is None]
    sign = 1.0 if state.header["mode"] == "max" else -1.0

    def rank(trial: TrialState) -> tuple[bool, float]:
        value = trial.value(objective)
        return (trial.state != "completed", -sign * value if value is not None else float("inf"))

    others = (t for t in state.trials.values() if t.state is not None or t.paused_at is not None)
    return (running + sorted(others, key=rank))[:SHOWN_TRIALS]


def _value(trial: TrialState, objective: str) -> str:
    value = trial.value(objective)
    return "-" if value is None else f"{value:.4f}"


def _params(trial: TrialState) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in trial.params.items()
    )


def _why(trial: TrialState) -> str:
    return f" ({trial.reason})" if trial.reason and trial.state != "pruned" else ""
