"""Frames -> which parameters mattered, and how sure that is.

Values are compared at one mark only, the furthest that every trial counted has reached: the
trials that early stopping let through are a selection, and a selection hides the parameters
that it was made by. The price is that an early mark favours what learns fast.

Two measures (`fanova`): fANOVA shares out the variance of the objective over the whole space;
PED-ANOVA asks what tells the best tenth from the rest. Both are computed again on bootstrap
samples of the trials, each time beside a parameter without effect: a searched one whose settings
were dealt anew among the trials. Left out: interactions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.fanova import (
    GRID,
    TARGET_QUANTILE,
    Counts,
    cells,
    fanova_variances,
    ped_anova_divergence,
)
from analysis.load import BY_COMMAND, FAILED_STATES, UNFINISHED, SweepFrames
from analysis.scales import Floats, distribution_of, is_categorical, is_log

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = [
    "Comparable",
    "Importance",
    "Stability",
    "comparable",
    "importance",
    "is_categorical",
    "is_log",
    "parameter_frame",
    "shared_mark",
]

MIN_TRIALS = {"fanova": 10, "ped_anova": 50}
"""fANOVA's forest needs a handful of points; PED-ANOVA wants 5 trials in its best tenth."""

TREES = 64
"""As in Optuna."""
TREES_A_RESAMPLE = 8
RESAMPLES = {"fanova": 60, "ped_anova": 200}
MAX_TRIALS = 500
"""Of more trials that many are drawn at random, so that the time is known beforehand."""
SEED = 0

MIN_COMPLETED = 8
"""From that many completed trials on, these are compared with one another."""


@dataclass(frozen=True)
class Stability:
    """How a measure varies over `resamples` bootstrap samples of the trials.

    `intervals` are the 5th, 50th and 95th percentile of each share, the largest median first;
    `first_count` is how often `first`, the largest share of all trials, was the largest again;
    `floor` is the share that a parameter without effect stayed below in 95 % of the samples.
    """

    resamples: int
    first: str
    first_count: int
    intervals: dict[str, tuple[float, float, float]]
    floor: float


@dataclass(frozen=True)
class Importance:
    """Shares that sum to one (largest first), or None and the reason.

    `mark` is the images at which the `n` trials were compared, `drawn` how many of them were
    used, `left_out` the parameters without a share.
    """

    evaluator: str
    shares: dict[str, float] | None
    reason: str
    mark: int
    n: int
    left_out: tuple[str, ...] = ()
    drawn: int = 0
    stability: Stability | None = None


@dataclass(frozen=True)
class Comparable:
    """Objectives that may be compared: of completed trials, or all at one mark.

    `values` maps trial number to objective.
    """

    values: pd.Series[Any]
    completed: bool
    mark: int

    def words(self) -> str:
        """Which trials these are, for a caption."""
        if self.completed:
            return f"the {len(self.values):,} completed trials"
        n = len(self.values)
        which = "the one trial" if n == 1 else f"the {n:,} trials"
        return f"{which} that reached {self.mark:,} images, at that mark"


def comparable(frames: SweepFrames) -> Comparable:
    """The completed trials' last values if there are MIN_COMPLETED, else all at the shared mark."""
    trials = frames.trials
    done = trials[(trials["state"] == "completed") & np.isfinite(trials["objective"])]
    if len(done) >= MIN_COMPLETED:
        values = done.set_index("number")["objective"]
        return Comparable(values, True, int(done["mark"].max()))
    mark, values = shared_mark(frames)
    return Comparable(values, False, mark)


def settings_of(frames: SweepFrames, parameter: str) -> pd.DataFrame:
    """`number`, `ending`, `setting`, `objective` (last value), `mark`: trials with all of them."""
    table = frames.trials[["number", "ending", "objective", "mark"]]
    setting = frames.trials[f"param.{parameter}"].astype("object")
    table = table.assign(parameter=parameter, setting=setting)
    return table[table["objective"].notna() & setting.notna()]


def parameter_frame(frames: SweepFrames) -> pd.DataFrame:
    """Tidy: `number`, `ending`, `parameter`, `setting`, `objective` (last value), `mark`.

    One row a trial and drawn parameter; trials without a value are left out.
    """
    columns = ["number", "ending", "parameter", "setting", "objective", "mark"]
    parts = [settings_of(frames, name)[columns] for name in frames.parameters]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def shared_mark(frames: SweepFrames) -> tuple[int, pd.Series[Any]]:
    """The furthest mark that every completed or early stopped trial reached, and the values there.

    The series maps trial number to objective; it holds those that are unfinished, or that a
    command stopped, if they got that far. (0, empty) while no trial has ended.
    """
    trials = frames.trials
    usable = trials[~trials["state"].isin(FAILED_STATES) & trials["objective"].notna()]
    ended = usable[~usable["ending"].isin((UNFINISHED, BY_COMMAND))]
    if ended.empty:
        return 0, pd.Series(dtype="float64")
    mark = int(ended["mark"].min())
    curves = frames.curves
    at_mark = curves[
        (curves["metric"] == frames.info["objective"])
        & (curves["mark"] == mark)
        & curves["number"].isin(usable["number"])
    ]
    values = at_mark.drop_duplicates("number", keep="last").set_index("number")["value"]
    return mark, values[np.isfinite(values)]


def importance(
    frames: SweepFrames, evaluator: str = "fanova", *, resamples: int | None = None
) -> Importance:
    """Share of each searched parameter in the objective; ValueError for an unknown evaluator.

    `resamples` (None: RESAMPLES) bootstrap samples tell its stability; 0 leaves that out.
    """
    if evaluator not in MIN_TRIALS:
        raise ValueError(f"evaluator must be one of {', '.join(MIN_TRIALS)}, got {evaluator!r}")
    mark, values = shared_mark(frames)
    least = MIN_TRIALS[evaluator]

    def none(reason: str) -> Importance:
        return Importance(evaluator, None, reason, mark, len(values))

    if not frames.parameters:
        return none("no parameter was searched")
    if len(values) < least:
        return none(f"needs {least} trials that reached the same mark, there are {len(values)}")
    if values.nunique() < 2:
        return none("every trial has the same value")
    columns, kept = _columns(frames, values.index)
    values = values[kept]
    columns = [column.of(kept) for column in columns]
    if evaluator == "fanova":
        columns = [column for column in columns if not np.isnan(column.units).any()]
    found = len(values)
    if found < least:
        return none(f"needs {least} trials inside the searched ranges, there are {found}")
    if not columns:
        return none("no parameter varies over all trials")
    rng = np.random.default_rng(SEED)
    if found > MAX_TRIALS:
        rows = np.sort(rng.choice(found, MAX_TRIALS, replace=False))
        values, columns = values.iloc[rows], [column.of(rows) for column in columns]
    sign = -1.0 if frames.info["mode"] == "max" else 1.0
    losses = sign * values.to_numpy(dtype="float64")
    once = np.ones(len(losses), dtype=np.int64)
    raw = _measure(evaluator, columns, losses, once, TREES, SEED)
    if raw is None or not raw.sum() > 0:
        return none(
            "too many trials share the best value"
            if evaluator == "ped_anova"
            else "no trial differs from the others by what was searched"
        )
    by_name = dict(zip((column.name for column in columns), raw / raw.sum(), strict=True))
    shares = {name: float(by_name[name]) for name in sorted(by_name, key=lambda n: -by_name[n])}
    left_out = tuple(name for name in frames.parameters if name not in shares)
    count = RESAMPLES[evaluator] if resamples is None else resamples
    stability = _stability(evaluator, columns, losses, next(iter(shares)), count)
    return Importance(evaluator, shares, "", mark, found, left_out, len(losses), stability)


@dataclass(frozen=True)
class _Column:
    """One parameter of N trials: settings in [0, 1] and in cells of a grid; missing: NaN, -1."""

    name: str
    units: Floats
    cells: NDArray[np.int64]
    size: int
    is_choice: bool

    def of(self, rows: NDArray[Any]) -> _Column:
        """The same of some of the trials, chosen by a mask or by their positions."""
        return _Column(self.name, self.units[rows], self.cells[rows], self.size, self.is_choice)


def _columns(
    frames: SweepFrames, numbers: pd.Index[Any]
) -> tuple[list[_Column], NDArray[np.bool_]]:
    """The parameters whose range is known and not a single point, and which trials lie inside.

    The default configuration is run whether or not the space contains it.
    """
    trials = frames.trials.set_index("number").loc[numbers]
    inside, drawn_any = np.ones(len(numbers), dtype=bool), np.zeros(len(numbers), dtype=bool)
    columns = []
    for name in frames.parameters:
        known = distribution_of(frames, name)
        if known is None:
            continue
        drawn = trials[f"param.{name}"].notna().to_numpy(dtype=bool)
        column = _column(name, known, trials[f"param.{name}"], drawn)
        inside &= ~drawn | ~np.isnan(column.units)
        drawn_any |= drawn
        if not known.single():
            columns.append(column)
    return columns, inside & drawn_any


def _column(
    name: str, distribution: BaseDistribution, settings: pd.Series[Any], drawn: NDArray[np.bool_]
) -> _Column:
    units = np.full(len(settings), np.nan)
    if hasattr(distribution, "choices"):
        size = len(distribution.choices)
        ranks = {_level(choice): rank for rank, choice in enumerate(distribution.choices)}
        taken = [ranks.get(_level(value), np.nan) for value in settings[drawn]]
        units[drawn] = (np.array(taken, dtype=float) + 0.5) / size
        places = np.where(np.isnan(units), -1, np.floor(units * size)).astype(np.int64)
        return _Column(name, units, places, size, True)
    low, high = float(distribution.low), float(distribution.high)  # type: ignore[attr-defined]
    step, log = distribution.step, distribution.log  # type: ignore[attr-defined]
    numbers = pd.to_numeric(settings[drawn], errors="coerce").to_numpy(dtype=float)
    numbers = np.where((numbers >= low) & (numbers <= high), numbers, np.nan)
    size = GRID
    if log:
        if step is not None:  # a whole number: one cell a doubling
            size = min(int(np.ceil(np.log2(high - low + 1))) + 1, GRID)
        low, high, numbers = np.log(low), np.log(high), np.log(numbers)
    elif step is not None:
        size = min(round((high - low) / step) + 1, GRID)
    units[drawn] = (numbers - low) / (high - low) if high > low else 0.5
    return _Column(name, units, cells(units, size), size, False)


def _level(choice: object) -> object:
    """A level as a key: a whole number is the same in a column of floats."""
    number = isinstance(choice, int | float | np.number) and not isinstance(choice, bool)
    return float(choice) if number else str(choice)  # type: ignore[arg-type]


def _measure(
    evaluator: str,
    columns: list[_Column],
    losses: Floats,
    counts: Counts,
    trees: int,
    seed: int,
) -> Floats | None:
    """Each column's measure on trials that count so often, before they are made shares."""
    if evaluator == "fanova":
        units = np.column_stack([column.units for column in columns])
        return fanova_variances(units, losses, counts, trees=trees, seed=seed)
    ordered = np.sort(np.repeat(losses, counts))
    best = losses <= ordered[int(np.ceil(TARGET_QUANTILE * len(ordered))) - 1]
    if 2 * counts[best].sum() > len(ordered):
        return None  # ties: the best tenth is more than half of all
    return np.array(
        [ped_anova_divergence(c.cells, c.size, c.is_choice, counts, best) for c in columns]
    )


def _stability(
    evaluator: str, columns: list[_Column], losses: Floats, first: str, resamples: int
) -> Stability | None:
    """Bootstrap of the shares, beside a whole column dealt anew, a different one each time.

    None with a single parameter, whose share is all there is.
    """
    n, rng = len(losses), np.random.default_rng(SEED + 1)
    rows, dealt = [], []
    whole = [column for column in columns if (column.cells >= 0).all()] or columns
    for index in range(resamples if len(columns) > 1 else 0):
        order = rng.permutation(n)
        shadow = whole[index % len(whole)].of(order)
        counts = np.bincount(rng.integers(0, n, n), minlength=n)
        raw = _measure(evaluator, [*columns, shadow], losses, counts, TREES_A_RESAMPLE, index)
        if raw is not None and raw[:-1].sum() > 0:
            rows.append(raw[:-1] / raw[:-1].sum())
            dealt.append(raw[-1] / raw[:-1].sum())
    if not rows:
        return None
    shares = np.array(rows)
    names = [column.name for column in columns]
    low, middle, high = np.percentile(shares, (5, 50, 95), axis=0)
    order = np.argsort(-middle, kind="stable")
    return Stability(
        resamples=len(rows),
        first=first,
        first_count=int((shares.argmax(axis=1) == names.index(first)).sum()),
        intervals={names[i]: (float(low[i]), float(middle[i]), float(high[i])) for i in order},
        floor=min(1.0, float(np.percentile(dealt, 95))),  # more than all of it is no share
    )
