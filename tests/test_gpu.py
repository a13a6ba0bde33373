"""What only a GPU can show: the same views, losses and metrics there, and no step that waits.

Everything else has one path for all devices, which the other tests take on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.augment import TwoViews
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.config import TrainConfig
from trainer.datasets import DataSplits, load_for
from trainer.loop import Trainer
from trainer.losses import LOSSES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ALL_VIEWS = {f"{name}_p": 0.5 for name in ("vflip", "rotation", "translation", "scaling", "blur",
             "solarize", "cutout")}  # fmt: skip


def tiny(**changed: Any) -> TrainConfig:
    base = {"train_limit": 150, "val_limit": 60, "image_size": 16, "batch_size": 32, "epochs": 2.5}
    base |= {"projector_hidden": 32, "projector_out": 16, "report_every": 70}
    return TrainConfig.model_validate(base | {"device": "cuda"} | changed)


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return load_for(tiny())


def test_trains_and_continues(data: DataSplits, tmp_path: Path) -> None:
    config = tiny()
    trainer = Trainer(config, data)
    next(trainer.run())
    save_checkpoint(tmp_path / "gpu.pt", trainer.state_dict(), config, 70)
    continued = Trainer(config, data)
    continued.load_state_dict(load_checkpoint(tmp_path / "gpu.pt").state)
    reports = list(continued.run())
    assert [report.mark for report in reports] == [140, 210, 280, 350, 375]
    assert reports[-1].knn_top1 is not None
    assert reports[-1].knn_top1 > 0.3


@pytest.mark.parametrize("jitter", ["hsv", "linear"])
@pytest.mark.parametrize("micro", [None, 8])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_never_waits_for_the_device(
    data: DataSplits, loss: str, micro: int | None, jitter: str
) -> None:
    changed = {"loss": loss, "micro_batch_size": micro, "jitter": jitter, "optimizer": "lars"}
    config = tiny(**changed, ema_decay=0.9, clip_norm=1.0, **ALL_VIEWS)
    trainer = Trainer(config, data)
    for _ in range(2):  # the first steps allocate
        trainer._step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_and_every_loss_train(data: DataSplits, loss: str) -> None:
    reports = list(Trainer(tiny(loss=loss, micro_batch_size=8, epochs=0.5), data).run())
    assert reports[-1].feature_std > 0


def test_views_are_finite_and_repeatable(data: DataSplits) -> None:
    views = TwoViews(tiny(**ALL_VIEWS), data.mean, data.std, "cuda")
    images = torch.from_numpy(data.train.images[:64].copy()).cuda()
    first, again = (views(images, torch.Generator("cuda").manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.isfinite().all()


def test_features_are_those_of_a_cpu(data: DataSplits) -> None:
    gpu, cpu = (
        Trainer(tiny(device=device, precision="float32"), data) for device in ("cuda", "cpu")
    )
    found = [trainer.features(data.val.images) for trainer in (gpu, cpu)]  # the same weights
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)  # TF32 convolutions
