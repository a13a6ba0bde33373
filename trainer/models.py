"""Encoders (image -> features, what is kept) and SimCLR's projection head (what is thrown away).

`conv_small` is made for sweeps on CPUs: it trains several thousand views a second on one core.
`resnet18` is torchvision's with the stem that suits small images. Sources: Chen et al., "A Simple
Framework for Contrastive Learning of Visual Representations" (arXiv:2002.05709), section B.9 for
the stem and section 4.2 for the head. Left out: pretrained weights and anything else than
convolutions; a new encoder is one function and one line in `ENCODERS`.

Shapes: B images, 3 channels, H height, W width, F features, P projected features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SMALL_IMAGE = 64
"""Images below this side (pixels) get a 3x3 stem of stride 1 and no max-pool in ResNets."""


class ProjectionHead(nn.Sequential):
    """Linear, batch norm, ReLU, linear: [B, F] features -> [B, P] for the loss (SimCLR)."""

    def __init__(self, feature_dim: int, hidden: int, out: int) -> None:
        super().__init__(
            nn.Linear(feature_dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out),
        )


def _block(channels_in: int, channels_out: int, *, stride: int = 1, pool: int = 1) -> nn.Sequential:
    # The pool stands before the norm, which then has a quarter of the values to work on.
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        nn.MaxPool2d(pool) if pool > 1 else nn.Identity(),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class _GlobalAveragePool(nn.Module):
    """Mean over the image: `AdaptiveAvgPool2d(1)` with a gradient in the layout of its input.

    That one's gradient is an expanded view, which put the ReLU before it on a slow path: an
    eighth of a training step of `conv_small` on a CPU.
    """

    def forward(self, x_BFHW: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x_BFHW, x_BFHW.shape[-2:]).flatten(1)


def _conv_small(image_size: int) -> tuple[nn.Module, int]:
    # Measured on CIFAR-10 (10,000 images, 6 epochs, kNN): this one .505; with strided
    # convolutions in place of the pools .479, a sixth faster. A stem of stride 1 trains at a
    # third of the speed.
    layers = [
        _block(3, 32, stride=2),
        _block(32, 48, pool=2),
        _block(48, 64, pool=2),
        _block(64, 192),
        _GlobalAveragePool(),
    ]
    return nn.Sequential(*layers), 192


def _resnet18(image_size: int) -> tuple[nn.Module, int]:
    # Imported here: torchvision costs 1.2 s in every worker that does not need it.
    from torchvision.models import resnet18

    network: nn.Module = resnet18(weights=None)
    if image_size < SMALL_IMAGE:
        network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return network, 512


def build_encoder(name: str, image_size: int) -> tuple[nn.Module, int]:
    """Build an encoder, float [B, 3, H, W] -> [B, F], and say its F.

    Weights come from torch's global generator. An unknown name is a ValueError.
    """
    if name not in ENCODERS:
        raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}; got {name!r}")
    _, build = ENCODERS[name]
    encoder, feature_dim = build(image_size)
    # Convolutions are faster in this layout on both CPUs (oneDNN) and GPUs (tensor cores).
    return encoder.to(memory_format=torch.channels_last), feature_dim


def parameter_count(module: nn.Module) -> int:
    """Count the trainable numbers of a module."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


Builder = Callable[[int], tuple[nn.Module, int]]

ENCODERS: dict[str, tuple[str, Builder]] = {
    "conv_small": ("four convolutions, 0.15 million parameters, for CPUs", _conv_small),
    "resnet18": ("ResNet-18, 11 million parameters, for GPUs", _resnet18),
}
