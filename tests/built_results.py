"""What a sweep came to, as its driver returns it, for tests of what is printed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from search.result import SweepResult

PLAIN = SweepResult(
    name="s",
    dir=Path("runs/s"),
    tracking_uri="",
    objective="knn_top1",
    state="finished",
    reason="",
    why="",
    best=None,
    pareto=[],
    trials={},
    samples_seen=100,
    wall_s=1.0,
    unrecorded=None,
)


def result(**changes: Any) -> SweepResult:
    """A finished sweep without trials, but for these changes."""
    return dataclasses.replace(PLAIN, **changes)
