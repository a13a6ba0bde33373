"""Image folders: a tree of image files -> one cached `uint8` array.

A folder is listed with `os.scandir`, decoded once on all cores by Pillow, and kept as a plain
`.npy` file that every later run maps into memory. The cache entry is named by a hash of the
folder's path, the files' names, sizes and times, and the image size, so a changed folder is
decoded anew. Leaves out: streaming of data sets larger than the disk's cache, and removal of
old cache entries (each is one folder below `decoded/`, free to be deleted).

Shapes: N images, 3 channels, S pixels a side.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image, ImageOps

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) while a folder is decoded."""

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)
HELD_OUT = ("test", "val")
"""Folders beside `train/` that may hold the test images; ImageNet's layout calls them `val`."""

FORMAT = 1
"""Raised when decoding or the cache's layout changes, so that older entries are not read."""

_CHUNK = 64  # files a task: keeps all cores busy to the end and costs nothing per file

_SMALL_FILE_BYTES = 2_000
"""Below this mean size one thread decodes faster than several, which then mostly hand the
interpreter's lock to each other: 13,700 against 10,500 images of 1 KB a second on two cores;
of 4 KB 6,000 against 8,100, of 26 KB 3,500 against 6,800."""

_EXIF_ORIENTATION = 0x0112


class ImageFile(NamedTuple):  # 60,000 of them are made at each load: cheaper than a dataclass
    """One image file of a listing; `name` is relative to the folder, with forward slashes."""

    name: str
    label: str
    held_out: bool
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Decoded:
    """A folder's images [N, 3, S, S] in the order of `files`; those of `corrupt` are black."""

    images: NDArray[np.uint8]
    files: tuple[ImageFile, ...]
    corrupt: tuple[int, ...]


def list_images(folder: Path) -> tuple[ImageFile, ...]:
    """List the images of `train/CLASS/...` and `test/CLASS/...`, or of `CLASS/...`, by name.

    `val/` stands in for `test/` where only that exists. Hidden files and files that are no
    images by their extension are left out. ValueError in one line: the folder is missing, is
    empty, has no classes or no images, or holds out a class that `train/` lacks.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"data folder {str(folder)!r} {found}; give a folder of images")
    classes = _subfolders(folder)
    if not classes and not any(folder.iterdir()):
        raise ValueError(f"data folder {str(folder)!r} is empty; expected CLASS/IMAGE files in it")
    train = folder / "train"
    # A class may be called "train", too: the layout's folder has classes and no images in it.
    if "train" in classes and _subfolders(train) and not _has_images(train):
        held_out = next((name for name in HELD_OUT if name in classes), None)
        files = list(_walk_classes(train, "train/", held_out=False))
        if held_out is not None:
            files += _walk_classes(folder / held_out, f"{held_out}/", held_out=True)
    else:
        files = list(_walk_classes(folder, "", held_out=False))
    if not files:
        reason = "has no class folders" if not classes else "has no images"
        raise ValueError(
            f"data folder {str(folder)!r} {reason}; "
            f"expected CLASS/IMAGE files ({', '.join(sorted(EXTENSIONS))})"
        )
    known = {file.label for file in files if not file.held_out}
    unknown = sorted({file.label for file in files} - known)
    if unknown:
        raise ValueError(
            f"data folder {str(folder)!r} holds out class {unknown[0]!r} that train/ lacks; "
            f"both need the same class folders"
        )
    return tuple(files)


def _subfolders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))


def _is_image(name: str) -> bool:
    stem, dot, extension = name.rpartition(".")
    return f"{dot}{extension}".lower() in EXTENSIONS and stem != "" and stem[0] != "."


def _has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(_is_image(entry.name) and entry.is_file() for entry in entries)


def _walk_classes(folder: Path, prefix: str, *, held_out: bool) -> Iterator[ImageFile]:
    for label in _subfolders(folder):
        yield from _walk(str(folder / label), f"{prefix}{label}/", label, held_out)


def _walk(folder: str, prefix: str, label: str, held_out: bool) -> Iterator[ImageFile]:
    """Yield a class's images in the order of their names, subfolders (no links) included."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if _is_image(entry.name) and entry.is_file():
            stat = entry.stat()
            name = prefix + entry.name
            yield ImageFile(name, label, held_out, stat.st_size, stat.st_mtime_ns)
        elif entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", label, held_out)


def decode_image(data: bytes, image_size: int) -> NDArray[np.uint8]:
    """Decode one file's bytes -> uint8 [3, S, S]: upright, RGB, centre square, antialiased.

    Shorter side to `image_size` and centre crop in one resampling; transparency becomes white,
    16-bit grey its upper 8 bits. Raises whatever Pillow raises for a corrupt file.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image: Image.Image = opened
        # JPEG can decode at 1/2, 1/4 or 1/8 for a fraction of the time; twice the wanted size
        # is kept, so that the resampling below still does the antialiasing.
        image.draft("RGB", (2 * image_size, 2 * image_size))
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        image = _to_rgb(image)
    if image.size != (image_size, image_size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        image = image.resize(
            (image_size, image_size),
            Image.Resampling.BICUBIC,
            box=(left, top, left + side, top + side),
        )
    return np.asarray(image).transpose(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit PNG and TIFF: Pillow's own conversion clips at 255
        grey_SS = np.asarray(image).astype(np.int64)
        return Image.fromarray((grey_SS.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:  # what lies beneath transparent pixels is arbitrary
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def load_folder(
    folder: Path, *, image_size: int, cache_dir: Path, progress: Progress | None = None
) -> Decoded:
    """Decode a folder's images, or map them from the cache when they were decoded before.

    Processes that ask for the same folder at once decode it once; a damaged cache entry is
    replaced. ValueError in one line: what `list_images` refuses, an unreadable file, a cache
    folder that cannot be written.
    """
    folder = Path(os.path.abspath(folder.expanduser()))
    try:
        files = list_images(folder)
    except OSError as error:
        raise ValueError(f"cannot read data folder {str(folder)!r}: {error.strerror}") from None
    key = _cache_key(folder, files, image_size)
    entry = cache_dir / "decoded" / key
    shape = (len(files), 3, image_size, image_size)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_suffix(".lock")):
            cached = _read_cache(entry, shape)
            if cached is None:
                _write_cache(entry, folder, files, image_size, progress)
                cached = _read_cache(entry, shape)
    except OSError as error:
        raise ValueError(
            f"cannot keep decoded images in {str(entry.parent)!r}: {error.strerror or error}; "
            f"choose another cache folder"
        ) from None
    if cached is None:
        raise ValueError(f"{str(entry)!r} cannot be read back; choose another cache folder")
    return Decoded(cached[0], files, cached[1])


def _cache_key(folder: Path, files: tuple[ImageFile, ...], image_size: int) -> str:
    digest = hashlib.sha256()
    digest.update(os.fsencode(f"{FORMAT}\0{image_size}\0{folder}\0"))
    lines = (f"{f.name}\0{f.size}\0{f.mtime_ns}\0{f.held_out:d}\n" for f in files)
    digest.update("".join(lines).encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _read_cache(
    entry: Path, shape: tuple[int, ...]
) -> tuple[NDArray[np.uint8], tuple[int, ...]] | None:
    """Map a cache entry's images; None when there is none, or it is not what was written."""
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


def _write_cache(
    entry: Path,
    folder: Path,
    files: tuple[ImageFile, ...],
    image_size: int,
    progress: Progress | None,
) -> None:
    """Decode into a temporary folder beside `entry`, then rename it into place."""
    needed, free = 3 * image_size * image_size * len(files), shutil.disk_usage(entry.parent).free
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
            header = {
                "descr": "|u1",
                "fortran_order": False,
                "shape": (len(files), 3, image_size, image_size),
            }
            np.lib.format.write_array_header_1_0(out, header)
            for images, unreadable in _decode_chunks(folder, files, image_size):
                corrupt += [done + row for row in unreadable]
                crc = zlib.crc32(images.data, crc)
                out.write(images.data)
                done += len(images)
                if progress is not None:
                    progress(done, len(files))
        meta = {"crc32": crc, "corrupt": corrupt, "folder": str(folder), "image_size": image_size}
        (building / "meta.json").write_text(json.dumps(meta))
        if entry.exists():
            shutil.rmtree(entry)  # damaged: the caller read it and found it wanting
        building.rename(entry)


def _decode_chunks(
    folder: Path, files: tuple[ImageFile, ...], image_size: int
) -> Iterator[tuple[NDArray[np.uint8], list[int]]]:
    """Yield (images [n, 3, S, S], rows of corrupt files, left black) in the order of `files`.

    Threads, not processes: Pillow decodes and resamples without the interpreter's lock, and a
    program that holds CUDA's or Ray's threads must not fork.
    """

    def decode(start: int) -> tuple[NDArray[np.uint8], list[int]]:
        chunk = files[start : start + _CHUNK]
        images = np.zeros((len(chunk), 3, image_size, image_size), np.uint8)
        unreadable: list[int] = []
        for row, file in enumerate(chunk):
            path = f"{folder}/{file.name}"
            try:
                with open(path, "rb") as opened:
                    data = opened.read()
            except OSError as error:
                raise ValueError(
                    f"cannot read {path!r}: {error.strerror}; fix or remove the file"
                ) from None
            try:
                images[row] = decode_image(data, image_size)
            except MemoryError:
                raise
            except Exception:  # Pillow's decoders raise anything from OSError to struct.error
                unreadable.append(row)
        return images, unreadable

    small = sum(file.size for file in files) < _SMALL_FILE_BYTES * len(files)
    with ThreadPoolExecutor(1 if small else _cores()) as pool:
        yield from pool.map(decode, range(0, len(files), _CHUNK))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
