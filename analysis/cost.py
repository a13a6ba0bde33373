"""Frames -> what a sweep cost: images, the driver's wall, time of slots and of GPUs."""

from __future__ import annotations

import math
from typing import TypedDict

from analysis.load import SweepFrames
from analysis.stopping import Saving, saving
from analysis.tables import wall_s


class Cost(TypedDict):
    """Images of the train split; seconds."""

    images: int
    wall_s: float  # of the driver
    slot_s: float | None  # walls of all trials together, None where none was recorded
    gpu_s: float | None  # the same times the GPUs a trial, None where these are not known
    saving: Saving


def gpus_per_trial(frames: SweepFrames) -> float | None:
    """The GPUs that a trial was given; None where it had none, or this was left to the cluster."""
    try:
        gpus = float(frames.info["config"].get("gpus_per_trial", ""))
    except ValueError:
        return None
    return gpus if 0 < gpus < math.inf else None


def cost_of(frames: SweepFrames) -> Cost:
    """What all trials together took, failed and unfinished ones included."""
    walls = frames.trials["wall_s"].astype("float64")
    walls = walls[(walls >= 0) & (walls < math.inf)]
    slot_s = float(walls.sum()) if len(walls) else None
    gpus = gpus_per_trial(frames)
    return Cost(
        images=int(frames.trials["samples_seen"].sum()),
        wall_s=wall_s(frames),
        slot_s=slot_s,
        gpu_s=None if slot_s is None or gpus is None else slot_s * gpus,
        saving=saving(frames),
    )
