"""Digits, CIFAR-10, STL-10 and ImageNet, against the libraries that they come from."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from search.provenance import describe_data
from trainer.datasets import SOURCES, Split, load_dataset
from trainer.images import RawImages
from trainer.stream import reader


def make_images(folder: Path, count: int, red: int) -> None:
    """Files NUMBER.png of one colour: `red`, the number, and blue for more than 256."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        colour = (red, number % 256, number // 256)
        Image.new("RGB", (10, 8), colour).save(folder / f"{number:04}.png")


@pytest.mark.parametrize("name", ["mnist", "digits:8", "", "folders:x"])
def test_an_unknown_name_lists_the_known(name: str) -> None:
    known = r"known: digits, cifar10, cifar100, stl10, imagenet, folder:PATH$"
    with pytest.raises(ValueError, match=known):
        load_dataset(name)
    with pytest.raises(ValueError, match=known):
        load_dataset("digits", labelled=name)


def test_every_source_has_a_line_of_description() -> None:
    for source in SOURCES.values():
        assert source.description
        assert "\n" not in source.description


# Digits


def test_digits_at_the_default() -> None:
    data = load_dataset("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (1138, 300, 359)
    assert data.classes == tuple("0123456789")
    for split in (data.train, data.val, data.test):
        assert split.images.shape[1:] == (3, 32, 32)
        assert split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
        assert split.labels.dtype == np.int64
        assert np.bincount(split.labels, minlength=10).min() > 0.08 * len(split)
    assert data.train.images.max() == 255
    assert data.mean[0] == pytest.approx(data.train.images[:, 0].mean() / 255)
    assert data.skipped == ()


def test_digits_are_the_ones_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    data = load_dataset("digits", image_size=8)
    ours = np.concatenate([split.images[:, 2] for split in (data.train, data.val, data.test)])
    labels = np.concatenate([split.labels for split in (data.train, data.val, data.test)])
    theirs = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    key = [(image.tobytes(), label) for image, label in zip(ours, labels, strict=True)]
    expected = [(i.tobytes(), n) for i, n in zip(theirs, load_digits().target, strict=True)]
    assert sorted(key) == sorted(expected)


# CIFAR


def write_cifar10(monkeypatch: pytest.MonkeyPatch, root: Path, train: int, test: int) -> np.ndarray:
    """Write files of CIFAR-10's layout with random images, and let torchvision accept them."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rows = np.random.default_rng(0).integers(0, 256, (train + test, 3072), dtype=np.uint8)
    checksums = {}
    for name, part in (("data_batch_1", rows[:train]), ("test_batch", rows[train:])):
        labels = [index % 10 for index in range(len(part))]
        (folder / name).write_bytes(pickle.dumps({"data": part, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"abcdefghij"]}))
    for path in folder.iterdir():
        checksums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", checksums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    meta = {**CIFAR10.meta, "md5": checksums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return rows.reshape(-1, 3, 32, 32)


def test_cifar10_keeps_its_test_split_and_its_channels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images = write_cifar10(monkeypatch, tmp_path, train=1_000, test=200)
    data = load_dataset("cifar10", data_dir=tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (700, 300, 200)
    assert data.classes == tuple("abcdefghij")
    ours = {(image.tobytes(), int(n)) for image, n in zip(*vars(data.test).values(), strict=True)}
    assert data.test.images.flags.c_contiguous
    assert ours == {(image.tobytes(), row % 10) for row, image in enumerate(images[1_000:])}
    where: dict[str, Any] = {"data_dir": tmp_path, "cache_dir": tmp_path / "cache"}
    seen: list[int] = []
    for _ in range(2):  # resized, and from the cache
        smaller = load_dataset(
            "cifar10", image_size=16, progress=lambda done, _: seen.append(done), **where
        )
        assert smaller.train.images.shape == (700, 3, 16, 16)
        image = Image.fromarray(data.train.images[5].transpose(1, 2, 0))
        expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
        assert (smaller.train.images[5] == expected.transpose(2, 0, 1)).all()
    assert seen.count(1_200) == 1


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_absent_data_names_the_remedy(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}.*not in.*--download") as caught:
        load_dataset(name, data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not in"):
        load_dataset(name, cache_dir=tmp_path)


# STL-10


def write_stl10(root: Path, train: int, unlabelled: int, test: int) -> None:
    """Write files of STL-10's layout with random images."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("unlabeled", unlabelled), ("test", test)):
        rng.integers(0, 256, count * 3 * 96 * 96, dtype=np.uint8).tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")


@pytest.mark.parametrize("image_size", [96, 32])
def test_stl10_is_read_as_torchvision_reads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image_size: int
) -> None:
    from torchvision.datasets import STL10

    write_stl10(tmp_path, train=60, unlabelled=90, test=40)
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    where: dict[str, Any] = {"data_dir": tmp_path, "cache_dir": tmp_path / "cache"}
    data = load_dataset("stl10", image_size=image_size, **where)
    again = load_dataset("stl10", image_size=image_size, **where)
    assert (data.train.images == again.train.images).all()

    def expected(part: str) -> list[tuple[bytes, int]]:
        found = []
        for image, label in STL10(str(tmp_path), split=part):
            if image_size != 96:
                image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
            found.append((np.asarray(image).transpose(2, 0, 1).tobytes(), label))
        return sorted(found)

    def ours(*splits: Split) -> list[tuple[bytes, int]]:
        return sorted(
            (image.tobytes(), int(label))
            for split in splits
            for image, label in zip(split.images, split.labels, strict=True)
        )

    assert ours(data.test) == expected("test")
    assert ours(data.train, data.val) == expected("train+unlabeled")
    assert data.classes[0] == "airplane"
    assert len(data.classes) == 10
    # Labelled train images give val and bank, the unlabelled are trained on.
    assert (len(data.train), len(data.val), len(data.bank)) == (120, 30, 30)
    assert data.val.labels.min() >= 0
    assert ours(data.bank) == [pair for pair in ours(data.train) if pair[1] >= 0]
    cut = load_dataset("stl10", image_size=image_size, train_limit=20, **where)
    assert len(cut.train) == 20
    assert ours(cut.bank) == ours(data.bank)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # few cores
@pytest.mark.parametrize("image_size", [96, 32])
def test_streamed_stl10_is_the_same_as_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image_size: int
) -> None:
    write_stl10(tmp_path, train=60, unlabelled=90, test=40)
    monkeypatch.setattr("trainer.images._STATISTICS_FILES", 5)  # of image files, which are slow
    held, streamed = (
        load_dataset(
            "stl10",
            image_size=image_size,
            in_memory=in_memory,
            data_dir=tmp_path,
            cache_dir=tmp_path / in_memory,
        )
        for in_memory in ("yes", "no")
    )
    assert not (tmp_path / "no").exists()
    for part in ("train", "val", "test", "bank"):
        one, other = getattr(held, part), getattr(streamed, part)
        assert isinstance(one.images, np.ndarray)
        assert isinstance(other.images, RawImages)
        assert one.images.shape == other.images.shape
        assert one.images.nbytes == other.images.nbytes
        assert (one.images == other.pixels(slice(None))).all()
        assert one.labels.tolist() == other.labels.tolist()
    assert (held.mean, held.std, held.classes) == (streamed.mean, streamed.std, streamed.classes)
    assert describe_data(held)["digest"] == describe_data(streamed)["digest"]
    assert len(pickle.dumps(streamed)) < 10_000  # 190 images of 96 pixels have 5 MB
    again = pickle.loads(pickle.dumps(streamed))
    assert (again.test.pixels(np.array([3, 1])) == held.test.images[[3, 1]]).all()
    rows = [torch.arange(70), torch.arange(120).flip(0)]
    batches = list(reader(streamed.train.images, torch.device("cpu"), 2).batches(rows))
    for batch, wanted in zip(batches, rows, strict=True):
        assert (batch.numpy() == held.train.images[wanted.numpy()]).all()


def test_auto_streams_an_stl10_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_stl10(tmp_path, train=20, unlabelled=20, test=20)
    where: dict[str, Any] = {"data_dir": tmp_path, "cache_dir": tmp_path / "cache"}
    for free, kind in ((4 * 60 * 3 * 32**2, np.ndarray), (4 * 60 * 3 * 32**2 - 1, RawImages)):
        monkeypatch.setattr("trainer.sources.available_memory_bytes", lambda free=free: free)
        assert isinstance(load_dataset("stl10", **where).train.images, kind)
        labelled = load_dataset("digits", labelled="stl10", **where)
        assert isinstance(labelled.train.images, np.ndarray)
        assert isinstance(labelled.bank.images, kind)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # few cores
@pytest.mark.parametrize("workers", [0, 2])
def test_an_stl10_that_is_cut_off_or_gone_is_an_error_of_one_line(
    tmp_path: Path, workers: int
) -> None:
    write_stl10(tmp_path, train=10, unlabelled=90, test=10)
    data = load_dataset("stl10", in_memory="no", data_dir=tmp_path)
    rows = torch.arange(len(data.train)).split(70)
    path = tmp_path / "stl10_binary" / "unlabeled_X.bin"
    for break_it, message in (
        (lambda: os.truncate(path, 5 * 3 * 96**2), "unlabeled_X.bin': image [0-9]+ is cut off"),
        (path.unlink, "unlabeled_X.bin': No such file"),
    ):
        break_it()
        batches = reader(data.train.images, torch.device("cpu"), workers).batches(rows)
        with pytest.raises(ValueError, match=message) as caught:
            list(batches)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "unlabeled_X.bin").write_bytes(b"x" * 1_000),
        lambda folder: (folder / "train_y.bin").write_bytes(b"\x01" * 9),
        lambda folder: (folder / "test_y.bin").write_bytes(b"\x0b" * 10),
        lambda folder: (folder / "test_X.bin").write_bytes(b""),
    ],
)
def test_a_damaged_stl10_is_refused(tmp_path: Path, damage: Any) -> None:
    write_stl10(tmp_path, train=10, unlabelled=10, test=10)
    damage(tmp_path / "stl10_binary")
    with pytest.raises(ValueError, match=r"not a whole file of STL-10; delete it and add --down"):
        load_dataset("stl10", data_dir=tmp_path, cache_dir=tmp_path / "cache")


# ImageNet


def write_imagenet(root: Path) -> dict[str, Any]:
    for number, wnid in enumerate(("n01", "n02", "n03")):
        make_images(root / "train" / wnid, 20 + number, red=number)
        make_images(root / "val" / wnid, 4, red=100 + number)
    make_images(root / "test", 5, red=200)  # ImageNet's own has no labels
    return {"data_dir": root, "cache_dir": root / "cache"}


@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_imagenet_has_its_val_as_test_and_names_for_its_ids(tmp_path: Path, in_memory: Any) -> None:
    where = write_imagenet(tmp_path) | {"in_memory": in_memory}
    data = load_dataset("imagenet", **where)
    assert data.classes == ("n01", "n02", "n03")
    reds = data.test.pixels(slice(None))[:, 0, 0, 0]
    assert sorted(reds.tolist()) == [100] * 4 + [101] * 4 + [102] * 4
    assert len(data.train) + len(data.val) == 63
    assert (reds - 100 == data.test.labels).all()
    meta = {"n01": ("crane", "bird"), "n02": ("tench", "Tinca tinca"), "n03": ("crane",)}
    torch.save((meta, ["n01"]), tmp_path / "meta.bin")  # as torchvision's parse_devkit_archive
    named = load_dataset("imagenet", **where)
    assert named.classes == ("crane (n01)", "tench", "crane (n03)")
    torch.save(({"n02": ("tench",)}, []), tmp_path / "meta.bin")
    assert load_dataset("imagenet", **where).classes == ("n01", "tench", "n03")


def test_imagenet_that_is_not_there_or_damaged_is_refused_in_one_line(tmp_path: Path) -> None:
    for where in ({}, {"data_dir": tmp_path}):
        with pytest.raises(ValueError, match=r"'imagenet' .*train/WNID/\* and val/WNID") as caught:
            load_dataset("imagenet", **where)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    where = write_imagenet(tmp_path)
    (tmp_path / "meta.bin").write_bytes(b"no zip file")
    with pytest.raises(ValueError, match=r"cannot read class names from .*; remove it") as caught:
        load_dataset("imagenet", **where)
    assert "\n" not in str(caught.value)
