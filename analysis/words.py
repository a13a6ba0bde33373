"""What people read on pages and terminals: how trials ended, counts, durations, values."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from analysis.load import BY_COMMAND, UNFINISHED

ENDING_LABELS: Mapping[str, str] = MappingProxyType(
    {
        "completed": "completed",
        "pruned": "stopped early",
        BY_COMMAND: "stopped by command",
        UNFINISHED: "unfinished",
        "diverged": "diverged",
        "oom": "out of memory",
        "error": "error",
        "lost": "lost",
    }
)


def format_value(value: object) -> str:
    """A metric or parameter for the eye: four significant digits, an en dash where missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:,.0f}" if 1e3 <= abs(value) < math.inf else f"{value:.4g}"


def show(value: Any, kind: str) -> str:
    """A cell of the leaderboard for the eye; tables.js shows the same values in the same way."""
    if value is None:
        return "–"
    if kind == "objective":
        return f"{value:.4f}"
    if kind == "epochs":
        return f"{value:.1f}"
    if kind == "duration":
        return format_duration(value)
    return format_value(value)


def format_setting(text: str) -> str:
    """A recorded configuration value, as Python wrote it, for people: no None, no brackets."""
    if text in ("None", ""):
        return "not set"
    if text in ("True", "False"):
        return "yes" if text == "True" else "no"
    if text[0] not in "[{(":
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if isinstance(value, dict):
        parts = [f"{key}: {format_setting(str(each))}" for key, each in value.items()]
    elif isinstance(value, list | tuple | set):
        parts = [format_setting(str(each)) for each in value]
    else:
        return text
    return ", ".join(parts) if parts else "none"


def format_count(value: float) -> str:
    return f"{int(value):,}"


def format_duration(seconds: float | None) -> str:
    """Two units at most, of days, hours, minutes and seconds."""
    if seconds is None or math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3_600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3_600:
        return f"{whole // 3_600} h {whole % 3_600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3_600} h"
