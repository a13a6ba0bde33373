"""Sweeps under ASHA with an audit, in memory, of which the end of every trial is known.

`draw_sweep` makes the values and lets `search.asha` decide in the order of the trials; `frames_of`
gives them as `analysis.load` reads them, without what early stopping hid.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.audit import Outcomes
from analysis.load import CURVE_COLUMNS, DECISION_COLUMNS, SweepFrames, SweepInfo
from search.asha import Asha

EPOCH = 1_000
MARKS = tuple(range(EPOCH, 10 * EPOCH, EPOCH))
START = pd.Timestamp("2026-01-01", tz="UTC")


@dataclass(frozen=True)
class DrawnSweep:
    """N trials with a value at each of M marks, the last of which is the full resource."""

    values_NM: np.ndarray
    marks_M: tuple[int, ...]
    rungs: tuple[int, ...]
    stopped_at_N: np.ndarray
    """Mark at which ASHA would stop it; 0 where it would not."""
    audited_N: np.ndarray
    decisions: list[tuple[int, int, float, int, bool]]
    """Trial, mark, cut-off, competitors, whether it was stopped."""
    strata_N: tuple[str, ...]
    audit: float

    @property
    def ends(self) -> np.ndarray:
        return self.values_NM[:, -1]

    @property
    def stopped(self) -> np.ndarray:
        return self.stopped_at_N > 0


def draw_sweep(
    rng: np.random.Generator,
    trials: int,
    *,
    marks: tuple[int, ...] = MARKS,
    rungs: tuple[int, ...] = (1_000, 3_000),
    reduction: int = 3,
    audit: float = 0.2,
    noise: float = 0.5,
    skewed: bool = False,
    strata: tuple[str, ...] = ("",),
) -> DrawnSweep:
    """Trials of a quality each, normal or skewed to the bad, and noise that falls to the end."""
    quality = rng.standard_normal(trials)
    quality = -(np.abs(quality) ** 1.5) if skewed else quality
    way = np.arange(1, len(marks) + 1) / len(marks)
    spread = noise * (0.2 + 0.8 * (1 - way))
    level_N = np.arange(trials) % len(strata)
    values = quality[:, None] * (0.5 + 0.5 * way) + spread * rng.standard_normal((trials, len(way)))
    values += level_N[:, None]  # a stratum is above the other, which is nothing to be learned from
    stopped_at, decisions = np.zeros(trials, int), []
    rules = [Asha(rungs, reduction) for _ in strata]
    audited = rng.random(trials) < audit
    for number in range(trials):
        for rung in rungs:
            value = float(values[number, marks.index(rung)])
            decision = rules[level_N[number]].report(number, rung, value)
            cutoff = np.nan if decision.cutoff is None else decision.cutoff
            told = decision.stop and not audited[number]
            decisions.append((number, rung, cutoff, decision.competitors, told))
            if decision.stop:
                stopped_at[number] = rung
                break
    audited &= stopped_at > 0
    levels = tuple(strata[level] for level in level_N)
    return DrawnSweep(values, marks, rungs, stopped_at, audited, decisions, levels, audit)


def info_of(**fields: Any) -> SweepInfo:
    """What is known of such a sweep; `fields` are put in place of these."""
    info: dict[str, Any] = {
        **{
            "name": "drawn",
            "sweep_id": "id",
            "run_id": "r",
            "tracking_uri": "",
            "state": "finished",
        },
        **{"objective": "knn_top1", "also": (), "also_modes": (), "warm_start": {}, "mode": "max"},
        **{"total_images": MARKS[-1], "train_images": EPOCH, "val_images": 400, "rungs": ()},
        **{"reduction": 3.0, "slots": 2, "wall_s": 100.0, "start": START, "end": START},
        **{"dataset": "digits", "space": "quick", "sampler": "random", "scheduler": "asha"},
        **{"versions": {}, "commit": None, "config": {}, "distributions": {}, **fields},
    }
    return info  # type: ignore[return-value]


def frames_of(drawn: DrawnSweep, *, scale: float = 0.05, sign: float = 1.0) -> SweepFrames:
    """The sweep as recorded: values 0.5 + scale * value, of a sign, as far as trials ran."""
    values = sign * (0.5 + scale * drawn.values_NM)
    marks = np.array(drawn.marks_M)
    ran_on = ~drawn.stopped | drawn.audited_N
    until = np.where(ran_on, marks[-1], drawn.stopped_at_N)
    trial, place = np.nonzero(marks[None, :] <= until[:, None])
    seen = marks[place]
    curves = pd.DataFrame(
        {
            "number": trial,
            "metric": "knn_top1",
            "samples_seen": seen,
            "mark": seen,
            "value": values[trial, place],
            "time": START + pd.to_timedelta(trial * 100 + seen / 1_000, unit="s"),
        },
        columns=list(CURVE_COLUMNS),
    )
    last = np.searchsorted(marks, until)
    count = len(values)
    trials = pd.DataFrame(
        {
            "number": np.arange(count),
            "state": np.where(ran_on, "completed", "pruned"),
            "ending": np.where(ran_on, "completed", "pruned"),
            "reason": "",
            "is_default": np.arange(count) == 0,
            "objective": values[np.arange(count), last],
            "best_objective": values[np.arange(count), last],
            "samples_seen": until,
            "mark": until,
            "wall_s": until / 100,
            "images_per_s": 100.0,
            "start": START,
            "end": START,
            "node": "a",
            "seed": "1",
            "rung": pd.array(
                [
                    None if on else int(at)
                    for on, at in zip(ran_on, drawn.stopped_at_N, strict=True)
                ],
                dtype="Int64",
            ),
            "audited": pd.array(
                [
                    int(at) if audited else None
                    for audited, at in zip(drawn.audited_N, drawn.stopped_at_N, strict=True)
                ],
                dtype="Int64",
            ),
            "bracket": pd.array([0] * count, dtype="Int64"),
            "stratum": list(drawn.strata_N),
            "pareto": False,
            "run_id": "r",
        }
    )
    rows = [
        (
            n,
            mark,
            mark,
            values[n, drawn.marks_M.index(mark)],
            sign * (0.5 + scale * cut),
            k,
            stop,
            False,
        )
        for n, mark, cut, k, stop in drawn.decisions
    ]
    decisions = pd.DataFrame(rows, columns=list(DECISION_COLUMNS))
    config = {"audit": str(drawn.audit), "grace": "1.0", "reduction": "3"}
    info = info_of(
        mode="max" if sign > 0 else "min",
        rungs=drawn.rungs,
        config=config,
        total_images=int(marks[-1]),
        scheduler="asha" if drawn.rungs else "none",
    )
    return SweepFrames(info, trials, curves, decisions)


def altered(frames: SweepFrames, **trial_columns: Any) -> SweepFrames:
    """The same sweep with some columns of its trials put in place of these."""
    return dataclasses.replace(frames, trials=frames.trials.assign(**trial_columns))


def outcomes_drawn(drawn: DrawnSweep, *, whole: bool = False) -> Outcomes:
    """What `outcomes_of` finds in the records of a sweep; `whole`: had nothing been stopped."""
    known = np.ones(len(drawn.ends), bool) if whole else ~drawn.stopped | drawn.audited_N
    until = np.where(known, drawn.marks_M[-1], drawn.stopped_at_N)
    marks = np.array(drawn.marks_M)
    return Outcomes(
        number_N=np.arange(len(drawn.ends)),
        stratum_N=pd.factorize(pd.Series(drawn.strata_N))[0],
        end_N=np.where(known, drawn.ends, np.nan),
        stopped_at_N=np.where(drawn.stopped & ~np.array(whole), drawn.stopped_at_N, np.nan),
        audited_N=drawn.audited_N & ~np.array(whole),
        scores_NM=np.where(marks[None, :] <= until[:, None], drawn.values_NM, np.nan),
        marks_M=marks,
        sign=1.0,
        total_images=int(marks[-1]),
    )
