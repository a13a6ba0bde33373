"""A comparison as a section of the report's page, and as a page of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.compare import Comparison, compare
from analysis.compare_plots import differences_figure, expected_best_figure
from analysis.confirmation_record import Confirmation
from analysis.frames import SweepFrames
from analysis.levels import SWEEP
from analysis.page import Figures, render, write_atomic
from analysis.tables import is_accuracy


def compare_section(
    sweeps: Sequence[SweepFrames],
    field: str,
    figures: Figures,
    prefix: str,
    confirmations: Sequence[Confirmation] | None = None,
) -> dict[str, Any]:
    """What `compare.html.j2` takes, its figures added to `figures`; errors: those of `compare`."""
    return section_of(compare(sweeps, field, confirmations=confirmations), figures, prefix)


def section_of(comparison: Comparison, figures: Figures, prefix: str) -> dict[str, Any]:
    """The same of a comparison that is already made."""
    drawn = any(row["by_trials"] for row in comparison["levels"])
    several = len(comparison["levels"]) > 1
    pairs = differences_figure(comparison)
    return {
        "result": comparison,
        "of": "sweeps" if comparison["field"] == SWEEP else f"levels of {comparison['field']}",
        "points": is_accuracy(comparison["objective"]),
        "curves": [
            figures.add(f"{prefix}-{by}", expected_best_figure(comparison, by), caption)
            for by, caption in _captions(comparison).items()
        ]
        if drawn
        else [],
        "differences": figures.add(f"{prefix}-differences", pairs) if pairs and several else None,
    }


def _captions(comparison: Comparison) -> dict[Any, str]:
    n = ", ".join(f"{row['level']} {row['trials']}" for row in comparison["levels"])
    return {
        "trials": "The mean of the best over all choices of so many of a level's trials. Bands: "
        "95 % intervals (studentised bootstrap), up to half of the trials; beyond that the points "
        f"rest on the same few best trials, and no interval can be trusted. n = {n} trials.",
        "images": "The same for what was spent, stopped and failed trials included: a level whose "
        f"trials are stopped early tries more for the same images. n = {n} trials.",
    }


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write `compare-FIELD.html` into a folder, whole or not at all; returns its path."""
    figures = Figures()
    section = section_of(comparison, figures, "compare")
    page = render(
        "compare_page.html.j2",
        figures,
        title=f"{', '.join(comparison['sweeps'])}: {section['of']}",
        s={"compare": section},
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"compare-{re.sub(r'[^A-Za-z0-9_.-]', '_', comparison['field'])}.html"
    write_atomic(path, page)
    return path
