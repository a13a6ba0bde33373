"""An encoder as a chain of stages, from the image to the features: what partial fine-tuning tunes.

One rule for all families. A part is a child module with weights; the tree of modules is opened at
its largest part until there are three parts at least, or nothing is left to open. Those are the
stages. Norms, and parameters that stand alone, are no parts: they go with the part before them, or
where there is none with the one after. So a stage is

- of `conv_small` each of its four blocks;
- of a ResNet the stem, then each of its four groups of blocks;
- of a VGG each convolution with its norm;
- of a vision transformer the patches with their positions, then each of its twelve layers, the
  last norm with the last one.

Modules must be registered in the order in which they are applied, as torchvision's are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trainer.models import build_encoder

LEAST = 3
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass
class Stage:
    """Some modules of an encoder, and parameters of it that belong to none of them."""

    modules: list[nn.Module] = field(default_factory=list)
    lone: list[nn.Parameter] = field(default_factory=list)

    def parameters(self) -> list[nn.Parameter]:
        """All of the stage's parameters, in order."""
        return [*self.lone, *(each for module in self.modules for each in module.parameters())]


def stages(encoder: nn.Module) -> list[Stage]:
    """The encoder's stages in the order of the forward pass; each parameter is in one of them."""
    parts: list[nn.Module | nn.Parameter] = _opened(encoder)
    while sum(map(_is_part, parts)) < LEAST:
        modules = [each for each in parts if isinstance(each, nn.Module) and any(each.children())]
        if not modules:
            break
        largest = max(modules, key=_size)
        at = next(number for number, each in enumerate(parts) if each is largest)
        parts[at : at + 1] = _opened(largest)
    found: list[Stage] = []
    waiting = Stage()  # what stands before the first part
    for each in parts:
        if _is_part(each):
            found.append(Stage())
        stage = found[-1] if found else waiting
        (stage.modules if isinstance(each, nn.Module) else stage.lone).append(each)  # type: ignore[arg-type]
    if not found:
        return [waiting]
    found[0] = Stage(waiting.modules + found[0].modules, waiting.lone + found[0].lone)
    return found


@lru_cache(maxsize=64)
def count_stages(encoder: str, image_size: int) -> int:
    """How many stages the encoder of that name has; errors are those of `check_encoder`."""
    if not encoder.startswith("torchvision:"):
        with torch.device("meta"):
            return len(stages(build_encoder(encoder, image_size)[0]))
    with torch.random.fork_rng(devices=[]):  # some constructors read values, which meta has not
        return len(stages(build_encoder(encoder, image_size)[0]))


def _opened(module: nn.Module) -> list[nn.Module | nn.Parameter]:
    """A module's own parameters and its children, without those that hold no parameters."""
    own: list[nn.Module | nn.Parameter] = list(module.parameters(recurse=False))
    return own + [child for child in module.children() if _size(child)]


def _is_part(each: nn.Module | nn.Parameter) -> bool:
    if not isinstance(each, nn.Module):
        return False
    leaves = [module for module in each.modules() if list(module.parameters(recurse=False))]
    return any(not isinstance(module, NORMS) for module in leaves)


def _size(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())
