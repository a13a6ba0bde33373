"""The seam: which failures are results, and which end the process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from search.trainable import ContrastiveTrainable
from trainer.datasets import DataSplits, load_dataset
from trainer.device import is_of_accelerator, is_out_of_memory


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return load_dataset("digits", train_limit=128, val_limit=60)


def segment(number: int = 0, checkpoint: str | None = None, **fields: Any) -> dict[str, Any]:
    small = {"batch_size": 32, "epochs": 2.0, "train_limit": 128, "val_limit": 60}
    return {"number": number, "attempt": 1, "checkpoint": checkpoint, "fields": small | fields}


def trainable(data: DataSplits, folder: Path, config: dict[str, Any]) -> ContrastiveTrainable:
    made = ContrastiveTrainable.__new__(ContrastiveTrainable)  # without Ray's actor around it
    made.setup(config, data=data, marks=(128, 256), sweep_dir=str(folder))
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
    whole.save_checkpoint(str(tmp_path / "saved"))
    expected = whole.step()
    again = trainable(data, tmp_path, segment(0, checkpoint=str(tmp_path / "saved")))
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


def test_only_a_sticky_cuda_error_ends_the_process() -> None:
    assert not is_of_accelerator(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_of_accelerator(RuntimeError("anything"))
    if hasattr(torch, "AcceleratorError"):
        assert is_of_accelerator(torch.AcceleratorError("device-side assert triggered"))
