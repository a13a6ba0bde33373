"""A segment: a trial from a checkpoint (or from nothing) to a stop, what Ray calls a trial."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

TRIALS, CHECKPOINT_PREFIX = "trials", "checkpoint_"
CHECKPOINT_FILE, LOG_FILE = "checkpoint.pt", "log.txt"


def segment_name(number: int, attempt: int) -> str:
    """A segment's folder below `trials/`: 7 of trial 7's first attempt, 7.2 of its second one."""
    return str(number) if attempt == 1 else f"{number}.{attempt}"


class Next(Enum):
    """What `Driver.next_segment` says when it has no segment to hand out."""

    WAIT = "wait"
    FINISHED = "finished"


@dataclass(frozen=True)
class Segment:
    """One piece of work for a worker: trial `number`, from `checkpoint` on."""

    number: int
    attempt: int
    fields: dict[str, Any]
    """Its `TrainConfig` fields."""
    checkpoint: str | None
    checkpoint_mark: int
