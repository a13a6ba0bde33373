"""Any of torchvision's classification models as an encoder: `torchvision:NAME`.

The last layer, which gives the classes, is taken off, and so are the auxiliary classifiers of
GoogLeNet and Inception; the rest is as torchvision has it, stems made for large images, dropout
and stochastic depth included. Which sizes of images a model can take, and how many features it
gives, is found by encoding a batch on the meta device, where tensors have shapes and no memory.
torchvision is imported inside functions: it costs 1.2 s in every process that does not need it.

Shapes: B images, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PREFIX = "torchvision:"
"""What stands before the name of a model."""
COMMON_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 384, 448, 512)
"""Sides of images (pixels) of which one is proposed in place of a side that cannot be had."""
_REFUSALS = (RuntimeError, ValueError, AssertionError)  # what models raise at a wrong size


class RemovedHead(nn.Identity):
    """Stands where a network had its class layers, whose weights in a file are passed over."""


def build_model(name: str, image_size: int) -> nn.Module:
    """Build torchvision's model `name` without its class layer, [B, 3, H, W] -> [B, F].

    Weights come from torch's global generator. A name that torchvision lacks is a ValueError.
    """
    import torchvision

    _check_name(name)
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Their papers' initial weights, which are torchvision's default but for a warning.
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    head, layer = [
        (path, module)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ][-1]
    classes = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert classes == 1000, f"the last layer of {name}, {head}, gives {classes} values, no classes"
    network.set_submodule(head, RemovedHead())
    for auxiliary in ("aux1", "aux2", "AuxLogits"):
        if hasattr(network, auxiliary):  # None, but their weights may stand in a file
            setattr(network, auxiliary, RemovedHead())
    return network


@lru_cache(maxsize=256)
def feature_dim(name: str, image_size: int) -> int:
    """Count the features F that `build_model` gives of images of that size (pixels).

    Takes 0.1 to 0.7 s the first time, no memory, and no random numbers. A ValueError of one line
    says that torchvision lacks the model or that the model cannot take such images, and what to
    do.
    """
    _check_name(name)
    try:
        return _encode_nothing(name, image_size)
    except _REFUSALS as error:
        why = str(error).split("\n")[0].rstrip(".!")
    fitting = (size for size in COMMON_SIZES if size > image_size and _takes(name, size))
    size = next(fitting, None)
    remedy = f"set image_size to {size}" if size else "choose another encoder"
    raise ValueError(
        f"encoder {PREFIX}{name} cannot take images of {image_size} pixels: {why}; {remedy}"
    )


def _check_name(name: str) -> None:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"encoder {PREFIX}NAME must name one of {', '.join(known)}; got {name!r}")


def _takes(name: str, image_size: int) -> bool:
    try:
        _encode_nothing(name, image_size)
    except _REFUSALS:
        return False
    return True


def _encode_nothing(name: str, image_size: int) -> int:
    with torch.device("meta"), _ReadableNumbers():
        model = build_model(name, image_size).to("meta")
        images = torch.empty(2, 3, image_size, image_size)
    with torch.no_grad():
        features_BF: Tensor = model(images)
    _, features = features_BF.shape
    return features


class _ReadableNumbers(TorchFunctionMode):
    """Within the meta device, keeps the small tensors whose values a constructor reads.

    RegNet computes its widths so. Weights are made by other functions.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.arange, torch.tensor):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
