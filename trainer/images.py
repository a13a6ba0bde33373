"""An image file -> `uint8` pixels, and images that stay in files until they are needed.

Pillow and numpy alone: what stands here runs in worker processes and never imports torch. Leaves
out the order of images and batches (`stream.py`) and finding files (`folder.py`).

Shapes: N images of a split, B images of a batch, 3 channels, S pixels a side, H before resizing.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from trainer.square import square_pixels

_STATISTICS_VALUES = 30_000_000  # 10,000 images of 32 pixels: 0.1 s; the mean's error is < 1e-3
_STATISTICS_FILES = 1_000
"""Image files decoded for the statistics: two cores take 4 s for photographs of ImageNet's size,
and the mean's error is 0.005, a fiftieth of the deviation."""


class CorruptImageError(ValueError):
    """A file that was read and is no image that Pillow can decode."""


def decode_image(data: bytes, image_size: int) -> NDArray[np.uint8]:
    """Decode one file's bytes -> uint8 [3, S, S], as `square_pixels` does; raises what it does."""
    with Image.open(io.BytesIO(data)) as opened:
        return square_pixels(opened, image_size)


def resized(image_3HH: NDArray[np.uint8], image_size: int) -> NDArray[np.uint8]:
    """A square image -> [3, S, S], antialiased."""
    if image_3HH.shape[1] == image_size:
        return image_3HH
    image = Image.fromarray(np.ascontiguousarray(image_3HH.transpose(1, 2, 0)))
    smaller = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(smaller).transpose(2, 0, 1)


def read_image(path: str, image_size: int) -> NDArray[np.uint8]:
    """Read and decode a file -> uint8 [3, S, S].

    A file that cannot be read is a ValueError in one line, one that cannot be decoded a
    `CorruptImageError`.
    """
    try:
        with open(path, "rb") as opened:
            data = opened.read()
    except OSError as error:
        raise ValueError(
            f"cannot read {path!r}: {error.strerror}; fix or remove the file"
        ) from None
    try:
        return decode_image(data, image_size)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # Pillow names an object in memory
        raise CorruptImageError(f"{path!r} is corrupt: it is no image") from error
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise CorruptImageError(f"{path!r} is corrupt: {why}") from error


class StoredImages(ABC):
    """N images read from files as they are needed: what stands in for an array [N, 3, S, S].

    Attributes: `folder`, absolute, of the files; `image_size` S.
    """

    folder: str
    image_size: int

    @abstractmethod
    def __len__(self) -> int:
        """Count the images."""

    @abstractmethod
    def __getitem__(self, rows: slice | NDArray[np.int64]) -> StoredImages:
        """Pick some of the images, reading none."""

    @abstractmethod
    def name(self, row: int) -> str:
        """Name an image below `folder`."""

    @abstractmethod
    def read(self, rows_B: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[int]]:
        """Read rows -> (uint8 [B, 3, S, S], rows of corrupt images that others stand in for).

        What cannot be read at all is a ValueError in one line.
        """

    @abstractmethod
    def file_names(self) -> NDArray[np.bytes_]:
        """Paths of the files below `folder`, in the file system's encoding."""

    @abstractmethod
    def in_folder(self, folder: str) -> StoredImages:
        """The same images, read from copies of the files below another folder."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, 3, S, S], as of the array that these would be."""
        return (len(self), 3, self.image_size, self.image_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the array that these would be."""
        return len(self) * 3 * self.image_size**2

    def decoded(self) -> NDArray[np.uint8]:
        """Read all of them, on all cores -> uint8 [N, 3, S, S]; meant for samples."""
        if not len(self):
            return np.empty(self.shape, np.uint8)
        with ThreadPoolExecutor(cores()) as pool:
            one_by_one = np.arange(len(self)).reshape(-1, 1)
            return np.concatenate([images for images, _ in pool.map(self.read, one_by_one)])


@dataclass(frozen=True, eq=False)
class ImageFiles(StoredImages):
    """N image files, each decoded when it is needed.

    A few arrays, not N objects: 1.28 million paths are 50 MB that processes share. Forked
    workers would copy a list of strings page by page, since reading one writes its reference
    count; pickled for Ray, arrays stay in its object store, unread and uncopied.

    Attributes: `folder`, absolute; `names`, paths below it in the file system's encoding;
    `labels`, int64, -1 where unknown; `image_size` S.
    """

    folder: str
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    image_size: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> ImageFiles:
        return ImageFiles(self.folder, self.names[rows], self.labels[rows], self.image_size)

    def name(self, row: int) -> str:
        """Path of a file below `folder`."""
        return os.fsdecode(bytes(self.names[row]))

    def file_names(self) -> NDArray[np.bytes_]:
        """See `StoredImages`."""
        return self.names

    def in_folder(self, folder: str) -> ImageFiles:
        """See `StoredImages`."""
        return replace(self, folder=folder)

    def read(self, rows_B: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[int]]:
        """Decode rows -> (uint8 [B, 3, S, S], rows of the corrupt files met on the way).

        Another image stands in for a corrupt one, always the same: the next readable one of its
        class, or the next of any class where it has no other. A file that cannot be read, or no
        image that can be decoded, is a ValueError in one line.
        """
        images = np.empty((len(rows_B), *self.shape[1:]), np.uint8)
        corrupt: list[int] = []
        for place, wanted in enumerate(rows_B.tolist()):
            why = ""
            for row in self._stand_ins(wanted):
                path = os.path.join(self.folder, self.name(row))
                try:
                    images[place] = read_image(path, self.image_size)
                    break
                except CorruptImageError as error:
                    corrupt.append(row)
                    why = why or str(error)
            else:
                raise ValueError(
                    f"none of {len(self)} images of {self.folder!r} can be decoded; {why}"
                )
        return images, corrupt

    def _stand_ins(self, row: int) -> Iterator[int]:
        """Yield the row, then the rest of its class, then all others, each from `row` on."""
        yield row
        others = np.roll(np.arange(len(self)), -row)[1:]
        same = self.labels[others] == self.labels[row]
        yield from others[same].tolist()
        yield from others[~same].tolist()


@dataclass(frozen=True, eq=False)
class RawImages(StoredImages):
    """N square images out of a few files of bare pixels, each image [3, H, H] column by column.

    Files are opened for each image: that takes 10 us, and nothing is left open to be forked or
    pickled.

    Attributes: `folder`, absolute; `files`, name and number of images of each; `side` H; `rows`,
    int64 [N], numbers through all the files; `image_size` S.
    """

    folder: str
    files: tuple[tuple[str, int], ...]
    side: int
    rows: NDArray[np.int64]
    image_size: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> RawImages:
        return replace(self, rows=self.rows[rows])

    def name(self, row: int) -> str:
        """Name of a file below `folder`, and the image's number in it."""
        file, number = self._place(row)
        return f"{file}, image {number}"

    def file_names(self) -> NDArray[np.bytes_]:
        """See `StoredImages`."""
        return np.array([os.fsencode(file) for file, _ in self.files], np.bytes_)

    def in_folder(self, folder: str) -> RawImages:
        """See `StoredImages`."""
        return replace(self, folder=folder)

    def read(self, rows_B: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[int]]:
        """Read rows -> (uint8 [B, 3, S, S], no rows: any bytes are an image)."""
        images = np.empty((len(rows_B), *self.shape[1:]), np.uint8)
        for place, row in enumerate(rows_B.tolist()):
            images[place] = self.image(row)
        return images, []

    def image(self, row: int) -> NDArray[np.uint8]:
        """Read and resize one image -> uint8 [3, S, S]; ValueError if its file cannot be read."""
        file, number = self._place(row)
        path = os.path.join(self.folder, file)
        image_bytes = 3 * self.side**2
        try:
            with open(path, "rb") as opened:
                opened.seek(number * image_bytes)
                data = opened.read(image_bytes)
        except OSError as error:
            raise ValueError(f"cannot read {path!r}: {error.strerror}; restore the file") from None
        if len(data) < image_bytes:
            raise ValueError(f"cannot read {path!r}: image {number} is cut off; restore the file")
        columns_3HH = np.frombuffer(data, np.uint8).reshape(3, self.side, self.side)
        return resized(columns_3HH.transpose(0, 2, 1), self.image_size)

    def _place(self, row: int) -> tuple[str, int]:
        """The file of an image, and its number there."""
        number = int(self.rows[row])
        for file, count in self.files:
            if number < count:
                return file, number
            number -= count
        raise AssertionError(f"row {row} is in none of {self.files}")


Images: TypeAlias = NDArray[np.uint8] | StoredImages
"""Images of a split: held in memory, uint8 [N, 3, S, S], or in files."""


def pixels(images: Images, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
    """Some of the images as an array [B, 3, S, S], read where they are in files."""
    some = images[rows]
    return some.decoded() if isinstance(some, StoredImages) else some


def channel_statistics(
    images: Images,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel in [0, 1], of an evenly spaced sample.

    The sample is bounded, read in chunks and summed in integers: quick on any size, exact on
    any machine; at most 1,000 images where each is a file to decode. The deviation is at least
    1e-3, so that a constant channel can be divided by it.
    """
    per_image = images.shape[2] * images.shape[3]
    size = min(len(images), max(256, _STATISTICS_VALUES // (3 * per_image)))
    if isinstance(images, ImageFiles):
        size = min(size, _STATISTICS_FILES)
    sample = np.linspace(0, len(images) - 1, size).astype(np.int64)
    sums_3, squares_3 = np.zeros(3, np.int64), np.zeros(3, np.int64)
    step = max(1, 1_000_000 // (3 * per_image))
    for start in range(0, size, step):
        chunk = pixels(images, sample[start : start + step]).astype(np.int32)
        sums_3 += chunk.sum(axis=(0, 2, 3), dtype=np.int64)
        squares_3 += (chunk * chunk).sum(axis=(0, 2, 3), dtype=np.int64)
    count = size * per_image
    mean_3 = sums_3 / count / 255
    std_3 = np.sqrt(np.maximum(squares_3 / count / 255**2 - mean_3**2, 0)).clip(min=1e-3)
    (m0, m1, m2), (s0, s1, s2) = mean_3.tolist(), std_3.tolist()
    return (m0, m1, m2), (s0, s1, s2)


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
