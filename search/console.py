"""How the command line prints: JSON for programs, tables for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from search.result import SweepResult
    from spaces.describe import Parameter

LEADERS = 10
UNTOLD = ("mark", "lr", "images_per_s", "peak_mem_bytes")
"""Metrics of a run that metrics.csv has and a summary does not need."""
out_console = Console(markup=False, highlight=False)
err_console = Console(stderr=True, markup=False, highlight=False)


def print_json(answer: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(answer, allow_nan=False, default=str))


def print_known(known: dict[str, str], as_json: bool) -> None:
    """Names with a line each."""
    if as_json:
        print_json(known)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in known.items():
        table.add_row(Text(name, style="bold"), Text(text))
    out_console.print(table)


def print_space(parameters: list[Parameter], samples: list[dict[str, Any]]) -> None:
    """What a space searches, a parameter a line, and some of its draws."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    for heading in ("parameter", "values", "only with"):
        table.add_column(heading, overflow="fold")
    for each in parameters:
        table.add_row(Text(each.name, style="bold"), each.values, each.condition)
    out_console.print(table)
    out_console.print(f"\n{len(samples)} samples", style="dim")
    for number, sample in enumerate(samples, start=1):
        values = " ".join(f"{name}={_short(value, 3)}" for name, value in sample.items())
        out_console.print(f"{number:2} {values}")


def print_leaderboard(rows: list[dict[str, Any]], objective: str) -> None:
    """The best trials, one a line; the default configuration is marked."""
    if not rows:
        out_console.print("no trial is recorded yet")
        return
    from analysis.tables import LEADERBOARD_COLUMNS
    from analysis.words import ENDING_LABELS, format_value

    also = [name for name in rows[0] if name.startswith("also.")]
    bracket = ["bracket"] if "bracket" in rows[0] else []
    names = [name for name in rows[0] if name not in (*LEADERBOARD_COLUMNS, *also, *bracket)]
    states = {row["number"]: ENDING_LABELS.get(row["ending"], row["ending"]) for row in rows}
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    fixed = ["trial", "state", objective, *(name.removeprefix("also.") for name in also)]
    fixed += ["epochs", *bracket]
    most = max(len(states[row["number"]]) for row in rows[:LEADERS])
    if _least_width([*fixed, *names]) + most - len("state") > out_console.width:
        columns, told = ["parameters"], _in_one_cell  # the space has too many for the terminal
    else:
        columns, told = names, _in_a_cell_each
    headings = [*fixed, *columns]
    narrow = sum(len(heading) + 2 for heading in headings) + most > out_console.width
    for heading in headings:
        table.add_column(
            heading.replace("_", "\n") if narrow else heading,
            justify="left" if heading in ("state", "parameters") else "right",
            vertical="bottom" if columns == names else "top",
            no_wrap=heading not in columns,
            overflow="fold",
        )
    for row in rows[:LEADERS]:
        table.add_row(
            f"{row['number']}{'*' if row['is_default'] else ''}{'†' if row['audited'] else ''}",
            states[row["number"]],
            _short(row["objective"], 4),
            *("-" if row[name] is None else format_value(row[name]) for name in also),
            _short(row["epochs"], 3),
            *(_short(row[name], 0) for name in bracket),
            *told({name: row[name] for name in names}),
        )
    out_console.print(table)
    if len(rows) > LEADERS:
        out_console.print(f"and {len(rows) - LEADERS} more in leaderboard.csv", style="dim")
    if any(row["is_default"] for row in rows[:LEADERS]):
        out_console.print("* the default configuration", style="dim")
    if any(row["audited"] for row in rows[:LEADERS]):
        out_console.print("† would have been stopped, and ran on as an audit", style="dim")


def _least_width(headings: list[str]) -> int:
    """Of a table in which each part of a heading has a line of its own."""
    return sum(max(5, *map(len, heading.split("_"))) + 2 for heading in headings)


def _endings(rows: list[dict[str, Any]]) -> str:
    """How many trials ended in which way, in words."""
    from analysis.load import ENDINGS
    from analysis.words import ENDING_LABELS

    found = Counter(str(row["ending"]) for row in rows)
    return ", ".join(f"{found[each]} {ENDING_LABELS[each]}" for each in ENDINGS if found[each])


def _in_a_cell_each(params: dict[str, Any]) -> list[str]:
    return [_short(value, 2) for value in params.values()]


def _in_one_cell(params: dict[str, Any]) -> list[str]:
    """Only those that the trial has."""
    known = {name: _short(value, 2) for name, value in params.items() if value is not None}
    return ["  ".join(f"{name} {value}" for name, value in known.items())]


def print_result(result: SweepResult, rows: list[dict[str, Any]]) -> None:
    """What a sweep came to: its leaderboard, how the trials ended, the best one."""
    counts = ", ".join(f"{count} {name}" for name, count in result.trials.items())
    if rows:
        print_leaderboard(rows, result.objective)
        counts = _endings(rows)
    out_console.print(f"{counts}; {result.samples_seen:,} images in {result.wall_s:,.0f} s")
    if result.best is not None:
        value = result.best["value"]
        out_console.print(f"best: trial {result.best['trial']}, {result.objective} {value:.4f}")
    if result.pareto:
        out_console.print("Pareto set, of which no trial beats another in all objectives:")
        for each in result.pareto:
            values = ", ".join(f"{name} {value:.6g}" for name, value in each["values"].items())
            out_console.print(f"  trial {each['trial']}: {values}")
    if result.reason:
        out_console.print(result.reason, markup=False, soft_wrap=True)


def print_status(answer: dict[str, Any], told: Mapping[str, int]) -> None:
    """How far a sweep is, from what `status --json` prints, and what is `told` of its trials."""
    counts = ", ".join(f"{count} {name}" for name, count in told.items()) or "none yet"
    out_console.print(f"{answer['name']}: {answer['state']}; of {answer['planned']}: {counts}")
    for trial in answer["unfinished"]:
        waits = ", waits for a promotion" if trial["waits"] else ""
        out_console.print(f"  trial {trial['trial']}: {trial['samples_seen']:,} images{waits}")
    if answer["best"]:
        best = answer["best"]
        out_console.print(f"best: trial {best['trial']}, {answer['objective']} {best['value']:.4f}")
    if answer["reason"]:
        out_console.print(answer["reason"], markup=False, soft_wrap=True)
    if answer["state"] == "interrupted":
        first = "raise the budget in its sweep.yaml, then " if answer["why"] == "budget" else ""
        out_console.print(f"{first}go on with: contrasweep resume {answer['dir']}", soft_wrap=True)


def print_training(result: dict[str, Any]) -> None:
    """What one run came to: its metrics, beside those of the trial that it repeats."""
    metrics = result["metrics"]
    if metrics.get("samples_seen") not in (None, result["samples_seen"]):
        early = "stopped early; " if result["stopped_early"] else ""
        out_console.print(
            f"{early}the figures and the encoder are those of the best report, at epoch "
            f"{metrics['epoch']:.3g}"
        )
    accuracies = [name for name in metrics if name.endswith("_top1")]
    for name in accuracies + [name for name in metrics if name not in (*accuracies, *UNTOLD)]:
        value, was = metrics[name], result.get("recorded", {}).get(name)
        text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        recorded_text = "" if was is None else f"   recorded {was:.6g}"
        out_console.print(f"{name:>16}  {text}{recorded_text}")
    out_console.print(f"written to {result['dir']}", soft_wrap=True)
    if result["curves"]:
        out_console.print(f"curves: {result['curves']}", soft_wrap=True)


def _short(value: Any, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
