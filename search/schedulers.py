"""Ray's `TrialScheduler` and `Callback` hooks, translated for `search.driver.Driver`.

Order of Ray's hooks for a result: the scheduler's (which journals the report with its decision),
the callback's (which asks for a checkpoint), the save, the callback's `on_checkpoint`, and only
then the stop, if that was the decision.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.result import SHOULD_CHECKPOINT
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from search.driver import Driver, guarded
from search.memory import death_reason
from search.searcher import unflattened


class SweepScheduler(FIFOScheduler):
    """Goes on or stops as the driver decides; trials start in the order of suggestion."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver: Driver | None = driver

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        assert self._driver is not None
        driver = self._driver
        stop = guarded(driver, lambda: driver.on_result(unflattened(result)), True)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Keep the reason: the searcher's hook, which comes next, is not told it."""
        assert self._driver is not None
        file = Path(trial.error_file) if trial.error_file else None  # written at once, here
        text = file.read_text(errors="replace") if file and file.exists() else ""
        self._driver.worker_errors[int(trial.config["number"])] = death_reason(text)
        super().on_trial_error(tune_controller, trial)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class SweepCallback(Callback):
    """Asks for checkpoints, journals them, and shows progress after each step of Tune's loop."""

    def __init__(self, driver: Driver, on_step: Callable[[], None]) -> None:
        self._driver: Driver | None = driver
        self._on_step = on_step
        self._marks: dict[str, int] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        assert self._driver is not None
        driver = self._driver
        wanted = guarded(driver, lambda: driver.wants_checkpoint(result), False)
        result[SHOULD_CHECKPOINT] = wanted
        if wanted:
            self._marks[trial.trial_id] = int(result["mark"])

    def on_checkpoint(
        self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any
    ) -> None:
        assert self._driver is not None
        driver, number = self._driver, int(trial.config["number"])
        mark = self._marks[trial.trial_id]
        guarded(driver, lambda: driver.on_checkpoint(number, mark, checkpoint.path), None)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune keeps an ended trial until the end, with averages of each metric: 50 KB for ours."""
        for name in ("metric_analysis", "metric_n_steps", "last_result"):
            getattr(trial.run_metadata, name, {}).clear()

    on_trial_error = on_trial_complete

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._on_step()

    def get_state(self) -> dict[str, Any] | None:
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {}
