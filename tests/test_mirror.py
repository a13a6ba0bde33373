"""The journal's copy: late by little, never ahead, never of two drivers at once."""

import contextlib
import json
import os
import shutil
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
    check_apart,
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
    (folder / "sweep.yaml").write_text(f"name: s\nstorage: {folder.parent / 'kept'}\n")
    (folder / "space.py").write_text("# mine\n")
    journal = Journal.create(folder / FILE_NAME, durable=False)
    journal.append("sweep_started", schema=1, config={"trials": 3}, slots=1, sweep_id="id")
    suggest(journal, 0)
    return journal


def suggest(journal: Journal, number: int, note: str = "") -> None:
    empty: dict[str, Any] = {"params": {"note": note}, "distributions": {}, "system_attrs": {}}
    journal.append("suggested", number=number, config={}, default=False, **empty)


def catch_up(folder: Path, storage: Folder) -> None:
    storage.create()
    mirror = Mirror(folder, storage)
    mirror.claim()
    mirror.release()


def made(storage: Folder) -> Folder:
    storage.create()
    return storage


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
    storage, mirror = made(Folder(folder / "kept")), None
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
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.mirror, "TOLD_S", 0.1)
    journal, storage, notes = begin(tmp_path / "s"), Flaky(tmp_path / "kept"), []
    storage.create()
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
    assert mirror.finish(5) is None
    mirror.stop(5)
    assert fully_mirrored(tmp_path / "s")
    assert not storage.exists(DRIVER)


def test_other_lines_follow_within_a_beat_and_deletions_after_them(
    tmp_path: Path, quick: None
) -> None:
    journal, storage = begin(tmp_path / "s"), Flaky(tmp_path / "kept")
    storage.create()
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
    mirror.stop(5)


def test_a_storage_that_never_comes_back_ends_the_sweep(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.mirror, "PATIENCE_S", 1.0)
    monkeypatch.setattr(search.mirror, "TOLD_S", 0.1)
    journal, storage = begin(tmp_path / "s"), Flaky(tmp_path / "kept")
    storage.create()
    mirror = Mirror(tmp_path / "s", storage)
    mirror.claim()
    mirror.start(journal)
    storage.down = True
    with pytest.raises(JournalError, match=r"has failed for .* can be resumed"):
        journal.append("finished", number=0, state="completed")
    with pytest.raises(JournalError, match="has failed"):
        suggest(journal, 1)
    assert "has failed" in str(mirror.finish(1))
    mirror.stop(0.5)
    assert not fully_mirrored(tmp_path / "s")
    storage.down = False
    catch_up(tmp_path / "s", storage)
    assert read_mirror(storage) == journal.path.read_bytes()
    assert fully_mirrored(tmp_path / "s")


def test_a_sweep_is_fetched_with_all_that_it_needs(tmp_path: Path) -> None:
    journal, kept = begin(tmp_path / "a" / "s"), tmp_path / "kept" / "s"
    check_new(Folder(kept))
    catch_up(tmp_path / "a" / "s", Folder(kept))
    with pytest.raises(MirrorError, match=r"there is a sweep at .*contrasweep resume"):
        check_new(Folder(kept))
    folder = fetch_sweep(str(kept), tmp_path / "b")
    assert folder == tmp_path / "b" / "s"
    assert (folder / FILE_NAME).read_bytes() == journal.path.read_bytes()
    assert (folder / "space.py").read_text() == "# mine\n"
    assert f"storage: {kept.parent}\n" in (folder / "sweep.yaml").read_text()
    # the first machine goes on, the second one catches up; it goes on, the first one may not
    suggest(journal, 1)
    catch_up(tmp_path / "a" / "s", Folder(kept))
    assert fetch_sweep(str(kept), tmp_path / "b") == folder
    assert (folder / FILE_NAME).read_bytes() == journal.path.read_bytes()
    suggest(Journal(folder / FILE_NAME, durable=False), 2, "elsewhere")
    assert fetch_sweep(str(kept), tmp_path / "b") == folder  # which knows more
    catch_up(folder, Folder(kept))
    suggest(journal, 2, "here")
    with pytest.raises(MirrorError, match="went on elsewhere"):
        Mirror(tmp_path / "a" / "s", Folder(kept)).claim()
    with pytest.raises(MirrorError, match="choose another --out"):
        fetch_sweep(str(kept), tmp_path / "a")
    with pytest.raises(MirrorError, match="there is no sweep at"):
        fetch_sweep(str(tmp_path / "nothing"), tmp_path / "b")


def test_a_missing_part_is_named(tmp_path: Path, quick: None) -> None:
    journal, kept = begin(tmp_path / "s"), made(Folder(tmp_path / "kept"))
    suggest(journal, 1, "x" * 1000)
    catch_up(tmp_path / "s", kept)
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
    kept = made(Folder(tmp_path / "s-kept" / "s"))
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
    journal, kept = begin(tmp_path / "s"), made(Folder(tmp_path / "kept"))
    mirror = Mirror(tmp_path / "s", kept)
    mirror.claim()
    mirror.start(journal)
    kept.put(DRIVER, json.dumps({"id": "another", "host": "far", "pid": 1, "beat": 1}).encode())
    time.sleep(0.5)
    with pytest.raises(JournalError, match="went on elsewhere: far"):
        suggest(journal, 1)
    assert "far" in str(mirror.finish(1))


def test_a_driver_that_slept_while_another_one_finished_replaces_nothing(
    tmp_path: Path, quick: None
) -> None:
    journal, kept = begin(tmp_path / "a" / "s"), made(Folder(tmp_path / "kept" / "s"))
    asleep = Mirror(tmp_path / "a" / "s", kept)
    asleep.claim()
    folder = fetch_sweep(str(kept.path), tmp_path / "b")
    other = Journal(folder / FILE_NAME, durable=False)
    for number in (1, 2):
        suggest(other, number, "elsewhere")
    catch_up(folder, kept)
    deleted: list[str] = []
    asleep.start(journal)
    with contextlib.suppress(JournalError):
        suggest(journal, 1, "here")
    asleep.when_mirrored(lambda: deleted.append("a checkpoint"))
    assert "went on elsewhere" in str(asleep.finish(5))
    assert read_mirror(kept) == other.path.read_bytes()
    assert deleted == []


def test_what_cannot_be_deleted_hinders_neither_beats_nor_the_end(
    tmp_path: Path, quick: None
) -> None:
    journal, kept, notes = begin(tmp_path / "s"), made(Folder(tmp_path / "kept")), []
    mirror = Mirror(tmp_path / "s", kept, on_wait=notes.append)
    mirror.claim()
    mirror.start(journal)

    def refused() -> None:
        raise PermissionError("access denied")

    mirror.when_mirrored(refused)
    first = json.loads(kept.read(DRIVER))["beat"]
    time.sleep(0.5)
    assert json.loads(kept.read(DRIVER))["beat"] > first + 1
    assert notes[0] == "cannot delete in its storage: access denied"
    assert mirror.finish(5) is None
    mirror.stop(5)
    assert fully_mirrored(tmp_path / "s")


def test_a_thread_that_ends_by_an_error_is_not_taken_for_one_at_work(
    tmp_path: Path, quick: None
) -> None:
    class Broken(Folder):
        def put(self, name: str, content: bytes) -> None:
            if name.startswith(EVENTS) and b"suggested" in content[200:]:
                raise RuntimeError("not of the system's")
            super().put(name, content)

    journal = begin(tmp_path / "s")
    mirror = Mirror(tmp_path / "s", made(Broken(tmp_path / "kept")))
    mirror._beat()
    mirror.start(journal)
    suggest(journal, 1)
    assert mirror.finish(5) == "not of the system's"
    with pytest.raises(JournalError, match="not of the system's"):
        suggest(journal, 2)


def test_a_fetch_that_broke_off_is_completed_by_the_next(tmp_path: Path) -> None:
    begin(tmp_path / "a" / "s")
    kept = made(Folder(tmp_path / "kept" / "s"))
    catch_up(tmp_path / "a" / "s", kept)
    folder = fetch_sweep(str(kept.path), tmp_path / "b")
    (folder / "space.py").unlink()
    (folder / "sweep.yaml").unlink()
    assert fetch_sweep(str(kept.path), tmp_path / "b") == folder
    assert (folder / "space.py").exists()


def test_a_place_that_was_copied_is_where_the_sweep_goes_on(tmp_path: Path) -> None:
    begin(tmp_path / "a" / "s")
    catch_up(tmp_path / "a" / "s", Folder(tmp_path / "kept" / "s"))
    shutil.copytree(tmp_path / "kept" / "s", tmp_path / "copied" / "s")
    folder = fetch_sweep(str(tmp_path / "copied" / "s"), tmp_path / "b")
    assert f"storage: {tmp_path / 'copied'}\n" in (folder / "sweep.yaml").read_text()
    shutil.copytree(tmp_path / "kept" / "s", tmp_path / "kept" / "other")
    with pytest.raises(MirrorError, match="give it that name again"):
        fetch_sweep(str(tmp_path / "kept" / "other"), tmp_path / "c")


@pytest.mark.parametrize("place", ["runs/s", "runs/s/kept", "runs"])
def test_the_storage_must_not_be_the_sweep_s_own_folder(tmp_path: Path, place: str) -> None:
    with pytest.raises(ValueError, match="must lie apart"):
        check_apart(Folder(tmp_path / place), tmp_path / "runs" / "s")
    check_apart(Folder(tmp_path / "kept"), tmp_path / "runs" / "s")
