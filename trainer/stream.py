"""Images of a split -> batches on the device, in the order of given rows.

One reader for each way of keeping images: an array that lies on the device, or in the host's
memory, and files that worker processes of torch's DataLoader read ahead of their use. What they
yield depends on the rows alone, not on the device, the workers or their number. Leaves out the
order of the rows, which is the caller's.

Shapes: N images of a split, B images of a batch, P images of a piece of one, 3 channels,
S pixels a side.
"""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.images import Images, StoredImages, cores

RESIDENT_SHARE = 0.2
"""Share of a GPU's free memory that one array may take: train, bank, val and test come one after
another, and what is left is for training."""
MAX_WORKERS = 16
"""Most workers unless told otherwise: a batch is assembled by one process."""

_PIECE_IMAGES, _PIECE_BYTES = 64, 10_000_000
"""Most of a batch that one worker decodes at a time. All workers share in a batch, so the first
one comes soon; 64 images of 32 pixels take a worker 5 ms, handing them over 0.1 ms."""
_BATCHES_AHEAD = 2
"""Batches under way at least: one being decoded while the other is trained on."""


class Reader(Protocol):
    """Yields batches of one split's images."""

    def __len__(self) -> int:
        """Count the split's images."""

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each int64 tensor of B row numbers, a batch: uint8 [B, 3, S, S] on the device.

        `rows` may be endless: what is read ahead is bounded, and nothing where images are held in
        memory. The iterator may be dropped at any time. Row numbers are best on the CPU, whatever
        the device: to read them from a GPU would wait for it.
        """


def reader(images: Images, device: torch.device, workers: int | None) -> Reader:
    """Make the reader of a split's images.

    `workers` processes decode where images are in files: 0 decodes in this process, None takes the
    cores that it may use, at most 16. An array goes to a GPU once if it takes at most a fifth of
    the free memory, else batch by batch.
    """
    if isinstance(images, StoredImages):
        return FileReader(images, device, min(cores(), MAX_WORKERS) if workers is None else workers)
    return ArrayReader(images, device)


class ArrayReader:
    """Reads from an array, of which a GPU gets a copy if there is room, a CPU none."""

    def __init__(self, images: NDArray[np.uint8], device: torch.device) -> None:
        with warnings.catch_warnings():
            # Arrays shared between processes are read-only; nothing here writes to them.
            warnings.filterwarnings("ignore", message=".*not writable")
            self._images_N3SS = torch.from_numpy(images)
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self._images_N3SS.nbytes <= RESIDENT_SHARE * free:
                self._images_N3SS = self._images_N3SS.to(device)
        self._device = device

    def __len__(self) -> int:
        return len(self._images_N3SS)

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """See `Reader`."""
        images_N3SS = self._images_N3SS
        for rows_B in rows:
            if images_N3SS.device.type == self._device.type:
                # To a GPU only: what comes from one without waiting may be read before it is there.
                rows_B = rows_B.to(images_N3SS.device, non_blocking=self._device.type == "cuda")
                yield images_N3SS.index_select(0, rows_B)
            else:
                batch = _host_batch((len(rows_B), *images_N3SS.shape[1:]), self._device)
                torch.index_select(images_N3SS, 0, rows_B.cpu(), out=batch)
                yield batch.to(self._device, non_blocking=True)


class FileReader:
    """Decodes files in worker processes, started anew for each `batches` and ended with it.

    Workers are forked: that takes hundredths of a second, a fresh interpreter that imports torch
    takes seconds, and evaluation starts some at each report (0.1 to 0.2 s for two, measured, in
    which they decode a thousand small images or twenty photographs). The parent holds threads of
    CUDA, Ray and OpenMP, whose locks a fork may catch taken; a worker must use none of them, and
    does not: it opens files and runs Pillow and numpy. A worker ends by itself within
    a second of its parent's death.

    Pixels come through one block of anonymous shared memory that workers write to in place: 38 us
    of the parent's time for an image of 224 pixels. Tensors sent one by one take 56 us and need
    /dev/shm, of which a container has 64 MB by default; arrays through a pipe take 115 us.

    Attributes: `corrupt`, names of the corrupt files met so far, in order; each was warned of.
    """

    def __init__(self, files: StoredImages, device: torch.device, workers: int) -> None:
        self._files = files
        self._device = device
        self._workers = workers
        self.corrupt: list[str] = []

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """See `Reader`. A file that cannot be read is a ValueError in one line."""
        piece_images = max(1, min(_PIECE_IMAGES, _PIECE_BYTES // (3 * self._files.image_size**2)))
        sizes: deque[int] = deque()  # of the batches that are under way

        def pieces() -> Iterator[NDArray[np.int64]]:
            for rows_B in rows:
                rows_np = rows_B.cpu().numpy()
                sizes.append(len(rows_np))
                for start in range(0, max(1, len(rows_np)), piece_images):  # an empty one counts
                    yield rows_np[start : start + piece_images]

        batch: Tensor | None = None
        filled = 0
        for decoded in self._decode(pieces(), piece_images, sizes):
            if batch is None:
                batch, filled = _host_batch((sizes[0], *self._files.shape[1:]), self._device), 0
            # By numpy: torch would copy with all its threads, which then spin beside the workers.
            batch.numpy()[filled : filled + len(decoded)] = decoded
            filled += len(decoded)
            if filled == sizes[0]:
                sizes.popleft()
                yield batch.to(self._device, non_blocking=True)
                batch = None

    def _decode(
        self, pieces: Iterator[NDArray[np.int64]], piece_images: int, sizes: deque[int]
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield the pixels of each piece in turn; they are overwritten when the next is asked."""
        first = list(itertools.islice(pieces, max(2, self._workers)))
        workers = min(self._workers, len(first))
        pieces = itertools.chain(first, pieces)
        if workers == 0 or len(first) == 1:  # not worth a process
            for rows_P in pieces:
                images, corrupt = self._files.read(rows_P)
                self._warn(corrupt)
                yield images
            return

        batch_pieces = math.ceil(max(sizes) / piece_images)
        ahead = max(2, math.ceil(_BATCHES_AHEAD * batch_pieces / workers))
        # DataLoader hands out the next piece before it gives one back: one slot more than are
        # under way, and none is written to before it has been read.
        slots = ahead * workers + 1
        shape = (slots, piece_images, *self._files.shape[1:])
        shared = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
        loader = DataLoader(
            _SharedPieces(self._files, shared),
            batch_sampler=cast(
                "Iterable[list[int]]",
                (_Task(index % slots, rows_P) for index, rows_P in enumerate(pieces)),
            ),
            num_workers=workers,
            prefetch_factor=ahead,
            collate_fn=cast("Callable[[list[_Done]], _Done]", _as_it_is),
            multiprocessing_context="fork",
            worker_init_fn=functools.partial(_end_with_parent, os.getpid()),
            generator=torch.Generator(),  # it draws a seed, else from torch's global generator
        )
        for done in loader:
            if done.error is not None:
                raise ValueError(done.error)
            self._warn(done.corrupt)
            yield shared[done.slot, : done.images]

    def _warn(self, rows: list[int]) -> None:
        for row in rows:
            name = self._files.name(row)
            if name not in self.corrupt:
                self.corrupt.append(name)
                warnings.warn(
                    f"{name} in {self._files.folder} is corrupt: another image stands in for it",
                    stacklevel=2,
                )


class _Task(NamedTuple):
    slot: int
    rows: NDArray[np.int64]


class _Done(NamedTuple):
    slot: int
    images: int
    corrupt: list[int]
    error: str | None  # a string: DataLoader would wrap an exception in lines of traceback


class _SharedPieces(Dataset[_Done]):
    """What a worker runs: decodes the rows of a task into its slot of the shared memory."""

    def __init__(self, files: StoredImages, shared_KP3SS: NDArray[np.uint8]) -> None:
        self._files = files
        self._shared_KP3SS = shared_KP3SS

    def __getitems__(self, task: _Task) -> _Done:  # DataLoader's hook for a whole batch of indices
        try:
            images_P3SS, corrupt = self._files.read(task.rows)
        except ValueError as error:
            return _Done(task.slot, 0, [], str(error))
        self._shared_KP3SS[task.slot, : len(images_P3SS)] = images_P3SS
        return _Done(task.slot, len(images_P3SS), corrupt, None)


def _end_with_parent(parent: int, _worker: int) -> None:
    """End this process when `parent` is no longer the one that it belongs to.

    DataLoader's workers look too, but take for their parent whoever it is once they are up: one
    that was killed before that leaves them waiting for ever.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(done: _Done) -> _Done:
    return done


def _host_batch(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Memory for a batch, pinned for a GPU: torch reuses it once its copy has been made."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
