"""How trials end, in words: the final state and its reason; and when all of them end badly."""

from __future__ import annotations

import re
from collections import Counter

from search.state import SweepState, TrialState

FAILED = ("diverged", "oom", "error", "lost")
BY_COMMAND = "stopped by command"
WORDS = {"pruned": "stopped early", "oom": "out of memory"}
"""What people read instead of a state's name, where that differs."""


def culprit(death: str) -> tuple[str, str] | None:
    """What a worker died of that is no fault of its trial's, storage or node, and what it said."""
    for error, what in (("StorageError", "storage"), ("NodeError", "node")):
        _, found, told = death.partition(f"{error}: ")
        if found:
            return what, told
    return None


def in_words(trial: TrialState) -> str:
    """How a trial ended, for people; empty while it has not."""
    by_command = trial.state == "pruned" and trial.reason == BY_COMMAND
    return BY_COMMAND if by_command else WORDS.get(trial.state or "", trial.state or "")


def counts_in_words(state: SweepState) -> dict[str, int]:
    """How many trials ended in which way, those without an end as `unfinished`."""
    return Counter(in_words(trial) or "unfinished" for trial in state.trials.values())


def ending_of(trial: TrialState, objective: str, total_images: int) -> tuple[str, str]:
    """Final state and reason of a trial that reached its end, was stopped or waited in vain."""
    if total_images in trial.reports:
        return "completed", ""
    stop = trial.stop_recorded()
    if stop is None and trial.stop_asked:
        return "pruned", BY_COMMAND
    report = stop or trial.last_report
    assert report is not None
    decision = report["decision"]
    value = report["metrics"].get(objective)
    shown = "not finite" if value is None else f"{value:.4g}"
    cutoff = decision["cutoff"]
    against = "" if cutoff is None else f", cut-off {cutoff:.4g}"
    waited = "" if stop else "never promoted: "
    return "pruned", (
        f"{waited}{objective} {shown} at {decision['rung']:,} images{against} "
        f"of {decision['competitors']} competitors"
    )


def ending_by_deaths(trial: TrialState, total_images: int) -> tuple[str, str]:
    """Final state and reason of a trial whose worker died too often."""
    if total_images in trial.reports:
        return "completed", "its last checkpoint could not be saved"
    times = f"{trial.deaths_in_a_row} times without progress"
    return "lost", f"its worker died {times}: {trial.last_death}"


def first_failed_alike(state: SweepState, first: int) -> str | None:
    """At the moment when `first` trials have ended, and all failed the same way: which way.

    Not while another trial has made a report: then there are some that work.
    """
    if len(state.trials) - len(state.open) != first:
        return None
    if any(trial.reports for trial in state.open.values()):
        return None
    ended = [trial for trial in state.trials.values() if trial.state is not None]
    kinds = {(trial.state, _kind(trial)) for trial in ended}
    if len(kinds) > 1 or ended[0].state not in FAILED:
        return None
    return f"the first {first} trials all failed alike ({ended[0].state}): {ended[0].reason}"


def _kind(trial: TrialState) -> str:
    """What two failures of one state have in common: the first line without its figures.

    Of divergence and of memory that runs out, the state says it all.
    """
    if trial.state in ("diverged", "oom"):
        return ""
    return re.sub(r"[\d.,]+", "#", trial.reason.partition("\n")[0])[:200]
