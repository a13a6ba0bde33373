"""Frames -> the report's section on early stopping: what it saved, what it cost, how sure that is.

Left out: an estimate of the objective that stopping lost beyond what the audit saw. A regression
of the end on the value at the rung, with its residuals drawn again for the stopped trials, was
tried on synthetic sweeps: where ends are skewed it tells of losses several times too large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.audit import (
    Outcomes,
    Regret,
    WronglyStopped,
    observed_regret,
    outcomes_of,
    wrongly_stopped,
)
from analysis.load import SweepFrames, SweepInfo
from analysis.next_steps import UNSTOPPED_SAMPLERS, early_stopping_options
from analysis.page import Figures
from analysis.rungs import (
    MOST_RUNGS,
    MOST_TRIALS,
    MarkCorrelation,
    mark_correlations,
    rung_correlations,
    tells_from,
)
from analysis.stopping import Saving, rung_table, saving
from analysis.stopping_plots import MOST_POINTS, correlation_figure, end_figure, rung_figure
from analysis.words import format_count, format_duration, format_value

MOST_END_FIGURES = 3
LEAST_ENDS = 3
"""Trials with a known end that a figure of ends takes."""
AGREE = 0.75
"""Share of pairs in the order of the end, from which on a mark is said to tell it."""
FEW_AUDITED = 20


def stopping_section(
    frames: SweepFrames,
    figures: Figures,
    prefix: str,
    advice: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the template says of early stopping; its figures are added to `figures`.

    `advice`: as `search.advice.advise` returns it.
    """
    outcomes, saved = outcomes_of(frames), saving(frames)
    rungs = rung_table(frames)
    tops = [found for top in _tops(outcomes) if (found := wrongly_stopped(outcomes, top))]
    regret = observed_regret(frames, outcomes)
    marks = mark_correlations(outcomes)
    stopping = bool(len(rungs) or saved["stopped"])
    return {
        "ran": stopping,
        "lead": [
            " ".join(sentences)
            for sentences in (
                _saved(frames, saved, stopping),
                _cost(outcomes, saved, tops, regret) if stopping else [],
                _order(frames, marks),
            )
            if sentences
        ],
        "saving": saved,
        "rungs": rungs.to_dict("records"),
        "rung_figure": _rung_figure(frames, figures, prefix) if len(frames.decisions) else None,
        "wrongly": tops,
        "correlations": [
            _correlation_row(each)
            for each in rung_correlations(outcomes, [int(rung) for rung in rungs["rung"]])
            if each.passed or each.all
        ],
        "thinned": len(rungs) > MOST_RUNGS,
        "correlation_figure": _correlation_figure(frames, figures, prefix, marks),
        "end_figures": _end_figures(frames, outcomes, rungs, figures, prefix),
        "advice": None if advice is None else advice_of(advice, frames.info),
    }


def _tops(outcomes: Outcomes) -> list[int]:
    """The best; where there are enough that ran through, the best three and the top tenth, too."""
    counts = np.bincount(outcomes.stratum_N[outcomes.ran_through])
    least = int(counts[counts > 0].min()) if counts.any() else 0
    tenth = math.ceil(least / 10)
    return [1, *([3] if least >= 6 else []), *([tenth] if tenth > 3 else [])]


def _saved(frames: SweepFrames, saved: Saving, stopping: bool) -> list[str]:
    if not stopping:
        return ["This sweep ran without early stopping."]
    if not saved["stopped"]:
        return ["No trial was stopped early so far, so nothing was saved."]
    slots, total = frames.info["slots"], len(frames.trials)
    time = f", which is {format_duration(saved['slot_s'])} of one slot" if saved["slot_s"] else ""
    if time and saved["wall_s"] is not None and slots and slots > 1:
        time += f" or {format_duration(saved['wall_s'])} on all {slots}"
    return [
        f"Stopping {saved['stopped']} of {total} trials early saved {saved['fraction']:.0%} of the "
        f"images{time}."
    ]


def _cost(
    outcomes: Outcomes, saved: Saving, tops: Sequence[WronglyStopped], regret: Regret | None
) -> list[str]:
    """What the audit says that this cost."""
    if not saved["audited"]:
        return (
            [
                "Whether one of the stopped trials would have won cannot be told: none of them was "
                "let run on. A sweep with --audit 0.1 can tell."
            ]
            if saved["stopped"]
            else []
        )
    if not tops or tops[0]["top"] != 1:
        return [
            f"{_trials(saved['audited'])} that would have been stopped ran on as an audit, but "
            "none can be compared with a trial that was not stopped, to the end."
        ]
    first = tops[0]
    strata = len(np.unique(outcomes.stratum_N)) > 1
    rest = " of its stratum" if strata else ""
    every = first["audited"] == first["stopped"]
    lines = [
        f"Of {_trials(first['stopped'])} that were to be stopped, {first['audited']} ran on to "
        f"show what that costs; {first['above'] or 'none'} of them ended above every trial{rest} "
        "that was not to be stopped."
    ]
    if not every:
        lines.append(
            f"So {_between(first)} of the {first['stopped']} would have ended above all of those "
            "(95 % interval)."
        )
    if regret is not None:
        where = " of its stratum" if strata else ""
        gap = f"{abs(regret['better']):.4f}"
        how = f"{gap} better than" if regret["better"] > 0 else f"{gap} short of"
        how = "equal to" if regret["better"] == 0 else how
        lines.append(
            f"The best of them{', against its own stratum' if strata else ''}, trial "
            f"{regret['number']}, ended {how} the best of the others{where}, trial "
            f"{regret['other']}."
        )
    if not every and first["audited"] < FEW_AUDITED:
        lines.append("An audit of more trials would narrow this down.")
    return lines


def _between(found: WronglyStopped) -> str:
    low, high = found["low"], found["high"]
    if high == 0:
        return "none"
    return str(low) if low == high else f"between {low} and {high}"


def _trials(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"


def _order(frames: SweepFrames, marks: Sequence[MarkCorrelation]) -> list[str]:
    """From when on the order of the trials is that of the end."""
    if not any(each.all for each in marks):
        return []
    first = tells_from(marks, AGREE)
    if first is None or first.all is None:
        return [
            "At no mark before the end can these trials show that three of four pairs stand in the "
            "order in which they end."
        ]
    epochs = first.early / frames.info["train_images"]
    share = first.early / frames.info["total_images"]
    return [
        f"From {format_count(first.early)} images on ({epochs:.3g} epochs, {share:.0%} of a trial) "
        "at least three of four pairs of trials stand in the order in which they end (95 % "
        f"confidence at each mark); at that mark the estimate is {100 * first.all.agree:.0f} of "
        "100 pairs."
    ]


def _correlation_row(each: MarkCorrelation) -> dict[str, Any]:
    """Both correlations as plain values, None where there is none."""

    def told(tau: Any) -> dict[str, Any] | None:
        if tau is None:
            return None
        return {"tau": tau.tau, "low": tau.low, "high": tau.high, "n": tau.n, "agree": tau.agree}

    return {
        "early": each.early,
        "late": each.late,
        "stopped": each.stopped,
        "sampled": each.all.sampled if each.all else each.sample,
        "passed": told(each.passed),
        "all": told(each.all),
    }


def _rung_figure(frames: SweepFrames, figures: Figures, prefix: str) -> dict[str, Any]:
    info = frames.info
    rule = ""
    if info["reduction"] and info["scheduler"] == "asha":
        rule = f" Reduction factor {format_value(info['reduction'])}."
    caption = f"Decisions at each rung; n = {len(frames.decisions)} decisions.{rule}"
    return figures.add(f"{prefix}-stopping-rungs", rung_figure(frames), caption)


def _correlation_figure(
    frames: SweepFrames, figures: Figures, prefix: str, marks: Sequence[MarkCorrelation]
) -> dict[str, Any] | None:
    known = [each.all for each in marks if each.all]
    shown = known or [each.passed for each in marks if each.passed]
    if len(shown) < 2:
        return None
    n = max(tau.n for tau in shown)
    drawn = " (drawn at random of more)" if n >= MOST_TRIALS else ""
    caption = (
        "Kendall's tau between the objective at a mark and at the full resource: 1 is the same "
        "order, 0 none. The band is a 95 % interval for one mark at a time, over trials such as "
        f"these; n = {n} trials{drawn}."
    )
    if known and known[-1].sampled:
        caption += (
            f" All trials: {known[-1].sampled} audited ones stand for the "
            f"{marks[-1].stopped} that were to be stopped."
        )
    elif not known:
        caption += (
            " Only of trials that passed every rung, which have been chosen by these very values: "
            "of all trials it may be quite different."
        )
    return figures.add(f"{prefix}-stopping-order", correlation_figure(frames, marks), caption)


def _end_figures(
    frames: SweepFrames, outcomes: Outcomes, table: pd.DataFrame, figures: Figures, prefix: str
) -> list[dict[str, Any]]:
    """The rungs at which most trials were audited, in their order; without an audit the first."""
    at = outcomes.stopped_at_N[outcomes.audited_N & np.isfinite(outcomes.end_N)]
    rungs = [int(rung) for rung in table["rung"]]
    audited = {rung: int((at == rung).sum()) for rung in rungs}
    chosen = sorted(rungs, key=lambda rung: -audited[rung])[:MOST_END_FIGURES]
    chosen = sorted(rung for rung in chosen if audited[rung] or rung == rungs[0])
    lone = frames.trials["stratum"].nunique() == 1 and frames.trials["bracket"].nunique() <= 1
    cutoffs = table.set_index("rung")["cutoff"].dropna().to_dict() if lone else {}
    found = []
    for rung in chosen:
        ended = np.isfinite(outcomes.scores_at(rung)) & np.isfinite(outcomes.end_N)
        if int(ended.sum()) < LEAST_ENDS:
            continue
        cutoff = cutoffs.get(rung)
        caption = f"A dot is a trial; n = {int(ended.sum())} whose end is known"
        caption += f", {audited[rung]} of them audited at this rung." if audited[rung] else "."
        caption += (
            " Dotted: the cut-off at the last decision, which moves." if cutoff is not None else ""
        )
        if outcomes.best_kept is not None:
            beyond = "above" if frames.info["mode"] == "max" else "below"
            caption += (
                f" Green: the best trial that was not stopped. Audited {beyond} the green line: a "
                "winner that stopping would have cost."
            )
        if int(ended.sum()) > MOST_POINTS:
            caption += f" At most {MOST_POINTS} of a kind are drawn."
        figure = end_figure(frames, outcomes, rung, cutoff)
        found.append(figures.add(f"{prefix}-stopping-ends-{rung}", figure, caption))
    return found


def advice_of(advice: Mapping[str, Any], info: SweepInfo) -> dict[str, Any]:
    """Advice on grace and reduction in words, beside its rows.

    `command` is what to add to the sweep's own options, or None.
    """
    rows, at = advice["settings"], advice["recommended"]
    told = [_advice_row(row, advice["train_images"]) for row in rows]
    notes = _notes(advice) if rows else []
    reason = advice["reason"]
    if at is not None and info["also"]:
        at, reason = None, "early stopping judges by one objective, and several were searched"
    if at is None:
        sentence = f"No advice on grace and reduction: {reason}."
        return {"rows": told, "command": None, "sentence": sentence, "notes": notes}
    row = rows[at]
    told[at]["recommended"] = True
    settings = [f"--grace {row['grace']:g}", f"--reduction {row['reduction']}"]
    command = " ".join([*early_stopping_options(info), *settings])
    kept = round(row["survival"] * row["shuffles"])
    sentence = (
        f"{'Keep these settings' if row['current'] else 'Next time'}: on the trials of this sweep, "
        f"{row['saving']:.0%} of the images are saved, and the best trial is kept in {kept} of "
        f"{row['shuffles']} random orders of arrival."
    )
    if info["sampler"] in UNSTOPPED_SAMPLERS:
        sentence += f" It takes another sampler: {info['sampler']} learns from whole trials alone."
    return {"rows": told, "command": command, "sentence": sentence, "notes": notes}


def _advice_row(row: Mapping[str, Any], train_images: int) -> dict[str, Any]:
    return {
        "grace": f"{row['grace']:g}{'*' if row['moved'] else ''}",
        "reduction": row["reduction"],
        "rungs": ", ".join(f"{rung / train_images:.3g}" for rung in row["rungs"]),
        "saving": f"{row['saving']:.0%}",
        "survival": f"{row['survival']:.0%}",
        "survival_range": f"{row['survival_low']:.0%} to {row['survival_high']:.0%}",
        "regret": "–" if row["regret"] is None else f"{row['regret']:.4f}",
        "unknown": f"{row['unknown']:.0%}",
        "current": row["current"],
        "recommended": False,
    }


def _notes(advice: Mapping[str, Any]) -> list[str]:
    """What the advice rests on, and its limits."""
    notes = [
        f"Replayed on the recorded curves of {advice['trials']} trials, {advice['ends']} of them "
        f"known to the end, in {advice['shuffles']} random orders of arrival. It tells of these "
        "trials; another setting would have led the sampler to others.",
        "Recommended is the setting that saves most of those that keep the best trial in at least "
        f"90 % of the orders and lose no more than {format_value(advice['allowed'])} on average, "
        f"{advice['allowed_by']}.",
    ]
    if advice["hidden"]:
        notes.append(
            f"{_trials(advice['hidden'])} were stopped or cut off when they were recorded. Unknown "
            "are runs that would have gone on beyond that; they are charged in full. The best "
            "trial known is one that stopping let through, so that its chances look better than "
            "they are."
        )
    if any(row["moved"] for row in advice["settings"]):
        notes.append("* A rung moved up to the next recorded report.")
    return notes
