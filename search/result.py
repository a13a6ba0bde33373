"""What a sweep came to, for Python and for `--json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.config import SweepConfig
from search.state import SweepState
from search.uris import without_credentials


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to; `to_json` is what `contrasweep sweep --json` prints."""

    name: str
    dir: Path
    tracking_uri: str
    objective: str
    state: str
    reason: str
    why: str
    """Of an interrupted one: failing (the first trials all fail alike), storage (checkpoints could
    not be saved), node (one cannot run the trials), budget, or asked."""
    pareto: list[dict[str, Any]]
    """With several objectives, the trials that none beats in all: `trial`, `values`, `params`."""
    best: dict[str, Any] | None
    """`trial`, `value` and searched `params` of the best trial."""
    trials: dict[str, int]
    samples_seen: int
    wall_s: float
    unrecorded: str | None
    """Why MLflow lacks a part of the journal; None: it has everything."""
    unmirrored: str | None = None
    """Why the storage lacks a part of the journal; None: it has everything, or there is none."""

    def to_json(self) -> dict[str, Any]:
        """The object that --json prints."""
        return {
            "name": self.name,
            "dir": str(self.dir),
            "tracking_uri": without_credentials(self.tracking_uri),
            "objective": self.objective,
            "state": self.state,
            "reason": self.reason,
            "best": self.best,
            **({"pareto": self.pareto} if self.pareto else {}),
            "trials": self.trials,
            "samples_seen": self.samples_seen,
            "wall_s": round(self.wall_s, 3),
        }


def result_of(
    config: SweepConfig,
    directory: Path,
    state: SweepState,
    *,
    tracking_uri: str,
    unrecorded: str | None,
    unmirrored: str | None,
) -> SweepResult:
    """The result of a sweep that has ended, from its journal."""
    assert state.ended is not None
    objective = config.objective
    best = state.best(objective, config.mode)
    return SweepResult(
        name=str(config.name),
        dir=directory,
        tracking_uri=tracking_uri,
        objective=objective,
        state=state.ended["state"],
        reason=state.ended["reason"],
        why=state.ended.get("why", ""),
        pareto=[
            {
                "trial": trial.number,
                "values": {name: trial.value(name) for name in config.objectives},
                "params": trial.params,
            }
            for trial in state.pareto(config.objectives, config.modes)
        ]
        if config.also
        else [],
        best=None
        if best is None
        else {"trial": best.number, "value": best.value(objective), "params": best.params},
        trials=state.counts(),
        samples_seen=state.samples_seen,
        wall_s=state.wall_s,
        unrecorded=unrecorded,
        unmirrored=unmirrored,
    )
