"""Encoders as programs: ONNX and torch.export give the trainer's features, for any batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from tests.extent import long
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


@dataclass(frozen=True)
class Saved:
    """An encoder, its program, and both in files; `stated`: the differences found on writing."""

    encoder: ExportedEncoder
    program: torch.export.ExportedProgram
    folder: Path
    stated: dict[str, float]


def saved(encoder: ExportedEncoder, folder: Path) -> Saved:
    program = traced(encoder)
    stated = {
        "onnx": save_onnx(folder / "encoder.onnx", program, encoder),
        "pt2": save_torch(folder / "encoder.pt2", program, encoder),
    }
    return Saved(encoder, program, folder, stated)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved(an_encoder("conv_small"), tmp_path_factory.mktemp("programs"))


def check(made: Saved) -> None:
    """The features are the trainer's, for any number of images."""
    encoder, size = made.encoder, made.encoder.config.image_size
    session = onnxruntime.InferenceSession(
        made.folder / "encoder.onnx", providers=["CPUExecutionProvider"]
    )
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("images", "tensor(uint8)", [3, size, size])
    shape = [encoder.feature_dim]
    assert (given.name, given.type, given.shape[1:]) == ("features", "tensor(float)", shape)
    assert isinstance(taken.shape[0], str)  # any number of images
    loaded = torch.export.load(made.folder / "encoder.pt2").module()
    largest = dict.fromkeys(made.stated, 0.0)
    images = some_images(max(BATCHES), size)
    expected = encoder.features(images)
    for count in BATCHES:
        found = {
            "onnx": torch.from_numpy(session.run(None, {"images": images[:count].numpy()})[0]),
            "pt2": loaded(images[:count]),
        }
        for kind, features in found.items():
            torch.testing.assert_close(features, expected[:count], rtol=1e-4, atol=2e-5)
            difference = float((features - expected[:count]).abs().max())
            largest[kind] = max(largest[kind], difference)
    scale = float(expected.abs().max())
    print(f"{encoder.config.encoder}: largest differences {largest}, features up to {scale:.3g}")
    assert max(made.stated.values()) < 1e-4


def test_programs_give_the_features_of_the_trainer(small: Saved) -> None:
    check(small)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 16),
        pytest.param("vgg11", 32, marks=long),
        pytest.param("vit_tiny", 16, marks=long),
    ],
)
def test_programs_of_larger_encoders(
    name: str, size: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = saved(an_encoder(name, size), tmp_path)
    assert capfd.readouterr().out == ""  # standard output is for results
    check(made)


def test_the_file_says_what_it_is_and_stands_alone(small: Saved) -> None:
    names = sorted(file.name for file in small.folder.iterdir())
    assert names == ["encoder.onnx", "encoder.pt2"]  # weights are within
    model = onnx.load(small.folder / "encoder.onnx")
    onnx.checker.check_model(model, full_check=True)
    about = json.loads({each.key: each.value for each in model.metadata_props}["contrasweep"])
    assert about["mean"] == list(MEAN)
    assert about["image_size"] == 32
    assert about["classes"] == ["cat", "döner"]


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


def test_a_program_that_computes_something_else_is_refused(small: Saved, tmp_path: Path) -> None:
    other = an_encoder("conv_small")
    with torch.no_grad():
        next(other.parameters()).mul_(3)
    with pytest.raises(ValueError, match=r"differ from the trainer's by .*; export the encoder"):
        save_torch(tmp_path / "encoder.pt2", small.program, other)


def test_what_cannot_be_traced_is_told_in_one_line() -> None:
    class Moody(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if images.sum() > 0 else -images

    config = TrainConfig(encoder="conv_small")
    with pytest.raises(ValueError, match="torch cannot trace the encoder conv_small: ") as caught:
        traced(ExportedEncoder(Moody(), config, 3, MEAN, STD, ()))
    assert "\n" not in str(caught.value)
