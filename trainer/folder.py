"""Image folders: a tree of image files -> a listing, and its images decoded and cached.

A folder is listed with `os.scandir` and, where its images are to be held in memory, decoded once
on all cores by Pillow into an entry of the cache. An entry is named by a hash of the folder's
path, the files' names, sizes and times, and the image size.

Shapes: N images, n of a chunk, 3 channels, S pixels a side.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.cache import Progress, cached_images
from trainer.images import CorruptImageError, ImageFiles, cores, read_image

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)
HELD_OUT = ("test", "val")
"""Folders beside `train/` that may hold the test images; ImageNet's layout calls them `val`."""

Classes = Literal["needed", "optional", "ignored"]
"""What the folders in a folder mean. needed: classes, or it is an error; optional: classes, where
there are two or more of them; ignored: nothing."""

FORMAT = 2
"""Raised when decoding or the cache's layout changes, so that older entries are not read."""

_CHUNK = 64  # files a task: keeps all cores busy to the end and costs nothing per file

_SMALL_FILE_BYTES = 2_000
"""Below this mean size one thread decodes faster than several, which then mostly hand the
interpreter's lock to each other: 13,700 against 10,500 images of 1 KB a second on two cores;
of 4 KB 6,000 against 8,100, of 26 KB 3,500 against 6,800."""


@dataclass(frozen=True, eq=False)
class Listing:
    """A folder's N images by name, in order of class and name, those held out at the end.

    A few arrays, for the reasons of `ImageFiles`: `folder`, absolute; `names`, paths below it;
    `labels`, int64 indices into `classes`, -1 where these are ignored; `held_out`, bool.
    """

    folder: str
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    held_out: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.names)

    def files(self, image_size: int) -> ImageFiles:
        """The same images, to be decoded as they are needed."""
        return ImageFiles(self.folder, self.names, self.labels, image_size)


def list_images(
    folder: Path, *, classes: Classes = "needed", held_out: tuple[str, ...] = HELD_OUT
) -> Listing:
    """List the images of `train/CLASS/...` and `test/CLASS/...`, or of `CLASS/...`, by name.

    `val/` stands in for `test/` where only that exists; `held_out` names these. Where classes
    are ignored, images may lie anywhere below the folder, and those of `test/` count as held out
    if there is a `train/`. Hidden files and files that are no images by their extension are left
    out. ValueError in one line: the folder is missing, unreadable, empty, has no images, or no
    classes though they are needed, or holds out a class that `train/` lacks.
    """
    folder = Path(os.path.abspath(folder.expanduser()))
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"data folder {str(folder)!r} {what}; give a folder of images")
    try:
        below = _subfolders(folder)
        if not below and not any(folder.iterdir()):
            raise ValueError(
                f"data folder {str(folder)!r} is empty; expected CLASS/IMAGE files in it"
            )
        found = None if classes == "ignored" else _by_class(folder, below, held_out)
        if found is None or (classes == "optional" and len(found.classes) < 2):
            found = _anywhere(folder, below, held_out)
        elif not len(found) and len(_anywhere(folder, below, held_out)):
            raise ValueError(
                f"data folder {str(folder)!r} has no class folders with images; expected "
                f"CLASS/IMAGE files, or add --labelled SOURCE, which has classes"
            )
    except OSError as error:
        raise ValueError(f"cannot read data folder {str(folder)!r}: {error.strerror}") from None
    if not len(found):
        expected = ", ".join(sorted(EXTENSIONS))
        raise ValueError(
            f"data folder {str(folder)!r} has no images; expected CLASS/IMAGE files ({expected})"
        )
    return found


def _by_class(folder: Path, below: tuple[str, ...], held_out: tuple[str, ...]) -> Listing:
    train = folder / "train"
    parts = [""]
    splits = {"train", *HELD_OUT}
    if "train" in below and len(below) > 1 and splits >= {*below} and not _subfolders(train):
        return _listing(folder, [], [], (), None)  # train/IMAGE and test/IMAGE are no classes
    # A class may be called "train", too: the layout's folder has classes and no images in it.
    if "train" in below and _subfolders(train) and not _has_images(train):
        parts = ["train/", *(f"{name}/" for name in held_out if name in below)][:2]
    names: list[bytes] = []
    labels: list[int] = []
    held_out_from = 0
    classes: dict[str, int] = {}
    for part in parts:
        held_out_from = len(names)
        for label in _subfolders(folder / part):
            images = list(_walk(str(folder / part / label), f"{part}{label}/"))
            if images and part != parts[0] and label not in classes:
                raise ValueError(
                    f"data folder {str(folder)!r} holds out class {label!r} that train/ lacks; "
                    f"both need the same class folders"
                )
            if images:
                names += images
                labels += [classes.setdefault(label, len(classes))] * len(images)
    return _listing(folder, names, labels, tuple(classes), held_out_from if parts[1:] else None)


def _anywhere(folder: Path, below: tuple[str, ...], held_out: tuple[str, ...]) -> Listing:
    parts = [""]
    if "train" in below and not _has_images(folder):
        parts = ["train/", *(f"{name}/" for name in held_out if name in below)][:2]
    if not parts[1:]:
        names = list(_walk(str(folder), ""))
        return _listing(folder, names, [-1] * len(names), (), None)
    names = list(_walk(str(folder / "train"), "train/"))
    held_out_from = len(names)
    names += _walk(str(folder / parts[1]), parts[1])
    return _listing(folder, names, [-1] * len(names), (), held_out_from)


def _listing(
    folder: Path,
    names: list[bytes],
    labels: list[int],
    classes: tuple[str, ...],
    held_out_from: int | None,
) -> Listing:
    rows = np.arange(len(names))
    return Listing(
        str(folder),
        np.array(names, np.bytes_),
        np.array(labels, np.int64),
        classes,
        rows >= (len(names) if held_out_from is None else held_out_from),
    )


def _subfolders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))


def _is_image(name: str) -> bool:
    stem, dot, extension = name.rpartition(".")
    return f"{dot}{extension}".lower() in EXTENSIONS and stem != "" and stem[0] != "."


def _has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(_is_image(entry.name) and entry.is_file() for entry in entries)


def _walk(folder: str, prefix: str) -> Iterator[bytes]:
    """Yield a folder's images in the order of their names, subfolders (no links) included."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if _is_image(entry.name) and entry.is_file():
            yield os.fsencode(prefix + entry.name)
        elif entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _walk(entry.path, f"{prefix}{entry.name}/")


def decode_listing(
    listing: Listing, *, image_size: int, cache_dir: Path, progress: Progress | None = None
) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """Decode a folder's images, or map them from the cache when they were decoded before.

    Returns (uint8 [N, 3, S, S] in the listing's order, rows of the corrupt files, left black).
    ValueError in one line: an unreadable file, and what `cached_images` refuses.
    """
    files = listing.files(image_size)
    paths = [os.path.join(files.folder, files.name(row)) for row in range(len(files))]
    try:
        stats = [os.stat(path) for path in paths]
    except OSError as error:
        raise ValueError(
            f"cannot read {error.filename!r}: {error.strerror}; fix or remove the file"
        ) from None
    small = sum(stat.st_size for stat in stats) < _SMALL_FILE_BYTES * len(stats)
    return cached_images(
        cache_dir,
        _cache_key(listing, stats, image_size),
        count=len(listing),
        image_size=image_size,
        decode=lambda: decode_on_threads(
            len(paths),
            image_size,
            lambda row: read_image(paths[row], image_size),
            threads=1 if small else cores(),
        ),
        about={"folder": listing.folder},
        progress=progress,
    )


def _cache_key(listing: Listing, stats: list[os.stat_result], image_size: int) -> str:
    digest = hashlib.sha256()
    digest.update(os.fsencode(f"{FORMAT}\0{image_size}\0{listing.folder}\0"))
    rows = zip(listing.names.tolist(), stats, listing.held_out.tolist(), strict=True)
    digest.update(
        b"".join(
            b"%b\0%d\0%d\0%d\n" % (name, stat.st_size, stat.st_mtime_ns, held_out)
            for name, stat, held_out in rows
        )
    )
    return digest.hexdigest()[:32]


def decode_on_threads(
    count: int, image_size: int, decode: Callable[[int], NDArray[np.uint8]], *, threads: int
) -> Iterator[tuple[NDArray[np.uint8], list[int]]]:
    """Decode rows 0 to count -> (images [n, 3, S, S], rows of corrupt ones, left black), in order.

    Threads, not processes: Pillow decodes and resamples without the interpreter's lock, and one
    pass over a folder leaves them little to hand over.
    """

    def decode_chunk(start: int) -> tuple[NDArray[np.uint8], list[int]]:
        rows = range(start, min(start + _CHUNK, count))
        images = np.zeros((len(rows), 3, image_size, image_size), np.uint8)
        corrupt: list[int] = []
        for place, row in enumerate(rows):
            try:
                images[place] = decode(row)
            except CorruptImageError:
                corrupt.append(place)
        return images, corrupt

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(decode_chunk, range(0, count, _CHUNK))
