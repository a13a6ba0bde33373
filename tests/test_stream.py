"""Readers: the same batches from arrays and files, by any number of workers, and no litter."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import trainer.stream
from trainer.images import ImageFiles
from trainer.stream import FileReader, reader

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # few cores
CPU = torch.device("cpu")
COUNT = 300


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    """300 noisy images of odd sizes, in three classes."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (*rng.integers(8, 30, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    names = np.array([f"{number:03}.png" for number in range(COUNT)], np.bytes_)
    return ImageFiles(str(folder), names, np.arange(COUNT) % 3, 16)


@pytest.fixture(scope="module")
def array(files: ImageFiles) -> np.ndarray:
    return files.decoded()


def children() -> int:
    """Worker processes of this one that are still there."""
    return len(multiprocessing.active_children())


@pytest.mark.parametrize("workers", [0, 1, 2, 3, None])
def test_files_give_what_the_array_gives_whatever_the_workers(
    files: ImageFiles, array: np.ndarray, workers: int | None
) -> None:
    rng = np.random.default_rng(1)
    # Whole pieces, parts of one, several of them, repeated rows, an empty batch.
    rows = [torch.from_numpy(rng.integers(0, COUNT, size)) for size in (64, 1, 200, 0, 130, 65, 7)]
    from_files = list(reader(files, CPU, workers).batches(rows))
    from_array = list(reader(array, CPU, workers).batches(rows))
    assert len(from_files) == len(from_array) == len(rows)
    for one, other, wanted in zip(from_files, from_array, rows, strict=True):
        assert one.dtype == other.dtype == torch.uint8
        assert torch.equal(one, other)
        assert np.array_equal(one.numpy(), array[wanted.numpy()])
    assert len(reader(files, CPU, workers)) == len(reader(array, CPU, workers)) == COUNT


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), max_size=12), piece=st.integers(1, 50))
def test_batches_are_cut_into_pieces_and_put_together_again(
    files: ImageFiles, array: np.ndarray, sizes: list[int], piece: int
) -> None:
    rng = np.random.default_rng(len(sizes))
    rows = [torch.from_numpy(rng.integers(0, COUNT, size)) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.stream, "_PIECE_IMAGES", piece)
        for workers in (0, 2) if sum(sizes) < 60 else (0,):  # to start workers takes a while
            batches = list(reader(files, CPU, workers).batches(rows))
            assert len(batches) == len(rows)
            for batch, wanted in zip(batches, rows, strict=True):
                assert np.array_equal(batch.numpy(), array[wanted.numpy()])


def test_a_batch_is_the_callers_to_keep(files: ImageFiles, array: np.ndarray) -> None:
    rows = list(torch.arange(COUNT).split(20))
    for images in (files, array):
        kept = list(reader(images, CPU, 2).batches(rows))
        assert np.array_equal(torch.cat(kept).numpy(), array)
        kept[0].zero_()
        assert array[:20].any()


@pytest.mark.parametrize("workers", [0, 2])
def test_endless_rows_are_not_run_away_with(files: ImageFiles, workers: int) -> None:
    asked = 0

    def endless() -> Iterator[torch.Tensor]:
        nonlocal asked
        for start in itertools.count():
            asked += 1
            yield torch.arange(start, start + 100) % COUNT

    batches = reader(files, CPU, workers).batches(endless())
    for number in range(5):
        assert next(batches).shape == (100, 3, 16, 16)
        time.sleep(0.05)
        assert number < asked <= number + 6
    batches.close()  # type: ignore[attr-defined]
    assert children() == 0


def test_readers_of_arrays_read_nothing_ahead(array: np.ndarray) -> None:
    rows = iter([torch.tensor([3]), torch.tensor([4])])
    batches = reader(array, CPU, None).batches(rows)
    assert np.array_equal(next(batches).numpy(), array[[3]])
    assert next(rows).tolist() == [4]


def test_an_abandoned_iterator_leaves_no_worker_and_no_open_file(files: ImageFiles) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    source = reader(files, CPU, 2)
    for batch in source.batches(torch.arange(COUNT).split(30)):  # what is set up once, is
        del batch
    before = open_files()
    for _ in range(3):
        batches = source.batches(itertools.cycle(torch.arange(COUNT).split(30)))
        next(batches)
        assert children() == 2
        started = time.perf_counter()
        del batches
        assert time.perf_counter() - started < 4
        assert children() == 0
    deadline = time.monotonic() + 10  # queues' threads close their ends a moment later
    while open_files() > before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_few_images_are_not_worth_a_process(files: ImageFiles) -> None:
    batches = reader(files, CPU, 16).batches([torch.arange(40)])
    assert len(next(batches)) == 40
    assert children() == 0
    several = reader(files, CPU, 16).batches(torch.arange(COUNT).split(150))
    next(several)
    assert 0 < children() <= 6  # as many as there are pieces


def test_several_can_be_read_at_once(files: ImageFiles, array: np.ndarray) -> None:
    """Training's workers wait while those of an evaluation decode."""
    training = reader(files, CPU, 2).batches(itertools.cycle(torch.arange(COUNT).split(50)))
    first = next(training)
    evaluated = torch.cat(list(reader(files, CPU, 2).batches(torch.arange(COUNT).split(70))))
    assert np.array_equal(evaluated.numpy(), array)
    assert np.array_equal(torch.cat([first, next(training)]).numpy(), array[:100])
    training.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_replaced_counted_and_named_once(
    files: ImageFiles, array: np.ndarray, tmp_path: Path, workers: int
) -> None:
    for number in range(COUNT):
        data = (Path(files.folder) / f"{number:03}.png").read_bytes()
        (tmp_path / f"{number:03}.png").write_bytes(data if number not in (7, 8) else data[:20])
    source = FileReader(ImageFiles(str(tmp_path), files.names, files.labels, 16), CPU, workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = torch.cat(list(source.batches(torch.arange(COUNT).split(64)))).numpy()
    expected = array.copy()
    expected[[7, 8]] = array[[10, 11]]  # the next of their classes
    assert np.array_equal(found, expected)
    assert [str(warning.message)[:7] for warning in caught] == ["007.png", "008.png"]
    assert source.corrupt == ["007.png", "008.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_file_is_an_error_of_one_line(
    files: ImageFiles, tmp_path: Path, workers: int
) -> None:
    gone = ImageFiles(str(tmp_path), files.names, files.labels, 16)
    with pytest.raises(ValueError, match=r"cannot read '.*\.png': No such file") as caught:
        list(reader(gone, CPU, workers).batches(torch.arange(COUNT).split(100)))
    assert "\n" not in str(caught.value)
    assert children() == 0


def test_an_error_in_the_rows_is_raised(files: ImageFiles) -> None:
    def rows() -> Iterator[torch.Tensor]:
        yield from torch.arange(COUNT).split(100)
        raise KeyError("rows")

    with pytest.raises(KeyError, match="rows"):
        list(reader(files, CPU, 2).batches(rows()))
    assert children() == 0


def test_rows_outside_the_split_are_refused(files: ImageFiles, array: np.ndarray) -> None:
    for images in (files, array):
        with pytest.raises(IndexError):
            list(reader(images, CPU, 0).batches([torch.tensor([COUNT])]))


ORPHANS = """
import itertools, multiprocessing, os, sys, threading, time
import numpy as np, torch
from trainer.images import ImageFiles
from trainer.stream import reader
def tell():
    while len(children := multiprocessing.active_children()) < 2:
        time.sleep(0.05)
    print(*(child.pid for child in children), flush=True)
files = ImageFiles(sys.argv[1], np.array([b"000.png"] * 9), np.zeros(9, np.int64), 16)
batches = reader(files, torch.device("cpu"), 2).batches(itertools.repeat(torch.arange(9)))
if sys.argv[2] == "starting":  # none has run a line of its own when the parent dies
    os.register_at_fork(after_in_child=lambda: time.sleep(3))
    threading.Thread(target=tell).start()
next(batches)
tell()
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers_are", ["starting", "decoding"])
def test_workers_do_not_outlive_a_killed_parent(files: ImageFiles, workers_are: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, files.folder, workers_are],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # nobody may be there to collect it


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_generators_are_left_alone(files: ImageFiles, workers: int) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    list(reader(files, CPU, workers).batches(torch.arange(COUNT).split(50)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_read_only_array_is_used_in_place(array: np.ndarray) -> None:
    shared = array.copy()
    shared.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = reader(shared, CPU, None)
        (batch,) = source.batches([torch.arange(COUNT)])
    assert source._images_N3SS.data_ptr() == shared.ctypes.data  # type: ignore[attr-defined]
    batch.zero_()
    assert np.array_equal(shared, array)


def test_large_images_come_in_small_pieces(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), (1, 2, 3)).save(tmp_path / "a.png")
    names = np.repeat(np.array([b"a.png"]), 12)
    large = ImageFiles(str(tmp_path), names, np.zeros(12, np.int64), 1024)  # 3 MB each
    batches = list(reader(large, CPU, 2).batches([torch.arange(7), torch.arange(5)]))
    assert [len(batch) for batch in batches] == [7, 5]
    assert all((batch[:, 2] == 3).all() for batch in batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_batches_on_a_gpu_are_the_same(
    files: ImageFiles, array: np.ndarray, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(trainer.stream, "RESIDENT_SHARE", share)
    rows = list(torch.randperm(COUNT).split(64)) * 3
    for images in (files, array):
        batches = list(reader(images, torch.device("cuda"), 2).batches(rows))
        assert all(batch.device.type == "cuda" for batch in batches)
        for batch, wanted in zip(batches, rows, strict=True):
            assert np.array_equal(batch.cpu().numpy(), array[wanted.numpy()])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_as_many_processes_decode_as_were_asked_for(files: ImageFiles, workers: int) -> None:
    rows = (torch.arange(16) for _ in iter(int, 1))
    batches = reader(files, CPU, workers).batches(rows)
    next(batches)
    assert len(multiprocessing.active_children()) == workers
    del batches
