"""Where a parameter's settings lie on the scale that it was searched on.

Every statistic and figure of effects speaks of places: the logarithm (base 10) of a parameter
that was searched on a logarithmic scale, the number itself otherwise, and the rank of a level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.load import SweepFrames
from analysis.style import log_ticks

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Floats = NDArray[np.float64]

MAX_STOPS = 6
TRIALS_A_STOP = 3
"""A number is treated as a few levels if it takes few values, each by several trials."""


@dataclass(frozen=True)
class Scale:
    """The scale of one searched parameter.

    `levels` are the texts of a choice's levels in their order, None for numbers. `stops` are the
    places of the levels, or of a number that takes only a few values, else None. `low` and
    `high` are the outermost places, of the searched range or of a trial outside it.
    """

    parameter: str
    levels: tuple[str, ...] | None
    log: bool
    low: float
    high: float
    stops: tuple[float, ...] | None

    def places(self, settings: Sequence[Any] | pd.Series[Any]) -> Floats:
        """One place a setting; NaN where it is missing or has none."""
        if self.levels is not None:
            ranks = {level: float(rank) for rank, level in enumerate(self.levels)}
            return np.array([ranks.get(_text(value), math.nan) for value in settings], dtype=float)
        numbers = pd.to_numeric(pd.Series(settings, dtype="object"), errors="coerce")
        values = numbers.to_numpy(dtype="float64", na_value=math.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(values) if self.log else values
        return np.where(np.isfinite(values), values, math.nan)

    def setting(self, place: float) -> float:
        """The number at a place; of a choice the place itself."""
        return 10.0**place if self.log else place

    def text(self, place: float) -> str:
        """A place as the reader knows it, four digits of a number."""
        if self.levels is not None:
            return self.levels[min(max(round(place), 0), len(self.levels) - 1)]
        return f"{self.setting(place):.4g}"

    def edges(self, most: int) -> Floats:
        """Edges of bins: around each stop, else `most` bins of equal width over the range."""
        if self.stops is None:
            low, high = self.low, self.high
            pad = 0.0 if high > low else 0.5
            return np.linspace(low - pad, high + pad, most + 1)
        stops = np.array(self.stops)
        if len(stops) == 1:
            return np.array([stops[0] - 0.5, stops[0] + 0.5])
        middles = (stops[1:] + stops[:-1]) / 2
        first, last = 2 * stops[0] - middles[0], 2 * stops[-1] - middles[-1]
        return np.array([first, *middles, last])

    def bin_text(self, edges: Floats, index: int) -> str:
        """A bin as the reader knows it: its level or its range."""
        if self.stops is not None:
            return self.text(self.stops[index])
        return f"{self.text(edges[index])} to {self.text(edges[index + 1])}"

    def ticks(self) -> dict[str, Any]:
        """Ticks of a linear axis of places, texts escaped; empty where plotly's own will do."""
        if self.levels is not None:
            return {
                "tickvals": list(range(len(self.levels))),
                "ticktext": [escape(level) for level in self.levels],
            }
        if self.stops is not None:
            texts = [self.text(place) for place in self.stops]
            return {"tickvals": list(self.stops), "ticktext": texts}
        if not self.log:
            return {}
        ticks = log_ticks([10.0**self.low, 10.0**self.high])
        return {
            "tickvals": [math.log10(value) for value in ticks["tickvals"]],
            "ticktext": ticks["ticktext"],
        }

    @property
    def title(self) -> str:
        """Name for an axis, escaped, with the scale where it is not plain."""
        return escape(self.parameter) + (" (log scale)" if self.log else "")


def scale_of(frames: SweepFrames, parameter: str) -> Scale:
    """The scale of a searched parameter, over its range and over all that trials drew."""
    drawn = frames.trials[f"param.{parameter}"].dropna()
    if is_categorical(frames, parameter):
        levels = tuple(_levels(drawn.tolist()))
        ranks = tuple(float(rank) for rank in range(len(levels)))
        return Scale(parameter, levels, False, 0.0, float(max(0, len(levels) - 1)), ranks)
    log = is_log(frames, parameter)
    bare = Scale(parameter, None, log, 0.0, 0.0, None)
    distribution = distribution_of(frames, parameter)
    ends = [] if distribution is None else [distribution.low, distribution.high]  # type: ignore[attr-defined]
    places = bare.places([*drawn.tolist(), *ends])
    places = places[np.isfinite(places)]
    low, high = (float(places.min()), float(places.max())) if len(places) else (0.0, 0.0)
    taken = bare.places(drawn)
    taken = taken[np.isfinite(taken)]
    distinct = np.unique(taken)
    few = 0 < len(distinct) <= MAX_STOPS and len(taken) >= TRIALS_A_STOP * len(distinct)
    stops = tuple(float(place) for place in distinct) if few else None
    return Scale(parameter, None, log, low, high, stops)


def is_log(frames: SweepFrames, parameter: str) -> bool:
    """Whether the parameter was searched on a logarithmic scale."""
    return bool(getattr(distribution_of(frames, parameter), "log", False))


def is_categorical(frames: SweepFrames, parameter: str) -> bool:
    """Whether the parameter was searched as a choice, or holds something else than numbers."""
    distribution = distribution_of(frames, parameter)
    if distribution is not None:
        return hasattr(distribution, "choices")
    column = frames.trials[f"param.{parameter}"]
    return bool(column.dtype == "boolean") or not pd.api.types.is_numeric_dtype(column)


def distribution_of(frames: SweepFrames, parameter: str) -> BaseDistribution | None:
    """Optuna's distribution of a parameter, the widest of several ranges; None: unknown."""
    from optuna.distributions import json_to_distribution

    text = frames.info["distributions"].get(parameter)
    return None if text is None else json_to_distribution(text)


def _levels(settings: Sequence[object]) -> list[str]:
    """Each level once: numbers by size, then everything else by name."""
    numbers = {v for v in settings if isinstance(v, int | float) and not isinstance(v, bool)}
    others = {_text(v) for v in settings if isinstance(v, bool) or not isinstance(v, int | float)}
    return [*map(_text, sorted(numbers)), *sorted(others)]


def _text(value: object) -> str:
    return "" if value is None or value is pd.NA else str(value)
