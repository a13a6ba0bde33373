"""Frames -> the figures of a sweep's progress with their captions."""

from __future__ import annotations

from typing import Any

from analysis.cost import gpus_per_trial
from analysis.load import SweepFrames
from analysis.page import Figures
from analysis.plots import best_so_far_figure, learning_curves
from analysis.style import outside
from analysis.tables import Axis, pace_s
from analysis.thinning import MAX_CURVES, MAX_DOTS


def progress_section(frames: SweepFrames, figures: Figures, prefix: str) -> list[dict[str, Any]]:
    """Best so far over time, images and cost; learning curves last. Empty without values."""
    curves = frames.curves[frames.curves["metric"] == frames.info["objective"]]
    if curves["value"].notna().sum() == 0:
        return []
    reports, trials = len(curves), curves["number"].nunique()
    n = f"n = {reports:,} report{'s' if reports > 1 else ''} of {trials:,} trial"
    n += "s." if trials > 1 else "."
    some = f" Of the dots, {MAX_DOTS:,} are drawn, chosen at random." if reports > MAX_DOTS else ""
    gpus = gpus_per_trial(frames)
    captions: dict[Axis, str] = {
        "time": "Thick: best trial that ran to its full resource. Dotted: best report of any "
        "trial, at whatever length. Weak reports lie outside the axis. Time counts from the "
        f"sweep's start, pauses included. {n}{some}",
        "images": "The same over the work spent: images that all trials together had trained "
        f"on, which does not depend on how many ran at once. {n}{some}",
        "cost": "The same over what it cost: the time of all trials together, each at its own mean "
        + (
            f"pace, times its {gpus:g} GPU{'s' if gpus > 1 else ''}. "
            if gpus
            else "pace; a slot is the place of one trial. "
        )
        + f"{n}{some}",
    }
    if not pace_s(frames).notna().any():
        del captions["cost"]
    found = []
    for by, caption in captions.items():
        figure = best_so_far_figure(frames, by)
        found.append(figures.add(f"{prefix}-best-{by}", figure, caption))
    rungs = " Vertical lines are the rungs." if frames.info["rungs"] else ""
    caption = f"Each line is a trial; the marker at its end tells how it ended.{rungs} {n}"
    if trials > MAX_CURVES:
        caption += (
            f" About {MAX_CURVES} of the {trials:,} curves are drawn: of each ending some, chosen "
            "at random, and the winner."
        )
    caption += outside(frames, curves["value"])
    found.append(figures.add(f"{prefix}-curves", learning_curves(frames), caption))
    return found
