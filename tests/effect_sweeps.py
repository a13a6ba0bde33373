"""Sweeps in memory with planted effects, for tests of effects and of their section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna.distributions as d
import pandas as pd

from analysis.frames import CURVE_COLUMNS, DECISION_COLUMNS, TRIAL_COLUMNS, SweepFrames, SweepInfo

TOTAL = 4_000
START = pd.Timestamp("2026-01-01", tz="UTC")
SPACE = {
    "lr": d.FloatDistribution(1e-4, 1e-1, log=True),
    "temperature": d.FloatDistribution(0.05, 1.0, log=True),
    "batch_size": d.CategoricalDistribution([64, 128, 256]),
    "strength": d.FloatDistribution(0.1, 1.5),
}


def info(ranges: Mapping[str, d.BaseDistribution], **changes: Any) -> SweepInfo:
    found: dict[str, Any] = {
        "name": "in memory",
        "sweep_id": "id",
        "run_id": "run",
        "tracking_uri": "sqlite://",
        "state": "finished",
        "objective": "knn_top1",
        "also": (),
        "also_modes": (),
        "warm_start": {},
        "mode": "max",
        "total_images": TOTAL,
        "train_images": 1_000,
        "val_images": 400,
        "rungs": (1_000,),
        "reduction": 3.0,
        "slots": 2,
        "wall_s": 100.0,
        "start": START,
        "end": None,
        "dataset": "digits",
        "space": "quick",
        "sampler": "tpe",
        "scheduler": "asha",
        "versions": {},
        "commit": None,
        "config": {},
        "distributions": {name: d.distribution_to_json(each) for name, each in ranges.items()},
    }
    return SweepInfo(**(found | changes))  # type: ignore[typeddict-item]


def sweep(
    settings: Mapping[str, Sequence[Any]],
    values: Sequence[float],
    *,
    states: Sequence[str] | None = None,
    marks: Sequence[int] | None = None,
    early: Sequence[float] | None = None,
    ranges: Mapping[str, d.BaseDistribution] | None = None,
    last: Mapping[str, Sequence[float]] | None = None,
    fields: Mapping[str, Sequence[str]] | None = None,
    **changes: Any,
) -> SweepFrames:
    """Trials with these settings whose last value, at `marks`, is `values`; NaN: no report.

    `early` are values at the first mark, 1,000 images (None: the last values).
    """
    n = len(values)
    states = ["completed"] * n if states is None else list(states)
    marks = (
        [TOTAL if state == "completed" else 1_000 for state in states] if marks is None else marks
    )
    trials = pd.DataFrame(index=range(n), columns=list(TRIAL_COLUMNS), dtype="object").assign(
        number=np.arange(n),
        state=states,
        ending=states,
        reason="",
        is_default=False,
        objective=np.array(values, dtype=float),
        best_objective=np.array(values, dtype=float),
        samples_seen=np.array(marks, dtype=int),
        mark=np.array(marks, dtype=int),
        wall_s=1.0,
        stratum="",
        pareto=False,
    )
    for name, drawn in settings.items():
        trials[f"param.{name}"] = pd.Series(list(drawn), dtype="object").infer_objects()
    first = values if early is None else early
    points = pd.DataFrame(
        {
            "number": np.repeat(np.arange(n), 2),
            "metric": "knn_top1",
            "samples_seen": np.column_stack([np.full(n, 1_000), marks]).ravel(),
            "mark": np.column_stack([np.full(n, 1_000), marks]).ravel(),
            "value": np.column_stack([first, values]).ravel(),
            "time": START,
        },
        columns=list(CURVE_COLUMNS),
    )
    points = points[points["value"].notna()].drop_duplicates(["number", "mark"], keep="last")
    numbers = pd.Index(np.arange(n), name="number")
    return SweepFrames(
        info(SPACE if ranges is None else ranges, **changes),
        trials,
        points.reset_index(drop=True),
        pd.DataFrame(columns=list(DECISION_COLUMNS)),
        pd.DataFrame(last or {}, index=numbers, dtype="float64"),
        pd.DataFrame(fields or {}, index=numbers, dtype="object"),
    )


def planted(n: int, seed: int = 0, noise: float = 0.02) -> SweepFrames:
    """Random search where the objective is a hump over lr, slightly one over temperature.

    Above an lr of 0.03 half of the trials diverge; a third of the others were stopped early.
    """
    rng = np.random.default_rng(seed)
    lr, temperature = 10 ** rng.uniform(-4, -1, n), 10 ** rng.uniform(-1.3, 0, n)
    batch_size = rng.choice([64, 128, 256], n)
    top = 0.9 - 0.1 * (np.log10(lr) + 2.5) ** 2 - 0.03 * (np.log10(temperature) + 0.7) ** 2
    top = top + noise * rng.normal(size=n)
    diverged = (lr > 0.03) & (rng.random(n) < 0.5)
    early = 0.6 * top
    stopped = (early < np.quantile(early, 0.4)) & ~diverged if n else diverged
    states = np.where(diverged, "diverged", np.where(stopped, "pruned", "completed"))
    return sweep(
        {
            "lr": lr.tolist(),
            "temperature": temperature.tolist(),
            "batch_size": batch_size.tolist(),
            "strength": rng.uniform(0.1, 1.5, n).tolist(),
        },
        np.where(states == "completed", top, early).tolist(),
        states=states.tolist(),
        early=early.tolist(),
        last={
            "images_per_s": (900 + batch_size * rng.uniform(0.9, 1.1, n)).tolist(),
            "peak_mem_bytes": (batch_size * 2.0**23 + 2.0**28).tolist(),
        },
    )


def degenerate() -> dict[str, SweepFrames]:
    """Sweeps of which little can be said."""
    nan = math.nan
    few = {"lr": [1e-3], "temperature": [0.1], "batch_size": [64], "strength": [1.0]}
    many = {name: values * 12 for name, values in few.items()}
    rng = np.random.default_rng(0)
    spread = {
        "lr": (10 ** rng.uniform(-4, -1, 12)).tolist(),
        "batch_size": rng.choice([64, 128, 256], 12).tolist(),
    }
    return {
        "empty": sweep({}, [], ranges={}),
        "no trial, known ranges": sweep({name: [] for name in few}, []),
        "nothing searched": sweep({}, [0.1 * n for n in range(10)], ranges={}),
        "one trial": sweep(few, [0.5]),
        "all failed": sweep(spread, [nan] * 12, states=["diverged"] * 12),
        "all out of memory after a report": sweep(spread, [0.3] * 12, states=["oom"] * 12),
        "all equal": sweep(spread, [0.5] * 12),
        "one setting": sweep(many, [0.04 * n for n in range(12)]),
        "running": sweep(spread, [nan] * 6 + [0.2] * 6, states=["unfinished"] * 12),
        "infinite": sweep(spread, [math.inf, -math.inf, nan, *[0.1 * n for n in range(9)]]),
        "hardly any completed": sweep(
            spread, [0.05 * n for n in range(12)], states=["completed"] * 3 + ["pruned"] * 9
        ),
        "texts": sweep(
            {"augment": ["<b>a&</b>", "x", "y"] * 4, "flag": [True, False] * 6},
            [0.05 * n for n in range(12)],
            ranges={
                "augment": d.CategoricalDistribution(["<b>a&</b>", "x", "y"]),
                "flag": d.CategoricalDistribution([True, False]),
            },
        ),
        "conditional": sweep(
            {"lr": spread["lr"], "margin": [1.0, None, 0.5] * 4},
            [0.05 * n for n in range(12)],
            ranges={"lr": SPACE["lr"], "margin": d.FloatDistribution(0.1, 2.0)},
        ),
        "lower is better": sweep(spread, [0.05 * n for n in range(12)], mode="min"),
    }
