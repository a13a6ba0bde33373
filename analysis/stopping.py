"""Frames -> what early stopping did: each rung's decisions, and the work that it saved.

Saved is what the trials that the scheduler stopped had left to their full resource; those that
failed, still run or were stopped by a user's command would have cost the same without a scheduler
and count as they are. What stopping *lost* (a stopped trial that would have won) stands in
`analysis.audit`.
"""

from __future__ import annotations

from typing import Any, TypedDict

import pandas as pd

from analysis.load import BY_COMMAND, UNFINISHED, SweepFrames

RUNG_COLUMNS = (
    *("rung", "arrived", "passed", "stopped", "audited"),
    *("first_cutoff", "cutoff", "best", "worst"),
)


class Saving(TypedDict):
    """Images of the train split, and seconds of one slot."""

    stopped: int  # trials, by the scheduler
    by_command: int  # trials that a user's command stopped, which saves nothing here
    samples_seen: int  # spent by all trials
    samples_without: int  # had every stopped trial run to its full resource
    samples_saved: int
    fraction: float  # saved / without, 0 where nothing ran
    slot_s: float  # time that one slot would have needed for what was saved
    wall_s: float | None  # the same spread over the sweep's slots, None where unknown
    audited: int  # trials that would have been stopped, and ran on as an audit
    audited_compared: int  # of these, those that completed beside unaudited ones of their stratum
    audited_above: int  # of these again, those that ended above all unaudited ones there


def rung_table(frames: SweepFrames) -> pd.DataFrame:
    """One row a rung, in images: trials that arrived, passed and were stopped there.

    A trial that waited there for a promotion which never came counts as stopped; one that a
    command ended while it waited, as neither; `audited` are those that would have been stopped and
    ran on to show what that would have cost.
    `first_cutoff` and `cutoff` are the cut-off at the first and at the last decision that had
    one; `best` and `worst` the objective's extremes among the arrivals.
    """
    decisions, trials = frames.decisions, frames.trials
    furthest = decisions.groupby("number")["mark"].transform("max") == decisions["mark"]
    undecided = trials.loc[
        trials["ending"].isin((UNFINISHED, BY_COMMAND)) & trials["audited"].isna(), "number"
    ]
    wait = decisions.loc[furthest & decisions["number"].isin(undecided), "number"]
    rungs = sorted({*frames.info["rungs"], *(int(mark) for mark in decisions["mark"])})
    times = frames.curves[frames.curves["metric"] == frames.info["objective"]]
    key = ["number", "samples_seen"]
    times = times[times["number"].isin(decisions["number"])].drop_duplicates(key, keep="last")
    decisions = decisions.merge(times[[*key, "time"]], on=key, how="left")
    rows: list[dict[str, Any]] = []
    for rung in rungs:
        here = decisions[decisions["mark"] == rung]
        cutoffs = here.sort_values("time")["cutoff"].dropna()
        values = here["value"].dropna()
        low, high = (values.min(), values.max()) if len(values) else (None, None)
        waited = trials.loc[(trials["rung"] == rung).fillna(False), "number"]
        stopped = int((here["stop"] | here["number"].isin(waited)).sum())
        audited = int((trials["audited"] == rung).fillna(False).sum())
        waiting = len(here[here["pause"] & here["number"].isin(wait)])
        rows.append(
            {
                "rung": rung,
                "arrived": len(here),
                "passed": len(here) - stopped - audited - waiting,
                "stopped": stopped,
                "audited": audited,
                "first_cutoff": cutoffs.iloc[0] if len(cutoffs) else None,
                "cutoff": cutoffs.iloc[-1] if len(cutoffs) else None,
                "best": high if frames.info["mode"] == "max" else low,
                "worst": low if frames.info["mode"] == "max" else high,
            }
        )
    return pd.DataFrame(rows, columns=list(RUNG_COLUMNS)).astype(
        dict.fromkeys(("first_cutoff", "cutoff", "best", "worst"), "float64")
    )


def saving(frames: SweepFrames) -> Saving:
    """Images spent against images without early stopping, and the time that makes.

    A stopped trial's rest is timed at that trial's own pace, evaluation included (its wall by
    its images), where no wall was recorded by its images_per_s.
    """
    trials, info = frames.trials, frames.info
    pruned = trials[trials["ending"] == "pruned"]
    left = (info["total_images"] - pruned["samples_seen"]).clip(lower=0)
    pace = pruned["wall_s"] / pruned["samples_seen"].where(pruned["samples_seen"] > 0)
    pace = pace.fillna(1.0 / pruned["images_per_s"].where(pruned["images_per_s"] > 0))
    pace = pace.fillna(pace.median())
    spent, saved = int(trials["samples_seen"].sum()), int(left.sum())
    slot_s = float((left * pace).sum())
    audited = trials["audited"].notna()
    sign = 1.0 if info["mode"] == "max" else -1.0
    ends = sign * trials["objective"].where(trials["state"] == "completed")
    others = ends.where(~audited).groupby(trials["stratum"]).transform("max")
    return Saving(
        stopped=len(pruned),
        by_command=int((trials["ending"] == BY_COMMAND).sum()),
        samples_seen=spent,
        samples_without=spent + saved,
        samples_saved=saved,
        fraction=saved / (spent + saved) if spent + saved else 0.0,
        slot_s=slot_s,
        wall_s=slot_s / info["slots"] if info["slots"] else None,
        audited=int(audited.sum()),
        audited_above=int((ends[audited] > others[audited]).sum()),
        audited_compared=int((ends[audited].notna() & others[audited].notna()).sum()),
    )
