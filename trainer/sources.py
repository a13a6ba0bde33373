"""Where images come from: each source finds its files and gives images, labels and class names.

torchvision (CIFAR, STL-10) and scikit-learn (digits) are imported by their sources only. Leaves
out the splits, which `datasets.py` makes.

Shapes: N images, 3 channels, H and W pixels, S pixels a side.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainer.cache import Progress, cached_images
from trainer.folder import (
    FORMAT,
    Classes,
    Listing,
    decode_listing,
    decode_on_threads,
    list_images,
)
from trainer.images import (
    ImageFiles,
    Images,
    RawImages,
    StoredImages,
    cores,
    read_image,
    resized,
)

InMemory: TypeAlias = Literal["auto", "yes", "no"]
"""Whether images are decoded once and held in memory; auto: where they fit."""
MEMORY_SHARE = 0.25
"""Share of the memory that is free which decoded images may take with `in_memory=auto`: the
splits are copies of rows of the cache, and Ray's object store holds them once more."""

STL10_SIDE = 96
STL10_CLASSES = (
    "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
)  # fmt: skip


class Request(NamedTuple):
    """What a source is asked for; `argument` is what follows the colon of its name."""

    argument: str
    classes: Classes
    image_size: int
    in_memory: InMemory
    data_dir: Path | None
    download: bool
    cache_dir: Path
    progress: Progress | None

    @property
    def root(self) -> Path:
        """Folder of the data sets that can be downloaded."""
        return self.data_dir or self.cache_dir / "datasets"


class Found(NamedTuple):
    """A source's images before splitting: [N, 3, S, S], and int64 [N], -1 where unknown.

    `is_test` marks the source's own test images [N]; None where it has none. `rows` picks the
    images that count (None: all), so that a mapped array need not be copied to drop some.
    """

    images: Images
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    is_test: NDArray[np.bool_] | None
    skipped: tuple[str, ...] = ()
    rows: NDArray[np.int64] | None = None


class Source(NamedTuple):
    """One entry of `SOURCES`; `streams`: its images may be read as they are needed."""

    description: str
    load: Callable[[Request], Found]
    streams: bool = False


def find_source(name: str) -> tuple[Source, str]:
    """Look a data set's name up -> (source, what follows its colon); ValueError if unknown."""
    kind, _, argument = name.partition(":")
    if kind not in SOURCES or (kind != "folder" and argument):
        known = ", ".join("folder:PATH" if key == "folder" else key for key in SOURCES)
        raise ValueError(f"unknown data set {name!r}; known: {known}")
    return SOURCES[kind], argument


# Arrays


def _load_digits(request: Request) -> Found:
    from sklearn.datasets import load_digits  # 1 s to import

    digits = load_digits()
    grey_NHW = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rgb_N3HW = np.repeat(grey_NHW[:, None], 3, axis=1)
    small = [resized(image, request.image_size) for image in rgb_N3HW]
    images = np.ascontiguousarray(np.stack(small))
    classes = tuple(str(name) for name in digits.target_names)
    return Found(images, digits.target.astype(np.int64), classes, is_test=None)


def _load_cifar10(request: Request) -> Found:
    from torchvision.datasets import CIFAR10

    return _load_cifar("cifar10", CIFAR10, request)


def _load_cifar100(request: Request) -> Found:
    from torchvision.datasets import CIFAR100

    return _load_cifar("cifar100", CIFAR100, request)


def _load_cifar(name: str, dataset: Callable[..., Any], request: Request) -> Found:
    parts = [
        _with_torchvision(name, request, lambda train=train: dataset(  # type: ignore[misc]
            root=str(request.root), train=train, download=request.download
        ))
        for train in (True, False)
    ]  # fmt: skip
    images_N3HW = np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2)
    labels = [np.asarray(part.targets, np.int64) for part in parts]
    test_N = np.repeat([False, True], [len(part) for part in labels])
    images = whole = np.ascontiguousarray(images_N3HW)
    if request.image_size != whole.shape[2]:
        images = _cached(
            name,
            str(zlib.crc32(whole.data)),
            len(whole),
            lambda row: resized(whole[row], request.image_size),
            request,
        )
    return Found(images, np.concatenate(labels), tuple(parts[0].classes), test_N)


def _load_stl10(request: Request) -> Found:
    """Read torchvision's files: to check their 3 GB against checksums takes 10 s at each start."""
    from torchvision.datasets import STL10

    if request.download:  # checked then
        _with_torchvision(
            "stl10", request, lambda: STL10(str(request.root), split="test", download=True)
        )
    folder = request.root / STL10.base_folder
    image_bytes = 3 * STL10_SIDE**2
    files: list[tuple[str, int]] = []
    labels: list[NDArray[np.int64]] = []
    stamps: list[str] = []
    try:
        for split in ("train", "unlabeled", "test"):
            path = folder / f"{split}_X.bin"
            count, left = divmod(path.stat().st_size, image_bytes)
            numbers = np.full(count, -1, np.int64)
            if split != "unlabeled":
                numbers = np.fromfile(folder / f"{split}_y.bin", np.uint8).astype(np.int64) - 1
            if left or not count or len(numbers) != count or numbers.max() >= len(STL10_CLASSES):
                raise ValueError(
                    f"{str(path)!r} is not a whole file of STL-10; delete it and add --download"
                )
            files.append((path.name, count))
            labels.append(numbers)
            stamps.append(f"{count} {path.stat().st_mtime_ns}")
    except OSError:
        raise _absent("stl10", request) from None
    test_N = np.repeat([False, False, True], [len(part) for part in labels])
    stored = RawImages(
        folder=os.path.abspath(folder),
        files=tuple(files),
        side=STL10_SIDE,
        rows=np.arange(len(test_N)),
        image_size=request.image_size,
    )
    images: Images = stored
    if not _stays_in_files(stored, request):
        fingerprint = "\0".join([str(folder), *stamps])
        images = _cached("stl10", fingerprint, len(stored), stored.image, request)
    return Found(images, np.concatenate(labels), STL10_CLASSES, test_N)


def _with_torchvision(name: str, request: Request, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except RuntimeError:  # torchvision: files absent, or not those of the checksums
        raise _absent(name, request) from None
    except OSError as error:
        raise ValueError(f"cannot download {name!r} to {str(request.root)!r}: {error}") from None


def _absent(name: str, request: Request) -> ValueError:
    return ValueError(
        f"data set {name!r} is not in {str(request.root)!r}; give its folder as data_dir, "
        f"or add --download"
    )


def _cached(
    name: str,
    fingerprint: str,
    count: int,
    image: Callable[[int], NDArray[np.uint8]],
    request: Request,
) -> NDArray[np.uint8]:
    """Images `image(row)` of [3, S, S] -> one array [N, 3, S, S], kept like a decoded folder.

    `fingerprint` stands for the images' content.
    """
    key = f"{FORMAT}\0{request.image_size}\0{name}\0{fingerprint}"
    images, _ = cached_images(
        request.cache_dir,
        hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32],
        count=count,
        image_size=request.image_size,
        decode=lambda: decode_on_threads(count, request.image_size, image, threads=cores()),
        about={"source": name},
        progress=request.progress,
    )
    return images


# Files


def _load_folder(request: Request) -> Found:
    if not request.argument:
        raise ValueError("data set 'folder' needs a path: folder:PATH")
    return _of_listing(list_images(Path(request.argument), classes=request.classes), request)


def _load_imagenet(request: Request) -> Found:
    root = request.data_dir
    if root is None or not (root / "train").is_dir() or not (root / "val").is_dir():
        where = "needs data_dir" if root is None else f"is not in {str(root)!r}"
        raise ValueError(
            f"data set 'imagenet' {where}: a folder with train/WNID/* and val/WNID/*, as "
            f"torchvision.datasets.ImageNet unpacks the archives of image-net.org"
        )
    listing = list_images(root, classes=request.classes, held_out=("val",))
    found = _of_listing(listing, request)
    return found._replace(classes=_imagenet_classes(root / "meta.bin", found.classes))


def _imagenet_classes(meta: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    """First name of each WordNet id in torchvision's meta.bin, the id itself where it lacks one.

    Two classes are called "crane" and two "maillot": such names get their ids after them.
    """
    if not meta.exists():
        return wnids
    import torch

    try:
        known = torch.load(meta, weights_only=True)[0]
        names = [str(known[wnid][0]) if known.get(wnid) else wnid for wnid in wnids]
    except Exception as error:  # torch's reader raises anything from KeyError to RuntimeError
        why = str(error).strip().split("\n")[0]
        raise ValueError(
            f"cannot read class names from {str(meta)!r}: {why}; remove it to use WordNet ids"
        ) from None
    return tuple(
        f"{name} ({wnid})" if names.count(name) > 1 and name != wnid else name
        for name, wnid in zip(names, wnids, strict=True)
    )


def _of_listing(listing: Listing, request: Request) -> Found:
    is_test = listing.held_out if listing.held_out.any() else None
    files = listing.files(request.image_size)
    if _stays_in_files(files, request):
        return Found(files, listing.labels, listing.classes, is_test)
    images, corrupt = decode_listing(
        listing,
        image_size=request.image_size,
        cache_dir=request.cache_dir,
        progress=request.progress,
    )
    readable_N = np.ones(len(listing), bool)
    readable_N[list(corrupt)] = False
    rows = np.flatnonzero(readable_N)
    if not len(rows):
        raise ValueError(
            f"data folder {listing.folder!r} has no readable images; {len(corrupt)} are corrupt; "
            f"{_why_corrupt(files, corrupt[0])}"
        )
    labels, classes = listing.labels, listing.classes
    if classes:  # those that only corrupt files stand for do not exist
        kept, numbers = np.unique(labels[rows], return_inverse=True)
        classes = tuple(classes[label] for label in kept)
        labels = np.full(len(listing), -1, np.int64)
        labels[rows] = numbers
    skipped = tuple(files.name(row) for row in corrupt)
    return Found(images, labels, classes, is_test, skipped, rows)


def _stays_in_files(images: StoredImages, request: Request) -> bool:
    if request.in_memory == "auto":
        return images.nbytes > MEMORY_SHARE * available_memory_bytes()
    return request.in_memory == "no"


def _why_corrupt(files: ImageFiles, row: int) -> str:
    """Decode a file once more, since the cache says only that it is corrupt."""
    try:
        read_image(os.path.join(files.folder, files.name(row)), files.image_size)
    except ValueError as error:
        return str(error)
    return f"delete the cache: {files.name(row)!r} can be decoded by now"


def available_memory_bytes() -> int:
    """Memory that this process may still take: what is free, or a container's limit if lower."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux: half of what is built in
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            available = min(available, int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return available


SOURCES: dict[str, Source] = {
    "digits": Source("1,797 handwritten digits of scikit-learn, built in", _load_digits),
    "cifar10": Source("60,000 photographs, 10 classes; --download fetches 170 MB", _load_cifar10),
    "cifar100": Source(
        "60,000 photographs, 100 classes; --download fetches 169 MB", _load_cifar100
    ),
    "stl10": Source(
        "113,000 photographs of 96 pixels, 100,000 of them unlabelled, 10 classes; "
        "--download fetches 2.6 GB",
        _load_stl10,
        streams=True,
    ),
    "imagenet": Source(
        "1.3 million photographs, 1,000 classes; data_dir has train/WNID/* and val/WNID/*",
        _load_imagenet,
        streams=True,
    ),
    "folder": Source(
        "folder:PATH, train/CLASS/* and test/CLASS/*, or CLASS/*; or any images, with --labelled",
        _load_folder,
        streams=True,
    ),
}
