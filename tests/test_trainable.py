"""The seam: which failures are results, and which end the process."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from search.trainable import ContrastiveTrainable
from tests.extent import long
from trainer.datasets import DataSplits, load_dataset
from trainer.device import is_of_accelerator, is_out_of_memory


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return load_dataset("digits", train_limit=128, val_limit=60)


def segment(number: int = 0, checkpoint: str | None = None, **fields: Any) -> dict[str, Any]:
    small = {"batch_size": 32, "epochs": 2.0, "train_limit": 128, "val_limit": 60}
    text = json.dumps(small | fields)
    return {"number": number, "attempt": 1, "checkpoint": checkpoint, "fields": text}


def trainable(
    data: DataSplits, folder: Path, config: dict[str, Any], memory_gib: float | None = None
) -> ContrastiveTrainable:
    made = ContrastiveTrainable.__new__(ContrastiveTrainable)  # without Ray's actor around it
    made.setup(config, data=data, marks=(128, 256), sweep_dir=str(folder), memory_gib=memory_gib)
    return made


def test_reports_come_one_a_step_and_are_logged(data: DataSplits, tmp_path: Path) -> None:
    made = trainable(data, tmp_path, segment(7))
    first, second = made.step(), made.step()
    assert (first["outcome"], first["number"], first["mark"]) == ("report", 7, 128)
    assert second["mark"] == 256
    assert "mark" not in first["metrics"]
    log = (tmp_path / "trials" / "7" / "log.txt").read_text()
    assert "trial 7, attempt 1" in log
    assert log.count("knn_top1") == 2


def test_a_segment_goes_on_from_its_checkpoint_like_the_whole_run(
    data: DataSplits, tmp_path: Path
) -> None:
    whole = trainable(data, tmp_path, segment(0))
    whole.step()
    whole._last_result = {}
    saved = whole.save().checkpoint.path
    assert saved == "trials/0/checkpoint_128"
    expected = whole.step()
    again = trainable(data, tmp_path, segment(0, checkpoint=saved))
    found = again.step()
    assert found["mark"] == expected["mark"] == 256
    for figure in ("knn_top1", "train_loss", "rankme"):
        assert found["metrics"][figure] == expected["metrics"][figure]


def test_a_checkpoint_that_is_gone_means_from_the_beginning(
    data: DataSplits, tmp_path: Path
) -> None:
    made = trainable(data, tmp_path, segment(0, checkpoint=str(tmp_path / "gone")))
    assert made.step()["mark"] == 128
    assert "is gone" in (tmp_path / "trials" / "0" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("fields", "state", "reason"),
    [
        ({"temperature": -1}, "error", "temperature"),
        ({"encoder": "nope"}, "error", "conv_small"),
        ({"batch_size": 1024}, "error", "batch_size"),
        ({"loss": "vicreg", "optimizer": "sgd", "lr": 100.0, "warmup": 0.0}, "diverged", "finite"),
    ],
)
def test_what_goes_wrong_is_a_result_and_the_next_trial_is_unharmed(
    data: DataSplits, tmp_path: Path, fields: dict[str, Any], state: str, reason: str
) -> None:
    made = trainable(data, tmp_path, segment(0, **fields))
    outcome = made.step()
    assert outcome["outcome"] == state, outcome
    assert reason in outcome["reason"]
    assert made.reset_config(segment(1))
    assert made.step()["outcome"] == "report"


def test_an_allocation_that_fails_is_out_of_memory(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 50)
    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))

    def allocate(*arguments: Any, **options: Any) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr("trainer.loop.Trainer.__init__", allocate)
    assert trainable(data, tmp_path, segment(0)).step()["outcome"] == "oom"


HUNGRY = """
import numpy as np
import torch

def one_tensor(z0, z1, config):
    if len(z0) > 8:
        torch.ones(400 << 18)
    return (z0 - z1).square().mean()

def leak(z0, z1, config, kept=[]):
    if len(z0) > 8:
        for _ in range(1000):
            kept.append(torch.ones(1 << 18))
    return (z0 - z1).square().mean()

def arrays(z0, z1, config):
    if len(z0) > 8:
        held = [np.ones(1 << 17) for _ in range(400)]
    return (z0 - z1).square().mean()

def stubborn(z0, z1, config):
    held = []
    for _ in range(400 if len(z0) > 8 else 0):
        try:
            held.append(torch.ones(1 << 18))
        except Exception:
            pass
    return (z0 - z1).square().mean()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
@pytest.mark.parametrize(
    "kinds",
    [
        ["leak"],
        pytest.param(
            ["one_tensor", "arrays", "stubborn", "encoder"], marks=[long, pytest.mark.slow]
        ),
    ],
)
def test_a_trial_over_its_memory_limit_ends_and_the_next_one_is_unharmed(
    data: DataSplits, tmp_path: Path, kinds: list[str]
) -> None:
    (tmp_path / "hungry.py").write_text(HUNGRY)
    small = segment(0, encoder="conv_small")
    made = trainable(data, tmp_path, small, memory_gib=0.3)
    assert made.step()["outcome"] == "report"  # what a first trial loads lies within the limit
    for kind in kinds:
        fields: dict[str, Any] = {"loss": f"{tmp_path / 'hungry.py'}:{kind}"}
        if kind == "encoder":
            fields = {"encoder": "resnet18", "batch_size": 128}
        made.reset_config(segment(1, **fields))
        outcome = made.step()
        assert outcome["outcome"] == "oom", (kind, outcome)
        assert "its limit is 0.3 GiB; raise --memory-per-trial" in outcome["reason"]
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
    made.reset_config(small)
    assert made.step()["outcome"] == made.step()["outcome"] == "report"


ASSERTED = "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`."
POISON = """
import torch
from {module} import {kind}

def mine(z0, z1, config):
    if len(z0) > 8:
        raise {kind}({message!r})
    return (z0 - z1).square().mean()
"""


@pytest.mark.parametrize(
    ("kind", "message", "poisons"),
    [
        ("torch.AcceleratorError", ASSERTED, True),
        ("builtins.RuntimeError", ASSERTED, True),  # before torch 2.8
        ("builtins.RuntimeError", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling", True),
        ("torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB.", False),
        ("torch.AcceleratorError", "CUDA error: out of memory", False),
        ("builtins.RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", False),
    ],
)
def test_a_cuda_error_that_stays_leaves_the_step_and_lost_memory_does_not(
    data: DataSplits, tmp_path: Path, kind: str, message: str, poisons: bool
) -> None:
    module, _, name = kind.rpartition(".")
    if name == "AcceleratorError" and not hasattr(torch, name):
        pytest.skip("torch before 2.8")
    (tmp_path / "mine.py").write_text(POISON.format(module=module, kind=name, message=message))
    made = trainable(data, tmp_path, segment(0, loss=f"{tmp_path / 'mine.py'}:mine"))
    if poisons:
        with pytest.raises(RuntimeError, match=r"^CUDA error"):
            made.step()
        assert "Traceback" in (tmp_path / "trials" / "0" / "log.txt").read_text()
    else:
        outcome = made.step()
        assert (outcome["outcome"], message in outcome["reason"]) == ("oom", True)


def test_only_a_sticky_cuda_error_ends_the_process() -> None:
    assert not is_of_accelerator(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_of_accelerator(RuntimeError("anything"))
    if hasattr(torch, "AcceleratorError"):
        assert is_of_accelerator(torch.AcceleratorError("device-side assert triggered"))
