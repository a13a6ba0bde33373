"""The search room: what to try, what to stop, and the log of both.

`Sweep` and `SweepConfig` are the room's front door. They are imported on first use, so that a
worker process that needs only `search.trainable` does not pay for MLflow and Optuna.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.config import SweepConfig
    from search.result import SweepResult
    from search.run import Sweep

__all__ = ["Sweep", "SweepConfig", "SweepResult"]

_HOMES = {"Sweep": "search.run", "SweepResult": "search.result", "SweepConfig": "search.config"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'search' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
