"""Sources, their splits, banks and labels; images are made on the spot with Pillow."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import trainer.datasets
import trainer.sources
from search.provenance import describe_data
from trainer.config import TrainConfig
from trainer.datasets import BANK_IMAGES, ImageFiles, Split, load_dataset, load_for

REPOSITORY = Path(__file__).parents[1]


def make_images(folder: Path, count: int, red: int) -> None:
    """Files NUMBER.png of one colour: `red`, the number, and blue for more than 256."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        colour = (red, number % 256, number // 256)
        Image.new("RGB", (10, 8), colour).save(folder / f"{number:04}.png")


def colours(split: Split) -> list[tuple[int, int, int]]:
    """The colour of each image of a split, sorted."""
    red_green_blue = split.pixels(slice(None))[:, :, 0, 0].tolist()
    return sorted((red, green, blue) for red, green, blue in red_green_blue)


@pytest.fixture
def small_bank(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(trainer.datasets, "BANK_IMAGES", 100)
    return 100


# Configuration


def test_load_for_follows_the_configuration() -> None:
    config = TrainConfig(image_size=16, train_limit=200, val_limit=50, test_limit=30, split_seed=3)
    data, same = load_for(config), load_for(config)
    assert data.train.images.shape == (200, 3, 16, 16)
    assert len(data.val) == 50
    assert len(data.test) == 30
    assert data.bank is data.train
    assert (data.train.images == same.train.images).all()
    other = load_for(config.model_copy(update={"split_seed": 4}))
    assert (data.train.images != other.train.images).any()


def test_load_for_passes_on_where_labels_and_images_are(tmp_path: Path) -> None:
    make_images(tmp_path / "large", 40, red=1)
    config = TrainConfig(
        dataset=f"folder:{tmp_path / 'large'}", labelled="digits", image_size=8, in_memory="no"
    )
    data = load_for(config, cache_dir=tmp_path / "cache")
    assert isinstance(data.train.images, ImageFiles)
    assert (len(data.train), len(data.val)) == (40, 300)
    alone = config.model_copy(update={"labelled": None})
    assert load_for(alone, labels_needed=False, cache_dir=tmp_path / "cache").classes == ()


@pytest.mark.parametrize("field", ["train_limit", "val_limit", "test_limit"])
def test_a_limit_below_one_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1 image, got 0"):
        load_dataset("digits", **{field: 0})  # type: ignore[arg-type]


def test_importing_the_module_imports_neither_torchvision_nor_scikit_learn() -> None:
    code = (
        "import sys, importlib.util as u; import types;"
        "p = types.ModuleType('trainer'); p.__path__ = ['trainer']; sys.modules['trainer'] = p;"
        "import trainer.datasets;"
        "print([m for m in ('torch', 'torchvision', 'sklearn', 'ray') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# Held in memory or decoded as needed


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
    """Images of every kind, some of them odd."""
    rng = np.random.default_rng(0)
    for number in range(60):
        folder = tmp_path / "data" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        size = rng.integers(5, 90, 2)
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        mode = ("RGB", "L", "P", "RGBA", "CMYK", "1", "I;16", "LA", "RGB", "RGB")[number // 2 % 10]
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 65536, size, dtype=np.uint16))
        elif mode == "RGBA":
            image.putalpha(Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)))
        else:
            image = image.convert(mode)
        exif = Image.Exif()
        exif[0x0112] = number % 8 + 1
        suffix = ".jpg" if mode in ("RGB", "L", "CMYK") else ".png"
        image.save(folder / f"{number:02}{suffix}", exif=exif)
    return tmp_path / "data"


def test_both_ways_give_the_identical_data(mixed_folder: Path, tmp_path: Path) -> None:
    name, cache_dir = f"folder:{mixed_folder}", tmp_path / "cache"
    held = load_dataset(name, in_memory="yes", cache_dir=cache_dir)
    streamed = load_dataset(name, in_memory="no", cache_dir=tmp_path / "none")
    assert held.skipped == streamed.skipped == ()
    for part in ("train", "val", "test", "bank"):
        one, other = getattr(held, part), getattr(streamed, part)
        assert isinstance(one.images, np.ndarray)
        assert isinstance(other.images, ImageFiles)
        assert one.images.shape == other.images.shape
        assert (one.images == other.pixels(slice(None))).all()
        assert one.labels.tolist() == other.labels.tolist() == other.images.labels.tolist()
    assert (held.mean, held.std) == (streamed.mean, streamed.std)
    described = [describe_data(each) for each in (held, streamed)]
    for mode in ("in_memory", "labelled_in_memory"):
        assert [each.pop(mode) for each in described] == [True, False]
    assert described[0] == described[1]
    assert not (tmp_path / "none").exists()  # nothing is decoded beforehand


def test_auto_holds_what_fits_a_quarter_of_the_memory(
    mixed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded_bytes = 60 * 3 * 32 * 32
    for available, kind in ((4 * decoded_bytes, np.ndarray), (4 * decoded_bytes - 1, ImageFiles)):
        monkeypatch.setattr(trainer.sources, "available_memory_bytes", lambda a=available: a)
        data = load_dataset(f"folder:{mixed_folder}", cache_dir=tmp_path / "cache")
        assert isinstance(data.train.images, kind)


def test_available_memory_is_a_part_of_what_is_built_in() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**26 < trainer.sources.available_memory_bytes() <= total


def test_small_sources_are_always_in_memory() -> None:
    with pytest.raises(ValueError, match="in_memory=no is for stl10, imagenet and folder:PATH; 'd"):
        load_dataset("digits", in_memory="no")
    assert isinstance(load_dataset("digits", in_memory="yes").train.images, np.ndarray)


def test_the_digest_follows_pixels_and_labels_but_not_the_place(tmp_path: Path) -> None:
    digests = []
    for place in ("one", "other"):
        for number, label in enumerate(("cat", "dog")):
            make_images(tmp_path / place / label, 20, red=number)
        for in_memory in ("yes", "no"):
            data = load_dataset(
                f"folder:{tmp_path / place}",
                in_memory=in_memory,  # type: ignore[arg-type]
                cache_dir=tmp_path / "cache",
            )
            digests.append(describe_data(data)["digest"])
    assert len(set(digests)) == 1
    for path in (tmp_path / "other" / "cat").iterdir():
        Image.new("RGB", (10, 8), (9, 9, 9)).save(path)
    for in_memory in ("yes", "no"):
        changed = load_dataset(
            f"folder:{tmp_path / 'other'}",
            in_memory=in_memory,  # type: ignore[arg-type]
            cache_dir=tmp_path / "cache",
        )
        assert describe_data(changed)["digest"] != digests[0]
    relabelled = replace(data, val=replace(data.val, labels=1 - data.val.labels))
    assert describe_data(relabelled)["digest"] != digests[0]


# The bank


def test_a_small_train_split_is_its_own_bank() -> None:
    data = load_dataset("digits")
    assert data.bank is data.train
    assert len(data.train) <= BANK_IMAGES


def test_a_large_train_split_has_a_stratified_bank(small_bank: int) -> None:
    data = load_dataset("digits")
    assert len(data.bank) == small_bank
    train = {(image.tobytes(), int(n)) for image, n in zip(*vars(data.train).values(), strict=True)}
    bank = [(image.tobytes(), int(n)) for image, n in zip(*vars(data.bank).values(), strict=True)]
    assert len(set(bank)) == small_bank
    assert set(bank) <= train
    share = np.bincount(data.train.labels) * small_bank / len(data.train)
    assert (np.abs(np.bincount(data.bank.labels) - share) < 1).all()
    again = load_dataset("digits")
    assert (data.bank.images == again.bank.images).all()
    cut = load_dataset("digits", train_limit=40)
    assert len(cut.bank) == 40


# A large set without labels, beside a small one with them


@pytest.fixture
def large_and_small(tmp_path: Path) -> tuple[str, str, dict[str, Any]]:
    """A flat and nested folder of 80 images, and a labelled one of 2 x 40."""
    make_images(tmp_path / "large", 50, red=10)
    make_images(tmp_path / "large" / "holiday" / "2019", 20, red=11)
    make_images(tmp_path / "large" / "cat", 10, red=12)
    make_images(tmp_path / "small" / "owl", 40, red=20)
    make_images(tmp_path / "small" / "yak", 40, red=21)
    large, small = (f"folder:{tmp_path / name}" for name in ("large", "small"))
    return large, small, {"cache_dir": tmp_path / "cache"}


@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_a_labelled_source_measures_an_unlabelled_one(
    large_and_small: tuple[str, str, dict[str, Any]], in_memory: str
) -> None:
    large, small, where = large_and_small
    where |= {"in_memory": in_memory}
    data = load_dataset(large, labelled=small, **where)
    everything = [(10, n, 0) for n in range(50)]
    everything += [(11, n, 0) for n in range(20)] + [(12, n, 0) for n in range(10)]
    assert colours(data.train) == everything
    assert set(data.train.labels.tolist()) == {-1}
    assert data.name == large
    assert data.classes == ("owl", "yak")
    alone = load_dataset(small, **where)
    assert colours(data.val) == colours(alone.val)
    assert colours(data.test) == colours(alone.test)
    assert colours(data.bank) == colours(alone.train)
    for split in (data.val, data.test, data.bank):
        assert (split.pixels(slice(None))[:, 0, 0, 0] - 20 == split.labels).all()
    assert data.mean[0] == pytest.approx((50 * 10 + 20 * 11 + 10 * 12) / 80 / 255)
    order = data.train.pixels(slice(None))[:, 0, 0, 0].tolist()
    assert order != sorted(order)

    cut = load_dataset(large, labelled=small, train_limit=7, val_limit=4, test_limit=5, **where)
    assert [len(part) for part in (cut.train, cut.val, cut.test)] == [7, 4, 5]
    assert colours(cut.bank) == colours(data.bank)
    assert set(colours(cut.train)) <= set(everything)


def test_the_labelled_bank_has_a_bound(
    large_and_small: tuple[str, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small, where = large_and_small
    monkeypatch.setattr(trainer.datasets, "BANK_IMAGES", 10)
    data = load_dataset(large, labelled=small, **where)
    assert np.bincount(data.bank.labels).tolist() == [5, 5]


def test_corrupt_files_of_both_are_named(
    large_and_small: tuple[str, str, dict[str, Any]],
) -> None:
    large, small, where = large_and_small
    (Path(large.removeprefix("folder:")) / "0003.png").write_bytes(b"x")
    (Path(small.removeprefix("folder:")) / "owl" / "0004.png").write_bytes(b"x")
    data = load_dataset(large, labelled=small, **where)
    assert data.skipped == ("0003.png", "owl/0004.png")
    assert len(data.train) == 79
    assert len(data.bank) + len(data.val) + len(data.test) == 79


def test_what_the_large_source_holds_out_is_not_trained_on(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "test")):
        make_images(tmp_path / "data" / part / "cat", 20, red=number)
    data = load_dataset(
        f"folder:{tmp_path / 'data'}", labelled="digits", cache_dir=tmp_path / "cache"
    )
    assert {red for red, _, _ in colours(data.train)} == {0}
    assert len(data.test) == 359


def test_a_source_does_not_measure_itself() -> None:
    with pytest.raises(ValueError, match=r"labelled must be another source.*'digits' for both"):
        load_dataset("digits", labelled="digits")


def test_a_labelled_source_needs_labels(
    large_and_small: tuple[str, str, dict[str, Any]], tmp_path: Path
) -> None:
    large, _, where = large_and_small
    make_images(tmp_path / "flat", 5, red=1)
    with pytest.raises(ValueError, match="has no class folders"):
        load_dataset(large, labelled=f"folder:{tmp_path / 'flat'}", **where)


@pytest.mark.parametrize("classes", [0, 1])
@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_labels_are_asked_for_unless_they_are_not_needed(
    tmp_path: Path, classes: int, in_memory: Any
) -> None:
    make_images(tmp_path / "data" / ("cat" if classes else ""), 1_000, red=1)
    name = f"folder:{tmp_path / 'data'}"
    where: dict[str, Any] = {"cache_dir": tmp_path / "cache", "in_memory": in_memory}
    with pytest.raises(ValueError, match="--labelled SOURCE") as caught:
        load_dataset(name, **where)
    assert "\n" not in str(caught.value)
    data = load_dataset(name, labels_needed=False, **where)
    assert data.classes == ()
    assert [len(s) for s in (data.train, data.val, data.test, data.bank)] == [700, 300, 0, 0]
    assert data.bank.images.shape == (0, 3, 32, 32)
    assert sorted(colours(data.train) + colours(data.val)) == [
        (1, green, blue) for green, blue in sorted((n % 256, n // 256) for n in range(1_000))
    ]
    assert set(data.train.labels.tolist()) == {-1}


def test_labels_that_are_there_stay_where_they_are_not_needed() -> None:
    data = load_dataset("digits", labels_needed=False)
    assert len(data.classes) == 10
    assert data.train.labels.min() == 0
    assert data.bank is data.train


def test_a_data_set_survives_shared_read_only_memory(
    large_and_small: tuple[str, str, dict[str, Any]],
) -> None:
    large, small, where = large_and_small
    for in_memory in ("yes", "no"):
        data = load_dataset(large, labelled=small, in_memory=in_memory, **where)
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
        again = pickle.loads(pickled, buffers=[bytes(buffer.raw()) for buffer in buffers])
        assert not again.val.labels.flags.writeable
        assert describe_data(again) == describe_data(data)
