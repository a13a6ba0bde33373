"""Fewer points for figures of thousands of trials: seeded samples, and steps at their changes.

What is left out is left out of the drawing alone; whoever draws says so in the caption.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

SEED = 0
MAX_DOTS = 2_000
MAX_CURVES = 200
MAX_CURVE_POINTS = 60


def sample(items: Sequence[int], most: int, seed: int = SEED) -> list[int]:
    """At most this many of the items, drawn without replacement, in their own order."""
    if len(items) <= most:
        return list(items)
    kept = random.Random(seed).sample(range(len(items)), most)
    return [items[index] for index in sorted(kept)]


def shares(sizes: Mapping[str, int], most: int) -> dict[str, int]:
    """How many of each group to draw, `most` in all: equal shares, what one leaves to the others.

    So that the few of a rare group are drawn beside the thousands of another one.
    """
    left, found = most, {}
    waiting = sorted(sizes, key=lambda group: sizes[group])
    for place, group in enumerate(waiting):
        found[group] = min(sizes[group], left // (len(waiting) - place))
        left -= found[group]
    return found


def thin_dots(rows: pd.DataFrame, most: int = MAX_DOTS, seed: int = SEED) -> pd.DataFrame:
    """A seeded sample of the rows, in their order; all of them where they are few enough."""
    if len(rows) <= most:
        return rows
    return rows.sample(n=most, random_state=seed).sort_index()


def changes(x: pd.Series[Any], y: pd.Series[Any]) -> pd.DataFrame:
    """`x` and `y` of a step line where it changes, and its last point."""
    line = pd.DataFrame({"x": x, "y": y}).dropna()
    if line.empty:
        return line
    kept = line["y"].ne(line["y"].shift())
    kept.iloc[-1] = True
    return line[kept]


def thin_curve(rows: pd.DataFrame, most: int = MAX_CURVE_POINTS) -> pd.DataFrame:
    """Evenly chosen rows of one curve with its first and its last one."""
    if len(rows) <= most:
        return rows
    places = sorted({round(i * (len(rows) - 1) / (most - 1)) for i in range(most)})
    return rows.iloc[places]
