"""Encoders (image -> features, what is kept) and the heads that training alone needs.

`conv_small` is made for sweeps on CPUs: it trains several thousand views a second on one core.
The others are torchvision's networks with the class layer taken off: ResNets with the stem that
suits small images, VGGs without their fully connected layers, vision transformers with patches
that suit the image, and, from torchvision_models.py, any further one by `torchvision:NAME`.
Sources: He et al. 2015 (https://arxiv.org/abs/1512.03385), Simonyan and Zisserman 2014
(https://arxiv.org/abs/1409.1556), Dosovitskiy et al. 2020 (https://arxiv.org/abs/2010.11929) with
the tiny and small sizes of Touvron et al. 2020 (https://arxiv.org/abs/2012.12877); for stem and
head Chen et al. 2020 (SimCLR, https://arxiv.org/abs/2002.05709), sections B.9 and 4.2. A new
encoder is one function and one line in `ENCODERS`. Left out: downloads of weights; they come from
a file.

Shapes: B images, 3 channels, H height, W width, F features, P projected features.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer import torchvision_models
from trainer.checkpoint import why_unreadable
from trainer.torchvision_models import RemovedHead

SMALL_IMAGE = 64
"""Images below this side (pixels) get a 3x3 stem of stride 1 and no max-pool in ResNets."""
VGG_SMALLEST = 32
"""Least side (pixels) of images for VGGs, which halve it five times."""


# ---------------------------------------------------------------------- heads


class ProjectionHead(nn.Sequential):
    """[B, F] features -> [B, P] for the loss: linear, batch norm, ReLU, ..., linear (SimCLR).

    `layers` counts the linear ones, at least 1; all but the last are `hidden` wide. `norm` adds a
    batch norm without weights after the last (SimSiam, https://arxiv.org/abs/2011.10566, section
    4.4): losses that do not push embeddings apart have nothing else to keep them centred.
    """

    def __init__(
        self, feature_dim: int, hidden: int, out: int, layers: int = 2, *, norm: bool = False
    ) -> None:
        last = [nn.BatchNorm1d(out, affine=False)] if norm else []
        super().__init__(*_perceptron(feature_dim, *[hidden] * (layers - 1), out), *last)


class Predictor(nn.Sequential):
    """[B, P] projections of one view -> [B, P] guesses at the other's, by one hidden layer.

    Grill et al. 2020 (BYOL, https://arxiv.org/abs/2006.07733); Chen and He 2020
    (SimSiam, https://arxiv.org/abs/2011.10566).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(*_perceptron(dim, hidden, dim))


def _perceptron(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inward, outward in itertools.pairwise(widths[:-1]):
        # The norm's shift does what a bias would.
        layers += [nn.Linear(inward, outward, bias=False), nn.BatchNorm1d(outward)]
        layers += [nn.ReLU(inplace=True)]
    return [*layers, nn.Linear(widths[-2], widths[-1])]


# ---------------------------------------------------------------------- encoders


class _GlobalAveragePool(nn.Module):
    """Mean over the image: `AdaptiveAvgPool2d(1)` with a gradient in the layout of its input.

    That one's gradient is an expanded view, which put the ReLU before it on a slow path: an
    eighth of a training step of `conv_small` on a CPU.
    """

    def forward(self, x_BFHW: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x_BFHW, x_BFHW.shape[-2:]).flatten(1)


def _block(channels_in: int, channels_out: int, *, stride: int = 1, pool: int = 1) -> nn.Sequential:
    # The pool stands before the norm, which then has a quarter of the values to work on.
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        nn.MaxPool2d(pool) if pool > 1 else nn.Identity(),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def _conv_small(image_size: int) -> nn.Module:
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
    return nn.Sequential(*layers)


def _resnet(image_size: int, *, name: str) -> nn.Module:
    # Imported here and below: torchvision costs 1.2 s in every worker that does not need it.
    import torchvision

    network: nn.Module = torchvision.models.get_model(name, weights=None)
    if image_size < SMALL_IMAGE:
        network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.fc = RemovedHead()
    return network


def _vgg(image_size: int, *, plan: str) -> nn.Module:
    from torchvision.models.vgg import cfgs, make_layers

    # Not the whole network cut down: of its 130 million parameters 120 are in the part cut off.
    features: nn.Module = make_layers(cfgs[plan], batch_norm=True)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision's VGG has it
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return nn.Sequential(
        OrderedDict(features=features, pool=_GlobalAveragePool(), classifier=RemovedHead())
    )


def _vit(image_size: int, *, dim: int, heads: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    network: nn.Module = VisionTransformer(
        image_size,
        _patch_size(image_size),
        num_layers=12,
        num_heads=heads,
        hidden_dim=dim,
        mlp_dim=4 * dim,
    )
    network.heads = RemovedHead()  # what is left gives the class token
    return network


def _patch_size(image_size: int) -> int:
    """Side of a patch, pixels: 64 patches at 32, 64 and 128 pixels, 196 at 224."""
    return 4 if image_size < 64 else 8 if image_size < 128 else 16


def _any_size(image_size: int) -> str:
    return ""


def _vgg_size(image_size: int) -> str:
    least = VGG_SMALLEST
    return f"needs at least {least} pixels; raise image_size" if image_size < least else ""


def _vit_size(image_size: int) -> str:
    patch = _patch_size(image_size)
    below = image_size // patch * patch
    if image_size == below:
        return ""
    return f"cuts them into patches of {patch}; set image_size to {below} or {below + patch}"


def check_encoder(name: str, image_size: int) -> None:
    """Raise a ValueError of one line if nobody has that encoder, or not for images of that size.

    `image_size` is in pixels. Allocates no weights and leaves all generators as they are.
    """
    if name.startswith(torchvision_models.PREFIX):
        torchvision_models.feature_dim(name.removeprefix(torchvision_models.PREFIX), image_size)
        return
    if name not in ENCODERS:
        known = ", ".join([*ENCODERS, f"{torchvision_models.PREFIX}NAME"])
        raise ValueError(f"encoder must be one of {known}; got {name!r}")
    refusal = ENCODERS[name].refuses(image_size)
    if refusal:
        raise ValueError(f"encoder {name} cannot take images of {image_size} pixels: {refusal}")


def feature_dim_of(name: str, image_size: int) -> int:
    """Count the features F of an encoder by name; errors are those of `check_encoder`."""
    check_encoder(name, image_size)
    if name.startswith(torchvision_models.PREFIX):
        model = name.removeprefix(torchvision_models.PREFIX)
        return torchvision_models.feature_dim(model, image_size)
    return ENCODERS[name].feature_dim


def build_encoder(name: str, image_size: int) -> tuple[nn.Module, int]:
    """Build an encoder, float [B, 3, image_size, image_size] -> [B, F], and say its F.

    Weights come from torch's global generator. Errors are those of `check_encoder`.
    """
    feature_dim = feature_dim_of(name, image_size)
    if name.startswith(torchvision_models.PREFIX):
        model = name.removeprefix(torchvision_models.PREFIX)
        encoder = torchvision_models.build_model(model, image_size)
    else:
        encoder = ENCODERS[name].build(image_size)
    # Convolutions are faster in this layout on both CPUs (oneDNN) and GPUs (tensor cores).
    return encoder.to(memory_format=torch.channels_last), feature_dim


# ---------------------------------------------------------------------- weights from a file


def load_encoder_weights(encoder: nn.Module, path: Path) -> None:
    """Give an encoder the weights in a file, all of them or, on a ValueError, none.

    The file is a .safetensors file or one of `torch.save` (read with `weights_only=True`, so that
    it cannot run code): a state dict, by itself or under "state_dict" or "model". Its names may
    all have one thing before them ("module.", "encoder.", "backbone."); what does not have it is
    another part's of the same model, such as a projection head's. Class layers are passed over.
    Anything else that is missing, left over or of another shape is an error.
    """
    state = _read_state(path)
    own = encoder.state_dict()
    first = next(iter(own))
    prefixes = [key.removesuffix(first) for key in state if key.endswith(f".{first}")]
    misfits = {prefix: _misfits(encoder, own, state, prefix) for prefix in ["", *prefixes]}
    fitting = [prefix for prefix, misfit in misfits.items() if not misfit]
    if not fitting:
        fewest = min(misfits.values(), key=lambda misfit: sum(map(len, misfit.values())))
        found = ", ".join(f"{len(keys)} {what} ({_few(keys)})" for what, keys in fewest.items())
        raise ValueError(
            f"encoder weights {path} do not fit: {found}; use weights of the same encoder and "
            "image size"
        )
    if len(fitting) > 1 and fitting[0]:
        raise ValueError(
            f"encoder weights {path} hold several encoders, {', '.join(fitting)}; keep one of them"
        )
    values = {key: state.get(fitting[0] + key, value) for key, value in own.items()}
    encoder.load_state_dict(values)


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"encoder weights {path} do not exist or are no file; check the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises a dozen types, by where it is broken
        raise ValueError(
            f"encoder weights {path} cannot be read, use others: {why_unreadable(error)}"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"encoder weights {path} hold no names; save a state_dict()")
    return {str(key): value for key, value in content.items()}


def _misfits(
    encoder: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Any], prefix: str
) -> dict[str, list[str]]:
    """List by kind what keeps the part of `state` behind `prefix` from being the encoder's."""
    heads = [path for path, module in encoder.named_modules() if isinstance(module, RemovedHead)]
    part = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    misfits: dict[str, list[str]] = {"missing": [], "of another shape": [], "left over": []}
    for key, value in own.items():
        if key not in part:
            # The count of batches is in no use here, and older files lack it.
            if not key.endswith("num_batches_tracked"):
                misfits["missing"].append(key)
            continue
        found = part[key]
        if not isinstance(found, Tensor):
            misfits["of another shape"].append(f"{key} is no tensor")
        elif found.shape != value.shape:
            shapes = f"{list(found.shape)} in place of {list(value.shape)}"
            misfits["of another shape"].append(f"{key} {shapes}")
        elif found.is_floating_point() != value.is_floating_point():
            misfits["of another shape"].append(f"{key} {found.dtype} in place of {value.dtype}")
    misfits["left over"] = [
        key
        for key in part
        if key not in own and not any(key.startswith(f"{head}.") for head in heads)
    ]
    return {what: keys for what, keys in misfits.items() if keys}


def _few(keys: list[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


class Architecture(NamedTuple):
    """An encoder by name: `refuses(image_size)` says why it cannot be had, or nothing."""

    description: str
    build: Callable[[int], nn.Module]
    feature_dim: int
    refuses: Callable[[int], str] = _any_size


ENCODERS: dict[str, Architecture] = {
    "conv_small": Architecture(
        "four convolutions, 0.15 million parameters, for CPUs", _conv_small, 192
    ),
    "resnet18": Architecture(
        "ResNet-18, 11 million parameters, for GPUs", partial(_resnet, name="resnet18"), 512
    ),
    "resnet34": Architecture(
        "ResNet-34, 21 million parameters", partial(_resnet, name="resnet34"), 512
    ),
    "resnet50": Architecture(
        "ResNet-50, 24 million parameters", partial(_resnet, name="resnet50"), 2048
    ),
    "vgg11": Architecture(
        "VGG-11 with batch norm, 9 million parameters", partial(_vgg, plan="A"), 512, _vgg_size
    ),
    "vgg16": Architecture(
        "VGG-16 with batch norm, 15 million parameters", partial(_vgg, plan="D"), 512, _vgg_size
    ),
    "vit_tiny": Architecture(
        "vision transformer, 5 million parameters", partial(_vit, dim=192, heads=3), 192, _vit_size
    ),
    "vit_small": Architecture(
        "vision transformer, 21 million parameters", partial(_vit, dim=384, heads=6), 384, _vit_size
    ),
}
