"""Encoders as programs: ONNX and torch.export give the trainer's features, for any batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from trainer import programs
from trainer.config import TrainConfig
from trainer.export import ExportedEncoder
from trainer.models import build_encoder
from trainer.programs import PixelEncoder, check_packages, save_onnx, save_torch, traced

MEAN, STD = (0.48, 0.25, 1 / 3), (0.2, 0.25, 0.3)
BATCHES = (1, 3, 300)


def an_encoder(name: str, size: int = 32) -> ExportedEncoder:
    """Running statistics have left their start, as training leaves them."""
    torch.manual_seed(1)
    encoder, width = build_encoder(name, size)
    with torch.no_grad():
        encoder.train()(torch.rand(16, 3, size, size))
    config = TrainConfig(encoder=name, image_size=size)
    return ExportedEncoder(encoder.eval(), config, width, MEAN, STD, ("cat", "döner"))


def some_images(count: int, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    "name",
    [
        "conv_small",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "vgg11", "vit_tiny")),
    ],
)
def test_programs_give_the_features_of_the_trainer(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = an_encoder(name)
    program = traced(encoder)
    stated = {
        "onnx": save_onnx(tmp_path / "encoder.onnx", program, encoder),
        "pt2": save_torch(tmp_path / "encoder.pt2", program, encoder),
    }
    assert capfd.readouterr().out == ""
    session = onnxruntime.InferenceSession(
        tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"]
    )
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("images", "tensor(uint8)", [3, 32, 32])
    assert (given.name, given.type, given.shape[1:]) == (
        "features",
        "tensor(float)",
        [encoder.feature_dim],
    )
    assert isinstance(taken.shape[0], str)  # any number of images
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    largest = dict.fromkeys(stated, 0.0)
    for count in BATCHES:
        images = some_images(count)
        expected = encoder.features(images)
        found = {
            "onnx": torch.from_numpy(session.run(None, {"images": images.numpy()})[0]),
            "pt2": loaded(images),
        }
        for kind, features in found.items():
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=2e-5)
            largest[kind] = max(largest[kind], float((features - expected).abs().max()))
    print(
        f"{name}: largest differences {largest}, features up to {float(expected.abs().max()):.3g}"
    )
    assert max(stated.values()) < 1e-4


def test_the_file_says_what_it_is_and_stands_alone(tmp_path: Path) -> None:
    encoder = an_encoder("conv_small")
    path = tmp_path / "encoder.onnx"
    save_onnx(path, traced(encoder), encoder)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # weights are within
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    about = json.loads({each.key: each.value for each in model.metadata_props}["contrasweep"])
    assert about["mean"] == list(MEAN)
    assert about["image_size"] == 32
    assert about["classes"] == ["cat", "döner"]
    code = (
        "import sys, numpy, onnxruntime; s = onnxruntime.InferenceSession(sys.argv[1]);"
        "print(s.run(None, {'images': numpy.full((2, 3, 32, 32), 7, numpy.uint8)})[0].sum());"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    expected = encoder.features(np.full((2, 3, 32, 32), 7, np.uint8)).sum()
    assert float(done.stdout) == pytest.approx(float(expected), rel=1e-3)


def test_a_program_leaves_the_encoder_as_it_was() -> None:
    encoder = an_encoder("conv_small")
    encoder.train()
    program = PixelEncoder(encoder)
    assert encoder.training
    assert next(encoder.parameters()).requires_grad
    assert not program.training
    own = {id(each) for each in program.parameters()}
    assert own.isdisjoint(map(id, encoder.parameters()))


def test_missing_packages_are_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages()
    monkeypatch.setattr(programs, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(
        ValueError, match=r"needs no_such_package; .* 'contrasweep\[onnx\]'"
    ) as caught:
        check_packages()
    assert "\n" not in str(caught.value)


def test_a_program_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    encoder = an_encoder("conv_small")
    program = traced(encoder)
    other = an_encoder("conv_small")
    with torch.no_grad():
        next(other.parameters()).mul_(3)
    with pytest.raises(ValueError, match=r"differ from the trainer's by .*; export the encoder"):
        save_torch(tmp_path / "encoder.pt2", program, other)


def test_what_cannot_be_traced_is_told_in_one_line() -> None:
    class Moody(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if images.sum() > 0 else -images

    config = TrainConfig(encoder="conv_small")
    with pytest.raises(ValueError, match="torch cannot trace the encoder conv_small: ") as caught:
        traced(ExportedEncoder(Moody(), config, 3, MEAN, STD, ()))
    assert "\n" not in str(caught.value)
