"""One conformance suite over all encoders; the projection head's shape."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from trainer.models import ENCODERS, ProjectionHead, build_encoder, parameter_count

SIZES = (8, 32, 64)
PARAMETERS = {"conv_small": (120_000, 180_000), "resnet18": (11_000_000, 11_300_000)}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", SIZES)
def test_features_have_the_promised_shape(name: str, size: int) -> None:
    encoder, feature_dim = build_encoder(name, size)
    features = encoder(torch.rand(3, 3, size, size))
    assert features.shape == (3, feature_dim)
    assert features.dtype == torch.float32


@pytest.mark.parametrize("name", ENCODERS)
def test_parameter_count_is_as_documented(name: str) -> None:
    least, most = PARAMETERS[name]
    assert least <= parameter_count(build_encoder(name, 32)[0]) <= most


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    encoder, _ = build_encoder(name, 32)
    encoder(torch.rand(4, 3, 32, 32)).square().mean().backward()
    without = [key for key, value in encoder.named_parameters() if value.grad is None]
    assert not without
    assert all(torch.isfinite(value.grad).all() for value in encoder.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_evaluation_is_deterministic_and_ignores_the_rest_of_the_batch(name: str) -> None:
    encoder, _ = build_encoder(name, 32)
    images = torch.rand(6, 3, 32, 32)
    encoder(images)  # moves the running statistics off their start
    encoder.eval()
    with torch.inference_mode():
        together = encoder(images)
        assert torch.equal(together, encoder(images))
        torch.testing.assert_close(encoder(images[:2]), together[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_weights_follow_the_generator(name: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(build_encoder(name, 32)[0].parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("size", [32, 64])
def test_resnet_keeps_the_resolution_of_small_images(size: int) -> None:
    encoder, _ = build_encoder("resnet18", size)
    maps: list[torch.Tensor] = []
    encoder.layer1.register_forward_hook(lambda module, args, out: maps.append(out))
    encoder(torch.rand(2, 3, size, size))
    assert maps[0].shape[-1] == (32 if size == 32 else 16)


def test_unknown_encoder_lists_the_known() -> None:
    with pytest.raises(ValueError, match="encoder must be one of conv_small, resnet18; got 'vit'"):
        build_encoder("vit", 32)


def test_projection_head_shape_and_norm() -> None:
    head = ProjectionHead(8, 32, 5)
    assert head(torch.rand(7, 8)).shape == (7, 5)
    assert parameter_count(head) == 8 * 32 + 2 * 32 + 32 * 5 + 5


def test_torchvision_is_not_imported_for_the_small_encoder() -> None:
    code = (
        "import sys; from trainer.models import build_encoder; build_encoder('conv_small', 32);"
        "sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
