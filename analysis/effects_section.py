"""Frames -> the report's section on effects: what mattered, how, and where trials failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.effect_plots import (
    BEST_POINTS,
    MAX_POINTS,
    importance_figure,
    parameter_figure,
    parameter_trend,
)
from analysis.effects import (
    MIN_COMPLETED,
    Comparable,
    Importance,
    comparable,
    importance,
    settings_of,
)
from analysis.failure_regions import (
    KINDS,
    LEVEL,
    MIN_FAILURES,
    Association,
    associations,
    failure_figure,
    kinds_of,
    p_words,
    strongest,
)
from analysis.heat_maps import MAX_DOTS, heat_map_figure, pairs, tiles
from analysis.load import UNFINISHED, SweepFrames
from analysis.page import Figures
from analysis.parallel import MAX_LINES, best_trials, parallel_figure
from analysis.resources import MEMORY, SPEED, usage, usage_figure
from analysis.scales import scale_of
from analysis.slices import MAX_TRIALS as MAX_TREND_TRIALS
from analysis.style import group_of, outside
from analysis.words import format_count

MAX_SHOWN = 6
"""Parameters whose figures are shown at once; the others are unfolded."""
MAX_FAILURE_FIGURES = 4
NAMES = {"fanova": "fANOVA", "ped_anova": "PED-ANOVA"}


def effects_section(frames: SweepFrames, figures: Figures, prefix: str) -> dict[str, Any]:
    """What the template says of effects; its figures are added to `figures`."""
    results = [importance(frames, name) for name in NAMES]
    names = by_importance(frames, results)
    compared = comparable(frames)
    slices = _slices(frames, figures, prefix, names, compared)
    return {
        "parameters": names,
        "groups": {group_of(str(ending)) for ending in frames.trials["ending"]},
        "importance": _importance(frames, figures, prefix, results),
        "slices": slices[:MAX_SHOWN],
        "more_slices": slices[MAX_SHOWN:],
        "compared": _compared(frames, compared),
        "pairs": _pairs(frames, figures, prefix, names, compared),
        "parallel": _parallel(frames, figures, prefix, names, compared),
        "failures": _failures(frames, figures, prefix),
        "resources": _resources(frames, figures, prefix),
    }


def by_importance(frames: SweepFrames, results: Sequence[Importance]) -> list[str]:
    """The searched parameters, the most important first, by the first measure that has shares."""
    shares = next((result.shares for result in results if result.shares), {})
    order = {name: rank for rank, name in enumerate(shares or {})}
    return sorted(frames.parameters, key=lambda name: (order.get(name, len(order)), name))


def _importance(
    frames: SweepFrames, figures: Figures, prefix: str, results: Sequence[Importance]
) -> dict[str, Any]:
    told = [result for result in results if result.shares]
    if not told:
        return {"figure": None, "reason": results[0].reason, "sentences": []}
    base = told[0]
    stable = [(result, result.stability) for result in told if result.stability is not None]
    if base.mark < frames.info["total_images"]:
        where = (
            f"Values compared at {format_count(base.mark)} images, the furthest that every ended "
            "trial reached, so that early stopping does not bias the shares; an early mark "
            "favours what learns fast."
        )
    else:
        where = "Values compared at the full resource."
    samples = " and ".join(
        f"{stability.resamples} ({NAMES[result.evaluator]})" for result, stability in stable
    )
    spread = (
        f" Bars: the median share over bootstrap samples of the trials, {samples} of them; "
        "whiskers: 5 to 95 % of the samples. Dashed, in the measure's colour: what a parameter "
        "without effect stays below in 95 % of the samples."
        if stable
        else ""
    )
    drawn = f", {base.drawn} of them drawn at random" if base.drawn < base.n else ""
    left = "".join(
        f" {NAMES[result.evaluator]} leaves out {', '.join(result.left_out)}: not every trial has "
        f"{'it' if len(result.left_out) == 1 else 'them'}, or only one value was searched."
        for result in told
        if result.left_out
    )
    caption = f"{where}{spread} n = {base.n:,} trials{drawn}.{left}"
    return {
        "figure": figures.add(f"{prefix}-importance", importance_figure(results), caption),
        "reason": "",
        "sentences": _stability_sentences(told),
    }


def _stability_sentences(results: Sequence[Importance]) -> list[str]:
    """Which parameter comes first how often, and which cannot be told from none."""
    first: dict[str, list[str]] = {}
    for result in results:
        if (stability := result.stability) is not None:
            often = f"in {stability.first_count} of {stability.resamples}"
            first.setdefault(stability.first, []).append(f"{often} by {NAMES[result.evaluator]}")
    if not first:
        return []
    told = [f"{name} came first {' and '.join(often)}" for name, often in first.items()]
    below: dict[str, bool] = {}
    for result in results:
        if result.stability is not None:
            for name, (_, middle, _) in result.stability.intervals.items():
                low = middle <= result.stability.floor
                below[name] = below.get(name, True) and low
    sentences = [f"In bootstrap samples of the trials, {'; '.join(told)}."]
    weak = sorted(name for name, low in below.items() if low)
    if weak:
        sentences.append(
            f"These trials cannot tell {', '.join(weak)} from a parameter without effect; that "
            "does not prove that there is none."
        )
    return sentences


def _slices(
    frames: SweepFrames,
    figures: Figures,
    prefix: str,
    names: Sequence[str],
    compared: Comparable,
) -> list[dict[str, Any]]:
    """One figure a parameter that a trial with a value has, in the order of the names."""
    found = []
    for index, name in enumerate(names):
        table = settings_of(frames, name)
        if table.empty:
            continue
        caption = f"n = {len(table):,} trials"
        if len(table) > MAX_POINTS:
            caption += f", {MAX_POINTS} of them drawn: the best {BEST_POINTS}, others at random"
        caption += f".{outside(frames, table['objective'])}"
        trend = parameter_trend(frames, scale_of(frames, name), compared)
        if trend is None:
            caption += " Too few comparable trials for a trend."
        elif trend.is_curve:
            caption += f" Trend of {trend.n} trials, band: its 95 % interval at each setting."
        else:
            caption += f" Dashes: means of {trend.n} trials with 95 % intervals."
        figure = parameter_figure(frames, name, trend)
        found.append(figures.add(f"{prefix}-param-{index}", figure, caption))
    return found


def _compared(frames: SweepFrames, compared: Comparable) -> str:
    """A sentence on the values that trends, tiles and lines are made of."""
    if compared.values.empty:
        return ""
    stopped = bool((frames.trials["ending"] == "pruned").any())
    many = (
        f" A trend is made of {MAX_TREND_TRIALS} of them, drawn at random."
        if len(compared.values) > MAX_TREND_TRIALS
        else ""
    )
    if compared.completed:
        chosen = ", which early stopping has chosen" if stopped else ""
        return (
            f"Trends, pairs and lines compare the last values of {compared.words()}{chosen}.{many}"
        )
    few = f"fewer than {MIN_COMPLETED} completed"
    return f"Trends, pairs and lines compare {compared.words()}: {few}.{many}"


def _pairs(
    frames: SweepFrames,
    figures: Figures,
    prefix: str,
    names: Sequence[str],
    compared: Comparable,
) -> list[dict[str, Any]]:
    items = []
    for index, pair in enumerate(pairs(frames, names)):
        found = tiles(frames, pair, compared)
        if found is None:
            continue
        n = len(found.values)
        caption = (
            f"Colour: mean {frames.info['objective']} of the trials in a tile, yellow is best; "
            f"empty: none was tried. Rings: trials. n = {n:,}"
            f"{f', {MAX_DOTS} of them drawn' if n > MAX_DOTS else ''}; a tile of one trial is "
            "that trial's value, with all its chance."
        )
        items.append(figures.add(f"{prefix}-pair-{index}", heat_map_figure(frames, found), caption))
    return items


def _parallel(
    frames: SweepFrames,
    figures: Figures,
    prefix: str,
    names: Sequence[str],
    compared: Comparable,
) -> dict[str, Any] | None:
    drawn = best_trials(frames, compared)
    figure = parallel_figure(frames, names, drawn)
    if figure is None:
        return None
    all_of = len(compared.values)
    which = f"the best {MAX_LINES} of {all_of:,}" if all_of > MAX_LINES else f"all {all_of}"
    log = " Axes are logarithmic where the parameter was searched so."
    caption = f"One line a trial, {which} comparable ones; thick and yellow is best.{log}"
    return figures.add(f"{prefix}-parallel", figure, caption)


def _failures(frames: SweepFrames, figures: Figures, prefix: str) -> dict[str, Any]:
    """The strongest association in a sentence, and rates by parameter where there are enough."""
    counts = kinds_of(frames)
    told = ", ".join(f"{count} {KINDS[kind]}" for kind, count in counts.items())
    kinds = [kind for kind, count in counts.items() if count >= MIN_FAILURES]
    if not kinds:
        few = f"{told}: too few to ask where." if counts else ""
        return {"sentence": few, "figures": [], "more": []}
    found = associations(frames)
    best = strongest(found)
    n = len(frames.trials)
    sentence = f"Of {format_count(n)} trials {told}. "
    if best is not None:
        sentence += (
            f"{best.sentence()} The region was chosen on these trials: elsewhere it tells apart "
            "less well."
        )
    elif found:
        sentence += (
            "No searched parameter tells where: the smallest p of "
            f"{found[0].tests} tests is {found[0].p:.2g}, corrected for their number."
        )
    else:
        sentence += "Nothing can be set against them."
    items = _failure_figures(frames, figures, prefix, kinds, found)
    shown = max(1, min(MAX_FAILURE_FIGURES, len({f.parameter for f in found if f.p < LEVEL})))
    return {"sentence": sentence, "figures": items[:shown], "more": items[shown:]}


def _failure_figures(
    frames: SweepFrames,
    figures: Figures,
    prefix: str,
    kinds: list[str],
    found: Sequence[Association],
) -> list[dict[str, Any]]:
    """One figure a tested parameter, the smallest p first."""
    least: dict[str, float] = {}
    for item in found:
        least.setdefault(item.parameter, item.p)
    items = []
    for index, (name, p) in enumerate(least.items()):
        figure = failure_figure(frames, name, kinds)
        if figure is not None:
            ended = frames.trials["state"] != UNFINISHED
            n = int((ended & frames.trials[f"param.{name}"].notna()).sum())
            caption = (
                f"Share of trials that failed, with Wilson's 95 % intervals; n = {n:,} ended "
                "trials, but for each kind of failure without those that failed in another way. "
                f"{p_words(p)} after correction."
            )
            items.append(figures.add(f"{prefix}-failed-{index}", figure, caption))
    return items


def _resources(frames: SweepFrames, figures: Figures, prefix: str) -> dict[str, Any]:
    """Speed and memory: figures where the batch size or the encoder varies, else sentences."""
    items, sentences = [], []
    slots = frames.info["slots"] or 1
    shared = (
        f" {slots} trials ran at once and shared the cores of their machine: alone, each is faster."
        if slots > 1
        else ""
    )
    for metric in (SPEED, MEMORY):
        found = usage(frames, metric)
        if found is None:
            continue
        if len(found.batch_sizes) < 2 and len(found.encoders) < 2:
            sentences.append(found.sentence() + (shared if metric == SPEED else ""))
            continue
        more = (
            f"The last report of each trial.{shared}"
            if metric == SPEED
            else "On a GPU the most that the trial had allocated; on a CPU the most that its "
            "worker had ever taken, earlier trials included."
        )
        n = f"n = {len(found.table):,} trials"
        caption = f"Dots: trials; dashes: medians. {n}.{found.drawn()} {more}"
        items.append(figures.add(f"{prefix}-{metric}", usage_figure(found), caption))
    return {"figures": items, "sentences": sentences}
