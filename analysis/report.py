"""Frames -> `index.html`, one self-contained page (`analysis.page`), and `leaderboard.csv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.artifacts import SweepPictures
from analysis.board import board_section
from analysis.compare_page import compare_section
from analysis.confirmation_record import SweepConfirmations
from analysis.confirmation_section import confirmation_section
from analysis.cost import cost_of
from analysis.effects_section import effects_section
from analysis.levels import stratified_field
from analysis.load import FAILED_STATES, SweepFrames
from analysis.next_steps import command, next_steps
from analysis.page import Figures, render, write_atomic
from analysis.pareto import pareto_figure, pareto_rows
from analysis.pictures import pictures_section
from analysis.plots import best_so_far_figure
from analysis.progress import progress_section
from analysis.spreadsheet import inert
from analysis.stopping_section import stopping_section
from analysis.style import SERIES_COLOURS
from analysis.summary import gain_at, scheduler, settings, sureness
from analysis.tables import (
    Axis,
    default_number,
    is_accuracy,
    leaderboard,
    level_rows,
    summarise,
    trial_row,
    varying_parameters,
)

MAX_FAILED = 100
"""Failed trials in their table; leaderboard.csv holds all."""


def write_report(
    frames: SweepFrames | Sequence[SweepFrames],
    out_dir: Path,
    *,
    advice: Sequence[Mapping[str, Any] | None] = (),
    pictures: Sequence[SweepPictures | None] = (),
    confirmations: Sequence[SweepConfirmations | None] = (),
) -> Path:
    """Write `index.html` and `leaderboard.csv` into `out_dir`; returns the page's path.

    Several sweeps share one page that begins with their comparison. `advice` on early stopping,
    `pictures` of what was learned and `confirmations` are one a sweep, in the same order, or none
    at all. Each file appears whole or not at all, and none before both are made. ValueError for an
    empty list, and for sweeps of different objectives.
    """
    sweeps = [frames] if isinstance(frames, SweepFrames) else list(frames)
    if not sweeps:
        raise ValueError("a report needs at least one sweep, got none")
    _check_one_objective(sweeps)
    table, html = leaderboard_csv(sweeps), render_page(sweeps, advice, pictures, confirmations)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(out_dir / "leaderboard.csv", table)
    page = out_dir / "index.html"
    write_atomic(page, html)
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
    """All leaderboards below one another, with seed, reason and MLflow's run id.

    Text that a spreadsheet would compute begins with an apostrophe (`analysis.spreadsheet`).
    """
    tables = []
    for frames in sweeps:
        more = frames.trials[["number", "seed", "reason", "run_id"]]
        table = leaderboard(frames).drop(columns="ending").merge(more, on="number", how="left")
        table.insert(0, "sweep", frames.info["name"])
        tables.append(table)
    text: str = inert(pd.concat(tables, ignore_index=True)).to_csv(index=False)
    return text


def render_page(
    sweeps: Sequence[SweepFrames],
    advice: Sequence[Mapping[str, Any] | None] = (),
    pictures: Sequence[SweepPictures | None] = (),
    confirmations: Sequence[SweepConfirmations | None] = (),
) -> str:
    """The page's HTML; arguments as those of `write_report`."""
    figures = Figures()
    sections = [
        _section(frames, f"s{index}", figures, told, seen, confirmed)
        for index, (frames, told, seen, confirmed) in enumerate(
            zip(
                sweeps,
                advice or [None] * len(sweeps),
                pictures or [None] * len(sweeps),
                confirmations or [None] * len(sweeps),
                strict=True,
            )
        )
    ]
    return render(
        "page.html.j2",
        figures,
        title=", ".join(frames.info["name"] for frames in sweeps),
        sections=sections,
        comparison=_comparison(sweeps, sections, figures) if len(sweeps) > 1 else None,
    )


def _section(
    frames: SweepFrames,
    prefix: str,
    figures: Figures,
    advice: Mapping[str, Any] | None,
    pictures: SweepPictures | None,
    confirmations: SweepConfirmations | None,
) -> dict[str, Any]:
    """Everything the template says of one sweep; its figures are added to `figures`."""
    info, trials = frames.info, frames.trials
    summary = summarise(frames)
    standing = summary["winner"] or summary["leading"]
    sure = sureness(frames, summary)
    cost = cost_of(frames)
    winner_word = "winner" if info["state"] == "finished" else "winner so far"
    failed = trials[trials["state"].isin(FAILED_STATES)]
    field = stratified_field(frames)
    pareto = pareto_figure(frames)
    last = frames.curves["time"].max()
    confirmation = confirmation_section(confirmations, figures, prefix)
    confirmed = confirmation and confirmation["head"]
    shown = standing["number"] if standing else None
    is_confirmed = bool(confirmed and (trials["number"] == confirmed["trial"]).any())
    if confirmed and is_confirmed:
        shown = int(confirmed["trial"])
    return {
        "id": prefix,
        "info": info,
        "summary": summary,
        "standing": standing,
        "winner_is_default": standing is not None
        and bool(trial_row(frames, standing["number"])["is_default"]),
        "winner_word": winner_word,
        "sure": sure,
        "cost": cost,
        "next_steps": next_steps(frames, sure, confirmed=confirmed),
        "confirmation": confirmation,
        "confirmed": confirmed,
        "confirm_command": command("confirm", info),
        "gain_at": gain_at(summary["gain"]),
        "accuracy": is_accuracy(info["objective"]),
        "scheduler": scheduler(info),
        "started": f"{info['start']:%Y-%m-%d %H:%M} UTC",
        "last_report": None if pd.isna(last) else f"{last:%Y-%m-%d %H:%M} UTC",
        "total": len(trials),
        "settings": settings(frames, shown),
        "shown": shown,
        "shown_is_confirmed": is_confirmed,
        "default": default_number(frames),
        "parameters": frames.parameters,
        "varying": varying_parameters(frames),
        "board": board_section(
            frames,
            figures,
            prefix,
            winner_word=winner_word,
            won=summary["winner"] is not None,
        ),
        "pareto": pareto_rows(frames),
        "pareto_figure": pareto and figures.add(f"{prefix}-pareto", pareto),
        "levels": level_rows(frames),
        "failed": failed[["number", "state", "reason", "samples_seen"]]
        .head(MAX_FAILED)
        .to_dict("records"),
        "failed_hidden": max(0, len(failed) - MAX_FAILED),
        "saving": cost["saving"],
        "rungs": bool(info["rungs"] or len(frames.decisions)),
        "progress": progress_section(frames, figures, prefix),
        "effects": effects_section(frames, figures, prefix),
        "stopping": stopping_section(frames, figures, prefix, advice),
        "compare": None
        if field is None or trials.empty
        else _compared(frames, field, figures, prefix, confirmations),
        "pictures": pictures_section(pictures, figures, prefix, frames),
        "config": info["config"],
        "versions": info["versions"],
    }


def _compared(
    frames: SweepFrames,
    field: str,
    figures: Figures,
    prefix: str,
    confirmations: SweepConfirmations | None,
) -> dict[str, Any]:
    """The levels that a sweep was stratified by, or why they are not compared."""
    found = None if confirmations is None else confirmations.found
    try:
        return compare_section([frames], field, figures, prefix, found)
    except ValueError as error:  # more levels than can be compared
        return {"refused": str(error)}


def _comparison(
    sweeps: Sequence[SweepFrames], sections: Sequence[dict[str, Any]], figures: Figures
) -> dict[str, Any]:
    """The sweeps side by side; curves only where they measure the same thing."""
    measures = {(f.info["objective"], f.info["mode"], f.info["dataset"]) for f in sweeps}
    same = len(measures) == 1
    captions: dict[Axis, str] = {
        "images": "Thick: best completed trial. Dotted: best report of any trial.",
        "time": "The same over each sweep's own time from its start, pauses included.",
        "cost": "The same over the time of all trials together.",
    }
    if len(sweeps) > len(SERIES_COLOURS):
        captions["images"] += " Where colours repeat, the later sweep's lines have markers."
    reports = ", ".join(
        f"{int((f.curves['metric'] == f.info['objective']).sum()):,} of {f.info['name']}"
        for f in sweeps
    )
    return {
        "rows": [
            {
                **{name: s[name] for name in ("id", "info", "summary", "sure", "cost", "total")},
                "colour": SERIES_COLOURS[index % len(SERIES_COLOURS)] if same else None,
            }
            for index, s in enumerate(sections)
        ],
        "same": same,
        "lengths_differ": len({f.info["total_images"] for f in sweeps}) > 1,
        "figures": [
            figures.add(
                f"all-{by}", best_so_far_figure(sweeps, by), f"{caption} n = {reports} reports."
            )
            for by, caption in captions.items()
        ]
        if same
        else [],
    }
