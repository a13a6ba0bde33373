"""Decoded images on disk: one plain `.npy` file an entry, that every later run maps into memory.

An entry is named by a hash of all that its images were made from, so that changed files are
decoded anew. Leaves out the removal of old entries: each is one folder below `decoded/`, free to
be deleted.

Shapes: N images, n of a chunk, 3 channels, S pixels a side.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) while images are decoded."""
Chunks = Callable[[], Iterator[tuple[NDArray[np.uint8], list[int]]]]
"""Decodes: yields images [n, 3, S, S] in order, and the rows among them that are corrupt."""


def cached_images(
    cache_dir: Path,
    key: str,
    *,
    count: int,
    image_size: int,
    decode: Chunks,
    about: dict[str, Any],
    progress: Progress | None = None,
) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """Map the images [N, 3, S, S] of an entry, decoding them first where it is absent.

    Returns them, read-only, with the rows of corrupt ones. Processes that ask for the same entry
    at once decode it once; a damaged one is replaced. `about` is written beside the images, for
    people. ValueError in one line: a cache folder that cannot be written, or is too small.
    """
    entry = cache_dir / "decoded" / key
    shape = (count, 3, image_size, image_size)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_suffix(".lock")):
            cached = _read(entry, shape)
            if cached is None:
                _write(entry, shape, decode, about, progress)
                cached = _read(entry, shape)
    except OSError as error:
        raise ValueError(
            f"cannot keep decoded images in {str(entry.parent)!r}: {error.strerror or error}; "
            f"choose another cache folder"
        ) from None
    if cached is None:
        raise ValueError(f"{str(entry)!r} cannot be read back; choose another cache folder")
    return cached


def _read(
    entry: Path, shape: tuple[int, int, int, int]
) -> tuple[NDArray[np.uint8], tuple[int, ...]] | None:
    """Map an entry's images; None when there is none, or it is not what was written."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        corrupt = tuple(int(row) for row in meta["corrupt"])
        images: NDArray[np.uint8] = np.load(entry / "images.npy", mmap_mode="r", allow_pickle=False)
        if images.shape != shape or images.dtype != np.uint8:
            return None
        # 0.1 s for 60,000 images of 32 pixels; a disk that filled up leaves holes of zeros.
        crc = 0
        for start in range(0, len(images), 4096):
            crc = zlib.crc32(images[start : start + 4096].data, crc)
        return (images, corrupt) if crc == meta["crc32"] else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _write(
    entry: Path,
    shape: tuple[int, int, int, int],
    decode: Chunks,
    about: dict[str, Any],
    progress: Progress | None,
) -> None:
    """Decode into a temporary folder beside `entry`, then rename it into place."""
    needed, free = int(np.prod(shape)), shutil.disk_usage(entry.parent).free
    if needed > free:
        raise ValueError(
            f"decoded images need {needed / 1e9:.1f} GB in {str(entry.parent)!r}, "
            f"{free / 1e9:.1f} GB are free; choose another cache folder or a smaller image size"
        )
    with tempfile.TemporaryDirectory(
        prefix="writing-", dir=entry.parent, ignore_cleanup_errors=True
    ) as temporary:
        building = Path(temporary) / "entry"
        building.mkdir()
        corrupt: list[int] = []
        done, crc = 0, 0
        with open(building / "images.npy", "wb") as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            for images, unreadable in decode():
                corrupt += [done + row for row in unreadable]
                crc = zlib.crc32(images.data, crc)
                out.write(images.data)
                done += len(images)
                if progress is not None:
                    progress(done, shape[0])
        meta = {"crc32": crc, "corrupt": corrupt, "image_size": shape[2], **about}
        (building / "meta.json").write_text(json.dumps(meta))
        if entry.exists():
            shutil.rmtree(entry)  # damaged: the caller read it and found it wanting
        building.rename(entry)
