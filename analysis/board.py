"""The leaderboard of a page: the first rows as markup, all of them as data for the browser.

The data are columns, since names that are repeated ten thousand times would make up most of a
page. The browser shows 50 rows at a time, sorts and filters them, and saves them as CSV.
"""

from __future__ import annotations

import math
from typing import Any

from analysis.load import SweepFrames
from analysis.page import Figures
from analysis.tables import leaderboard, plain_values, varying_parameters
from analysis.words import ENDING_LABELS, show

MAX_ROWS = 100
"""Rows as markup, for a reader without JavaScript; leaderboard.csv holds all."""


def board_section(
    frames: SweepFrames, figures: Figures, prefix: str, *, winner_word: str, won: bool
) -> dict[str, Any]:
    """What the template `leaderboard.html.j2` shows; all rows are added to `figures`.

    `won`: the first row is a winner, called by `winner_word`.
    """
    info, table = frames.info, leaderboard(frames)
    varying = varying_parameters(frames)
    columns = _columns(frames, varying, "bracket" in table.columns)
    cells = [plain_values(table[key]) for key, _, _ in columns]
    rows = len(table)
    audited = plain_values(table["audited"])
    data: dict[str, Any] = {
        "columns": [
            {"label": label, "kind": kind, "integer": _integer(column)}
            for (_, label, kind), column in zip(columns, cells, strict=True)
        ],
        "cells": [[_short(value) for value in column] for column in cells],
        "labels": {name: ENDING_LABELS.get(name, name) for name in table["ending"].unique()},
        "default": [i for i, value in enumerate(table["is_default"].tolist()) if value],
        "audited": {str(i): value for i, value in enumerate(audited) if value is not None},
        "winner": winner_word if won else None,
        "full": [i for i, state in enumerate(table["state"].tolist()) if state == "completed"],
    }
    if rows:
        figures.boards[f"{prefix}-board"] = data
    shown = range(min(rows, MAX_ROWS))
    return {
        "id": f"{prefix}-board",
        "columns": data["columns"],
        "rows": [
            {
                "cells": [
                    {"text": show(column[i], kind), "kind": kind}
                    for column, (_, _, kind) in zip(cells, columns, strict=True)
                ],
                "ending": table["ending"].iat[i],
                "default": bool(table["is_default"].iat[i]),
                "audited": audited[i],
                "won": won and i == 0,
                "full": table["state"].iat[i] == "completed",
            }
            for i in shown
        ],
        "total": rows,
        "hidden": rows - len(shown),
        "brackets": "bracket" in table.columns,
        "constant": {
            name: plain_values(table[f"param.{name}"])[0]
            for name in frames.parameters
            if rows and name not in varying
        },
        "epoch_images": info["train_images"],
    }


def _columns(frames: SweepFrames, varying: list[str], brackets: bool) -> list[tuple[str, str, str]]:
    """Column of the leaderboard, heading, and how its values are shown."""
    return [
        ("number", "trial", "number"),
        ("ending", "state", "state"),
        ("objective", frames.info["objective"], "objective"),
        *((f"also.{name}", name, "measure") for name in frames.info["also"]),
        *((f"param.{name}", name, "value") for name in varying),
        *([("bracket", "bracket", "value")] if brackets else []),
        ("rank", "rank", "value"),
        ("epochs", "epochs", "epochs"),
        ("wall_s", "wall", "duration"),
    ]


def _integer(column: list[Any]) -> bool:
    """Whether all numbers are whole by type: those are shown in full."""
    return not any(isinstance(value, float) for value in column)


def _short(value: Any) -> Any:
    """A cell for JSON: seven digits are more than is shown; what JSON lacks becomes text."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)
