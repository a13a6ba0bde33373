"""Which grace and reduction to use next time, from a small replay of a recorded sweep.

A composition root beside `search.replays`: it reads frames of `analysis` and answers with plain
values, which the report shows. The rule stands in `recommended_of`. It needs neither a folder nor
a driver's records, and is kept small enough to run with every report; `contrasweep replay` tries
more settings, in more orders.
"""

from __future__ import annotations

import dataclasses
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from search.asha import rungs_for

if TYPE_CHECKING:
    from analysis import SweepFrames
    from search.replay import Recording, Row, Setting

REDUCTIONS = (2, 3, 4)
SHUFFLES = 50
LEAST_SHUFFLES = 20
GLANCE = 10
"""Shuffles that tell whether the records hold enough for more."""
MOST_REPORTS = 60_000
"""Reports in all replays together: some five seconds."""
LEAST_ENDS = 5
"""Trials with a known end, below which there is nothing to lose or to keep."""
SURVIVAL = 0.9
"""Chance of keeping the best trial that a recommended setting has at least."""
MOST_UNKNOWN = 0.05
"""Share of a setting's trial runs that may end because nothing more was recorded of them."""
SPREAD_SHARE = 0.05
"""Regret allowed where the objective has no known error: of the way from median to best end."""


def advise(frames: SweepFrames, *, shuffles: int = SHUFFLES, seed: int = 0) -> dict[str, Any]:
    """A table of settings as replayed on a sweep, and the one to use next time.

    `settings`: rows as `contrasweep replay --json` prints them, each with `current`, whether the
    sweep itself ran so; empty where there is nothing to replay, and `reason` says why.
    `recommended`: index of a row, or None, and `reason` again says why. `allowed`: the regret that
    was allowed, and `allowed_by` what it is; `ends` and `hidden`: trials whose end is known, and
    trials that were stopped before theirs.
    """
    from search.replays import recording_of

    nothing: dict[str, Any] = {"settings": [], "recommended": None}
    too_long = nothing | {
        "reason": f"{len(frames.trials)} trials take too long to replay with every report; "
        "`contrasweep replay` does"
    }
    least = min(shuffles, LEAST_SHUFFLES)
    if 2 * len(frames.trials) * len(REDUCTIONS) * least > MOST_REPORTS:
        return too_long
    try:
        recording = recording_of(frames)
    except ValueError:
        return nothing | {"reason": "no trial ran to its full resource"}
    ends = recording.finals()
    if len(ends) < LEAST_ENDS:
        return nothing | {
            "reason": f"only {len(ends)} trials ran to their full resource, and it takes "
            f"{LEAST_ENDS}"
        }
    settings = _settings(frames, recording)
    reports = sum(
        len(recording.trials) * (1 + len(_rungs(recording, setting))) for setting in settings
    )
    affordable = min(shuffles, MOST_REPORTS // max(1, reports))
    if not settings:
        return nothing | {"reason": "a trial is too short for a rung before its end"}
    if affordable < least:
        return too_long
    rows = _replayed(recording, settings, min(affordable, GLANCE), seed)
    worth_more = any(row.unknown <= MOST_UNKNOWN for row, _ in rows)
    if worth_more and affordable > GLANCE:
        rows = _replayed(recording, settings, affordable, seed)
    allowed, allowed_by = _allowed(frames, recording)
    recommended, reason = recommended_of([row for row, _ in rows], allowed)
    return {
        "settings": [
            row.to_json() | {"current": setting == _own(frames, recording)} for row, setting in rows
        ],
        "recommended": recommended,
        "reason": reason,
        "allowed": allowed,
        "allowed_by": allowed_by,
        "shuffles": rows[0][0].shuffles,
        "trials": len(recording.trials),
        "ends": len(ends),
        "hidden": sum(
            trial.failed is None and recording.total_images not in trial.values
            for trial in recording.trials
        ),
        "train_images": recording.train_images,
    }


def recommended_of(rows: Sequence[Row], allowed: float) -> tuple[int | None, str]:
    """The row that saves most, keeps the best trial and loses little; else why there is none.

    A row qualifies with a survival of at least SURVIVAL, a mean regret of at most `allowed`, and
    at most MOST_UNKNOWN of its runs unknown. Its saving is the lower one, which charges unknown
    runs in full.
    """
    from search.replays import BETTER

    known = [place for place, row in enumerate(rows) if row.unknown <= MOST_UNKNOWN]
    if not known:
        return None, (
            "the records cannot tell, since every setting tried would have let trials run on that "
            f"were stopped when they were recorded; {BETTER}"
        )
    good = [
        place
        for place in known
        if rows[place].survival >= SURVIVAL
        and (regret := rows[place].regret) is not None
        and regret <= allowed
    ]
    good = [place for place in good if rows[place].saving > 0]
    if not good:
        return None, (
            f"no setting saves images, keeps the best trial in {SURVIVAL:.0%} of the orders and "
            "loses too little to matter"
        )
    return max(good, key=lambda place: rows[place].saving), ""


def _own(frames: SweepFrames, recording: Recording) -> Setting | None:
    """The setting that the sweep itself ran with, if it can be replayed."""
    config = frames.info["config"]
    several = config.get("brackets", "1") != "1"
    if frames.info["scheduler"] != "asha" or several or not {"grace", "reduction"} <= set(config):
        return None
    return _setting(frames, float(config["grace"]), int(config["reduction"]))


def _setting(frames: SweepFrames, grace: float, reduction: int) -> Setting:
    from search.replay import Setting

    config = frames.info["config"]
    competitors = config.get("min_competitors", "")
    return Setting(
        "promote" if config.get("promote") == "True" else "asha",
        grace,
        reduction,
        min_competitors=int(competitors) if competitors.isdigit() else None,
    )


def _settings(frames: SweepFrames, recording: Recording) -> list[Setting]:
    """The small grid, and the sweep's own setting; only those with a rung before the end."""
    from search.replays import usual_graces

    epochs = recording.total_images / recording.train_images
    settings = [
        _setting(frames, grace, reduction)
        for grace in usual_graces(epochs)
        for reduction in REDUCTIONS
    ]
    own = _own(frames, recording)
    if own is not None and own.grace < epochs:
        settings.append(own)
    settings = [setting for setting in dict.fromkeys(settings) if _rungs(recording, setting)]
    return sorted(settings, key=lambda setting: (setting.grace, setting.reduction))


def _rungs(recording: Recording, setting: Setting) -> list[int]:
    """The recorded marks that are the setting's rungs."""
    marks, total = recording.marks, recording.total_images
    grace = max(1, round(setting.grace * recording.train_images))
    if grace >= total:
        return []
    wanted = rungs_for(grace, setting.reduction, total)
    return sorted({marks[bisect_left(marks, rung)] for rung in wanted} - {total})


def _replayed(
    recording: Recording, settings: Sequence[Setting], shuffles: int, seed: int
) -> list[tuple[Row, Setting]]:
    """Each setting on the marks that it decides at, and on those where a trial's record ends."""
    from search.replay import replay

    total = recording.total_images
    ends = {max(t.values) for t in recording.trials if t.values and t.failed is None}
    rows = []
    for setting in settings:
        needed = {*_rungs(recording, setting), *ends, total}
        trials = tuple(
            dataclasses.replace(
                trial, values={mark: v for mark, v in trial.values.items() if mark in needed}
            )
            for trial in recording.trials
        )
        thinned = dataclasses.replace(recording, trials=trials)
        rows += [(row, setting) for row in replay(thinned, [setting], shuffles=shuffles, seed=seed)]
    return rows


def _allowed(frames: SweepFrames, recording: Recording) -> tuple[float, str]:
    """The mean regret that a recommended setting may have, and what it is in words."""
    from analysis.tables import is_accuracy, standard_error

    ends = sorted(recording.finals().values(), reverse=frames.info["mode"] == "max")
    if is_accuracy(recording.objective):
        error = standard_error(ends[0], frames.info["val_images"])
        if error:
            return error, "one standard error of the best value"
    spread = abs(ends[0] - statistics.median(ends))
    return SPREAD_SHARE * spread, "a twentieth of the way from the median end to the best"
