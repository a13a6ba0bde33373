import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.journal import Journal, JournalError, load_state, read_events

HEADER: dict[str, Any] = {
    "schema": 1,
    "sweep_id": "abc",
    "config": {"trials": 4, "name": "s", "objective": "knn_top1"},
    "mode": "max",
    "slots": 2,
}
SUGGESTED: dict[str, Any] = {
    "params": {"lr": 0.1},
    "distributions": {},
    "system_attrs": {},
    "config": {"lr": 0.1},
    "default": False,
}


def _report(number: int, mark: int, value: float, stop: bool = False) -> dict[str, Any]:
    return {
        "number": number,
        "mark": mark,
        "samples_seen": mark + 3,
        "metrics": {"knn_top1": value},
        "decision": {"stop": stop, "rung": None, "cutoff": None, "competitors": 0},
    }


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal.create(tmp_path / "events.jsonl")
    journal.append("sweep_started", **HEADER)
    journal.append("suggested", number=0, **SUGGESTED)
    journal.append("started", number=0, attempt=1, mark=0)
    journal.append("report", **_report(0, 100, 0.5))
    return journal


def test_reading_gives_the_state_that_writing_had(journal: Journal) -> None:
    journal.append("checkpoint", number=0, mark=100, path="/x")
    journal.append("finished", number=0, state="pruned", reason="weak", mark=100)
    again = load_state(journal.path)
    assert again == journal.state
    assert again.trials[0].samples_seen == 103
    assert again.counts() == {"pruned": 1}


def test_a_torn_last_line_is_dropped_and_cut_before_more_is_written(journal: Journal) -> None:
    whole = list(read_events(journal.path))
    with journal.path.open("ab") as file:
        file.write(b'{"event": "finished", "num')
    assert list(read_events(journal.path)) == whole
    resumed = Journal(journal.path)
    resumed.drop_torn_line()
    resumed.append("finished", number=0, state="completed", reason="", mark=100)
    assert [event["event"] for event in read_events(journal.path)][-1] == "finished"


@given(cut=st.integers(0, 2000))
def test_a_cut_at_any_byte_leaves_a_readable_prefix(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "events.jsonl"
    journal = Journal.create(path)
    journal.append("sweep_started", **HEADER)
    journal.append("suggested", number=0, **SUGGESTED)
    journal.append("report", **_report(0, 100, 0.5))
    events, content = list(read_events(path)), path.read_bytes()
    path.write_bytes(content[:cut])
    kept = list(read_events(path))
    assert kept == events[: len(kept)]
    assert len(kept) == content[:cut].count(b"\n")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("not json", "line 5"),
        ('{"no": "event"}', "line 5: not an event"),
        ('{"event": "surprise", "time": 1}', "line 5: unknown event"),
        ('{"event": "report", "time": 1, "number": 9, "mark": 1}', "line 5: 9 is missing"),
        ('{"event": "report", "time": 1, "number": 0, "mark": 100}', "line 5: mark 100"),
    ],
)
def test_anything_else_malformed_names_its_line(journal: Journal, line: str, why: str) -> None:
    with journal.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(JournalError, match=why):
        load_state(journal.path)


def test_an_unknown_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(
        json.dumps({"event": "sweep_started", "time": 1, **HEADER, "schema": 99}) + "\n"
    )
    with pytest.raises(JournalError, match="schema 99"):
        load_state(path)


def test_missing_and_empty_journals_are_errors(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot read"):
        load_state(tmp_path / "events.jsonl")
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(JournalError, match="never started"):
        load_state(tmp_path / "events.jsonl")


def test_a_write_that_fails_stays_failed(journal: Journal) -> None:
    lines = journal.path.read_bytes()
    journal.path.unlink()  # the append opens without O_CREAT: a vanished journal is an error
    with pytest.raises(JournalError, match="cannot write"):
        journal.append("finished", number=0, state="completed", reason="", mark=100)
    journal.path.write_bytes(lines)
    with pytest.raises(JournalError, match="cannot write"):
        journal.append("finished", number=0, state="completed", reason="", mark=100)
    assert journal.state.trials[0].state is None


def test_numbers_that_are_not_finite_become_null(journal: Journal) -> None:
    journal.append("report", **_report(0, 200, math.nan))
    assert "NaN" not in journal.path.read_text()
    assert journal.state.trials[0].value("knn_top1") is None


def test_a_final_state_is_final(journal: Journal) -> None:
    journal.append("finished", number=0, state="completed", reason="", mark=100)
    with pytest.raises(ValueError, match="finished twice"):
        journal.append("finished", number=0, state="pruned", reason="", mark=100)


def test_the_best_is_a_completed_trial_if_there_is_one(journal: Journal) -> None:
    assert journal.state.best("knn_top1", "max") is journal.state.trials[0]
    journal.append("suggested", number=1, **SUGGESTED)
    journal.append("report", **_report(1, 100, 0.9))
    journal.append("finished", number=1, state="pruned", reason="", mark=100)
    journal.append("finished", number=0, state="completed", reason="", mark=100)
    best = journal.state.best("knn_top1", "max")
    assert best is not None
    assert best.number == 0


def test_wall_time_leaves_out_the_pause_between_drivers(tmp_path: Path) -> None:
    now = iter([10.0, 15.0, 100.0, 107.0])
    journal = Journal.create(tmp_path / "events.jsonl", clock=lambda: next(now))
    journal.append("sweep_started", **HEADER)
    journal.append("suggested", number=0, **SUGGESTED)
    journal.append("resumed", trials=4, slots=2)
    journal.append("started", number=0, attempt=1, mark=0)
    assert journal.state.wall_s == pytest.approx(5 + 7)
