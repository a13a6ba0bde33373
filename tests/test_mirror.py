"""The journal's copy: late by little, never ahead, never of two drivers at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import search.mirror
from search.journal import FILE_NAME, Journal, JournalError
from search.mirror import (
    DRIVER,
    EVENTS,
    Mirror,
    MirrorError,
    check_new,
    fetch_sweep,
    fully_mirrored,
    read_mirror,
)
from search.storage import Folder


class Flaky(Folder):
    """A folder that fails as long as `down`."""

    down = False

    def put(self, name: str, content: bytes) -> None:
        if self.down:
            raise OSError("no route to storage")
        super().put(name, content)


def begin(folder: Path) -> Journal:
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text("name: s\n")
    (folder / "space.py").write_text("# mine\n")
    journal = Journal.create(folder / FILE_NAME, durable=False)
    journal.append("sweep_started", schema=1, config={"trials": 3}, slots=1, sweep_id="id")
    suggest(journal, 0)
    return journal


def suggest(journal: Journal, number: int, note: str = "") -> None:
    empty: dict[str, Any] = {"params": {"note": note}, "distributions": {}, "system_attrs": {}}
    journal.append("suggested", number=number, config={}, default=False, **empty)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.mirror, "BEAT_S", 0.05)
    monkeypatch.setattr(search.mirror, "PART_BYTES", 300)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 400), min_size=1, max_size=6), part=st.integers(60, 400))
def test_the_parts_make_the_journal_wherever_they_were_cut(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], part: int
) -> None:
    """Copied at any moment, in the midst of a line, too; by one mirror or by many."""
    folder = tmp_path_factory.mktemp("s")
    whole = b"".join(b"%d " % n + b"x" * (n * 7 % 90) + b"\n" for n in range(40))
    storage, mirror = Folder(folder / "kept"), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.mirror, "PART_BYTES", part)
        end = 0
        for number, cut in enumerate(cuts):
            end += cut
            (folder / FILE_NAME).write_bytes(whole[:end])
            if mirror is None or number % 3 == 0:
                mirror = Mirror(folder, storage)
                mirror.claim()
            else:
                mirror._copy()
            shown = whole[:end]
            assert read_mirror(storage) == shown[: shown.rfind(b"\n") + 1]
            assert mirror.mirrored() == len(read_mirror(storage))
    assert all(size <= part for size in storage.sizes(EVENTS).values())


def test_a_trial_counts_as_finished_only_once_the_storage_says_so(
    tmp_path: Path, quick: None
) -> None:
    journal, storage, notes = begin(tmp_path / "s"), Flaky(tmp_path / "kept"), []
    mirror = Mirror(tmp_path / "s", storage, on_wait=notes.append)
    mirror.claim()
    mirror.start(journal)
    storage.down = True
    suggest(journal, 1)  # needs no storage
    end = threading.Thread(
        target=lambda: journal.append("finished", number=0, state="completed"), daemon=True
    )
    end.start()
    time.sleep(1.5)
    assert journal.state.trials[0].state is None
    assert notes == ["waits for its storage: no route to storage"]
    storage.down = False
    end.join(10)
    assert journal.state.trials[0].state == "completed"
    assert read_mirror(storage) == journal.path.read_bytes()
    assert mirror.stop() is None
    assert fully_mirrored(tmp_path / "s")
    assert not storage.exists(DRIVER)


def test_other_lines_follow_within_a_beat_and_deletions_after_them(
    tmp_path: Path, quick: None
) -> None:
    journal, storage = begin(tmp_path / "s"), Flaky(tmp_path / "kept")
    mirror = Mirror(tmp_path / "s", storage)
    mirror.claim()
    mirror.start(journal)
    held: list[bytes] = []
    storage.down = True
    suggest(journal, 1, "x" * 500)
    mirror.when_mirrored(lambda: held.append(read_mirror(storage)))
    time.sleep(0.3)
    assert held == []
    storage.down = False
    for _ in range(100):
        time.sleep(0.05)
        if held:
            break
    assert held == [journal.path.read_bytes()]
    mirror.stop()


def test_a_storage_that_never_comes_back_ends_the_sweep(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.mirror, "PATIENCE_S", 1.0)
    journal, storage = begin(tmp_path / "s"), Flaky(tmp_path / "kept")
    mirror = Mirror(tmp_path / "s", storage)
    mirror.claim()
    mirror.start(journal)
    storage.down = True
    with pytest.raises(JournalError, match=r"has failed for .* can be resumed"):
        journal.append("finished", number=0, state="completed")
    with pytest.raises(JournalError, match="has failed"):
        suggest(journal, 1)
    told = mirror.stop(timeout_s=1.5)
    assert told is not None
    assert not fully_mirrored(tmp_path / "s")
    storage.down = False
    Mirror(tmp_path / "s", storage).catch_up()
    assert read_mirror(storage) == journal.path.read_bytes()
    assert fully_mirrored(tmp_path / "s")


def test_a_sweep_is_fetched_with_all_that_it_needs(tmp_path: Path) -> None:
    journal, kept = begin(tmp_path / "a" / "s"), tmp_path / "kept" / "s"
    check_new(Folder(kept))
    Mirror(tmp_path / "a" / "s", Folder(kept)).catch_up()
    with pytest.raises(MirrorError, match=r"there is a sweep at .*contrasweep resume"):
        check_new(Folder(kept))
    folder = fetch_sweep(str(kept), tmp_path / "b")
    assert folder == tmp_path / "b" / "s"
    assert (folder / FILE_NAME).read_bytes() == journal.path.read_bytes()
    assert (folder / "space.py").read_text() == "# mine\n"
    assert (folder / "sweep.yaml").read_text() == "name: s\n"
    # the first machine goes on, the second one catches up; it goes on, the first one may not
    suggest(journal, 1)
    Mirror(tmp_path / "a" / "s", Folder(kept)).catch_up()
    assert fetch_sweep(str(kept), tmp_path / "b") == folder
    assert (folder / FILE_NAME).read_bytes() == journal.path.read_bytes()
    suggest(Journal(folder / FILE_NAME, durable=False), 2, "elsewhere")
    assert fetch_sweep(str(kept), tmp_path / "b") == folder  # which knows more
    Mirror(folder, Folder(kept)).catch_up()
    suggest(journal, 2, "here")
    with pytest.raises(MirrorError, match="went on elsewhere"):
        Mirror(tmp_path / "a" / "s", Folder(kept)).claim()
    with pytest.raises(MirrorError, match="choose another --out"):
        fetch_sweep(str(kept), tmp_path / "a")
    with pytest.raises(MirrorError, match="there is no sweep at"):
        fetch_sweep(str(tmp_path / "nothing"), tmp_path / "b")


def test_a_missing_part_is_named(tmp_path: Path, quick: None) -> None:
    journal, kept = begin(tmp_path / "s"), Folder(tmp_path / "kept")
    suggest(journal, 1, "x" * 1000)
    Mirror(tmp_path / "s", kept).catch_up()
    second = sorted(kept.sizes(EVENTS))[1]
    kept.delete_file(second)
    with pytest.raises(MirrorError, match=f"{second} is missing"):
        read_mirror(kept)


DRIVE = """
import sys, time
from pathlib import Path
import search.mirror
from search.journal import Journal
from search.mirror import Mirror
from search.storage import Folder
search.mirror.BEAT_S = 0.1
folder, kept = map(Path, sys.argv[1:])
mirror = Mirror(folder, Folder(kept))
mirror.claim()
mirror.start(Journal(folder / "events.jsonl"))
print("up", flush=True)
time.sleep(60)
"""


def test_of_two_drivers_the_second_is_refused_until_the_first_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.mirror, "WATCH_S", 1.5)
    begin(tmp_path / "s")
    kept = Folder(tmp_path / "kept")
    command = [sys.executable, "-c", DRIVE, str(tmp_path / "s"), str(kept.path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    assert other.stdout is not None
    assert other.stdout.readline() == b"up\n"
    with pytest.raises(MirrorError, match=f"another process works on .*{other.pid}"):
        fetch_sweep(str(kept.path), tmp_path / "b")
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    other.stdout.close()
    assert json.loads(kept.read(DRIVER))["pid"] == other.pid
    assert fetch_sweep(str(kept.path), tmp_path / "b").is_dir()
    assert not kept.exists(DRIVER)


def test_a_driver_whose_sweep_was_taken_over_stops(tmp_path: Path, quick: None) -> None:
    journal, kept = begin(tmp_path / "s"), Folder(tmp_path / "kept")
    mirror = Mirror(tmp_path / "s", kept)
    mirror.claim()
    mirror.start(journal)
    kept.put(DRIVER, json.dumps({"id": "another", "host": "far", "pid": 1, "beat": 1}).encode())
    time.sleep(0.5)
    with pytest.raises(JournalError, match="goes on elsewhere: far"):
        suggest(journal, 1)
    assert "far" in str(mirror.stop())
