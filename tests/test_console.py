"""The leaderboard and the counts that a sweep prints at its end."""

import io
from typing import Any

import pytest
from rich.console import Console

from analysis.tables import LEADERBOARD_COLUMNS
from search import console
from tests.built_results import result as built_result


def row(number: int, ending: str, **more: Any) -> dict[str, Any]:
    plain: dict[str, Any] = dict.fromkeys(LEADERBOARD_COLUMNS)
    state = "pruned" if ending == "by_command" else ending
    plain |= {"number": number, "state": state, "ending": ending, "is_default": False}
    return plain | {"objective": 0.5, "epochs": 2.0, **more}


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(console, "out_console", Console(width=100, file=file))
    return file


def test_further_objectives_and_brackets_are_columns(printed: io.StringIO) -> None:
    more = {"bracket": 1, "also.images_per_s": 12_345.6, "also.peak_mem_bytes": None}
    console.print_leaderboard([row(4, "completed", **more, lr=0.01)], "knn_top1")
    heading, values, *_ = printed.getvalue().splitlines()
    assert heading.split() == [
        *("trial", "state", "knn_top1", "images_per_s", "peak_mem_bytes"),
        *("epochs", "bracket", "lr"),
    ]
    assert values.split() == ["4", "completed", "0.5", "12,346", "-", "2", "1", "0.01"]


def test_endings_are_told_in_words(printed: io.StringIO) -> None:
    rows = [row(0, "completed"), row(1, "pruned"), row(2, "by_command"), row(3, "oom")]
    result = built_result(trials={"completed": 1, "pruned": 2, "oom": 1})
    console.print_result(result, rows)
    text = printed.getvalue()
    assert "1 completed, 1 stopped early, 1 stopped by command, 1 out of memory; 100" in text
    assert "pruned" not in text
    assert len(text.splitlines()) == 6
