"""Frames -> the tables of a sweep: leaderboard, best so far, summary.

**What ranks above what.** A value reached with fewer images is not comparable with one reached
with more, so trials that ran to their full resource stand first, ordered by their last value.
Behind them stand the stopped and the unfinished ones, those that got further first (a higher
rung was survived) and then by value; failed ones come last and carry no rank. A trial that did
not complete is never called the winner.

Left out: repeated runs of the winner with fresh seeds. The winner's value here is the highest
of many noisy ones and therefore optimistic.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict

import pandas as pd

from analysis.load import ENDINGS, FAILED_STATES, SweepFrames, SweepInfo

LEADERBOARD_COLUMNS = (
    *("rank", "number", "state", "ending", "is_default", "objective", "best_objective"),
    *("samples_seen", "epochs", "wall_s", "audited"),
)

Axis = Literal["time", "images", "cost"]


class Standing(TypedDict):
    """One trial in the summary."""

    number: int
    value: float
    standard_error: float | None  # of the value over the validation images, fraction
    samples_seen: int
    params: dict[str, Any]


class Gain(TypedDict):
    """The winner against the default configuration; positive is better, whatever the mode."""

    value: float
    winner: float  # at the mark, like `default`
    default: float
    mark: int  # images, the furthest at which both were measured
    full: bool  # whether that is the full resource
    default_ending: str | None  # how the default ended there, None if it went on


class Summary(TypedDict):
    """What a hurried reader wants to know."""

    name: str
    state: str
    objective: str
    winner: Standing | None  # best of the completed trials
    leading: Standing | None  # best of the others while none is completed
    gain: Gain | None
    trials: dict[str, int]  # ending -> count, only endings that occur
    samples_seen: int
    wall_s: float


def is_accuracy(objective: str) -> bool:
    """Whether the objective is a fraction of images that are right."""
    return objective.endswith("top1")


def standard_error(value: float, images: int | None) -> float | None:
    """Binomial standard error sqrt(p (1 - p) / n) of an accuracy; None where n is unknown."""
    if images is None or images <= 0 or not 0 <= value <= 1:
        return None
    return math.sqrt(value * (1 - value) / images)


def leaderboard(frames: SweepFrames) -> pd.DataFrame:
    """LEADERBOARD_COLUMNS and further ones, one row a trial, best first.

    `rank` is missing for failed trials and those without a finite value; `epochs` are
    samples_seen / train images. Further columns are `bracket`, of a sweep with more than one;
    `also.NAME`, the further objectives; and `param.NAME`, the searched parameters.
    """
    trials, info = frames.trials, frames.info
    failed = trials["state"].isin(FAILED_STATES)
    table = trials.assign(
        epochs=trials["samples_seen"] / info["train_images"],
        tier=failed.map({True: 2, False: 1}).where(trials["state"] != "completed", 0),
    )
    table["reached"] = table["mark"].where(table["tier"] > 0, 0)
    table["known"] = table["objective"].where(table["objective"].abs() < math.inf)
    table = table.sort_values(
        ["tier", "reached", "known", "number"],
        ascending=[True, False, info["mode"] == "min", True],
        na_position="last",
        ignore_index=True,
    )
    ranked = (table["tier"] < 2) & table["known"].notna()
    table["rank"] = ranked.cumsum().where(ranked).astype("Int64")
    bracket = ["bracket"] if info["config"].get("brackets", "1") != "1" else []
    also = [f"also.{name}" for name in info["also"]]
    params = [f"param.{name}" for name in frames.parameters]
    return table[[*LEADERBOARD_COLUMNS, *bracket, *also, *params]]


def best_completed(frames: SweepFrames) -> list[int]:
    """Numbers of the completed trials that have a value, best first."""
    completed = frames.trials[frames.trials["state"] == "completed"]
    known = completed[completed["objective"].abs() < math.inf]
    ascending = [frames.info["mode"] == "min", True]
    ordered = known.sort_values(["objective", "number"], ascending=ascending)["number"]
    return [int(number) for number in ordered]


def winner_of(frames: SweepFrames) -> int | None:
    """Number of the best completed trial; None while none is."""
    return next(iter(best_completed(frames)), None)


def leaderboard_rows(frames: SweepFrames, limit: int | None = None) -> list[dict[str, Any]]:
    """The leaderboard as plain Python values (None where missing), parameters without prefix."""
    table = leaderboard(frames).head(limit) if limit is not None else leaderboard(frames)
    names = [str(name).removeprefix("param.") for name in table.columns]
    columns = [plain_values(table[name]) for name in table.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def plain_values(column: pd.Series[Any]) -> list[Any]:
    """A column as plain Python values, None where missing."""
    if column.dtype == "object":
        return [plain(value) for value in column]
    values = column.astype("object").where(column.notna(), None).tolist()
    return [plain(value) for value in values] if column.dtype == "category" else values


def varying_parameters(frames: SweepFrames) -> list[str]:
    """The searched parameters that tell trials apart; all of them while there is one trial."""
    several = len(frames.trials) > 1
    return [
        name
        for name in frames.parameters
        if not several or frames.trials[f"param.{name}"].astype("object").map(str).nunique() > 1
    ]


def best_so_far(frames: SweepFrames, by: Axis = "time") -> pd.DataFrame:
    """One row a report, in order of time: `x`, `number`, `value`, `best`, `best_completed`.

    `x` is, by "time", seconds since the sweep's start (pauses between interrupt and resume
    included); by "images", the images that all trials together had trained on up to that
    report; by "cost", the seconds of one slot that these images took, each trial at its own mean
    pace. `best` is over every report so far, `best_completed` over the last values of the
    trials that had by then reached their full resource (missing before the first did).
    """
    info = frames.info
    rows = frames.curves[frames.curves["metric"] == info["objective"]]
    rows = rows.sort_values(["time", "number", "samples_seen"], ignore_index=True)
    if by == "time":
        x = (rows["time"] - info["start"]).dt.total_seconds()
    else:
        done = rows.groupby("number")["samples_seen"].diff().fillna(rows["samples_seen"])
        done = done.clip(lower=0)
        if by == "cost":
            done = done * rows["number"].map(pace_s(frames)).astype("float64")
        x = done.cumsum()
    completed = frames.trials.loc[frames.trials["state"] == "completed"]
    ends = completed.set_index("number")["samples_seen"]
    final = rows["value"].where(rows["number"].map(ends) == rows["samples_seen"])
    return pd.DataFrame(
        {
            "x": x.astype("float64"),
            "number": rows["number"],
            "value": rows["value"],
            "best": _running_best(rows["value"], info["mode"]),
            "best_completed": _running_best(final, info["mode"]),
        }
    )


def pace_s(frames: SweepFrames) -> pd.Series[Any]:
    """Seconds of one slot an image, by trial; the median's where a trial's wall is not known.

    All missing where none is known.
    """
    trials = frames.trials.set_index("number")
    seen, wall = trials["samples_seen"].astype("float64"), trials["wall_s"].astype("float64")
    pace = (wall / seen).where((seen > 0) & (wall > 0) & (wall < math.inf))
    return pace.fillna(pace.median())


def summarise(frames: SweepFrames) -> Summary:
    """Winner, gain over the default configuration, counts by ending, images and wall spent."""
    info, trials = frames.info, frames.trials
    table = leaderboard(frames)
    ranked = table[table["rank"].notna()]
    first = None if ranked.empty else ranked.iloc[0]
    won = first is not None and first["state"] == "completed"
    standing = None if first is None else _standing(frames, int(first["number"]))
    counts = trials["ending"].value_counts()
    known = [ending for ending in ENDINGS if ending in counts]
    others = sorted(ending for ending in counts.index if ending not in ENDINGS)
    return Summary(
        name=info["name"],
        state=info["state"],
        objective=info["objective"],
        winner=standing if won else None,
        leading=None if won else standing,
        gain=None if first is None else _gain(frames, int(first["number"])),
        trials={ending: int(counts[ending]) for ending in [*known, *others]},
        samples_seen=int(trials["samples_seen"].sum()),
        wall_s=wall_s(frames),
    )


def wall_s(frames: SweepFrames) -> float:
    """The driver's wall, seconds; from the first start to the last report where unrecorded."""
    info = frames.info
    if info["wall_s"] is not None:
        return info["wall_s"]
    last = [time for time in (frames.curves["time"].max(), info["end"]) if not pd.isna(time)]
    return max((time - info["start"]).total_seconds() for time in last) if last else 0.0


def plain(value: Any) -> Any:
    """A cell as a plain Python value: None where missing, numpy scalars unwrapped."""
    if value is None or (not isinstance(value, list | tuple | dict) and pd.isna(value)):
        return None
    return value.item() if hasattr(value, "item") else value


def value_at(frames: SweepFrames, number: int, mark: int) -> float | None:
    """A trial's objective at the report of a mark, None where it did not report there."""
    curves = frames.curves
    here = curves[
        (curves["metric"] == frames.info["objective"])
        & (curves["number"] == number)
        & (curves["mark"] == mark)
    ]["value"]
    return None if here.empty or pd.isna(here.iloc[-1]) else float(here.iloc[-1])


def trial_row(frames: SweepFrames, number: int) -> dict[str, Any]:
    """One row of `frames.trials`."""
    row = frames.trials[frames.trials["number"] == number].to_dict("records")[0]
    return {str(name): value for name, value in row.items()}


def trial_params(frames: SweepFrames, number: int) -> dict[str, Any]:
    """The searched parameters that this trial drew."""
    row = trial_row(frames, number)
    values = {name: plain(row[f"param.{name}"]) for name in frames.parameters}
    return {name: value for name, value in values.items() if value is not None}


class LevelRow(TypedDict):
    """One level of the choice that a sweep was stratified by."""

    level: str
    trials: int
    completed: int
    images: int
    default: float | None  # objective of its default configuration, if that was completed
    best: float | None  # of its completed trials
    best_number: int | None


def level_rows(frames: SweepFrames) -> list[LevelRow]:
    """The levels of a stratified sweep, the one with the best completed trial first."""
    trials, higher = frames.trials, frames.info["mode"] == "max"
    rows = []
    for level, group in trials[trials["stratum"] != ""].groupby("stratum"):
        done = group[(group["state"] == "completed") & group["objective"].notna()]
        default = done.loc[done["is_default"], "objective"]
        ranked = done.sort_values("objective", ascending=not higher)
        rows.append(
            LevelRow(
                level=str(level),
                trials=len(group),
                completed=len(done),
                images=int(group["samples_seen"].sum()),
                default=None if default.empty else float(default.iloc[0]),
                best=None if ranked.empty else float(ranked["objective"].iloc[0]),
                best_number=None if ranked.empty else int(ranked["number"].iloc[0]),
            )
        )
    sign = -1.0 if higher else 1.0
    return sorted(rows, key=lambda row: math.inf if row["best"] is None else sign * row["best"])


def default_number(frames: SweepFrames) -> int | None:
    """Number of the trial that ran the default configuration."""
    defaults = frames.trials.loc[frames.trials["is_default"], "number"]
    return None if defaults.empty else int(defaults.iloc[0])


def _running_best(values: pd.Series[Any], mode: str) -> pd.Series[Any]:
    finite = values.where(values.abs() < math.inf)
    best = finite.cummax() if mode == "max" else finite.cummin()
    return best.ffill()


def _standing(frames: SweepFrames, number: int) -> Standing:
    info: SweepInfo = frames.info
    row = trial_row(frames, number)
    value = float(row["objective"])
    accuracy = is_accuracy(info["objective"])
    return Standing(
        number=number,
        value=value,
        standard_error=standard_error(value, info["val_images"]) if accuracy else None,
        samples_seen=int(row["samples_seen"]),
        params=trial_params(frames, number),
    )


def _gain(frames: SweepFrames, number: int) -> Gain | None:
    """Against the default at the furthest mark that both reported: equal images on both sides."""
    default = default_number(frames)
    if default is None:
        return None
    curves = frames.curves[frames.curves["metric"] == frames.info["objective"]]
    curves = curves[curves["value"].notna()]
    shared = set(curves.loc[curves["number"] == number, "mark"]) & set(
        curves.loc[curves["number"] == default, "mark"]
    )
    if not shared:
        return None
    mark = int(max(shared))
    ours, theirs = value_at(frames, number, mark), value_at(frames, default, mark)
    assert ours is not None
    assert theirs is not None
    sign = 1.0 if frames.info["mode"] == "max" else -1.0
    at_its_end = mark == curves.loc[curves["number"] == default, "mark"].max()
    return Gain(
        value=sign * (ours - theirs),
        winner=ours,
        default=theirs,
        mark=mark,
        full=mark >= frames.info["total_images"],
        default_ending=str(trial_row(frames, default)["ending"]) if at_its_end else None,
    )
