"""Frames -> where trials failed: rates over each parameter, and the strongest association.

A kind of failure is set against the trials that ended otherwise but for the other failures,
which might still have come to it. Numbers are tested by Mann and Whitney's test, each level of
a choice against the rest by Fisher's exact one, all of them together corrected by Holm. Left
out: parameters that only together lead to failure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from scipy.stats import fisher_exact, mannwhitneyu
from scipy.stats import norm as normal

from analysis.load import FAILED_STATES, UNFINISHED, SweepFrames
from analysis.scales import Floats, Scale, scale_of
from analysis.style import BLUE, ORANGE, PURPLE, finish

KINDS = {"diverged": "diverged", "oom": "ran out of memory", "error": "ended with an error"}
"""Failures that a setting may cause; that a worker was lost is none of them."""
KIND_STYLE = {
    "diverged": (PURPLE, "triangle-up"),
    "oom": (ORANGE, "square"),
    "error": (BLUE, "x"),
}
MIN_FAILURES = 3
LEVEL = 0.05
BINS = 5


@dataclass(frozen=True)
class Association:
    """One parameter and one kind of failure; `p` after Holm's correction for `tests` tests.

    Of `failures` failures `inside_failures` lie in the region, of its `inside` trials; outside
    it are `outside` trials. `region` says it in words.
    """

    parameter: str
    kind: str
    p: float
    tests: int
    region: str
    failures: int
    inside_failures: int
    inside: int
    outside: int

    def sentence(self) -> str:
        """What was found, in one sentence."""
        told = KINDS[self.kind]
        if self.inside_failures == self.failures:
            who = f"All {self.failures} trials that {told} had"
        else:
            who = f"{self.inside_failures} of {self.failures} trials that {told} had"
        return (
            f"{who} {self.parameter} {self.region}: {self.inside_failures} of {self.inside} trials "
            f"there {told}, {self.failures - self.inside_failures} of {self.outside} elsewhere "
            f"({p_words(self.p)}, corrected for {self.tests} tests)."
        )


@dataclass(frozen=True)
class Rates:
    """Failures of one kind over one parameter: `failures` of `trials` in each bin.

    `low` and `high` are the ends of Wilson's interval of 95 %; NaN where no trial is.
    """

    kind: str
    texts: tuple[str, ...]
    places: Floats
    failures: Floats
    trials: Floats
    low: Floats
    high: Floats


def p_words(p: float) -> str:
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def kinds_of(frames: SweepFrames) -> dict[str, int]:
    """How often trials failed in each way that a setting may cause; only ways that occur."""
    states = frames.trials["state"].value_counts()
    return {kind: int(states[kind]) for kind in KINDS if kind in states}


def associations(frames: SweepFrames) -> list[Association]:
    """Every parameter and kind of failure that was tested, the smallest p first.

    Kinds with fewer than MIN_FAILURES failures, or as few other trials, are not tested.
    """
    found: list[Association] = []
    tests = 0
    for kind in kinds_of(frames):
        risk, failed = _at_risk(frames, kind)
        if failed.sum() < MIN_FAILURES or (~failed).sum() < MIN_FAILURES:
            continue
        for name in frames.parameters:
            scale = scale_of(frames, name)
            places = scale.places(risk[f"param.{name}"])
            has = np.isfinite(places)
            x, y = places[has], failed[has]
            if len(np.unique(x)) < 2 or y.sum() < MIN_FAILURES or (~y).sum() < MIN_FAILURES:
                continue
            test = _number if scale.levels is None else _choice
            count, p, inside, region = test(scale, x, y)
            tests += count
            found.append(
                Association(
                    parameter=name,
                    kind=kind,
                    p=p,
                    tests=count,
                    region=region,
                    failures=int(y.sum()),
                    inside_failures=int(y[inside].sum()),
                    inside=int(inside.sum()),
                    outside=int((~inside).sum()),
                )
            )
    return _holm(sorted(found, key=lambda item: item.p), tests)


def strongest(found: list[Association]) -> Association | None:
    """The association of the smallest p where that is below LEVEL, else None."""
    return found[0] if found and found[0].p < LEVEL else None


def rates(frames: SweepFrames, parameter: str, kind: str) -> Rates | None:
    """The failure rate of one kind over the bins of a parameter, None where no trial has it."""
    scale = scale_of(frames, parameter)
    risk, failed = _at_risk(frames, kind)
    places = scale.places(risk[f"param.{parameter}"])
    has = np.isfinite(places)
    if not has.any():
        return None
    edges = scale.edges(BINS)
    trials = np.histogram(places[has], edges)[0].astype(float)
    failures = np.histogram(places[has & failed], edges)[0].astype(float)
    low, high = wilson(failures, trials)
    centres = np.array(scale.stops) if scale.stops is not None else (edges[1:] + edges[:-1]) / 2
    texts = tuple(scale.bin_text(edges, index) for index in range(len(trials)))
    return Rates(kind, texts, centres, failures, trials, low, high)


def wilson(failures: Floats, trials: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Wilson's score interval of a rate (1927); NaN where there are no trials."""
    z2 = float(normal.ppf(0.5 + level / 2)) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = (failures + z2 / 2) / (trials + z2)
        spread = np.sqrt(failures * (trials - failures) / trials + z2 / 4) * np.sqrt(z2)
        half = spread / (trials + z2)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def failure_figure(frames: SweepFrames, parameter: str, kinds: list[str]) -> go.Figure | None:
    """Failure rates with their intervals over one parameter; None where no trial has it."""
    scale = scale_of(frames, parameter)
    figure = go.Figure()
    edges = scale.edges(BINS)
    width = float(np.diff(edges).min())
    for index, kind in enumerate(kinds):
        found = rates(frames, parameter, kind)
        if found is None:
            continue
        colour, symbol = KIND_STYLE[kind]
        shown = np.flatnonzero(found.trials > 0)
        rate = found.failures[shown] / found.trials[shown]
        figure.add_scatter(
            x=found.places[shown] + 0.16 * width * (index - (len(kinds) - 1) / 2),
            y=rate,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": np.maximum(0, found.high[shown] - rate),
                "arrayminus": np.maximum(0, rate - found.low[shown]),
                "color": colour,
                "thickness": 2,
                "width": 5,
            },
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 10},
            name=KINDS[kind],
            customdata=[
                (int(found.failures[i]), int(found.trials[i]), escape(found.texts[i]))
                for i in shown
            ],
            hovertemplate="%{customdata[2]}<br>%{customdata[0]} of %{customdata[1]} "
            + KINDS[kind]
            + "<extra></extra>",
        )
    if not figure.data:
        return None
    figure = finish(
        figure,
        title=f"Failures by {escape(parameter)}",
        x=scale.title,
        y="share of trials",
        y_range=[-0.03, 1.03],
        height=290,
    )
    figure.update_xaxes(**scale.ticks(), range=[float(edges[0]), float(edges[-1])])
    figure.update_yaxes(tickformat=".0%")
    return figure.update_layout(showlegend=len(kinds) > 1)


def _at_risk(frames: SweepFrames, kind: str) -> tuple[pd.DataFrame, NDArray[np.bool_]]:
    """The trials that ended in this failure or in none, and which of them failed."""
    states = frames.trials["state"]
    others = [state for state in FAILED_STATES if state != kind]
    risk = frames.trials[~states.isin([*others, UNFINISHED])]
    return risk, (risk["state"] == kind).to_numpy(dtype=bool)


def _number(
    scale: Scale, x: Floats, y: NDArray[np.bool_]
) -> tuple[int, float, NDArray[np.bool_], str]:
    """Tests made, p, who is inside the region, and its words; the cut tells rates best apart."""
    result = mannwhitneyu(x[y], x[~y], alternative="two-sided")
    larger = result.statistic > y.sum() * (~y).sum() / 2
    best, cut = -np.inf, float(x[y][0])
    for candidate in np.unique(x[y]):
        inside = x >= candidate if larger else x <= candidate
        apart = inside[y].mean() - inside[~y].mean()
        if apart > best:
            best, cut = apart, float(candidate)
    inside = x >= cut if larger else x <= cut
    words = f"{'at or above' if larger else 'at or below'} {scale.text(cut)}"
    return 1, float(result.pvalue), inside, words


def _choice(
    scale: Scale, x: Floats, y: NDArray[np.bool_]
) -> tuple[int, float, NDArray[np.bool_], str]:
    """The same for the level of the smallest p; every level is a test, two levels are one."""
    present = np.unique(x)
    least = (2.0, x == present[0], "")
    for place in present:
        inside = x == place
        table = [
            [int((inside & y).sum()), int((inside & ~y).sum())],
            [int((~inside & y).sum()), int((~inside & ~y).sum())],
        ]
        p = float(fisher_exact(table).pvalue)
        more = y[inside].mean() > y[~inside].mean()
        if p < least[0] or (p == least[0] and more):  # of two levels, that with the failures
            least = (p, inside, scale.text(place))
    return 1 if len(present) == 2 else len(present), *least


def _holm(found: list[Association], tests: int) -> list[Association]:
    """Holm's step-down correction (1979) of ordered p.

    A choice kept only its smallest p: an item's rank among all tests is at least its rank here,
    so that the correction errs on the safe side.
    """
    corrected, running = [], 0.0
    for index, item in enumerate(found):
        running = max(running, min(1.0, item.p * (tests - index)))
        corrected.append(replace(item, p=running, tests=tests))
    return corrected
