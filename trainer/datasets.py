"""Named sources of images -> seeded, stratified train, validation and test splits, and a bank.

Everything here is plain numpy, so that one copy of a data set can be shared by all processes
of a machine, and nothing here imports torch. `train` carries labels where they are known; only
the loss `sup_con` uses them. `test` is the source's own, or 20 % of it. Images that would take
too much memory stay in files (`images.py`), which `stream.py` reads.

Shapes: N images, 3 channels, S pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
from numpy.typing import NDArray

from trainer.cache import Progress
from trainer.config import TrainConfig
from trainer.folder import Classes
from trainer.images import ImageFiles, Images, channel_statistics, pixels
from trainer.sources import SOURCES, Found, InMemory, Request, find_source
from trainer.splits import limited, split_indices, stratified_pick

__all__ = [
    "BANK_IMAGES",
    "SOURCES",
    "DataSplits",
    "ImageFiles",
    "Images",
    "Split",
    "channel_statistics",
    "load_dataset",
    "load_for",
    "split_indices",
    "stratified_pick",
]

BANK_IMAGES = 20_000
"""Most labelled train images that the kNN classifier and the linear probe compare with."""
_BANK_SEED = 0  # the same for every run, so that runs compare


@dataclass(frozen=True)
class Split:
    """images: uint8 [N, 3, S, S], contiguous, or in files; labels: int64 [N], into `classes`.

    A label is -1 where it is unknown.
    """

    images: Images
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Some images as an array [B, 3, S, S], the same whether they are in files or not."""
        return pixels(self.images, rows)


@dataclass(frozen=True)
class DataSplits:
    """A data set, split; each split in random order, so that a prefix is a random sample.

    `bank` are the labelled images that kNN and the linear probe compare with: train images that
    have labels, at most 20,000, or those of a `labelled` source; no rows where nothing is
    labelled. It is `train` itself where that is small enough, else a copy of the rows (61 MB at
    32 pixels). `skipped` names the corrupt files that were left out; of files that are decoded as
    they are needed none is known beforehand. `mean` and `std` are the channels' statistics over
    the train images, scaled to [0, 1]; `std` is at least 1e-3.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    bank: Split
    skipped: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_dataset(
    name: str,
    *,
    labelled: str | None = None,
    labels_needed: bool = True,
    image_size: int = 32,
    data_dir: str | Path | None = None,
    in_memory: InMemory = "auto",
    labelled_in_memory: InMemory | None = None,
    download: bool = False,
    split_seed: int = 0,
    train_limit: int | None = None,
    val_limit: int | None = None,
    test_limit: int | None = None,
    cache_dir: Path | str | None = None,
    progress: Progress | None = None,
) -> DataSplits:
    """Load a source by name and split it; the same arguments give the same splits anywhere.

    `labelled` names a second source, which then gives classes, `val`, `test` and `bank`; of the
    first, all images but those that it holds out itself are `train`, and its labels are ignored.
    Without it and with `labels_needed` false, a folder may have no classes: it then has a `val`,
    but neither `bank` nor, unless it holds one out, `test`.

    The limits cut their splits, stratified, after these are made, so none depends on another's.
    The bank follows `train_limit` where all of `train` is labelled. `in_memory=auto` decodes
    beforehand what takes at most a quarter of the free memory; `labelled_in_memory` says it of
    the second source, None: as of the first. `progress(done, total)` counts images that are being
    decoded. ValueError in one line: an unknown name, a source that is not there, labels that are
    missing, and what the sources themselves refuse.
    """
    limits = {"train_limit": train_limit, "val_limit": val_limit, "test_limit": test_limit}
    for field, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{field} must be at least 1 image, got {limit}")
    if labelled == name:
        raise ValueError(
            f"labelled must be another source than the data set, got {name!r} for both: "
            f"training would see the validation images"
        )

    def find(name: str, classes: Classes, *, is_main: bool) -> _Images:
        source, argument = find_source(name)
        if is_main and in_memory == "no" and not source.streams:
            raise ValueError(
                f"in_memory=no is for stl10, imagenet and folder:PATH; {name!r} is always in memory"
            )
        request = Request(
            argument,
            classes,
            image_size,
            in_memory if is_main else labelled_in_memory or in_memory,
            None if data_dir is None else Path(data_dir).expanduser(),
            download,
            default_cache_dir() if cache_dir is None else Path(cache_dir),
            progress,
        )
        return _checked(name, source.load(request), classes)

    if labelled is None:
        main = find(name, "needed" if labels_needed else "optional", is_main=True)
        measured = main
    else:
        find_source(name)  # both names are checked before either is decoded
        measured = find(labelled, "needed", is_main=False)
        main = find(name, "ignored", is_main=True)

    train_rows, val_rows, test_rows = split_indices(
        measured.labels, test_N=measured.is_test, split_seed=split_seed, **limits
    )
    if labelled is not None or (measured.labels < 0).any():
        # Here a limit on training says nothing about the images that measure it.
        whole, _, _ = split_indices(measured.labels, test_N=measured.is_test, split_seed=split_seed)
        bank_rows = whole[measured.labels[whole] >= 0]
    else:
        bank_rows = train_rows
    bank_rows = limited(bank_rows, measured.labels, BANK_IMAGES, [_BANK_SEED, 6])
    if labelled is not None:
        train_rows = np.arange(len(main.labels))
        train_rows = train_rows if main.is_test is None else train_rows[~main.is_test]
        train_rows = train_rows[stratified_pick(main.labels[train_rows], 0, [split_seed, 1])[1]]
        train_rows = limited(train_rows, main.labels, train_limit, [split_seed, 2])

    train = main.split(train_rows)
    is_bank = main is measured and np.array_equal(bank_rows, train_rows)
    mean, std = channel_statistics(train.images)
    return DataSplits(
        name=name,
        classes=measured.classes,
        train=train,
        val=measured.split(val_rows),
        test=measured.split(test_rows),
        bank=train if is_bank else measured.split(bank_rows),
        skipped=main.skipped if main is measured else main.skipped + measured.skipped,
        mean=mean,
        std=std,
    )


def load_for(
    config: TrainConfig,
    *,
    labels_needed: bool = True,
    labelled_in_memory: InMemory | None = None,
    download: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> DataSplits:
    """Load the splits that a configuration names; see `load_dataset`."""
    return load_dataset(
        config.dataset,
        labelled=config.labelled,
        labels_needed=labels_needed,
        image_size=config.image_size,
        data_dir=config.data_dir,
        in_memory=config.in_memory,
        labelled_in_memory=labelled_in_memory,
        download=download,
        split_seed=config.split_seed,
        train_limit=config.train_limit,
        val_limit=config.val_limit,
        test_limit=config.test_limit,
        cache_dir=cache_dir,
        progress=progress,
    )


def default_cache_dir() -> Path:
    """The platform's cache folder of this program."""
    return Path(platformdirs.user_cache_dir("contrasweep"))


@dataclass(frozen=True)
class _Images:
    """A source's images that count: `rows` numbers them, `labels` and `is_test` speak of them."""

    images: Images
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    is_test: NDArray[np.bool_] | None
    classes: tuple[str, ...]
    skipped: tuple[str, ...]

    def split(self, rows: NDArray[np.int64]) -> Split:
        return Split(self.images[self.rows[rows]], self.labels[rows])


def _checked(name: str, found: Found, classes: Classes) -> _Images:
    """Drop what does not count, and labels that are not wanted; ValueError for what is missing."""
    rows = np.arange(len(found.labels)) if found.rows is None else found.rows
    labels, names = found.labels[rows], found.classes
    known = np.unique(labels[labels >= 0])
    if classes == "needed" and len(known) < 2:
        raise ValueError(
            f"data set {name!r} has one class with images, {names[known[0]]!r}; at least two are "
            f"needed to measure features, or add --labelled SOURCE, which has them"
        )
    if classes == "ignored" or len(known) < 2:
        labels, names = np.full(len(rows), -1, np.int64), ()
    is_test = None if found.is_test is None else found.is_test[rows]
    return _Images(found.images, rows, labels, is_test, names, found.skipped)
