"""What is random about views: drawn for a whole batch at once, before any pixel is touched.

Every call draws the same count of random numbers, whichever augmentations are on. Runs that
differ in one augmentation therefore see the same crops, flips and colours otherwise, which
makes comparing them less noisy.

Definitions are those of torchvision's `RandomAffine`, `RandomResizedCrop` and `ColorJitter`, of
SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709) for the blur, of BYOL (Grill et al.
2020, https://arxiv.org/abs/2006.07733) for solarisation and of DeVries and Taylor 2017
(https://arxiv.org/abs/1708.04552) for the cutout. Left out: shear, perspective, elastic
deformation and policies of augmentations such as RandAugment.

Shapes: N views, U uniform numbers a view, S side in pixels.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trainer.config import Augmentation, TrainConfig
from trainer.crop import CROP_UNIFORMS, crop_boxes, whole_boxes

ColourOp = Literal["brightness", "contrast", "saturation", "hue"]
COLOUR_ORDERS: tuple[tuple[ColourOp, ...], ...] = tuple(itertools.permutations(get_args(ColourOp)))

LEAST_BLUR_SIGMA = 0.1  # pixels at strength 1, SimCLR's
NEVER = 2.0  # a threshold that no value reaches

DRAWS = (  # one uniform number a view each: for whom, and how much
    *(f"{name}_p" for name in get_args(Augmentation)),
    *("rotation", "right", "down", "scaling"),
    *get_args(ColourOp),
    *("blur", "cutout_top", "cutout_left"),
)
Uniforms = dict[str, Tensor]


@dataclass(frozen=True)
class ViewParameters:
    """Everything random about N views; None where no view of the configuration is changed.

    A view that was not chosen for an operation has the value that changes nothing.
    """

    affine: Tensor | None  # [N,4]: degrees clockwise, pixels to the right, pixels down, factor
    boxes: Tensor | None  # [N,4] int64: top, left, height, width in pixels
    flip: Tensor  # [N] bool; all false if `boxes` is None
    vflip: Tensor  # [N] bool; likewise
    brightness: Tensor | None  # [N] factor
    contrast: Tensor | None  # [N] factor
    saturation: Tensor | None  # [N] factor
    hue: Tensor | None  # [N] turns
    grayscale: Tensor | None  # [N] share of the colour that is lost
    blur: Tensor | None  # [N] standard deviation in pixels, 0: no blur
    solarize: Tensor | None  # [N] threshold in [0, 1], or NEVER
    cutout: Tensor | None  # [N,3] int64: top, left, side in pixels; partly outside, side 0: none
    order: tuple[ColourOp, ...]  # of the jitter's operations, for the whole batch

    def rows(self, part: slice | Tensor) -> ViewParameters:
        """The parameters of some of the views."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        parts: dict[str, Any] = {
            name: value[part] for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **parts)

    @property
    def recolours(self) -> bool:
        """Whether there is any jitter or grayscale."""
        operations = (self.brightness, self.contrast, self.saturation, self.hue, self.grayscale)
        return any(operation is not None for operation in operations)


def sample_order(generator: torch.Generator) -> tuple[ColourOp, ...]:
    """An order of the colour operations, decided by the generator's state, which stays as it is.

    The order must be known on the host. Drawing it on the device would make the host wait;
    the state of a generator lies on the host for every device.
    """
    state = generator.get_state().numpy().tobytes()
    number = int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "big")
    return COLOUR_ORDERS[number % len(COLOUR_ORDERS)]


def sample_parameters(
    config: TrainConfig, count: int, size: int, generator: torch.Generator
) -> ViewParameters:
    """Draw the parameters of N = `count` views of images of `size` px, on the generator's device.

    With m a magnitude of the configuration and s its strength: rotation uniform in [-m, m]
    degrees, translation in [-m, m] of the side on either axis, in whole pixels, scaling in
    [1 - m, 1 + m]. Brightness, contrast and saturation uniform in [max(0, 1 - s m), 1 + s m], hue
    in [-s m, s m] turns with s m at most 0.5, blur in [0.1 s, s m] pixels. The same for all
    views that are chosen: the share of colour lost, min(1, s m); the share of the range that is
    inverted, min(1, s m); the side of the cutout, m of the image's, around any of its pixels.
    """
    order = sample_order(generator)
    uniform_UN = torch.rand(
        (len(DRAWS) + CROP_UNIFORMS, count), generator=generator, device=generator.device
    )
    uniform = dict(zip(DRAWS, uniform_UN[: len(DRAWS)].unbind(), strict=True))
    return ViewParameters(
        affine=_affine(config, uniform, size),
        boxes=_boxes(config, uniform, uniform_UN[len(DRAWS) :], size),
        flip=_chosen(config, uniform, "flip"),
        vflip=_chosen(config, uniform, "vflip"),
        brightness=_factor(config, uniform, "brightness"),
        contrast=_factor(config, uniform, "contrast"),
        saturation=_factor(config, uniform, "saturation"),
        hue=_hue(config, uniform),
        grayscale=_grayscale(config, uniform),
        blur=_blur(config, uniform),
        solarize=_solarize(config, uniform),
        cutout=_cutout(config, uniform, size),
        order=order,
    )


def _chosen(config: TrainConfig, uniform: Uniforms, name: Augmentation) -> Tensor:
    return uniform[f"{name}_p"] < config.chance(name)


def _spread(
    config: TrainConfig, uniform: Uniforms, draw: str, name: Augmentation, most: float
) -> Tensor:
    """Uniform in [-most, most] for the views chosen for `name`, 0 for the others."""
    return (uniform[draw] * 2 - 1).mul_(most) * _chosen(config, uniform, name)


def _affine(config: TrainConfig, uniform: Uniforms, size: int) -> Tensor | None:
    magnitudes: dict[Augmentation, float] = {
        "rotation": config.rotation,
        "translation": config.translation,
        "scaling": config.scaling,
    }
    if all(config.chance(name) * most == 0 for name, most in magnitudes.items()):
        return None
    pixels = config.translation * size
    angle_N = _spread(config, uniform, "rotation", "rotation", config.rotation)
    # whole pixels, as torchvision draws them: a translation alone must not blur
    right_N = _spread(config, uniform, "right", "translation", pixels).round_()
    down_N = _spread(config, uniform, "down", "translation", pixels).round_()
    scale_N = _spread(config, uniform, "scaling", "scaling", config.scaling) + 1
    return torch.stack([angle_N, right_N, down_N, scale_N], dim=1)


def _boxes(config: TrainConfig, uniform: Uniforms, crop_UN: Tensor, size: int) -> Tensor | None:
    crops = config.chance("crop") > 0 and config.crop_min_scale < 1
    if not crops and config.chance("flip") == config.chance("vflip") == 0:
        return None
    boxes_N4 = whole_boxes(crop_UN.shape[1], size, crop_UN.device)
    if crops:
        chosen_N1 = _chosen(config, uniform, "crop")[:, None]
        cropped_N4 = crop_boxes(crop_UN, size, config.crop_min_scale)
        boxes_N4 = torch.where(chosen_N1, cropped_N4, boxes_N4)
    return boxes_N4


def _factor(
    config: TrainConfig,
    uniform: Uniforms,
    operation: Literal["brightness", "contrast", "saturation"],
) -> Tensor | None:
    magnitude: float = config.strength * getattr(config, operation)
    if config.chance("jitter") * magnitude == 0:
        return None
    low, high = max(0.0, 1 - magnitude), 1 + magnitude
    kept_N = ~_chosen(config, uniform, "jitter")
    return (uniform[operation] * (high - low)).add_(low).masked_fill_(kept_N, 1)


def _hue(config: TrainConfig, uniform: Uniforms) -> Tensor | None:
    magnitude = min(0.5, config.strength * config.hue)
    if config.chance("jitter") * magnitude == 0:
        return None
    return _spread(config, uniform, "hue", "jitter", magnitude)


def _grayscale(config: TrainConfig, uniform: Uniforms) -> Tensor | None:
    share = min(1.0, config.strength * config.grayscale)
    if config.chance("grayscale") * share == 0:
        return None
    return _chosen(config, uniform, "grayscale") * share


def _blur(config: TrainConfig, uniform: Uniforms) -> Tensor | None:
    if config.chance("blur") * config.strength * config.blur_sigma == 0:
        return None
    low, high = min(LEAST_BLUR_SIGMA, config.blur_sigma), config.blur_sigma
    sigma_N = (uniform["blur"] * (high - low)).add_(low).mul_(config.strength)
    return sigma_N * _chosen(config, uniform, "blur")


def _solarize(config: TrainConfig, uniform: Uniforms) -> Tensor | None:
    share = min(1.0, config.strength * config.solarize)
    if config.chance("solarize") * share == 0:  # a threshold of 1 would invert plain white
        return None
    threshold_N = torch.full_like(uniform["solarize_p"], 1 - share)
    return threshold_N.masked_fill_(~_chosen(config, uniform, "solarize"), NEVER)


def _cutout(config: TrainConfig, uniform: Uniforms, size: int) -> Tensor | None:
    side = round(config.cutout * size)
    if config.chance("cutout") * side == 0:
        return None
    side_N = _chosen(config, uniform, "cutout") * side
    # a product with a float just below 1 can round up to the size itself
    corner_N2 = torch.stack(
        [
            (uniform[draw] * size).floor_().clamp_(max=size - 1).long() - side // 2
            for draw in ("cutout_top", "cutout_left")
        ],
        dim=1,
    )
    return torch.cat([corner_N2, side_N[:, None]], dim=1)
