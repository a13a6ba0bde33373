"""Named sources of images -> seeded, stratified train, validation and test splits in memory.

Everything here is plain numpy, so that one copy of a data set can be shared by all processes
of a machine, and nothing here imports torch: torchvision (CIFAR) and scikit-learn (digits) are
imported by their sources only. `train` carries labels for the kNN bank; training does not use
them. `test` is the source's own, or 20 % of it. Leaves out: data sets that do not fit in
memory, and folders without labels.

Shapes: N images, 3 channels, H and W pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import platformdirs
from numpy.typing import NDArray
from PIL import Image

from trainer.config import TrainConfig
from trainer.folder import Progress, load_folder

VAL_FRACTION, VAL_MIN, VAL_MAX = 0.1, 300, 5_000
"""The validation split's share of train, and its bounds in images.

At 300 images and an accuracy of 85 % the standard error is 2.1 points, at 5,000 it is 0.5."""

TEST_FRACTION = 0.2
_STATISTICS_VALUES = 30_000_000  # 10,000 images of 32 pixels: 0.1 s; the mean's error is < 1e-3


@dataclass(frozen=True)
class Split:
    """images: uint8 [N, 3, H, W], contiguous; labels: int64 [N], indices into `classes`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSplits:
    """A data set, split; each split in random order, so that a prefix is a random sample.

    `skipped` names the corrupt files that were left out. `mean` and `std` are the channels'
    statistics over the train images, scaled to [0, 1]; `std` is at least 1e-3.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    skipped: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Request(NamedTuple):
    """What a source is asked for; `argument` is what follows the colon of its name."""

    argument: str
    image_size: int
    data_dir: Path | None
    download: bool
    cache_dir: Path
    progress: Progress | None


class Labelled(NamedTuple):
    """A source's images before splitting: uint8 [N, 3, H, W] and int64 [N].

    `is_test` marks the source's own test images [N]; None where it has none. `rows` picks the
    images that count (None: all), so that a mapped array need not be copied to drop some.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    is_test: NDArray[np.bool_] | None
    skipped: tuple[str, ...] = ()
    rows: NDArray[np.int64] | None = None


class Source(NamedTuple):
    """One entry of `SOURCES`."""

    description: str
    load: Callable[[Request], Labelled]


def load_dataset(
    name: str,
    *,
    image_size: int = 32,
    data_dir: str | Path | None = None,
    download: bool = False,
    split_seed: int = 0,
    train_limit: int | None = None,
    val_limit: int | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> DataSplits:
    """Load a source by name and split it; the same arguments give the same splits anywhere.

    `train_limit` and `val_limit` cut those splits, stratified, after the split is made, so
    `test` and the other split do not depend on them. `progress(done, total)` counts the files
    of a folder that is being decoded. ValueError in one line: an unknown name, a source that
    is not there, and what the sources themselves refuse.
    """
    kind, _, argument = name.partition(":")
    if kind not in SOURCES or (kind != "folder" and argument):
        known = ", ".join("folder:PATH" if key == "folder" else key for key in SOURCES)
        raise ValueError(f"unknown data set {name!r}; known: {known}")
    for field, limit in (("train_limit", train_limit), ("val_limit", val_limit)):
        if limit is not None and limit < 1:
            raise ValueError(f"{field} must be at least 1 image, got {limit}")
    source = SOURCES[kind].load(
        Request(
            argument,
            image_size,
            None if data_dir is None else Path(data_dir).expanduser(),
            download,
            default_cache_dir() if cache_dir is None else cache_dir,
            progress,
        )
    )
    rows = np.arange(len(source.labels)) if source.rows is None else source.rows
    labels = source.labels[rows]
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"data set {name!r} has one class with images, {source.classes[labels[0]]!r}; "
            f"at least two are needed to measure features"
            if len(labels)
            else f"data set {name!r} has no readable images; {len(source.skipped)} are corrupt"
        )
    splits = split_indices(
        labels,
        test_N=None if source.is_test is None else source.is_test[rows],
        split_seed=split_seed,
        train_limit=train_limit,
        val_limit=val_limit,
    )
    train, val, test = (Split(source.images[rows[i]], labels[i]) for i in splits)
    mean, std = channel_statistics(train.images)
    return DataSplits(name, source.classes, train, val, test, source.skipped, mean, std)


def load_for(
    config: TrainConfig,
    *,
    download: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> DataSplits:
    """Load the splits that a configuration names; see `load_dataset`."""
    return load_dataset(
        config.dataset,
        image_size=config.image_size,
        data_dir=config.data_dir,
        download=download,
        split_seed=config.split_seed,
        train_limit=config.train_limit,
        val_limit=config.val_limit,
        cache_dir=cache_dir,
        progress=progress,
    )


def default_cache_dir() -> Path:
    """The platform's cache folder of this program."""
    return Path(platformdirs.user_cache_dir("contrasweep"))


# Splits


def class_quotas(counts_C: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Share `total` among classes in proportion to `counts_C`, by largest remainder.

    Each share differs from the exact proportion by less than 1 and never exceeds its count.
    Integer arithmetic, and ties go to the lower class: no platform rounds otherwise.
    """
    available = int(counts_C.sum())
    assert 0 <= total <= available, f"{total} of {available}"
    if total == 0:
        return np.zeros_like(counts_C)
    quotas_C = counts_C * total // available
    remainder_C = counts_C * total % available
    largest = np.argsort(-remainder_C, kind="stable")[: total - int(quotas_C.sum())]
    quotas_C[largest] += 1
    return quotas_C


def stratified_pick(
    labels: NDArray[np.int64], total: int, seed: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pick `total` of the rows, every class in proportion; returns (picked, rest) row numbers.

    Both come in random order. Only `Generator.random` is drawn, whose stream numpy keeps.
    """
    keys_N = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))).random(len(labels))
    by_class_N = np.lexsort((keys_N, labels))  # class by class, at random within each
    _, starts_C, counts_C = np.unique(labels[by_class_N], return_index=True, return_counts=True)
    rank_N = np.arange(len(labels)) - np.repeat(starts_C, counts_C)
    chosen_N = rank_N < np.repeat(class_quotas(counts_C, total), counts_C)
    picked, rest = by_class_N[chosen_N], by_class_N[~chosen_N]
    return picked[np.argsort(keys_N[picked])], rest[np.argsort(keys_N[rest])]


def split_indices(
    labels: NDArray[np.int64],
    *,
    test_N: NDArray[np.bool_] | None = None,
    split_seed: int = 0,
    train_limit: int | None = None,
    val_limit: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Split N labels -> row numbers of (train, val, test), disjoint and each in random order.

    `test_N` marks rows that are the test split; without it, 20 % of each class are taken. `val`
    is 10 % of the rest, at least 300 and at most 5,000 rows, but at most half. Limits cut
    `train` and `val` afterwards; every step keeps the classes' proportions.
    """
    rows = np.arange(len(labels))
    if test_N is None:
        test, rest = stratified_pick(labels, round_half_up(len(rows), TEST_FRACTION), [split_seed])
    else:
        test, rest = rows[test_N], rows[~test_N]
        test = test[stratified_pick(labels[test], 0, [split_seed])[1]]
    val_total = min(max(round_half_up(len(rest), VAL_FRACTION), VAL_MIN), VAL_MAX, len(rest) // 2)
    val_rows, train_rows = stratified_pick(labels[rest], val_total, [split_seed, 1])
    train, val = rest[train_rows], rest[val_rows]
    if train_limit is not None and train_limit < len(train):
        train = train[stratified_pick(labels[train], train_limit, [split_seed, 2])[0]]
    if val_limit is not None and val_limit < len(val):
        val = val[stratified_pick(labels[val], val_limit, [split_seed, 3])[0]]
    return train, val, test


def round_half_up(count: int, fraction: float) -> int:
    """`count` times a fraction given in whole per cent, rounded in integers."""
    return (count * round(100 * fraction) + 50) // 100


def channel_statistics(
    images_N3HW: NDArray[np.uint8],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel in [0, 1], of an evenly spaced sample.

    The sample is bounded, read in chunks and summed in integers: quick on any size, exact on
    any machine. The deviation is at least 1e-3, so that a constant channel can be divided by it.
    """
    pixels = images_N3HW.shape[2] * images_N3HW.shape[3]
    size = min(len(images_N3HW), max(256, _STATISTICS_VALUES // (3 * pixels)))
    sample = np.linspace(0, len(images_N3HW) - 1, size).astype(np.int64)
    sums_3, squares_3 = np.zeros(3, np.int64), np.zeros(3, np.int64)
    step = max(1, 1_000_000 // (3 * pixels))
    for start in range(0, size, step):
        chunk = images_N3HW[sample[start : start + step]].astype(np.int32)
        sums_3 += chunk.sum(axis=(0, 2, 3), dtype=np.int64)
        squares_3 += (chunk * chunk).sum(axis=(0, 2, 3), dtype=np.int64)
    count = size * pixels
    mean_3 = sums_3 / count / 255
    std_3 = np.sqrt(np.maximum(squares_3 / count / 255**2 - mean_3**2, 0)).clip(min=1e-3)
    (m0, m1, m2), (s0, s1, s2) = mean_3.tolist(), std_3.tolist()
    return (m0, m1, m2), (s0, s1, s2)


# Sources


def _resize(images_NHWC: NDArray[np.uint8], image_size: int) -> NDArray[np.uint8]:
    """Square images [N, H, H, 3] -> contiguous [N, 3, S, S], antialiased."""
    if images_NHWC.shape[1] != image_size:
        size = (image_size, image_size)
        images_NHWC = np.stack(
            [
                np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
                for image in images_NHWC
            ]
        )
    return np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))


def _load_digits(request: Request) -> Labelled:
    from sklearn.datasets import load_digits  # 1 s to import

    digits = load_digits()
    grey_NHW = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = _resize(np.repeat(grey_NHW[..., None], 3, axis=3), request.image_size)
    classes = tuple(str(name) for name in digits.target_names)
    return Labelled(images, digits.target.astype(np.int64), classes, is_test=None)


def _load_cifar10(request: Request) -> Labelled:
    from torchvision.datasets import CIFAR10

    return _load_cifar("cifar10", CIFAR10, request)


def _load_cifar100(request: Request) -> Labelled:
    from torchvision.datasets import CIFAR100

    return _load_cifar("cifar100", CIFAR100, request)


def _load_cifar(name: str, dataset: Callable[..., object], request: Request) -> Labelled:
    root = request.data_dir or request.cache_dir / "datasets"
    parts = []
    for train in (True, False):
        try:
            parts.append(dataset(root=str(root), train=train, download=request.download))
        except RuntimeError:  # torchvision: files absent, or not those of the checksums
            raise ValueError(
                f"data set {name!r} is not in {str(root)!r}; give its folder as data_dir, "
                f"or add --download"
            ) from None
        except OSError as error:
            raise ValueError(f"cannot download {name!r} to {str(root)!r}: {error}") from None
    images_NHWC = np.concatenate([part.data for part in parts])  # type: ignore[attr-defined]
    labels = [np.asarray(part.targets, np.int64) for part in parts]  # type: ignore[attr-defined]
    test_N = np.repeat([False, True], [len(part) for part in labels])
    classes = tuple(parts[0].classes)  # type: ignore[attr-defined]
    images = _resize(images_NHWC, request.image_size)
    return Labelled(images, np.concatenate(labels), classes, test_N)


def _load_folder(request: Request) -> Labelled:
    if not request.argument:
        raise ValueError("data set 'folder' needs a path: folder:PATH")
    decoded = load_folder(
        Path(request.argument),
        image_size=request.image_size,
        cache_dir=request.cache_dir,
        progress=request.progress,
    )
    files = decoded.files
    readable_N = np.ones(len(files), bool)
    readable_N[list(decoded.corrupt)] = False
    rows = np.flatnonzero(readable_N)
    # Classes that only corrupt files stand for do not exist.
    classes = tuple(sorted({files[row].label for row in rows}))
    index = {label: number for number, label in enumerate(classes)}
    labels = np.array([index.get(file.label, -1) for file in files], np.int64)
    held_out_N = np.array([file.held_out for file in files])
    return Labelled(
        decoded.images,
        labels,
        classes,
        is_test=held_out_N if held_out_N.any() else None,
        skipped=tuple(files[row].name for row in decoded.corrupt),
        rows=rows,
    )


SOURCES: dict[str, Source] = {
    "digits": Source("1,797 handwritten digits of scikit-learn, built in", _load_digits),
    "cifar10": Source("60,000 photographs, 10 classes; --download fetches 170 MB", _load_cifar10),
    "cifar100": Source(
        "60,000 photographs, 100 classes; --download fetches 169 MB", _load_cifar100
    ),
    "folder": Source("folder:PATH, train/CLASS/* and test/CLASS/*, or CLASS/*", _load_folder),
}
