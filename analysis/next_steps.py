"""Frames -> what to try next: rules that the record of a sweep supports, each with its reason.

A rule that the record cannot decide says nothing, so a short sweep gets little advice. Every rule
asks for more than chance would show: a small gain over a few trials is no ground for a new sweep.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd
from scipy.stats import binom, hypergeom, mannwhitneyu, spearmanr

from analysis.confirmation_verdict import capitalised
from analysis.load import FAILED_STATES, SweepFrames, SweepInfo
from analysis.summary import Sureness, can_confirm, joined
from analysis.words import ENDING_LABELS, format_count, format_value

MOST = 4
OUTER = 0.1
"""The part of a range that counts as its end."""
LEAST_COMPLETED = 10
LEAST_FOR_ORDER = 20
LEAST_FAILED = 3
UNSTOPPED_SAMPLERS = ("gp", "nsga2")
"""Samplers that learn from whole trials alone, so that no scheduler goes with them."""
LEVEL = 0.05
"""Chance of a false advice on ranges, and on where trials fail, in the whole sweep."""


class Step(TypedDict):
    """One thing to try."""

    action: str
    command: NotRequired[str]  # what is typed for it
    reason: str
    weight: float  # what weighs more stands first


def next_steps(
    frames: SweepFrames,
    sure: Sureness,
    most: int = MOST,
    *,
    confirmed: Mapping[str, Any] | None = None,
) -> list[Step]:
    """At most so many steps, the weightiest first; empty where the record cannot tell.

    `confirmed` is the head of the newest confirmation (`analysis.confirmation_section`).
    """
    rules = (_failures, _ranges, _audit, _length, _more_trials, _early_stopping)
    found = [step for rule in rules for step in rule(frames, sure)]
    found += _confirm(frames, sure, confirmed)
    return sorted(found, key=lambda step: -step["weight"])[:most]


def _failures(frames: SweepFrames, sure: Sureness) -> Iterator[Step]:
    """More than a tenth of the trials that ended have failed."""
    trials = frames.trials
    ended = trials[trials["state"] != "unfinished"]
    failed = ended["state"].isin(FAILED_STATES)
    n = int(failed.sum())
    if n <= len(ended) / 10 or (n < LEAST_FAILED and n < len(ended)):
        return
    counts = ended.loc[failed, "state"].value_counts()
    how = joined([f"{count:,} {ENDING_LABELS.get(str(s), str(s))}" for s, count in counts.items()])
    where = _where_they_fail(frames, ended, failed)
    yield Step(
        action="Mend what makes trials fail, or keep the space out of there.",
        reason=f"{n:,} of {len(ended):,} ended trials failed ({how})"
        + (f": {where}." if where else "; no searched parameter tells where."),
        weight=100.0 if n == len(ended) else 70.0,
    )


def _where_they_fail(frames: SweepFrames, ended: pd.DataFrame, failed: pd.Series[Any]) -> str:
    """The level or the third of a range with the most failures, if chance would not show it."""
    groups: list[tuple[str, pd.Series[Any]]] = []
    for name in frames.parameters:
        column = ended[f"param.{name}"]
        numeric = pd.api.types.is_numeric_dtype(column) and column.dtype != "boolean"
        if numeric and column.nunique() > 5:
            values = column.astype("float64")
            low, high = values.quantile(1 / 3), values.quantile(2 / 3)
            groups += [(f"{name} at or below {format_value(low)}", values <= low)]
            groups += [(f"{name} at or above {format_value(high)}", values >= high)]
        else:
            text = column.astype("object").map(str).where(column.notna())
            groups += [
                (f"{name} {level}", text == level) for level in sorted(text.dropna().unique())
            ]
    n, total, best = int(failed.sum()), len(ended), (LEVEL, "")
    for label, inside in groups:
        size, hits = int(inside.sum()), int((inside & failed).sum())
        if 0 < size < total and hits * (total - size) >= 2 * (n - hits) * size:
            chance = len(groups) * float(hypergeom.sf(hits - 1, total, n, size))
            told = f"{hits} of the {size} with {label}, {n - hits} of the {total - size} others"
            best = min(best, (chance, told))
    return best[1]


def _ranges(frames: SweepFrames, sure: Sureness) -> Iterator[Step]:
    """A parameter whose best trials crowd at an end of its searched range."""
    trials = frames.trials[~frames.trials["is_default"].astype(bool)]
    done = trials[(trials["state"] == "completed") & np.isfinite(trials["objective"])]
    ranked = done.sort_values("objective", ascending=frames.info["mode"] == "min")
    for name in frames.parameters:
        bounds = _bounds(frames.info["distributions"].get(name))
        if bounds is None or name in frames.info.get("several_ranges", ()):
            continue  # in a range that is not every trial's, an end says nothing
        low, high, log, chance = bounds
        settings = pd.to_numeric(ranked[f"param.{name}"], errors="coerce")
        drawn = ranked[settings.between(low, high)]
        if len(drawn) < LEAST_COMPLETED:
            continue
        top = drawn.head(max(5, math.ceil(len(drawn) / 10)))
        place = _places(top[f"param.{name}"], low, high, log)
        every = _places(drawn[f"param.{name}"], low, high, log)
        for up, inside, all_inside in (
            (True, place >= 1 - OUTER, every >= 1 - OUTER),
            (False, place <= OUTER, every <= OUTER),
        ):
            middle = float(np.median(place))
            crowded = middle >= 1 - OUTER if up else middle <= OUTER
            n = int(inside.sum())
            # were the place without effect, so many there would be rare in any of the parameters
            # (a sampler that learns draws more there to begin with)
            share = max(chance, float(all_inside.mean()))
            rare = binom.sf(n - 1, len(top), share) * 2 * len(frames.parameters) < LEVEL
            if crowded and rare:
                where = "top" if up else "bottom"
                yield Step(
                    action=f"Widen the range of {name} {'upwards' if up else 'downwards'}.",
                    reason=f"{n} of the best {len(top)} trials lie in the {where} tenth of "
                    f"{format_value(low)} to {format_value(high)}"
                    + (" (on its logarithmic scale)." if log else "."),
                    weight=80.0 + n / len(top),
                )


def _places(values: pd.Series[Any], low: float, high: float, log: bool) -> Any:
    """Where values lie in their searched range, from 0 to 1."""
    found = values.astype("float64").to_numpy()
    return np.log(found / low) / math.log(high / low) if log else (found - low) / (high - low)


def _bounds(text: str | None) -> tuple[float, float, bool, float] | None:
    """Low, high, whether log, and the chance of an end by nothing; None for a choice."""
    attributes: Mapping[str, Any] = json.loads(text)["attributes"] if text else {}
    low, high, step = attributes.get("low"), attributes.get("high"), attributes.get("step")
    if low is None or high is None or not low < high:
        return None
    log = bool(attributes.get("log")) and low > 0
    levels = (high - low) / step + 1 if step and not log else math.inf
    return float(low), float(high), log, max(OUTER, 1 / levels)


def _confirm(
    frames: SweepFrames, sure: Sureness, confirmed: Mapping[str, Any] | None
) -> Iterator[Step]:
    """The winner's value is the best of several noisy ones; a confirmed one can be used."""
    info, alike = frames.info, sure["alike"] or 0
    if not can_confirm(frames):
        return
    if confirmed is not None:
        # with one seed of the winner, nothing is confirmed, and the search's best is exported
        if confirmed["result"] != "worse" and confirmed["figure"]["n"] > 1:
            yield Step(
                action="Export the confirmed encoder.",
                command=command("export", info),
                reason=f"{capitalised(confirmed['candidate'])} has been trained with fresh seeds "
                "and tested.",
                weight=50.0,
            )
        return
    if info["state"] == "running" or sure["completed"] < 2:
        return
    top = min(alike + 1, 5) if alike >= 2 else min(3, sure["completed"])
    reason = (
        f"The winner's value is the best of {sure['completed']:,} noisy ones; fresh seeds and the "
        "test split tell what holds of it, with an interval, and whether it beats the default."
    )
    if alike >= 2:
        numbers = joined(sure["alike_numbers"][:top])
        reason = (
            f"{alike:,} other completed trials cannot be told apart from the winner; the best of "
            f"them all: trials {numbers}. Their values come from "
            f"{format_count(info['val_images'] or 0)} images. Fresh seeds tell more than more "
            "trials do."
        )
    yield Step(
        action=f"Confirm the best {top} with fresh seeds.",
        command=f"{command('confirm', info)} --top {top}",
        reason=reason,
        weight=85.0,
    )


def command(verb: str, info: SweepInfo) -> str:
    """What is typed to do something with this sweep."""
    runs = PurePath(info["config"].get("out") or "runs").name or "runs"
    return f"contrasweep {verb} {shlex.quote(f'{runs}/' + info['name'])}"


def _audit(frames: SweepFrames, sure: Sureness) -> Iterator[Step]:
    """The winner is a trial that would have been stopped."""
    if sure["audited"] is None:
        return
    yield Step(
        action="Let early stopping begin later, or stop fewer trials at a rung.",
        reason="The winner ran on as an audit: without it, it would have been stopped at "
        f"{format_count(sure['audited'])} images.",
        weight=90.0,
    )


def _length(frames: SweepFrames, sure: Sureness) -> Iterator[Step]:
    """The best trials still rose when they ended, apart from what a cool-down of the rate gives."""
    info, trials = frames.info, frames.trials
    done = trials[(trials["state"] == "completed") & np.isfinite(trials["objective"])]
    until, cooled = 1.0, False
    if {"schedule", "cooldown"} <= set(frames.fields.columns):
        fields = frames.fields[frames.fields.index.isin(done["number"])]
        if (fields["schedule"] == "cosine").any():
            return  # its rate falls all the way: a rise at the end says nothing of a longer run
        rest = pd.to_numeric(fields["cooldown"].where(fields["schedule"] == "wsd"), errors="coerce")
        cooled = bool((rest > 0).any())
        until = 1.0 - float(rest.max()) if cooled else 1.0
    curves = frames.curves
    ours = curves[(curves["metric"] == info["objective"]) & curves["number"].isin(done["number"])]
    table = ours.pivot_table(index="number", columns="mark", values="value", aggfunc="last")
    reported = sorted(int(mark) for mark in ours["mark"].unique())
    marks = [mark for mark in reported if mark <= until * info["total_images"]]
    if len(done) < 3 or len(marks) < 2:
        return
    last = marks[-1]
    early = [mark for mark in marks if mark <= 0.8 * last]
    if not early or last < 0.5 * info["total_images"]:
        return
    # The best by then: those that are best at the end are so by luck, too, which looks like a rise.
    then = table[early[-1]].sort_values(ascending=info["mode"] == "min")
    top = then.head(max(3, math.ceil(len(done) / 10))).index
    rise = (table[last] - table[early[-1]])[top].replace([np.inf, -np.inf], np.nan).dropna()
    rise = rise if info["mode"] == "max" else -rise
    error = sure["standard_error"]
    least = error / 2 if error is not None else 0.02 * abs(float(table[last][top].median()))
    if len(rise) >= 3 and rise.mean() > max(least, 2 * rise.std(ddof=1) / math.sqrt(len(rise))):
        yield Step(
            action="Train longer: give each trial more epochs.",
            reason=f"The best {len(rise)} completed trials at {format_count(early[-1])} images "
            f"still gained {rise.mean():.2g} on average up to {format_count(last)} images"
            + (", before the rate was cooled down." if cooled else "."),
            weight=65.0,
        )


def _more_trials(frames: SweepFrames, sure: Sureness) -> Iterator[Step]:
    """Whether the search still found better trials towards its end."""
    trials, mode = frames.trials, frames.info["mode"]
    done = trials[(trials["state"] == "completed") & np.isfinite(trials["objective"])]
    if frames.info["state"] == "running" or len(done) < LEAST_FOR_ORDER:
        return
    done = done.sort_values(["end", "number"], na_position="last")
    values = done["objective"].to_numpy() * (1.0 if mode == "max" else -1.0)
    place = int(np.argmax(values)) + 1
    noise = math.sqrt(2) * (sure["standard_error"] or 0.0)
    gained = values.max() - values[: 3 * len(values) // 4].max()
    if not noise:
        return
    before = 3 * len(values) // 4  # one record alone is no trend: a fourth of all fall in the rest
    late = mannwhitneyu(values[before:], values[:before], alternative="greater")
    if gained > noise and late.pvalue < LEVEL:
        yield Step(
            action="Run more trials of this kind.",
            reason=f"The best one ended as number {place} of {len(values):,} completed trials, "
            f"{gained:.2g} better than the best of the first three quarters: "
            "the search was still improving.",
            weight=68.0,
        )
    elif values.max() - values[: len(values) // 2].max() <= noise and (sure["alike"] or 0) < 2:
        yield Step(
            action="More trials of this kind are unlikely to help: change the space, or train "
            "longer.",
            reason=f"The best of the first {len(values) // 2} completed trials was, within noise, "
            f"as good as the best of all {len(values)}.",
            weight=40.0,
        )


def early_stopping_options(info: SweepInfo) -> list[str]:
    """What switches plain successive halving on in the command of such a sweep, if it was not."""
    options = []
    if info["sampler"] in UNSTOPPED_SAMPLERS:
        options.append("--sampler tpe")
    if info["scheduler"] != "asha":
        options.append("--scheduler asha")
    if info["config"].get("brackets", "1") != "1":
        options.append("--brackets 1")
    return options


def _early_stopping(frames: SweepFrames, sure: Sureness) -> Iterator[Step]:
    """No scheduler, and the order of the trials shows early."""
    info, trials = frames.info, frames.trials
    done = trials[(trials["state"] == "completed") & np.isfinite(trials["objective"])]
    if info["rungs"] or len(frames.decisions) or len(done) < LEAST_COMPLETED or info["also"]:
        return  # several objectives need a sampler that goes with no scheduler
    curves = frames.curves[frames.curves["metric"] == info["objective"]]
    early = curves[curves["mark"] <= info["total_images"] / 3]
    early = early[early["number"].isin(done["number"])]
    if early.empty:
        return
    mark = int(early["mark"].max())
    then = early[early["mark"] == mark].drop_duplicates("number", keep="last")
    both = done.set_index("number")["objective"].to_frame("end")
    both["then"] = then.set_index("number")["value"]
    both = both.replace([np.inf, -np.inf], np.nan).dropna()
    if len(both) < LEAST_COMPLETED or min(both["end"].nunique(), both["then"].nunique()) < 2:
        return
    order = spearmanr(both["then"], both["end"])
    if order.statistic >= 0.5 and order.pvalue < LEVEL:
        saved = 0.5 * (1 - mark / info["total_images"])
        yield Step(
            action=f"Switch early stopping on ({' '.join(early_stopping_options(info))}).",
            reason=f"The order of the trials at {format_count(mark)} images agreed with that at "
            f"the end (rank correlation {order.statistic:.2f}, n = {len(both)}); ending the worse "
            f"half there would have saved {saved:.0%} of the images.",
            weight=55.0,
        )
