"""A disk that is full, and two sweeps on one store."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import Attack, one_by_one

pytestmark = [pytest.mark.slow, one_by_one]
DISK_MIB = 48


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """`runs`, a file system of its own of a few MiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    runs = tmp_path / "runs"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", str(runs)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield runs
    subprocess.run(["umount", "-l", str(runs)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Leave so many bytes; deleting the file that is returned frees the rest."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        size = max(0, shutil.disk_usage(disk).free - leave)
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            while not leave:
                file.write(bytes(4096))
        except OSError:
            pass
    return ballast


def fill_while_it_runs(disk: Path, process: subprocess.Popen[str], leave: int) -> Path:
    """What a driver frees, such as a trial's older checkpoints, is taken until it ends."""
    ballast = fill(disk, leave)
    with ballast.open("r+b", buffering=0) as file:
        while process.poll() is None:
            if (more := shutil.disk_usage(disk).free - leave) > 0:
                with contextlib.suppress(OSError):  # the driver was faster
                    os.posix_fallocate(file.fileno(), ballast.stat().st_size, more)
            time.sleep(0.02)
    return ballast


def test_a_disk_too_full_for_checkpoints_and_the_database(disk: Path) -> None:
    """What the journal needs is left: checkpoints and the record wait until there is room."""
    attack = Attack(disk.parent)
    attack.sweep()
    attack.until(lambda state: len(state.reports) >= 3)
    ballast = fill(disk, leave=32 * 1024)
    time.sleep(8)
    ballast.unlink()
    attack.tried += 1
    assert attack.end()["state"] == "finished"
    attack.verdict("disk full for 8 s: checkpoints, database")


def test_a_disk_that_stays_too_full_for_checkpoints(disk: Path) -> None:
    attack = Attack(disk.parent)
    attack.sweep()
    attack.until(lambda state: len(state.reports) >= 3)
    assert attack.process is not None
    attack.tried += 1
    ballast = fill_while_it_runs(disk, attack.process, leave=32 * 1024)
    told = attack.end(1)
    assert told["state"] == "interrupted"
    assert "No space left on device" in told["reason"]
    ballast.unlink()
    attack.finished_by_resume()
    attack.verdict("disk stays full: checkpoints")


def test_a_disk_too_full_for_the_journal(disk: Path) -> None:
    attack = Attack(disk.parent)
    attack.sweep("--storage", str(disk.parent / "storage"))  # where there is room
    attack.until(lambda state: len(state.reports) >= 4)
    ballast = fill(disk)
    attack.tried += 1
    attack.end(2)
    last = attack.errors.splitlines()[-1]
    assert last.startswith("contrasweep: cannot write ")
    assert "No space left on device" in last
    ballast.unlink()
    attack.finished_by_resume()
    attack.verdict("disk full: journal")


def test_two_sweeps_at_once_on_one_store(tmp_path: Path) -> None:
    """Both find it missing and make it; one of them is killed besides."""
    attacks = [Attack(tmp_path, name) for name in ("one", "two")]
    for attack in attacks:
        attack.sweep()
    attacks[0].until(lambda state: len(state.reports) > 3)
    attacks[0].kill()
    attacks[0].resume()
    attacks[1].tried = 1
    for attack in attacks:
        assert attack.end()["state"] == "finished"
    for attack in attacks:
        attack.verdict("two sweeps at once on one store")
