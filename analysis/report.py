"""Frames -> `index.html`, one self-contained page (`analysis.page`), and `leaderboard.csv`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.effect_plots import importance_figure, parameter_figure
from analysis.effects import Importance, importance
from analysis.load import BY_COMMAND, FAILED_STATES, SweepFrames, SweepInfo
from analysis.page import Figures, render, write_atomic
from analysis.pareto import pareto_figure, pareto_rows
from analysis.plots import best_so_far_figure, learning_curves
from analysis.stopping import rung_table, saving
from analysis.stopping_plots import rung_figure
from analysis.style import group_of, robust_range
from analysis.tables import (
    Gain,
    default_number,
    is_accuracy,
    leaderboard,
    leaderboard_rows,
    level_rows,
    standard_error,
    summarise,
    trial_params,
    trial_row,
    varying_parameters,
)
from analysis.words import ENDING_LABELS, format_count

MAX_ROWS = 100
"""Leaderboard rows on the page; the CSV holds all."""


def write_report(frames: SweepFrames | Sequence[SweepFrames], out_dir: Path) -> Path:
    """Write `index.html` and `leaderboard.csv` into `out_dir`; returns the page's path.

    Several sweeps share one page that begins with their comparison. Each file appears whole
    or not at all. ValueError for an empty list, and for sweeps of different objectives.
    """
    sweeps = [frames] if isinstance(frames, SweepFrames) else list(frames)
    if not sweeps:
        raise ValueError("a report needs at least one sweep, got none")
    _check_one_objective(sweeps)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(out_dir / "leaderboard.csv", leaderboard_csv(sweeps))
    page = out_dir / "index.html"
    write_atomic(page, render_page(sweeps))
    return page


def _check_one_objective(sweeps: Sequence[SweepFrames]) -> None:
    """Raise a one-line ValueError for sweeps whose values measure different things."""
    first = sweeps[0].info
    for frames in sweeps[1:]:
        if frames.info["objective"] != first["objective"]:
            had = " and ".join(
                f"{info['objective']!r} of sweep {info['name']!r}" for info in (first, frames.info)
            )
            raise ValueError(
                f"sweeps on one page must have one objective, got {had}: their values are not "
                "comparable; report each on a page of its own"
            )


def leaderboard_csv(sweeps: Sequence[SweepFrames]) -> str:
    """All leaderboards below one another, with seed, reason and MLflow's run id."""
    tables = []
    for frames in sweeps:
        more = frames.trials[["number", "seed", "reason", "run_id"]]
        table = leaderboard(frames).drop(columns="ending").merge(more, on="number", how="left")
        table.insert(0, "sweep", frames.info["name"])
        tables.append(table)
    text: str = pd.concat(tables, ignore_index=True).to_csv(index=False)
    return text


def render_page(sweeps: Sequence[SweepFrames]) -> str:
    """The page's HTML."""
    figures = Figures()
    sections = [_section(frames, f"s{index}", figures) for index, frames in enumerate(sweeps)]
    return render(
        "page.html.j2",
        figures,
        title=", ".join(frames.info["name"] for frames in sweeps),
        sections=sections,
        comparison=_comparison(sweeps, figures) if len(sweeps) > 1 else None,
    )


def _section(frames: SweepFrames, prefix: str, figures: Figures) -> dict[str, Any]:
    """Everything the template says of one sweep; its figures are added to `figures`."""
    info, trials = frames.info, frames.trials
    summary = summarise(frames)
    standing = summary["winner"] or summary["leading"]
    rows = leaderboard_rows(frames)
    default = default_number(frames)
    results = [importance(frames, "fanova"), importance(frames, "ped_anova")]
    failed = trials[trials["state"].isin(FAILED_STATES)]
    varying = varying_parameters(frames)
    pareto = pareto_figure(frames)
    last = frames.curves["time"].max()
    return {
        "id": prefix,
        "info": info,
        "summary": summary,
        "standing": standing,
        "winner_is_default": standing is not None
        and bool(trial_row(frames, standing["number"])["is_default"]),
        "winner_word": "winner" if info["state"] == "finished" else "winner so far",
        "gain_at": _gain_at(summary["gain"]),
        "gain_is_noise": _within_noise(summary["gain"], info),
        "accuracy": is_accuracy(info["objective"]),
        "scheduler": _scheduler(info),
        "started": f"{info['start']:%Y-%m-%d %H:%M} UTC",
        "last_report": None if pd.isna(last) else f"{last:%Y-%m-%d %H:%M} UTC",
        "total": len(trials),
        "settings": _settings(frames, standing["number"] if standing else None, default),
        "default": default,
        "parameters": frames.parameters,
        "varying": varying,
        "constant": {
            name: rows[0][name] for name in frames.parameters if rows and name not in varying
        },
        "rows": rows[:MAX_ROWS],
        "groups": {group_of(str(ending)) for ending in trials["ending"]},
        "pareto": pareto_rows(frames),
        "pareto_figure": pareto and figures.add(f"{prefix}-pareto", pareto),
        "levels": level_rows(frames),
        "hidden_rows": max(0, len(rows) - MAX_ROWS),
        "failed": failed[["number", "state", "reason", "samples_seen"]].to_dict("records"),
        "saving": saving(frames),
        "rungs": rung_table(frames).to_dict("records"),
        "rung_figure": figures.add(f"{prefix}-rungs", rung_figure(frames))
        if len(frames.decisions)
        else None,
        "progress": _progress_figures(frames, prefix, figures),
        "parameter_figures": _parameter_figures(frames, prefix, figures, results[0]),
        "importance": results,
        "importance_figure": figures.add(f"{prefix}-importance", importance_figure(results))
        if any(result.shares for result in results)
        else None,
        "config": info["config"],
        "versions": info["versions"],
    }


def _scheduler(info: SweepInfo) -> str:
    """The scheduler with what was asked of it."""
    config = info["config"]
    parts = [info["scheduler"] or "–"]
    parts += ["promoting"] if config.get("promote") == "True" else []
    brackets, audit = config.get("brackets", "1"), float(config.get("audit", 0))
    parts += [f"{brackets} brackets"] if brackets != "1" else []
    field = config.get("stratify", "None")
    parts += [f"stratified by {field}"] if field != "None" else []
    parts += [f"{audit:.0%} audited"] if audit else []
    return ", ".join(parts)


def _gain_at(gain: Gain | None) -> str:
    """Where the winner and the default were compared, in words; empty at the full resource."""
    if gain is None or gain["full"]:
        return ""
    if gain["default_ending"] in ("pruned", BY_COMMAND):
        why = f"where the default was {ENDING_LABELS[gain['default_ending']]}"
    elif gain["default_ending"] in FAILED_STATES:
        why = "the last report of the default, which failed"
    else:
        why = "the furthest that both have reached"
    return f"at {format_count(gain['mark'])} images, {why}"


def _within_noise(gain: Gain | None, info: SweepInfo) -> bool:
    """Whether a gain is below two standard errors of a difference of two accuracies.

    As of independent ones, though both were measured on the same images: a cautious answer.
    """
    if gain is None or not is_accuracy(info["objective"]):
        return False
    errors = [standard_error(gain[side], info["val_images"]) for side in ("winner", "default")]
    known = [error for error in errors if error is not None]
    return len(known) == 2 and abs(gain["value"]) < 2 * math.hypot(*known)


def _settings(frames: SweepFrames, number: int | None, default: int | None) -> list[dict[str, Any]]:
    """Each searched parameter in the winner and in the default configuration."""
    ours = {} if number is None else trial_params(frames, number)
    theirs = {} if default is None else trial_params(frames, default)
    return [
        {"name": name, "winner": ours.get(name), "default": theirs.get(name)}
        for name in frames.parameters
        if name in ours or name in theirs
    ]


def _progress_figures(frames: SweepFrames, prefix: str, figures: Figures) -> list[dict[str, Any]]:
    curves = frames.curves[frames.curves["metric"] == frames.info["objective"]]
    if curves["value"].notna().sum() == 0:
        return []
    reports = len(curves)
    trials = curves["number"].nunique()
    n = f"n = {reports} reports of {trials} trials."
    captions = {
        "time": "Thick: best trial that ran to its full resource. Dotted: best report of any "
        "trial, at whatever length. Weak reports lie outside the axis. Time counts from the "
        f"sweep's start, pauses included. {n}",
        "images": "The same over the work spent: images that all trials together had trained "
        "on, which does not depend on how many ran at once. Weak reports lie outside here, too. "
        f"{n}",
    }
    found = []
    for by in ("time", "images"):
        figure = best_so_far_figure(frames, "time" if by == "time" else "images")
        found.append(figures.add(f"{prefix}-best-{by}", figure, captions[by]))
    rungs = " Vertical lines are the rungs." if frames.info["rungs"] else ""
    caption = f"Each line is a trial; the marker at its end tells how it ended.{rungs} {n}"
    caption += _outside(frames, curves["value"])
    found.append(figures.add(f"{prefix}-curves", learning_curves(frames), caption))
    return found


def _parameter_figures(
    frames: SweepFrames, prefix: str, figures: Figures, result: Importance
) -> list[dict[str, Any]]:
    """One figure a parameter, the important ones first."""
    order = {name: rank for rank, name in enumerate(result.shares or {})}
    names = sorted(frames.parameters, key=lambda name: (order.get(name, len(order)), name))
    found = []
    for index, name in enumerate(names):
        drawn = frames.trials["objective"].notna() & frames.trials[f"param.{name}"].notna()
        n = int(drawn.sum())
        if n:
            figure = parameter_figure(frames, name)
            caption = f"n = {n} trials.{_outside(frames, frames.trials.loc[drawn, 'objective'])}"
            found.append(figures.add(f"{prefix}-param-{index}", figure, caption))
    return found


def _outside(frames: SweepFrames, values: pd.Series[Any]) -> str:
    """A sentence on those that the axis of the objective leaves out; empty if there are none."""
    shown = robust_range([frames])
    count = 0 if shown is None else int((~values.dropna().between(shown[0], shown[1])).sum())
    lies = "lies" if count == 1 else "lie"
    return f" {count} of them, weak ones, {lies} outside the axis." if count else ""


def _comparison(sweeps: Sequence[SweepFrames], figures: Figures) -> dict[str, Any]:
    """The sweeps side by side; curves only where they measure the same thing."""
    measures = {(f.info["objective"], f.info["mode"], f.info["dataset"]) for f in sweeps}
    same = len(measures) == 1
    return {
        "rows": [
            {
                "id": f"s{index}",
                "info": frames.info,
                "summary": summarise(frames),
                "saving": saving(frames),
                "total": len(frames.trials),
            }
            for index, frames in enumerate(sweeps)
        ],
        "same": same,
        "lengths_differ": len({f.info["total_images"] for f in sweeps}) > 1,
        "figures": [
            figures.add("all-images", best_so_far_figure(sweeps, "images")),
            figures.add("all-time", best_so_far_figure(sweeps, "time")),
        ]
        if same
        else [],
    }
