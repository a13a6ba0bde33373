"""Confirmations in memory for tests: candidates with accuracies as given, answers drawn."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.confirmation_record import METRICS, TEST, Confirmation, parse_record

VAL, TESTED = 300, 360


def packed(right: Any) -> str:
    return base64.b64encode(np.packbits(np.asarray(right, dtype=bool)).tobytes()).decode()


def candidate(name: str, **more: Any) -> dict[str, Any]:
    number = int(name.rpartition(" ")[2]) if name.startswith("trial ") else None
    base = {"trial": number, "top": name.startswith("trial "), "baseline": name == "default"}
    return {"name": name, **base, "searched_value": None, "params": {}} | more


def record(
    rates: Mapping[str, float],
    seeds: int = 5,
    *,
    candidates: Mapping[str, dict[str, Any]] | None = None,
    failed: Sequence[tuple[str, int]] = (),
    unbegun: Sequence[tuple[str, int]] = (),
    noise: float = 0.02,
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """`confirmation.json` as data: each candidate is right at its rate, on easy images first.

    `noise` is the spread of its trainings; the linear probe is right as often.
    """
    rng = np.random.default_rng(seed)
    trials = []
    hard = {"": rng.random(VAL), TEST: rng.random(TESTED)}
    luck_R = rng.normal(0, noise, seeds)
    for place, (name, rate) in enumerate(rates.items()):
        for repeat in range(seeds):
            if (name, repeat) in unbegun:
                continue
            row: dict[str, Any] = {
                "number": place * seeds + repeat,
                "candidate": name,
                "repeat": repeat,
                "state": "completed",
            }
            if (name, repeat) in failed:
                row["state"] = "diverged"
            else:
                at = rate + luck_R[repeat] + rng.normal(0, noise / 2)
                row["correct"] = {}
                for metric in METRICS:
                    own = hard[TEST if metric.startswith(TEST) else ""]
                    right = own + rng.normal(0, 0.1, len(own)) < at
                    row["correct"][metric] = packed(right)
            trials.append(row)
    return {
        **{"schema": 1, "sweep_id": "id", "sweep": "built", "ordinal": 1, "objective": "knn_top1"},
        **{"mode": "max", "epochs": 4.0, "seeds": list(range(seeds)), "val_images": VAL},
        "test_images": TESTED,
        "candidates": [candidate(name, **(candidates or {}).get(name, {})) for name in rates],
        "trials": trials,
    } | more


def confirmation(content: Mapping[str, Any], **more: Any) -> Confirmation:
    about: dict[str, Any] = {
        **{"name": "built/confirm-1", "sweep_id": "own", "run_id": "run", "state": "finished"},
        "start": pd.Timestamp("2026-01-02", tz="UTC"),
    }
    parsed = parse_record(json.dumps(content).encode())
    return Confirmation(**(about | more), record=parsed)
