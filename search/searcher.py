"""Ray's `Searcher` hooks, translated for `search.driver.Driver`.

The adapters hold no open file, lock or thread, and drop the driver when Tune pickles them: what
they know is in the journal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.search import Searcher

from search.driver import Driver, guarded
from search.segments import Next, Segment

METRICS = "metrics/"
"""Prefix of a report's metrics in a result that Tune has flattened."""


def unflattened(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as the trainable returned it, whether or not Tune has flattened it."""
    if "metrics" in result:
        return dict(result)
    metrics = {
        key.removeprefix(METRICS): value for key, value in result.items() if key.startswith(METRICS)
    }
    return {**result, "metrics": metrics}


class SweepSearcher(Searcher):
    """Hands out the driver's segments and tells it how they ended."""

    def __init__(self, driver: Driver, slots: Callable[[], int]) -> None:
        super().__init__()
        self._driver: Driver | None = driver
        self._slots = slots
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        assert self._driver is not None
        driver = self._driver
        finished: Segment | Next = Next.FINISHED
        segment = guarded(driver, lambda: driver.next_segment(self._slots()), finished)
        if segment is Next.WAIT:
            return None
        if isinstance(segment, Next):
            return str(Searcher.FINISHED)
        self._numbers[trial_id] = segment.number
        return {
            "number": segment.number,
            "attempt": segment.attempt,
            # As text: Tune keeps three copies of each value, under a name of its own, to the end.
            "fields": json.dumps(segment.fields),
            "checkpoint": segment.checkpoint,
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        assert self._driver is not None
        driver, number = self._driver, self._numbers.pop(trial_id)
        if result is None and not error:
            driver.never_ran(number)
            return
        last = unflattened(result) if result is not None and not error else None
        reason = driver.worker_errors.pop(number, "")
        guarded(driver, lambda: driver.on_segment_end(number, last, reason), None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the searcher's state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        return {}
