"""One process at a time in a folder of a sweep or a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_NAME = ".lock"


@contextlib.contextmanager
def locked(directory: Path, hint: str = "wait for it") -> Iterator[None]:
    """Hold a folder; ValueError if another process does. A killed holder lets go.

    The `hint` tells the user what to do then.
    """
    lock = FileLock(directory / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process works on {directory}; {hint}") from None
    try:
        yield
    finally:
        lock.release()
