"""Files of a data set on a node: copied once, whole, and the same images as before."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from search import node_data
from search.node_data import (
    Fetch,
    Fetched,
    FolderFiles,
    Piece,
    fetch_from_here,
    fetch_from_node,
    files_to_share,
    on_this_node,
)
from search.provenance import describe_data
from tests.extent import long
from trainer.datasets import DataSplits, load_dataset
from trainer.images import RawImages, StoredImages


def write_classes(folder: Path, count: int = 40) -> Path:
    """Images of noise of different sizes, in two classes; one is corrupt."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("cat", "dög")[number % 2] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (8 + number % 3, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    (folder / "cat" / "006.png").write_bytes(b"\x89PNG broken")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_classes(tmp_path / "data")


def load(folder: Path, **options: Any) -> DataSplits:
    options = {"in_memory": "no", "cache_dir": folder.parent / "decoded", **options}
    return load_dataset(f"folder:{folder}", image_size=8, **options)


def folders_of(data: DataSplits) -> set[str]:
    splits = (data.train, data.val, data.test, data.bank)
    return {split.images.folder for split in splits if isinstance(split.images, StoredImages)}


def no_fetch(folder: str, pieces: Iterable[Piece]) -> Fetched:
    raise AssertionError("nothing is to be fetched")


class Elsewhere:
    """A folder that this node does not see, on a node that reads it; counts the files read."""

    def __init__(self, folder: Path) -> None:
        self.hidden = folder.with_name("driver")
        folder.rename(self.hidden)
        self.files_read = 0

    def fetch(self, folder: str, pieces: Iterable[Piece]) -> Fetched:
        for piece, data in fetch_from_here(str(self.hidden), pieces):
            self.files_read += len(piece.names)
            yield piece, data


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "files").iterdir() if path.is_dir())


def test_what_a_node_sees_is_read_in_place(folder: Path, tmp_path: Path) -> None:
    data = load(folder)
    files = files_to_share(data)
    assert [(each.folder, len(each.names)) for each in files] == [(str(folder), 40)]
    assert on_this_node(data, files, None, no_fetch) is data
    for path in folder.rglob("*.png"):  # a copy by hand, of another day
        os.utime(path, (1, 1))
    assert on_this_node(data, files, None, no_fetch) is data
    held = load(folder, in_memory="yes")
    assert files_to_share(held) == ()
    assert on_this_node(held, (), tmp_path / "cache", no_fetch) is held
    assert not (tmp_path / "cache").exists()


def test_a_copy_gives_the_same_images(folder: Path, tmp_path: Path) -> None:
    data = load(folder)
    lines: list[str] = []
    copied = on_this_node(
        data, files_to_share(data), tmp_path / "cache", no_fetch, say=lines.append
    )
    (entry,) = entries(tmp_path / "cache")
    assert folders_of(copied) == {str(entry / "copy")}
    assert [line.split()[:3] for line in lines] == [
        ["copies", "40", "files"],
        ["copied", "40", "files"],
    ]
    assert copied.bank is copied.train
    expected = describe_data(data)
    shutil.rmtree(folder)
    for again in (copied, pickle.loads(pickle.dumps(copied))):
        assert describe_data(again) == expected
    assert isinstance(data.train.images, StoredImages)
    assert isinstance(copied.train.images, StoredImages)
    assert copied.train.images.name(3) == data.train.images.name(3)


def test_a_folder_that_is_not_seen_is_fetched_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_data, "default_cache_dir", lambda: tmp_path / "home")
    data = load(folder)
    files, expected = files_to_share(data), describe_data(data)
    elsewhere = Elsewhere(folder)
    copied = on_this_node(data, files, None, elsewhere.fetch)
    assert describe_data(copied) == expected
    assert folders_of(copied) == {str(entry / "copy") for entry in entries(tmp_path / "home")}
    again = on_this_node(data, files, None, no_fetch)
    assert folders_of(again) == folders_of(copied)
    assert elsewhere.files_read == 40


def test_other_files_under_the_same_path_are_not_taken_for_the_data(
    folder: Path, tmp_path: Path
) -> None:
    data = load(folder)
    files, expected = files_to_share(data), describe_data(data)
    elsewhere = Elsewhere(folder)
    shutil.copytree(elsewhere.hidden, folder)
    path = folder / "cat" / "002.png"
    path.write_bytes(path.read_bytes()[:-1] + b"?")  # of the same size
    for cache in (None, tmp_path / "cache"):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(node_data, "default_cache_dir", lambda: tmp_path / "home")
            copied = on_this_node(data, files, cache, elsewhere.fetch)
        assert describe_data(copied) == expected
    assert elsewhere.files_read == 80


def test_two_folders_are_copied_apart_and_one_held_in_memory_not(tmp_path: Path) -> None:
    many, few = write_classes(tmp_path / "many"), write_classes(tmp_path / "few", 30)
    data = load(many, labelled=f"folder:{few}")
    copied = on_this_node(data, files_to_share(data), tmp_path / "cache", no_fetch)
    assert len(entries(tmp_path / "cache")) == len(folders_of(copied)) == 2
    assert describe_data(copied) == describe_data(data)
    mixed = load(many, labelled=f"folder:{few}", labelled_in_memory="yes")
    (files,) = files_to_share(mixed)
    copied = on_this_node(mixed, (files,), tmp_path / "cache", no_fetch)
    assert copied.val is mixed.val
    assert len(entries(tmp_path / "cache")) == 2  # that of `many` serves here too


def test_large_files_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_data, "PIECE_BYTES", 100)
    monkeypatch.setattr(node_data, "PIECE_FILES", 3)
    folder = tmp_path / "data"
    folder.mkdir()
    sizes = [0, 1, 99, 100, 101, 200, 999, *[7] * 9, 0]
    for number, size in enumerate(sizes):
        (folder / f"{number:02}").write_bytes(os.urandom(size))
    names = np.array([f"{number:02}".encode() for number in range(len(sizes))])
    files = node_data._listed(str(folder), names)
    pieces = list(node_data._pieces(files, np.arange(len(names))))
    assert max(piece.nbytes for piece in pieces) == 100
    assert max(len(piece.names) for piece in pieces) == 3
    copy = node_data._own_copy(files, tmp_path / "cache", fetch_from_here, print)
    for path in folder.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 6, 6), dtype=np.uint8)
    pixels[:3].tofile(folder / "a.bin")
    pixels[3:].tofile(folder / "b.bin")
    raw = RawImages(str(folder), (("a.bin", 3), ("b.bin", 4)), 6, np.array([6, 0, 2]), 6)
    files = node_data._listed(str(folder), raw.file_names())
    copy = node_data._own_copy(files, tmp_path / "cache", fetch_from_here, print)
    assert sorted(path.name for path in copy.iterdir()) == ["a.bin", "b.bin"]
    assert (raw.in_folder(str(copy)).decoded() == raw.decoded()).all()


def in_processes(count: int, work: Callable[[], None]) -> list[int | None]:
    """Run something in so many processes at once -> their exit codes."""
    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


def test_of_many_workers_one_copies(folder: Path, tmp_path: Path) -> None:
    data = load(folder)
    files = files_to_share(data)
    elsewhere = Elsewhere(folder)

    def said() -> list[str]:
        return sorted(line.split()[0] for line in (tmp_path / "log").read_text().splitlines())

    def slow(folder: str, pieces: Iterable[Piece]) -> Fetched:
        give_up = time.monotonic() + 20
        while said().count("waits") < 5 and time.monotonic() < give_up:
            time.sleep(0.01)  # the others come meanwhile
        return elsewhere.fetch(folder, pieces)

    def say(line: str) -> None:
        with open(tmp_path / "log", "a") as log:
            log.write(f"{line}\n")

    def work() -> None:
        copied = on_this_node(data, files, tmp_path / "cache", slow, say=say)
        assert copied.train.pixels(slice(3)).shape == (3, 3, 8, 8)

    assert in_processes(6, work) == [0] * 6
    assert said() == ["copied", "copies", *["waits"] * 5]


def test_a_copy_that_was_killed_is_continued(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_data, "PIECE_FILES", 8)
    data = load(folder)
    files, expected = files_to_share(data), describe_data(data)
    elsewhere = Elsewhere(folder)

    def killed(folder: str, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Any]]:
        for number, piece in enumerate(elsewhere.fetch(folder, pieces)):
            yield piece
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        on_this_node(data, files, tmp_path / "cache", killed)

    assert in_processes(1, work) == [-signal.SIGKILL]
    (entry,) = entries(tmp_path / "cache")
    there = sum(1 for path in entry.rglob("*.png"))
    assert (there, (entry / "complete.json").exists()) == (24, False)
    (entry / "unfinished").write_bytes(b"half an image")
    copied = on_this_node(data, files, tmp_path / "cache", elsewhere.fetch)
    assert elsewhere.files_read == 40 - there
    assert describe_data(copied) == expected
    assert {path.name for path in entry.iterdir()} == {"copy", "complete.json"}


def test_a_copy_that_lost_files_is_mended(folder: Path, tmp_path: Path) -> None:
    data = load(folder)
    files, expected = files_to_share(data), describe_data(data)
    elsewhere = Elsewhere(folder)
    on_this_node(data, files, tmp_path / "cache", elsewhere.fetch)
    (entry,) = entries(tmp_path / "cache")
    (entry / "copy" / "cat" / "010.png").unlink()
    (entry / "copy" / "cat" / "020.png").write_bytes(b"")
    shutil.rmtree(entry / "copy" / "dög")
    copied = on_this_node(data, files, tmp_path / "cache", elsewhere.fetch)
    assert elsewhere.files_read == 40 + 22
    assert describe_data(copied) == expected


def test_a_changed_folder_is_copied_anew(folder: Path, tmp_path: Path) -> None:
    data = load(folder)
    before, first = files_to_share(data), describe_data(data)
    old = on_this_node(data, before, tmp_path / "cache", no_fetch)
    for path in folder.rglob("*.png"):
        data_before, stat = path.read_bytes(), path.stat()
        size = 8 + int(path.stem) % 3, 8
        Image.new("RGB", size[::-1], (int(path.stem), 0, 0)).save(path)
        content = path.read_bytes()
        path.write_bytes(content.ljust(len(data_before), b"\0"))  # the same size
        os.utime(path, ns=(0, stat.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"^'.*png' has changed since it was listed; leave") as why:
        list(fetch_from_here(str(folder), node_data._pieces(before[0], np.arange(40))))
    assert "\n" not in str(why.value)
    data = load(folder)
    new = on_this_node(data, files_to_share(data), tmp_path / "cache", no_fetch)
    assert len(entries(tmp_path / "cache")) == 2
    assert describe_data(new)["digest"] == describe_data(data)["digest"] != first["digest"]
    assert describe_data(old) == first


def test_what_cannot_be_read_or_written_is_an_error_of_one_line(
    folder: Path, tmp_path: Path
) -> None:
    data = load(folder)
    files = files_to_share(data)
    (tmp_path / "file").write_text("")
    elsewhere = Elsewhere(folder)
    (elsewhere.hidden / "cat" / "000.png").unlink()
    for cache, match in (
        ("file", r"^cannot keep a copy of .*: Not a directory; .* choose another --node-cache$"),
        ("cache", r"^cannot read '.*000.png': No such file or directory; fix or remove the file$"),
    ):
        with pytest.raises(ValueError, match=match):
            on_this_node(data, files, tmp_path / cache, elsewhere.fetch)
    elsewhere.hidden.rename(folder)
    with pytest.raises(ValueError, match=r"^cannot read '.*/cat/000.png': it is gone, or not"):
        files_to_share(data)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"this process may not mount a small file system: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_without_room_is_an_error_before_and_during_the_copy(
    folder: Path, tiny_disk: Path
) -> None:
    data = load(folder)
    files = files_to_share(data)

    def fetch_and_fill(folder: str, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Any]]:
        for piece in fetch_from_here(str(elsewhere.hidden), pieces):
            with pytest.raises(OSError, match="No space"):  # another program's
                (tiny_disk / "ballast").write_bytes(b"0" * (1 << 20))
            yield piece

    elsewhere = Elsewhere(folder)
    with pytest.raises(ValueError, match=r"^cannot keep a copy .*: No space left on device; free"):
        on_this_node(data, files, tiny_disk, fetch_and_fill)
    assert entries(tiny_disk) == []  # others need the room
    with pytest.raises(ValueError, match=r"needs 0\.000 GB in .*, 0\.000 GB are free; delete old"):
        on_this_node(data, files, tiny_disk, no_fetch)
    (tiny_disk / "ballast").unlink()
    copied = on_this_node(data, files, tiny_disk, elsewhere.fetch)
    assert folders_of(copied) == {str(entries(tiny_disk)[0] / "copy")}


@long
@pytest.mark.slow
def test_trials_on_a_node_fetch_its_copy_once_from_the_drivers_node(
    folder: Path, tmp_path: Path
) -> None:
    """Two raylets, of which the second looks for the files where there are none.

    The driver's node has no CPU left, and each trial holds one of its node while it fetches.
    """
    import ray
    from ray import tune
    from ray.cluster_utils import Cluster

    data = load(folder)
    files, expected = files_to_share(data), describe_data(data)
    hidden = Elsewhere(folder).hidden

    class Described(tune.Trainable):
        def setup(
            self,
            config: dict[str, Any],
            data: DataSplits | None = None,
            files: tuple[FolderFiles, ...] = (),
            fetch: Fetch | None = None,
            cache: str = "",
        ) -> None:
            assert data is not None
            assert fetch is not None
            self._said: list[str] = []
            self._data = on_this_node(data, files, cache, fetch, say=self._said.append)

        def step(self) -> dict[str, Any]:
            node = ray.get_runtime_context().get_node_id()
            described = describe_data(self._data)
            return {"done": True, "said": self._said, "described": described, "node": node}

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        worker = cluster.add_node(num_cpus=3, resources={"far": 3})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()
        here = ray.get_runtime_context().get_node_id()
        trainable = tune.with_parameters(
            Described,
            data=data,
            files=files,
            fetch=lambda _folder, pieces: fetch_from_node(here, str(hidden), pieces),
            cache=str(tmp_path / "cache"),
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1, "far": 1}),
            tune_config=tune.TuneConfig(num_samples=3),
            run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0),
        )
        results = [result.metrics for result in tuner.fit()]
        assert {result["node"] for result in results} == {worker.node_id} != {here}
        assert [result["described"] for result in results] == [expected] * 3
        said = sorted(line.split()[0] for result in results for line in result["said"])
        assert [line for line in said if line != "waits"] == ["copied", "copies"]
        pieces = node_data._pieces(files[0], np.arange(3))
        with pytest.raises(ValueError, match=r"^cannot fetch .* node: cannot read .*: No such"):
            list(fetch_from_node(here, str(folder), pieces))
    finally:
        ray.shutdown()
        cluster.shutdown()
