"""Checkpoints: what is read equals what was written; broken and hostile files are refused."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.extent import ALL
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.config import TrainConfig

STATE = {"weights": torch.arange(6.0).reshape(2, 3), "seen": 7, "nested": {"mark": None}}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "checkpoint.pt"
    config = TrainConfig(lr=0.02, epochs=3)
    save_checkpoint(path, STATE, config, mark=500)
    loaded = load_checkpoint(path)
    assert loaded.config == config
    assert loaded.mark == 500
    assert torch.equal(loaded.state["weights"], STATE["weights"])
    assert loaded.state["nested"] == {"mark": None}
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.pt does not exist"):
        load_checkpoint(tmp_path / "gone.pt")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused_in_one_line(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE, TrainConfig(), mark=1)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=r"checkpoint .* cannot be read") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"model": {}},
        [1, 2],
        {"format": 99, "config": {}, "mark": 1, "state": {}},
        {"format": 1, "config": {}, "state": {}},
        {"format": 1, "config": {"lr": -1.0}, "mark": 1, "state": {}},
        {"format": 1, "config": {"unheard_of": 1}, "mark": 1, "state": {}},
        {"format": 1, "config": {}, "mark": 1, "state": [1]},
    ],
)
def test_other_content_is_refused_in_one_line(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"other\.pt") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_hostile_pickle_is_refused_and_not_executed(tmp_path: Path, writer: str) -> None:
    path, folder = tmp_path / "hostile.pt", tmp_path / "made"
    content = {"format": 1, "config": {}, "mark": 1, "state": Hostile(folder)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(path)
    assert not folder.exists()


def test_failed_save_keeps_the_old_file_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE, TrainConfig(), mark=1)
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"lambda": lambda: None}, TrainConfig(), mark=2)
    assert load_checkpoint(path).mark == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


SAVE_FOR_EVER = """
import sys, torch
from pathlib import Path
from trainer.checkpoint import save_checkpoint
from trainer.config import TrainConfig
for mark in range(1, 10**9):
    state = {"weights": torch.full((500_000,), float(mark))}
    save_checkpoint(Path(sys.argv[1]), state, TrainConfig(), mark)
"""


@pytest.mark.slow
def test_kill_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    marks = []
    for delay_s in (0.0, 0.011, 0.027, 0.05) if ALL else (0.0, 0.027):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(path)])
        path.unlink(missing_ok=True)
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        checkpoint = load_checkpoint(path)
        weights = checkpoint.state["weights"]
        assert torch.equal(weights, torch.full((500_000,), float(checkpoint.mark)))
        marks.append(checkpoint.mark)
    assert max(marks) >= 1


def test_a_full_disk_is_the_system_s_error_and_leaves_the_older_file(tmp_path: Path) -> None:
    """torch raises a RuntimeError of its own while it closes the archive."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("a small file system is mounted, which takes root")
    try:
        path, config = tmp_path / "checkpoint.pt", TrainConfig()
        save_checkpoint(path, {"step": 1}, config, 100)
        with pytest.raises(OSError, match="No space left") as raised:
            save_checkpoint(path, {"weights": torch.zeros(20_000)}, config, 200)
        assert raised.value.errno == errno.ENOSPC
        assert load_checkpoint(path).mark == 100
        assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
