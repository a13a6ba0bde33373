"""Frames -> what a hurried reader asks: who won, how sure that is, against what, how it was run.

How sure: the standard error of an accuracy over the validation images, and the number of completed
trials that lie within two standard errors of a difference of the winner, which therefore cannot
be told apart from it. The errors are taken as independent though all trials are measured on the
same images: a cautious answer. What a fresh seed would change is not in these records: reruns
measure it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import pandas as pd
from scipy.stats import norm

from analysis.load import BY_COMMAND, FAILED_STATES, SweepFrames, SweepInfo
from analysis.tables import (
    Gain,
    Summary,
    default_number,
    is_accuracy,
    standard_error,
    trial_params,
    trial_row,
)
from analysis.words import ENDING_LABELS, format_count

CONFIRMATION = "confirm"
"""The space of a confirmation."""
JUDGE = "knn_top1"
"""What a confirmation is decided by where the objective needs no labels."""
OF_ADAPTATION = ("top1", "balanced_top1")
"""Objectives of sweeps that adapt an encoder, which are not confirmed."""
Z = 2.0
"""Standard errors of a difference below which two trials are not told apart."""


class Sureness(TypedDict):
    """How far the winner can be trusted; None where the record cannot tell."""

    standard_error: float | None
    completed: int  # trials with a value at the full resource, the winner among them
    alike: int | None  # of these, those not to be told apart from the winner, without it
    alike_numbers: tuple[int, ...]  # the best of them, winner first
    optimism: float | None  # on average, were all of these equally good
    gain: Literal["clear", "noise"] | None  # over the default, also of one below zero
    gain_errors: float | None  # the gain in standard errors of a difference; negative: worse
    audited: int | None  # images at which the winner would have been stopped
    can_confirm: bool


def sureness(frames: SweepFrames, summary: Summary) -> Sureness:
    """How sure the winner is; every question open while no trial has completed."""
    info, trials, winner = frames.info, frames.trials, summary["winner"]
    done = trials[(trials["state"] == "completed") & trials["objective"].notna()]
    gain_errors = _gain_in_errors(summary["gain"], info)
    audited = trial_row(frames, winner["number"])["audited"] if winner else None
    sure = Sureness(
        standard_error=winner["standard_error"] if winner else None,
        completed=len(done),
        alike=None,
        alike_numbers=(),
        optimism=None,
        gain=None
        if gain_errors is None
        else "noise"
        # chosen as the best, a winner gains by chance; it loses no more than any other trial
        if -Z < gain_errors < _errors_of_a_best(len(done))
        else "clear",
        gain_errors=gain_errors,
        audited=None if audited is None or pd.isna(audited) else int(audited),
        can_confirm=can_confirm(frames),
    )
    if winner is None or winner["standard_error"] is None or info["val_images"] is None:
        return sure
    values = done["objective"].to_numpy(dtype="float64")
    inside = np.clip(values, 0.0, 1.0)
    errors = np.hypot(winner["standard_error"], np.sqrt(inside * (1 - inside) / info["val_images"]))
    sign = 1.0 if info["mode"] == "max" else -1.0
    gap = sign * (winner["value"] - values)
    # an accuracy of exactly one has an error of zero, and is still alike to itself
    alike = done[(gap < Z * errors) | (gap <= 0)]
    order = alike.sort_values("objective", ascending=info["mode"] == "min")["number"].tolist()
    others = [number for number in order if number != winner["number"]]
    sure["alike"] = len(others)
    sure["alike_numbers"] = (winner["number"], *others[:9])
    if others:
        sure["optimism"] = winner["standard_error"] * expected_maximum(len(others) + 1)
    return sure


def can_confirm(frames: SweepFrames) -> bool:
    """Whether `contrasweep confirm` takes a sweep like this; else it is not to be advised.

    It takes neither a confirmation nor a sweep of adaptations, and one without labels cannot be
    judged: no trial of it has the accuracy that decides.
    """
    info, last = frames.info, frames.last
    if info["space"] == CONFIRMATION or info["objective"] in OF_ADAPTATION:
        return False
    values = frames.trials["objective"] if is_accuracy(info["objective"]) else last.get(JUDGE)
    return values is not None and bool(values.notna().any())


def _errors_of_a_best(n: int) -> float:
    """Standard errors of a difference that the best of n equal ones seldom (2.5 %) gains on one."""
    return max(Z, float(norm.ppf(1 - 0.025 / max(1, n - 1))))


def expected_maximum(n: int) -> float:
    """Mean of the highest of n standard normal values (Blom 1958: within 1 % from n = 2 on)."""
    return float(norm.ppf((n - 0.375) / (n + 0.25)))


def gain_at(gain: Gain | None) -> str:
    """Where the winner and the default were compared, in words; empty at the full resource."""
    if gain is None or gain["full"]:
        return ""
    if gain["default_ending"] in ("pruned", BY_COMMAND):
        why = f"where the default was {ENDING_LABELS[gain['default_ending']]}"
    elif gain["default_ending"] in FAILED_STATES:
        why = "the last report of the default, which failed"
    else:
        why = "the furthest that both have reached"
    return f"at {format_count(gain['mark'])} images, {why}"


def _gain_in_errors(gain: Gain | None, info: SweepInfo) -> float | None:
    """A gain in standard errors of a difference of two accuracies, as of independent ones."""
    if gain is None or not is_accuracy(info["objective"]):
        return None
    errors = [standard_error(gain[side], info["val_images"]) for side in ("winner", "default")]
    known = [error for error in errors if error is not None]
    if len(known) < 2 or not any(known):
        return None
    return gain["value"] / math.hypot(*known)


def settings(frames: SweepFrames, number: int | None) -> list[dict[str, Any]]:
    """Each searched parameter in a trial and in the default configuration."""
    default = default_number(frames)
    ours = {} if number is None else trial_params(frames, number)
    theirs = {} if default is None else trial_params(frames, default)
    return [
        {"name": name, "winner": ours.get(name), "default": theirs.get(name)}
        for name in frames.parameters
        if name in ours or name in theirs
    ]


def scheduler(info: SweepInfo) -> str:
    """The scheduler with what was asked of it."""
    config = info["config"]
    parts = [info["scheduler"] or "–"]
    parts += ["promoting"] if config.get("promote") == "True" else []
    brackets, audit = config.get("brackets", "1"), float(config.get("audit", 0))
    parts += [f"{brackets} brackets"] if brackets != "1" else []
    field = config.get("stratify", "None")
    parts += [f"stratified by {field}"] if field != "None" else []
    parts += [f"{audit:.0%} audited"] if audit else []
    return ", ".join(parts)


def joined(words: Sequence[object]) -> str:
    """1, 2 and 3."""
    texts = [str(word) for word in words]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
