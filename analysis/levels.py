"""Frames -> the levels of a field, and what the trials of each came to.

How a trial counts where levels are compared:

- a completed one with its last value;
- one that the scheduler stopped with its last value, reached with fewer images, though never as
  more than the median of its level's completed trials: it has no final value, and whatever that
  had been, it was not one of those that won;
- a failed one, or one without a value, with the worst value of any trial compared;
- one that still runs, that a command stopped or whose node was lost not at all, since nothing is
  known of its end.

Each costs the images that it was trained on. The default configuration is nobody's draw: it
counts only where every level has one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.best_of import Array, Sample
from analysis.effects import shared_mark
from analysis.frames import BY_COMMAND, FAILED_STATES, UNFINISHED, SweepFrames

SWEEP = "sweep"
"""The field whose levels are the sweeps themselves."""
MAX_LEVELS = 8
MAX_TRIALS = 1_200
"""Of all levels together in intervals and tests, shared out evenly, which keeps a large sweep's
comparison within seconds."""
GROUPS = 3
"""Groups of equal numbers of trials that a numeric field with more values is cut into."""


@dataclass(frozen=True)
class Level:
    """The trials of one level; `outcomes` is None where no trial was completed."""

    name: str
    outcomes: Sample | None
    early: Sample
    """Values at the furthest mark that every ended trial reached, failed ones as the worst."""
    trials: int
    completed: int
    stopped: int
    failed: int
    images: int
    best: float | None
    """Of its completed trials, as recorded."""
    best_trial: tuple[str, int] | None
    """Sweep and number."""


@dataclass(frozen=True)
class Levels:
    """Of one field, over sweeps that measure the same."""

    field: str
    levels: tuple[Level, ...]
    early_mark: int
    apart: bool
    """Whether each level was searched apart, with rungs of its own."""
    notes: tuple[str, ...]
    """What was left out or cut, a sentence each."""


def stratified_field(frames: SweepFrames) -> str | None:
    """The field that a sweep was stratified by."""
    name = frames.info["config"].get("stratify", "None").partition("=")[0]
    return None if name in ("", "None") else name


def check_same_measure(sweeps: Sequence[SweepFrames]) -> None:
    """Raise a one-line ValueError for sweeps whose values are not comparable."""
    if not sweeps:
        raise ValueError("a comparison needs at least one sweep, got none")
    check_given_once(sweeps)
    first = sweeps[0].info
    for frames in sweeps[1:]:
        info = frames.info
        for what, name in (
            ("objective", "objective"),
            ("mode", "mode"),
            ("dataset", "data set"),
            ("total_images", "full resource"),
        ):
            ours, theirs = first[what], info[what]  # type: ignore[literal-required]
            if ours != theirs:
                raise ValueError(
                    f"sweeps that are compared must have one {name}, got {ours} of sweep "
                    f"{first['name']!r} and {theirs} of {info['name']!r}"
                )


def check_given_once(sweeps: Sequence[SweepFrames]) -> None:
    """Raise a one-line ValueError for a sweep that is there twice, by whatever path it was read."""
    ids = [frames.info["sweep_id"] for frames in sweeps]
    for frames in sweeps:
        if ids.count(frames.info["sweep_id"]) > 1:
            raise ValueError(f"each sweep must be given once, got {frames.info['name']!r} twice")


def levels_of(sweeps: Sequence[SweepFrames], field: str, *, seed: int = 0) -> Levels:
    """The levels of a field in one sweep or pooled over several.

    `field` is a searched parameter, a field of the trainer's configuration, or SWEEP. Numbers of
    more than MAX_LEVELS values are cut into GROUPS; ValueError for other fields with so many
    levels, for an unknown field, and for sweeps that do not measure the same. Of a level with more
    than its share of MAX_TRIALS, so many, drawn by chance (`seed`), are its outcomes.
    """
    check_same_measure(sweeps)
    names = [frames.info["name"] for frames in sweeps]
    table = pd.concat(
        [_rows(frames, field, several=names.count(frames.info["name"]) > 1) for frames in sweeps],
        ignore_index=True,
    )
    notes = []
    lacking = int(table["level"].isna().sum())
    if lacking:
        notes.append(f"{_trials(lacking)} without a value of {field} left out.")
    table = table[table["level"].notna()]
    table, order, cut = _named(table, field)
    notes += cut
    running = table["ending"].isin((UNFINISHED, BY_COMMAND, "lost"))  # a node's fault, if any's
    if running.any():
        notes.append(f"{_trials(int(running.sum()))} left out whose end is not known.")
    table = table[~running]
    defaults = table[table["is_default"]]
    if len(defaults) and set(defaults["level"]) != set(order):
        table = table[~table["is_default"]]
        which = "The default configuration is" if len(defaults) == 1 else "Default ones are"
        notes.append(f"{which} left out, since not every level has one.")
    mark = min((int(m) for m in table["early_mark"] if m > 0), default=0)
    early = pd.concat([_early(frames, mark) for frames in sweeps], ignore_index=True)
    table = table.merge(early, on=["sweep_id", "number"], how="left")
    sign = 1.0 if sweeps[0].info["mode"] == "max" else -1.0
    most = MAX_TRIALS // max(1, len(order))
    levels = _levels(table, order, sign, most, np.random.default_rng(seed))
    large = [each.name for each in levels if each.trials > most]
    if large:
        notes.append(
            f"{most} trials, drawn by chance, stand for all of {', '.join(large)} in what is "
            "expected of a budget and in the test."
        )
    alone = table.groupby("sweep_id")["level"].nunique() < 2
    apart = field == SWEEP or all(
        (stratified_field(frames) == field and not cut)
        or bool(alone.get(frames.info["sweep_id"], True))
        for frames in sweeps
    )
    return Levels(field, tuple(levels), mark, apart, tuple(notes))


def _trials(count: int) -> str:
    return "1 trial is" if count == 1 else f"{count} trials are"


def _rows(frames: SweepFrames, field: str, several: bool) -> pd.DataFrame:
    """One row a trial: where it is from, its level as recorded, how it ended, what it cost.

    `several`: other sweeps have the same name.
    """
    trials, info = frames.trials, frames.info
    if field == SWEEP:
        name = f"{info['name']} ({info['sweep_id']})" if several else info["name"]
        level = pd.Series(name, index=trials.index, dtype="object")
    elif f"param.{field}" in trials:
        level = trials[f"param.{field}"].astype("object")
    elif field in frames.fields:
        level = trials["number"].map(frames.fields[field]).astype("object")
    elif trials.empty:
        level = pd.Series(index=trials.index, dtype="object")
    else:
        raise ValueError(f"no field {field!r} in sweep {info['name']!r}; {_known(frames)}")
    columns = ["number", "state", "ending", "is_default", "objective", "samples_seen"]
    return trials[columns].assign(
        level=level if field == SWEEP else level.map(level_value, na_action="ignore"),
        sweep=info["name"],
        sweep_id=info["sweep_id"],
        early_mark=shared_mark(frames)[0],
    )


def _known(frames: SweepFrames) -> str:
    vary = [str(name) for name in frames.fields if frames.fields[name].nunique() > 1]
    names = sorted({*frames.parameters, *vary})
    return f"its trials differ in {', '.join(names) or 'none'}; {SWEEP} compares whole sweeps"


def level_value(recorded: object) -> object:
    """Numbers as floats, also from text, so that a sweep that fixed a field meets one that varied
    it; everything else as text."""
    if isinstance(recorded, bool | np.bool_):
        return str(recorded)
    try:
        number = float(str(recorded))
    except ValueError:
        return str(recorded)
    return number if math.isfinite(number) else str(recorded)


def _named(table: pd.DataFrame, field: str) -> tuple[pd.DataFrame, list[str], list[str]]:
    """Levels by name, the names in their order, and a note where values were grouped."""
    values = list(table["level"].unique())
    numeric = all(isinstance(value, float) for value in values)
    if len(values) <= MAX_LEVELS or field == SWEEP:
        values.sort(key=(lambda v: (v, "")) if numeric else str)
        names = {value: f"{value:g}" if isinstance(value, float) else value for value in values}
        return table.assign(level=table["level"].map(names)), [*dict.fromkeys(names.values())], []
    if not numeric:
        raise ValueError(
            f"{field} has {len(values)} levels in these sweeps, of which at most {MAX_LEVELS} can "
            "be compared; numbers alone can be grouped"
        )
    numbers = table["level"].astype(float)
    cuts = sorted(set(np.quantile(numbers, np.arange(1, GROUPS) / GROUPS, method="lower")))
    cuts = [cut for cut in cuts if cut < numbers.max()]
    cuts = cuts or [float(numbers[numbers < numbers.max()].max())]
    names_of = [
        f"up to {cuts[0]:.3g}",
        *(f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(cuts)),
        f"above {cuts[-1]:.3g}",
    ]
    group = np.searchsorted(cuts, numbers, side="left")
    note = (
        f"{field} has {len(values)} values, cut into {len(names_of)} groups of as many trials each "
        "as ties allow."
    )
    return table.assign(level=[names_of[place] for place in group]), names_of, [note]


def _early(frames: SweepFrames, mark: int) -> pd.DataFrame:
    curves = frames.curves
    here = curves[(curves["metric"] == frames.info["objective"]) & (curves["mark"] == mark)]
    here = here.drop_duplicates("number", keep="last")[["number", "value"]]
    return here.rename(columns={"value": "early"}).assign(sweep_id=frames.info["sweep_id"])


def _levels(
    table: pd.DataFrame,
    order: Sequence[str],
    sign: float,
    most: int,
    generator: np.random.Generator,
) -> list[Level]:
    """Levels in this order, each with at most so many outcomes."""
    finite = np.isfinite(table["objective"].astype(float))
    failed = table["state"].isin(FAILED_STATES) | ~finite
    done = (table["state"] == "completed") & ~failed
    value = sign * table["objective"].astype(float)
    worst = float(value[~failed].min()) if (~failed).any() else 0.0
    early = sign * table["early"].astype(float)
    early = early.where(np.isfinite(early) & ~failed)
    early = early.where(~failed, early.min()).dropna()
    costs = table["samples_seen"].astype(float)
    found = []
    for name in order:
        here = table["level"] == name
        finished = value[here & done]
        best = None if finished.empty else float(finished.max())
        outcomes = None
        if best is not None:
            counted = value.where(done, value.clip(upper=finished.median())).where(~failed, worst)
            chosen = _drawn(int(here.sum()), most, generator)
            outcomes = Sample.of(
                counted[here].to_numpy()[chosen], costs[here].clip(lower=1).to_numpy()[chosen]
            )
        row = None if best is None else table[here & done & (value == best)].iloc[0]
        at_mark = early[here.reindex(early.index)].to_numpy()
        at_mark = at_mark[_drawn(len(at_mark), most, generator)]
        found.append(
            Level(
                name=name,
                outcomes=outcomes,
                early=Sample.of(at_mark, np.ones(len(at_mark))),
                trials=int(here.sum()),
                completed=len(finished),
                stopped=int((here & ~done & ~failed).sum()),
                failed=int((here & failed).sum()),
                images=int(costs[here].sum()),
                best=None if best is None else sign * best,
                best_trial=None if row is None else (str(row["sweep"]), int(row["number"])),
            )
        )
    return found


def _drawn(count: int, most: int, generator: np.random.Generator) -> Array:
    """Places of `most` of so many; of all where they are fewer."""
    return generator.choice(count, most, replace=False) if count > most else np.arange(count)
