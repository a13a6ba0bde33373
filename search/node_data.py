"""Images that stay in files, on every node of a cluster: each node gets them once.

The driver lists the files that the splits read (`files_to_share`); a worker asks with that list
for the splits as its node can read them (`on_this_node`): in place where the node sees the files,
else from a copy in its cache, which the first worker makes from the driver's node.

A copy is named by a hash of the folder's path and the files' names, sizes and times, so that
changed files are copied anew. Leaves out the removal of old copies: each is one folder below
`files/`, free to be deleted when no sweep reads it; its `complete.json` is touched at each use.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from trainer.datasets import DataSplits, Split, default_cache_dir
from trainer.images import StoredImages

FORMAT = 1  # raised when a copy's layout changes, so that older ones are not read
PIECE_BYTES, PIECE_FILES = 16 << 20, 1_024
"""Most that is read at a time: one task of Ray, about 20 ms of a fast disk."""
PIECES_AHEAD, READS_AT_ONCE = 4, 8
"""Pieces under way for one copy; that the driver's node reads for all, each in its own process."""

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_STAT_FILES = 2_048
_SLOW_STAT_S, _STAT_THREADS = 100e-6, 16
"""A local disk takes 2 us a file, and with threads 4 us; one on the network perhaps 1 ms."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class FolderFiles:
    """The files of one folder that the splits read, as the driver saw them: 100 MB for ImageNet.

    Attributes: `folder`, absolute; `names`, paths below it, sorted; `sizes` in bytes; `times_ns`
    of their last change; `crc32` of samples of their bytes; `key`, which names the copies.
    """

    folder: str
    names: NDArray[np.bytes_]
    sizes: NDArray[np.int64]
    times_ns: NDArray[np.int64]
    crc32: int
    key: str


class Piece(NamedTuple):
    """What is read at a time: some whole files, or `nbytes` from `offset` on of one large file."""

    names: NDArray[np.bytes_]
    sizes: NDArray[np.int64]
    times_ns: NDArray[np.int64]
    offset: int
    nbytes: int


Fetched: TypeAlias = Iterator[tuple[Piece, NDArray[np.uint8]]]
Fetch: TypeAlias = Callable[[str, Iterable[Piece]], Fetched]
"""Reads pieces of a folder's files -> each in turn with its bytes, or a ValueError in one line."""


# The driver's part


def files_to_share(data: DataSplits) -> tuple[FolderFiles, ...]:
    """List the files that splits read, folder by folder; nothing where all is held in memory.

    Looks up each file: 7 s for a million files of a local disk. ValueError in one line for one
    that cannot be read.
    """
    names: dict[str, list[NDArray[np.bytes_]]] = {}
    for images in (split.images for split in _splits(data)):
        if isinstance(images, StoredImages) and len(images):
            names.setdefault(images.folder, []).append(images.file_names())
    return tuple(_listed(folder, np.concatenate(parts)) for folder, parts in names.items())


def _listed(folder: str, names: NDArray[np.bytes_]) -> FolderFiles:
    names = np.unique(names)
    sizes, times_ns = _look_up(folder, names)
    if (sizes < 0).any():
        path = os.path.join(folder, os.fsdecode(bytes(names[sizes.argmin()])))
        raise ValueError(f"cannot read {path!r}: it is gone, or not to be read; restore the file")
    digest = hashlib.sha256(os.fsencode(f"{FORMAT}\0{folder}\0{names.dtype}\0"))
    for array in (names, sizes, times_ns):
        digest.update(np.ascontiguousarray(array).data)
    files = FolderFiles(folder, names, sizes, times_ns, 0, digest.hexdigest()[:32])
    return replace(files, crc32=_sampled_crc32(files, same_times=True))


def _look_up(folder: str, names: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Sizes and times of change of files, int64 [2, N], -1 where there is none."""
    root = os.fsencode(folder)

    def look_up(start: int) -> NDArray[np.int64]:
        some = names[start : start + _STAT_FILES].tolist()
        found_2N = np.full((2, len(some)), -1, np.int64)
        for place, name in enumerate(some):
            with contextlib.suppress(OSError):
                stat = os.stat(os.path.join(root, name))
                found_2N[:, place] = stat.st_size, stat.st_mtime_ns
        return found_2N

    started = time.perf_counter()
    first = look_up(0)
    is_slow = time.perf_counter() - started > _SLOW_STAT_S * first.shape[1]
    with ThreadPoolExecutor(_STAT_THREADS if is_slow else 1) as pool:
        rest = pool.map(look_up, range(_STAT_FILES, len(names), _STAT_FILES))
        return np.concatenate([first, *rest], axis=1)


def _sampled_crc32(files: FolderFiles, *, same_times: bool) -> int:
    """Read up to 64 places, evenly spaced through all the bytes, 64 KiB from each at most.

    ValueError if a file is not there, or not of the size or (`same_times`) time that was listed.
    """
    ends, crc = np.cumsum(files.sizes), 0
    places = np.linspace(0, max(0, int(ends[-1]) - 1), _SAMPLES).astype(np.int64)
    for place in np.unique(places).tolist():
        row = min(int(np.searchsorted(ends, place, side="right")), len(ends) - 1)
        size = int(files.sizes[row])
        offset = place - (int(ends[row]) - size)
        nbytes = min(_SAMPLE_BYTES, size - offset)
        piece = _piece(files, np.array([row]))._replace(offset=offset, nbytes=nbytes)
        crc = zlib.crc32(read_piece(files.folder, piece, same_times=same_times).data, crc)
    return crc


# A worker's part


def on_this_node(
    data: DataSplits,
    folders: tuple[FolderFiles, ...],
    cache: Path | str | None,
    fetch: Fetch,
    *,
    say: Callable[[str], None] = print,
) -> DataSplits:
    """The same splits, their files read from where this node has them.

    `folders` are of `files_to_share`. What this node sees of them stays in place, unless a `cache`
    folder is given: it is copied then, as from a slow shared file system. What it does not see
    (nothing, or other files, under that path) comes by `fetch` into the cache, by default the
    platform's of this node. Of workers that ask at once one copies and the others wait; a copy that
    was broken off is continued, and one that lost files is mended. `say` is told what takes time.

    ValueError in one line: no room for the copy, a cache folder that cannot be written, files that
    cannot be read or have changed since they were listed.
    """
    moved: dict[str, str] = {}
    for files in folders:
        if cache is None and _is_here(files, same_times=False):
            continue
        directory = default_cache_dir() if cache is None else Path(cache).expanduser()
        # A visible copy with other times may be of another age: then the driver's node is asked.
        is_source = _is_here(files, same_times=True)
        copy = _own_copy(files, directory, fetch_from_here if is_source else fetch, say)
        moved[files.folder] = str(copy)
    return _read_from(data, moved) if moved else data


def _is_here(files: FolderFiles, *, same_times: bool) -> bool:
    """Whether this node sees the same files under the same path, by samples of their bytes."""
    try:
        return _sampled_crc32(files, same_times=same_times) == files.crc32
    except ValueError:
        return False


def _splits(data: DataSplits) -> tuple[Split, ...]:
    return (data.train, data.val, data.test, data.bank)


def _read_from(data: DataSplits, moved: dict[str, str]) -> DataSplits:
    """Splits that read the files of some folders from others; what was shared stays shared."""
    images: dict[int, StoredImages] = {}
    splits: dict[int, Split] = {}
    for split in _splits(data):
        stored = split.images
        if isinstance(stored, StoredImages) and stored.folder in moved:
            found = images.setdefault(id(stored), stored.in_folder(moved[stored.folder]))
            splits.setdefault(id(split), replace(split, images=found))
    train, val, test, bank = (splits.get(id(split), split) for split in _splits(data))
    return replace(data, train=train, val=val, test=test, bank=bank)


# The copy


def _own_copy(files: FolderFiles, cache: Path, fetch: Fetch, say: Callable[[str], None]) -> Path:
    """The folder of this node's copy, made or made whole first where it is not."""
    entry = cache / "files" / files.key
    copy, complete = entry / "copy", entry / "complete.json"
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        was_complete = complete.exists()
        if not was_complete or len(_absent(copy, files)):
            with _turn(entry.with_suffix(".lock"), files, say):
                if was_complete or not complete.exists():  # else it was made while we waited
                    with _left_out_if_full(entry):
                        _fill(entry, files, fetch, say)
        with contextlib.suppress(OSError):  # another user's
            os.utime(complete)
    except OSError as error:
        raise ValueError(
            f"cannot keep a copy of {files.folder!r} in {str(entry.parent)!r}: "
            f"{error.strerror or error}; free some room there or choose another --node-cache"
        ) from None
    return copy


def _turn(
    path: Path, files: FolderFiles, say: Callable[[str], None]
) -> contextlib.AbstractContextManager[object]:
    """Hold the lock of a copy; who holds it and is killed lets go."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"waits for another worker of this node, which copies {files.folder}")
        return lock.acquire()


@contextlib.contextmanager
def _left_out_if_full(entry: Path) -> Iterator[None]:
    """Remove a copy for which the disk proves too small: others need the room."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            shutil.rmtree(entry, ignore_errors=True)
        raise


def _absent(copy: Path, files: FolderFiles) -> NDArray[np.int64]:
    """Rows of the files that a copy lacks; a file gets its name there once it is whole."""
    return np.flatnonzero(_look_up(str(copy), files.names)[0] != files.sizes)


def _fill(entry: Path, files: FolderFiles, fetch: Fetch, say: Callable[[str], None]) -> None:
    """Copy what is absent; the marker is removed first and written last."""
    copy, complete = entry / "copy", entry / "complete.json"
    copy.mkdir(parents=True, exist_ok=True)
    complete.unlink(missing_ok=True)
    rows = _absent(copy, files)
    _check_room(copy, files, rows)
    started = time.monotonic()
    amount = f"{len(rows):,} files ({files.sizes[rows].sum() / 1e6:,.1f} MB) of {files.folder}"
    say(f"copies {amount} to {copy}")
    unfinished, root, made = os.fsencode(entry / "unfinished"), os.fsencode(copy), b""
    for piece, data in fetch(files.folder, _pieces(files, rows)):
        start = 0
        for name, size in zip(piece.names.tolist(), piece.sizes.tolist(), strict=True):
            stop = start + min(size - piece.offset, len(data) - start)
            with open(unfinished, "ab" if piece.offset else "wb") as file:
                file.write(data[start:stop].data)
            if piece.offset + stop - start == size:
                path = os.path.join(root, name)
                if (folder := os.path.dirname(path)) != made:
                    os.makedirs(folder, exist_ok=True)
                    made = folder
                os.replace(unfinished, path)
            start = stop
    about = {"folder": files.folder, "files": len(files.names), "bytes": int(files.sizes.sum())}
    with open(unfinished, "w", encoding="utf-8") as marker:
        json.dump(about, marker)
        _sync(marker.fileno())
    os.replace(unfinished, complete)
    say(f"copied {amount} in {time.monotonic() - started:.1f} s")


def _check_room(copy: Path, files: FolderFiles, rows: NDArray[np.int64]) -> None:
    """Raise a one-line ValueError if a disk has no room for some of the files."""
    disk, directory = os.statvfs(copy), str(copy.parents[1])
    block = disk.f_frsize
    need, have = int((-(-files.sizes[rows] // block) * block).sum()), disk.f_bavail * block
    if need > have:
        raise ValueError(
            f"a copy of {files.folder!r} needs {need / 1e9:.3f} GB in {directory!r}, "
            f"{have / 1e9:.3f} GB are free; delete old copies there or choose another --node-cache"
        )


def _sync(descriptor: int) -> None:
    """Bring a file system to its disk, so that no power cut leaves holes in a copy."""
    # Not os.sync: that waits for all file systems, a network one that hangs among them.
    with contextlib.suppress(AttributeError):  # Linux only
        ctypes.CDLL(None).syncfs(descriptor)


# Pieces


def _piece(files: FolderFiles, rows: NDArray[np.int64]) -> Piece:
    sizes = files.sizes[rows]
    return Piece(files.names[rows], sizes, files.times_ns[rows], 0, int(sizes.sum()))


def _pieces(files: FolderFiles, rows: NDArray[np.int64]) -> Iterator[Piece]:
    """Yield some of the files in pieces; one that is larger than a piece comes in several."""
    ends = np.cumsum(files.sizes[rows])
    first, before = 0, 0
    while first < len(rows):
        last = int(np.searchsorted(ends, before + PIECE_BYTES, side="right"))
        last = min(max(last, first + 1), first + PIECE_FILES)
        whole = _piece(files, rows[first:last])
        for offset in range(0, max(1, whole.nbytes), PIECE_BYTES):
            yield whole._replace(offset=offset, nbytes=min(PIECE_BYTES, whole.nbytes - offset))
        first, before = last, int(ends[last - 1])


def read_piece(folder: str, piece: Piece, *, same_times: bool = True) -> NDArray[np.uint8]:
    """Read a piece -> its bytes, uint8 [piece.nbytes].

    ValueError in one line: a file that cannot be read, or is not as it was listed.
    """
    data = np.empty(piece.nbytes, np.uint8)
    root, start = os.fsencode(folder), 0
    listed = zip(piece.names.tolist(), piece.sizes.tolist(), piece.times_ns.tolist(), strict=True)
    for name, size, time_ns in listed:
        path = os.path.join(root, name)
        stop = start + min(size - piece.offset, len(data) - start)
        try:
            with open(path, "rb", buffering=0) as file:
                stat = os.fstat(file.fileno())
                is_same = stat.st_size == size and (stat.st_mtime_ns == time_ns or not same_times)
                file.seek(piece.offset)
                while is_same and start < stop:
                    got = file.readinto(data[start:stop].data)
                    is_same, start = bool(got), start + (got or 0)
        except OSError as error:
            raise ValueError(
                f"cannot read {os.fsdecode(path)!r}: {error.strerror}; fix or remove the file"
            ) from None
        if not is_same:
            raise ValueError(
                f"{os.fsdecode(path)!r} has changed since it was listed; leave a folder as it is "
                f"while a sweep reads it, then resume the sweep"
            )
    return data


def _in_turn(
    pieces: Iterable[Piece], begin: Callable[[Piece], Callable[[], T]]
) -> Iterator[tuple[Piece, T]]:
    """Begin some pieces ahead, and yield each in turn with what it comes to."""
    under_way: deque[tuple[Piece, Callable[[], T]]] = deque()
    for piece in pieces:
        under_way.append((piece, begin(piece)))
        if len(under_way) == PIECES_AHEAD:
            first, result = under_way.popleft()
            yield first, result()
    for first, result in under_way:
        yield first, result()


def fetch_from_here(folder: str, pieces: Iterable[Piece]) -> Fetched:
    """Read the files under the path where they were listed: a `Fetch` on threads."""
    with ThreadPoolExecutor(PIECES_AHEAD) as pool:
        yield from _in_turn(pieces, lambda piece: pool.submit(read_piece, folder, piece).result)


def fetch_from_node(node_id: str, folder: str, pieces: Iterable[Piece]) -> Fetched:
    """Read the files by tasks on another node of the Ray cluster: a `Fetch`, once given the node.

    The tasks take no CPU, so a node that is full of trials serves them too.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Each node has 1 of a resource of its own name: a share limits how many run at once.
    has = {name for node in ray.nodes() if node["NodeID"] == node_id for name in node["Resources"]}
    own = [name for name in has if name.startswith("node:") and "__" not in name]
    read = ray.remote(read_piece).options(
        num_cpus=0,
        resources=dict.fromkeys(own, 1 / READS_AT_ONCE),
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    )

    def begin(piece: Piece) -> Callable[[], NDArray[np.uint8]]:
        return functools.partial(ray.get, read.remote(folder, piece))

    try:
        yield from _in_turn(pieces, begin)
    except ray.exceptions.RayError as error:
        # What `read_piece` raised is the cause of what Ray raises, which has lines of traceback.
        why = " ".join(str(getattr(error, "cause", error)).split())[:500]
        raise ValueError(f"cannot fetch {folder!r} from the driver's node: {why}") from None
