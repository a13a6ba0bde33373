"""Sweeps in memory for tests of the page and of its summary: values and endings as given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna.distributions as d
import pandas as pd

from analysis.frames import CURVE_COLUMNS, DECISION_COLUMNS, TRIAL_COLUMNS, SweepFrames, SweepInfo

TOTAL, TRAIN, REPORTS = 4_000, 1_000, 8
START = pd.Timestamp("2026-01-01", tz="UTC")
TRIAL_S = 80.0


def built(
    values: Sequence[float],
    *,
    states: Sequence[str] | None = None,
    reports: Sequence[int] | None = None,
    params: Mapping[str, Sequence[Any]] | None = None,
    ranges: Mapping[str, d.BaseDistribution] | None = None,
    curve: Sequence[float] | None = None,
    audited: Mapping[int, int] | None = None,
    default: int | None = None,
    config: Mapping[str, str] | None = None,
    fields: Mapping[str, str] | None = None,
    **info: Any,
) -> SweepFrames:
    """A sweep of as many trials as values; each ends at `values`, after `reports` of 8 reports.

    `curve` is the part of the value that was reached at each report, the same for all trials;
    `audited` trial -> images where it would have been stopped; `fields` of every trial's
    configuration; further arguments change the sweep's info.
    """
    n = len(values)
    states = states or ["completed"] * n
    reports = reports or [REPORTS if state == "completed" else 2 for state in states]
    curve = curve or [1 - math.exp(-3 * (k + 1) / REPORTS) for k in range(REPORTS - 1)] + [1.0]
    audited = audited or {}
    starts = [START + pd.Timedelta(seconds=40.0 * i) for i in range(n)]
    trials = pd.DataFrame(
        {
            "number": np.arange(n),
            "state": states,
            "ending": states,
            "reason": ["" if s in ("completed", "pruned") else f"it was {s}" for s in states],
            "is_default": [i == default for i in range(n)],
            "objective": np.array(values, dtype="float64"),
            "best_objective": np.array(values, dtype="float64"),
            "samples_seen": [TOTAL // REPORTS * r for r in reports],
            "mark": [TOTAL // REPORTS * r for r in reports],
            "wall_s": [TRIAL_S * r / REPORTS for r in reports],
            "images_per_s": 50.0,
            "start": starts,
            "end": [
                start + pd.Timedelta(seconds=TRIAL_S * r / REPORTS)
                for start, r in zip(starts, reports, strict=True)
            ],
            "node": "a",
            "seed": "1",
            "rung": pd.array([None] * n, dtype="Int64"),
            "audited": pd.array([audited.get(i) for i in range(n)], dtype="Int64"),
            "bracket": pd.array([None] * n, dtype="Int64"),
            "stratum": "",
            "pareto": False,
            "run_id": [f"r{i}" for i in range(n)],
        },
        columns=list(TRIAL_COLUMNS),
    )
    for name, column in (params or {}).items():
        trials[f"param.{name}"] = list(column)
    number = np.repeat(np.arange(n), reports)
    step = np.concatenate([np.arange(r) for r in reports]).astype(int) if n else np.array([], int)
    seen = (step + 1) * (TOTAL // REPORTS)
    curves = pd.DataFrame(
        {
            "number": number,
            "metric": "knn_top1",
            "samples_seen": seen,
            "mark": seen,
            "value": np.array(values, dtype="float64")[number] * np.array(curve)[step],
            "time": START
            + pd.to_timedelta(40.0 * number + TRIAL_S * (step + 1) / REPORTS, unit="s"),
        },
        columns=list(CURVE_COLUMNS),
    )
    curves = curves.sort_values(["time", "number"], ignore_index=True)
    about: dict[str, Any] = {
        **{"name": "built", "sweep_id": "id", "run_id": "run", "tracking_uri": "sqlite://"},
        **{"state": "finished", "objective": "knn_top1", "also": (), "also_modes": ()},
        **{"warm_start": {}, "mode": "max", "total_images": TOTAL, "train_images": TRAIN},
        **{"val_images": 1_000, "rungs": (), "reduction": None, "slots": 2, "wall_s": 40.0 * n},
        **{"start": START, "end": None, "dataset": "digits", "space": "quick"},
        **{"sampler": "random", "scheduler": "none", "versions": {}, "commit": None},
        "config": dict(config or {}),
        "distributions": {name: d.distribution_to_json(r) for name, r in (ranges or {}).items()},
    }
    return SweepFrames(
        SweepInfo(**(about | info)),  # type: ignore[typeddict-item]
        trials,
        curves,
        pd.DataFrame(columns=list(DECISION_COLUMNS)),
        fields=pd.DataFrame({k: [v] * n for k, v in (fields or {}).items()}, index=trials["number"])
        if fields
        else pd.DataFrame(index=pd.Index(trials["number"], name="number")),
    )


LR = d.FloatDistribution(1e-4, 1e-1, log=True)


def large(n: int, names: int = 8) -> SweepFrames:
    """A sweep of n trials, most of them stopped early, some failed, of so many parameters."""
    rng = np.random.default_rng(5)
    states = rng.choice(
        ["completed", "pruned", "diverged", "oom"], size=n, p=[0.1, 0.8, 0.06, 0.04]
    ).tolist()
    reports = [{"completed": 8, "pruned": int(rng.choice([2, 4]))}.get(s, 1) for s in states]
    lr = 10 ** rng.uniform(-4, -1, n)
    values = 0.9 - 0.05 * (np.log10(lr) + 2.5) ** 2 + rng.normal(0, 0.01, n)
    params: dict[str, Any] = {"lr": lr}
    ranges: dict[str, d.BaseDistribution] = {"lr": LR}
    long = ("temperature", "crop_min_scale", "colour_strength", "weight_decay", "batch_size")
    for name in [*long, *(f"momentum_{i}" for i in range(9))][: names - 1]:
        params[name] = rng.uniform(0.01, 1.0, n)
        ranges[name] = d.FloatDistribution(0.01, 1.0)
    return built(
        values.tolist(),
        states=states,
        reports=reports,
        params=params,
        ranges=ranges,
        default=0,
        name=f"of {n}",
        rungs=(1_000, 2_000),
        scheduler="asha",
    )
