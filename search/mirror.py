"""A sweep's journal on its storage, so that another machine can go on when this one is lost.

`Mirror` copies the journal on a thread of its own, at most a few seconds late, and at once where
the journal asks for it: before a trial counts as finished. What cannot be undone, such as deleting
a checkpoint that the mirror still names, waits until the mirror has caught up, and MLflow is told
no more than the mirror holds; so a sweep that goes on from the mirror contradicts nothing.

In the storage lie `events/OFFSET.jsonl`, parts of the journal by the byte at which they begin, of
which the last one is replaced as it grows; the sweep's plan and the user's own code; and
`driver.json`, which says who drives the sweep, with a count that goes on as long as they do.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from search.config import write_atomically
from search.journal import FILE_NAME, Journal, JournalError
from search.storage import PATIENCE_S, Folder, Storage, joined, storage_at

EVENTS, DRIVER, PROBE = "events", "driver.json", "probe"
NOTE = ".mirrored"
"""File of the sweep's folder: how much of the journal the storage had when its driver ended."""
PART_BYTES = 2**20
BEAT_S = 4.0
TOLD_S = 5.0
"""After this long the user is told what the sweep waits for."""
WATCH_S = 3 * BEAT_S
"""How long a driver that may be dead is watched before another one takes over."""
FILES = ("sweep.yaml", "*.py")
"""What a sweep's folder holds beside the journal that another machine needs."""


class MirrorError(ValueError):
    """The storage cannot be used, or is not this sweep's any more."""


class Mirror:
    """The copy of one journal; made by the driver that holds the sweep's folder."""

    def __init__(
        self, sweep_dir: Path, storage: Storage, *, on_wait: Callable[[str], None] | None = None
    ) -> None:
        self._dir, self._path, self._storage = sweep_dir, sweep_dir / FILE_NAME, storage
        self._on_wait = on_wait or (lambda text: None)
        self._id, self._beats = uuid.uuid4().hex, 0
        self._mirrored = self._part = 0
        self._failure: str | None = None
        self._problem: str | None = None
        self._actions: deque[tuple[int, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._wanted = self._stopping = False
        self._thread: threading.Thread | None = None

    def mirrored(self) -> int:
        """Bytes of the journal that the storage holds."""
        return self._mirrored

    def claim(self) -> None:
        """Take over the sweep's place in the storage and bring it up to date.

        MirrorError in one line: it cannot be reached, another driver is at work there, or the sweep
        went on from there on another machine.
        """
        try:
            watch_for_driver(self._storage)
            self._compare()
            self._beat()
            for pattern in FILES:
                for path in sorted(self._dir.glob(pattern)):
                    self._storage.put(path.name, path.read_bytes())
            self._copy()
        except OSError as error:
            raise MirrorError(_unreachable(self._storage, error)) from None

    def start(self, journal: Journal) -> None:
        """Copy what the journal writes from now on."""
        journal.on_written = self._written
        self._thread = threading.Thread(target=self._run, name="journal-mirror", daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float) -> str | None:
        """Wait until the storage holds all of the journal; returns what kept it from that, if so.

        The sweep's place stays claimed: what is still to be recorded is nobody else's.
        """
        size, deadline = self._whole_lines(), time.monotonic() + timeout_s
        with self._changed:
            while self._mirrored < size and self._failure is None:
                if time.monotonic() > deadline:
                    return self._problem or f"{self._storage.uri} took more than {timeout_s:g} s"
                self._wanted = True
                self._changed.notify_all()
                self._changed.wait(0.2)
        return self._failure

    def stop(self, timeout_s: float) -> None:
        """End the thread, and let go of the sweep's place."""
        assert self._thread is not None
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def release(self) -> None:
        """Let go of the sweep's place; another machine may go on from there."""
        self._storage.delete_file(DRIVER)
        if self._mirrored >= self._whole_lines():
            (self._dir / NOTE).write_text(str(self._path.stat().st_size))

    def when_mirrored(self, act: Callable[[], None]) -> None:
        """Do something on the mirror's thread once it has all that the journal holds by now.

        What fails is tried again until the sweep ends.
        """
        self._actions.append((self._path.stat().st_size, act))

    # ---- the driver's side

    def _written(self, event: str) -> None:
        """A line was written: wait for the mirror before a trial counts as finished."""
        if event == "finished":
            self._settle(self._path.stat().st_size)
        if self._failure is not None:
            raise JournalError(self._failure)

    def _settle(self, size: int) -> None:
        started, told = time.monotonic(), False
        with self._changed:
            while self._mirrored < size and self._failure is None:
                self._wanted = True
                self._changed.notify_all()
                self._changed.wait(0.5)
                waited_s = time.monotonic() - started
                if waited_s > TOLD_S and not told:
                    self._on_wait(f"waits for its storage: {self._problem or 'no answer'}")
                    told = True
                if waited_s > PATIENCE_S:
                    self._failure = (
                        f"the storage {self._storage.uri} has failed for {PATIENCE_S / 60:g} "
                        f"minutes ({self._problem or 'no answer'}); the sweep can be resumed once "
                        "it works"
                    )

    # ---- the thread

    def _run(self) -> None:
        beat_at = time.monotonic() + BEAT_S
        while True:
            with self._changed:
                if not (self._wanted or self._stopping):
                    self._changed.wait(max(0.0, beat_at - time.monotonic()))
                self._wanted, stopping = False, self._stopping
            try:
                # Before anything is replaced or deleted: this process may have been asleep.
                self._check_still_ours()
                self._copy()
                if time.monotonic() >= beat_at:
                    self._beat()
                    beat_at = time.monotonic() + BEAT_S
                self._problem = None
                self._act(beat_at + 20.0 * stopping)
                if stopping:
                    self.release()
                    return
            except OSError as error:
                self._problem = " ".join(str(error).split())[:300]
                time.sleep(1.0)
            except Exception as error:  # a thread that ends unheard would be taken for one at work
                self._fail(str(error) or type(error).__name__)
                return

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._failure = reason
            self._changed.notify_all()

    def _copy(self) -> None:
        """Put the whole lines that the storage lacks, part by part."""
        with self._path.open("rb") as file:
            file.seek(self._part)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        while self._mirrored < self._part + len(content):
            part, content = content[:PART_BYTES], content[PART_BYTES:]
            self._storage.put(_part_name(self._part), part)
            with self._changed:
                self._mirrored = self._part + len(part)
                self._changed.notify_all()
            if not content and len(part) < PART_BYTES:
                return
            self._part += len(part)

    def _act(self, until: float) -> None:
        for _ in range(len(self._actions)):
            if self._actions[0][0] > self._mirrored or time.monotonic() > until:
                return
            size, act = self._actions.popleft()
            try:
                act()
            except OSError as error:
                self._actions.append((size, act))
                self._on_wait(f"cannot delete in its storage: {' '.join(str(error).split())[:200]}")
                return

    def _whole_lines(self) -> int:
        """Bytes of the journal up to the end of its last whole line."""
        with self._path.open("rb") as file:
            file.seek(self._part)
            return self._part + file.read().rfind(b"\n") + 1

    def _beat(self) -> None:
        self._beats += 1
        about = {"id": self._id, "host": socket.gethostname(), "pid": os.getpid(), "on": _here()}
        self._storage.put(DRIVER, json.dumps({**about, "beat": self._beats}).encode())

    def _check_still_ours(self) -> None:
        found = _driver(self._storage)
        if found is None or found.get("id") != self._id:
            who = "another driver has been" if found is None else f"{found.get('host')} is"
            raise MirrorError(f"the sweep went on elsewhere: {who} at work on {self._storage.uri}")

    def _compare(self) -> None:
        """The storage must hold the beginning of this journal; find out how much of it."""
        theirs = read_mirror(self._storage)
        ours = self._path.read_bytes()
        if not ours.startswith(theirs):
            raise MirrorError(
                f"{self._dir} and {self._storage.uri} differ: the sweep went on elsewhere; use "
                f"'contrasweep resume {self._storage.uri}' with another --out"
            )
        self._mirrored = len(theirs)
        self._part = len(theirs) - len(theirs) % PART_BYTES


def fully_mirrored(sweep_dir: Path) -> bool:
    """Whether the storage is known to hold all of the journal, without asking it."""
    try:
        return int((sweep_dir / NOTE).read_text()) >= (sweep_dir / FILE_NAME).stat().st_size
    except (OSError, ValueError):
        return False


def check_apart(storage: Storage, sweep_dir: Path) -> None:
    """ValueError if the storage's place is the sweep's own folder, or in it, or around it."""
    place = Path(storage.uri)
    if isinstance(storage, Folder) and (
        place.is_relative_to(sweep_dir) or sweep_dir.is_relative_to(place)
    ):
        raise ValueError(
            f"the storage {place} and the sweep's own folder {sweep_dir} must lie apart; leave out "
            "--storage, or choose another --out"
        )


def check_new(storage: Storage) -> None:
    """MirrorError in one line: the storage cannot be written, or has a sweep at this place."""
    try:
        storage.create()
        if storage.sizes(EVENTS):
            raise MirrorError(
                f"there is a sweep at {storage.uri}; go on with 'contrasweep resume "
                f"{storage.uri}' or choose another --name"
            )
        storage.put(PROBE, b"")
        storage.delete_file(PROBE)
    except OSError as error:
        raise MirrorError(_unreachable(storage, error)) from None


def is_mirror(path: Path) -> bool:
    """Whether a folder is a sweep's place in a storage, and not its own folder."""
    return (path / EVENTS).is_dir() and not (path / FILE_NAME).exists()


def read_mirror(storage: Storage) -> bytes:
    """The journal as the storage holds it, without a torn last line; empty if it holds none.

    MirrorError if a part of it is missing.
    """
    journal = b""
    for name in sorted(storage.sizes(EVENTS)):
        if name != _part_name(len(journal)):
            raise MirrorError(f"{joined(storage.uri, _part_name(len(journal)))} is missing")
        journal += storage.read(name)
    return journal[: journal.rfind(b"\n") + 1]


def fetch_sweep(uri: str, out: Path) -> Path:
    """Bring the sweep at `uri` into a folder below `out`, which may hold an older state of it.

    Returns the folder. MirrorError in one line where there is no sweep, or another one in `out`.
    """
    storage = storage_at(uri)
    folder = out.expanduser().resolve() / storage.uri.rpartition("/")[2]
    try:
        watch_for_driver(storage)
        theirs = read_mirror(storage)
        if not theirs:
            raise MirrorError(f"there is no sweep at {storage.uri}")
        ours = (folder / FILE_NAME).read_bytes() if (folder / FILE_NAME).exists() else b""
        older = bool(ours) and theirs.startswith(ours[: ours.rfind(b"\n") + 1])
        newer = ours.startswith(theirs)  # this machine drove the sweep last
        if folder.exists() and not (older or newer):
            raise MirrorError(
                f"{folder} exists and is not this sweep, or went on apart from it; choose another "
                "--out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not newer:  # first of all, so that a fetch that was broken off is known again
            write_atomically(folder / FILE_NAME, theirs)
        for name in storage.sizes(""):
            of_plan = "/" not in name and any(Path(name).match(pattern) for pattern in FILES)
            if of_plan and not (folder / name).exists():
                write_atomically(folder / name, storage.read(name))
        _name_place(folder / "sweep.yaml", storage)
    except OSError as error:
        raise MirrorError(_unreachable(storage, error)) from None
    return folder


def _name_place(plan: Path, storage: Storage) -> None:
    """Write into a sweep's plan where its storage is, which may have been copied or moved."""
    document = yaml.safe_load(plan.read_text(encoding="utf-8"))
    place, _, name = storage.uri.rpartition("/")
    if document["name"] != name:
        raise MirrorError(
            f"{storage.uri} is the place of the sweep {document['name']!r}; give it that name again"
        )
    if document["storage"] != place:
        document["storage"] = place
        write_atomically(plan, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def watch_for_driver(storage: Storage, watch_s: float = WATCH_S) -> None:
    """MirrorError if another driver is at work on the sweep in a storage.

    One on this machine is asked of the system; one elsewhere is watched for a few beats, since
    clocks of two machines may differ.
    """
    seen = _driver(storage)
    if seen is None:
        return
    if _here() is None or seen.get("on") != _here() or _is_another(int(seen["pid"])):
        deadline = time.monotonic() + watch_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, watch_s))
            if _driver(storage) not in (None, seen):
                raise MirrorError(
                    f"another process works on {storage.uri}: {seen.get('host')}, process "
                    f"{seen.get('pid')}; wait for it, or stop it"
                )
    storage.delete_file(DRIVER)


def _driver(storage: Storage) -> dict[str, Any] | None:
    """Who says to drive the sweep; None for nobody."""
    try:
        found = json.loads(storage.read(DRIVER))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise MirrorError(f"{joined(storage.uri, DRIVER)} is no JSON object; delete it")
    return found


def _here() -> str | None:
    """What tells this machine, or container, from others, since it was started; None: unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _is_another(pid: int) -> bool:
    """Whether there is such a process, beside this one."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _part_name(offset: int) -> str:
    return f"{EVENTS}/{offset:015d}.jsonl"


def _unreachable(storage: Storage, error: OSError) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"the storage {storage.uri} cannot be used: {reason}; check its name and your rights"
