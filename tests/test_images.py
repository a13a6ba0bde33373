"""Decoding of files of every kind, files that stand in for arrays, and channel statistics."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer.images import (
    CorruptImageError,
    ImageFiles,
    RawImages,
    channel_statistics,
    decode_image,
    pixels,
    read_image,
)


def encoded(tmp_path: Path, image: Image.Image, suffix: str, **options: Any) -> bytes:
    path = tmp_path / f"image{suffix}"
    image.save(path, **options)
    return path.read_bytes()


def files_of(folder: Path, labels: list[int], image_size: int = 32) -> ImageFiles:
    """The files of a folder in the order of their names."""
    names = np.array([path.name for path in sorted(folder.iterdir())], np.bytes_)
    return ImageFiles(str(folder), names, np.array(labels, np.int64), image_size)


def write_greys(folder: Path, count: int) -> Path:
    """Images 00.png, 01.png, ..., each of the grey value of its number."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("L", (8, 8), number).save(folder / f"{number:02}.png")
    return folder


def test_numbers_without_a_range_are_no_image(tmp_path: Path) -> None:
    path = tmp_path / "float.tif"
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(path)
    with pytest.raises(CorruptImageError, match="no known range; convert them to 8 or 16 bits"):
        read_image(str(path), 8)


def test_modes_become_rgb(tmp_path: Path) -> None:
    colour = (200, 100, 50)
    rgb = Image.new("RGB", (8, 8), colour)
    grey16 = Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))
    half = Image.new("RGBA", (8, 8), (*colour, 0))
    half.paste((*colour, 255), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, *colour])
    cases = {
        "grey": (encoded(tmp_path, Image.new("L", (8, 8), 77), ".png"), (77, 77, 77)),
        "grey with alpha": (encoded(tmp_path, Image.new("LA", (8, 8), (9, 255)), ".png"), (9,) * 3),
        "bilevel": (encoded(tmp_path, Image.new("1", (8, 8), 1), ".png"), (255,) * 3),
        "palette": (encoded(tmp_path, palette, ".png"), colour),
        "gif": (encoded(tmp_path, palette, ".gif"), colour),
        "16 bit": (encoded(tmp_path, grey16, ".png"), (0x80,) * 3),
        "bmp": (encoded(tmp_path, rgb, ".bmp"), colour),
        "webp": (encoded(tmp_path, rgb, ".webp", lossless=True), colour),
        "rgba": (encoded(tmp_path, half, ".png"), colour),
        "cmyk": (encoded(tmp_path, Image.new("CMYK", (8, 8), (0, 0, 0, 0)), ".tif"), (255,) * 3),
        "cmyk jpeg": (
            encoded(tmp_path, Image.new("CMYK", (8, 8), (0, 0, 0, 0)), ".jpg"),
            (255,) * 3,
        ),
        "grey jpeg": (encoded(tmp_path, Image.new("L", (8, 8), 77), ".jpg"), (77,) * 3),
        "16 bit tiff": (encoded(tmp_path, grey16, ".tif"), (0x80,) * 3),
    }
    for name, (data, expected) in cases.items():
        image = decode_image(data, 8)
        assert image.shape == (3, 8, 8), name
        assert image.dtype == np.uint8, name
        assert tuple(image[:, 0, 0].tolist()) == expected, name
    assert decode_image(cases["rgba"][0], 8)[:, 0, 7].tolist() == [255] * 3  # transparent: white


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8] = 255  # the sky is above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    stored = Image.fromarray(np.rot90(upright).copy())
    for suffix in (".jpg", ".png"):
        data = encoded(tmp_path, stored, suffix, exif=exif)
        image = decode_image(data, 16)
        assert image[:, :6].min() > 240
        assert image[:, 10:].max() < 15


@pytest.mark.parametrize("size", [(128, 64), (32, 64), (1, 5), (12, 4), (640, 320), (48, 48)])
def test_odd_sizes_are_resized_by_the_shorter_side_and_cropped(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )
    width, height = (32 * length // min(size) for length in size)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    left, top = (width - 32) // 2, (height - 32) // 2
    expected = resized[top : top + 32, left : left + 32].transpose(2, 0, 1).astype(int)
    decoded = decode_image(encoded(tmp_path, image, ".png"), 32)
    assert decoded.shape == (3, 32, 32)
    assert np.abs(decoded.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(33, 47), (640, 480), (201, 100), (41, 200)])
def test_odd_sizes_give_the_centre_square(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    side = min(size)
    image = np.full((height, width, 3), 255, np.uint8)
    left, top = (width - side) // 2, (height - side) // 2
    odd = (width - side) % 2 + (height - side) % 2  # the centre falls between two pixels
    image[top : top + side + odd, left : left + side + odd] = (10, 20, 30)
    decoded = decode_image(encoded(tmp_path, Image.fromarray(image), ".png"), 32)
    assert decoded.shape == (3, 32, 32)
    inner = decoded[:, 2:-2, 2:-2]
    assert np.abs(inner.astype(int) - np.array([10, 20, 30])[:, None, None]).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_shrinking_is_antialiased(tmp_path: Path, suffix: str) -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    data = encoded(tmp_path, Image.fromarray(stripes), suffix)
    assert np.abs(decode_image(data, 16).astype(int) - 127).max() <= 6


# Files in place of arrays


def test_files_are_read_by_row_in_the_order_asked_for(tmp_path: Path) -> None:
    files = files_of(write_greys(tmp_path / "data", 10), [0] * 10, image_size=4)
    images, corrupt = files.read(np.array([7, 2, 2, 9]))
    assert images[:, 0, 0, 0].tolist() == [7, 2, 2, 9]
    assert images.shape == (4, 3, 4, 4)
    assert corrupt == []
    assert files.shape == (10, 3, 4, 4)
    assert files.nbytes == files.decoded().nbytes
    assert files.decoded()[:, 1, 3, 3].tolist() == list(range(10))
    assert files[np.array([5, 1])].decoded()[:, 0, 0, 0].tolist() == [5, 1]
    assert files[::4].decoded()[:, 0, 0, 0].tolist() == [0, 4, 8]
    assert files[np.array([5, 1])].name(0) == "05.png"
    assert files[:0].decoded().shape == (0, 3, 4, 4)
    assert (pixels(files, slice(3)) == pixels(files.decoded(), slice(3))).all()


def test_another_of_its_class_stands_in_for_a_corrupt_image(tmp_path: Path) -> None:
    folder = write_greys(tmp_path / "data", 8)
    for number in (1, 4, 7):
        (folder / f"{number:02}.png").write_bytes(b"\x89PNG broken")
    files = files_of(folder, [0, 1, 0, 1, 0, 1, 0, 2])
    images, corrupt = files.read(np.arange(8))
    # 1 -> 3, 4 -> 6, each the next of its class; 7 is alone in its class and takes the next of all.
    assert images[:, 0, 0, 0].tolist() == [0, 3, 2, 3, 6, 5, 6, 0]
    assert corrupt == [1, 4, 7]
    one_by_one = [files.read(np.array([row]))[0][0, 0, 0, 0] for row in range(8)]
    assert one_by_one == images[:, 0, 0, 0].tolist()


def test_the_last_of_a_class_is_followed_by_its_first(tmp_path: Path) -> None:
    folder = write_greys(tmp_path / "data", 6)
    for number in (3, 5):
        (folder / f"{number:02}.png").write_bytes(b"")
    images, corrupt = files_of(folder, [0, 1, 0, 1, 0, 1]).read(np.array([3]))
    assert images[0, 0, 0, 0] == 1
    assert corrupt == [3, 5]


def test_nothing_but_corrupt_images_and_a_missing_file_are_errors_of_one_line(
    tmp_path: Path,
) -> None:
    folder = write_greys(tmp_path / "data", 3)
    files = files_of(folder, [0, 0, 1])
    (folder / "01.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read '.*01.png': No such file") as caught:
        files.read(np.arange(3))
    assert "\n" not in str(caught.value)
    for number in range(3):
        (folder / f"{number:02}.png").write_bytes(b"no image")
    why = r"none of 3 images of .* can be decoded; '.*00.png' is corrupt: it is no image$"
    with pytest.raises(ValueError, match=why) as caught:
        files.read(np.arange(3))
    assert "\n" not in str(caught.value)


def test_files_pickle_small_and_work_on_read_only_memory(tmp_path: Path) -> None:
    files = files_of(write_greys(tmp_path / "data", 10), [0] * 10)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(files, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 2  # names and labels: arrays that Ray shares without a copy
    shared = [bytes(buffer.raw()) for buffer in buffers]
    again: ImageFiles = pickle.loads(data, buffers=shared)
    assert not again.names.flags.writeable
    assert (again.decoded() == files.decoded()).all()
    many = ImageFiles("/data", np.repeat(files.names, 1_000), np.zeros(10_000, np.int64), 32)
    assert len(pickle.dumps(many)) < 20 * len(many)


def test_copies_in_another_folder_are_the_same_images(tmp_path: Path) -> None:
    files = files_of(write_greys(tmp_path / "data", 3), [0, 1, 0])
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = files.in_folder(str(tmp_path / "moved"))
    assert moved.decoded()[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert moved.name(1) == files.name(1)
    assert moved.file_names().tolist() == [b"00.png", b"01.png", b"02.png"]
    np.arange(24, dtype=np.uint8).tofile(tmp_path / "moved" / "a.bin")
    raw = RawImages("/nowhere", (("a.bin", 2),), side=2, rows=np.arange(2), image_size=2)
    assert raw[:1].file_names().tolist() == [b"a.bin"]
    assert raw.in_folder(str(tmp_path / "moved")).decoded().sum() == sum(range(24))


def test_names_of_any_encoding_survive(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("Käse.png", "日本.png"):
        Image.new("L", (4, 4), 9).save(folder / name)
    names = np.array([name.encode() for name in ("Käse.png", "日本.png")], np.bytes_)
    files = ImageFiles(str(folder), names, np.zeros(2, np.int64), 4)
    assert files.name(1) == "日本.png"
    assert (files.decoded() == 9).all()


def test_bare_pixels_are_read_by_row_through_all_the_files(tmp_path: Path) -> None:
    columns = np.random.default_rng(0).integers(0, 256, (7, 3, 6, 6), dtype=np.uint8)
    columns[:3].tofile(tmp_path / "a.bin")
    columns[3:].tofile(tmp_path / "b.bin")
    files = (("a.bin", 3), ("b.bin", 4))
    raw = RawImages(str(tmp_path), files, side=6, rows=np.arange(7), image_size=6)
    upright = columns.transpose(0, 1, 3, 2)
    assert (raw.decoded() == upright).all()
    assert raw.decoded().flags.c_contiguous
    images, corrupt = raw.read(np.array([5, 2, 2]))
    assert (images == upright[[5, 2, 2]]).all()
    assert corrupt == []
    some = raw[np.array([6, 1])]
    assert (some[::-1].decoded() == upright[[1, 6]]).all()
    assert some.shape == (2, 3, 6, 6)
    assert some.name(0) == "b.bin, image 3"
    assert (pixels(raw, slice(2)) == upright[:2]).all()
    assert raw[:0].decoded().shape == (0, 3, 6, 6)
    assert channel_statistics(raw) == channel_statistics(upright)


# Channel statistics


@given(seed=st.integers(0, 100), count=st.integers(1, 30), side=st.integers(1, 12))
def test_channel_statistics_agree_with_numpy(seed: int, count: int, side: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    mean, std = channel_statistics(images)
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, scaled.mean(axis=(0, 2, 3)), atol=1e-9)
    np.testing.assert_allclose(std, scaled.std(axis=(0, 2, 3)).clip(min=1e-3), atol=1e-6)


def test_channel_statistics_of_a_sample_are_close_and_of_a_constant_are_floored() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1_500, 3, 224, 224), dtype=np.uint8)
    images[:, 1] = 255
    started = time.perf_counter()
    mean, std = channel_statistics(images)
    assert time.perf_counter() - started < 5
    assert mean == pytest.approx((0.5, 1.0, 0.5), abs=2e-3)
    assert std[1] == 1e-3
    assert std[0] == pytest.approx(0.2898, abs=2e-3)


def test_channel_statistics_of_files_are_those_of_their_pixels(tmp_path: Path) -> None:
    files = files_of(write_greys(tmp_path / "data", 30), [0] * 30, image_size=8)
    assert channel_statistics(files) == channel_statistics(files.decoded())


def test_only_a_sample_of_many_files_is_decoded(tmp_path: Path) -> None:
    folder = write_greys(tmp_path / "data", 2)
    names = np.repeat(files_of(folder, [0] * 2).names, 200_000)  # first all black, then not
    many = ImageFiles(str(folder), names, np.zeros(400_000, np.int64), 4)
    started = time.perf_counter()
    mean, _ = channel_statistics(many)
    assert time.perf_counter() - started < 10
    assert mean[0] == pytest.approx(0.5 / 255)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read '.*gone.png': No such file") as caught:
        read_image(str(tmp_path / "gone.png"), 8)
    assert "\n" not in str(caught.value)
