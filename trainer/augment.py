"""Two random views of a batch, made on the device in batched operations.

The augmentations of SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709, appendix A)
without the blur, which its authors leave out at 32 px: random resized crop, horizontal flip,
colour jitter, grayscale, normalisation. Definitions are torchvision's and every sample has its
own parameters; only the order of the four colour operations is drawn once a batch.

How it is fast: nothing loops over samples or waits for the device, a crop with its flip is two
small matrix products, colours are worked on in place, and a CPU goes through the batch in
chunks whose intermediate results stay in its cache. All random numbers are drawn before the
first chunk, so the views do not depend on the size of the chunks.

`jitter="hsv"` is torchvision's colour jitter: four operations, each clamped to [0, 1], hue
rotated in HSV. `jitter="linear"` rotates hue linearly in YIQ, as NVIDIA DALI's colour twist
does, so that jitter, grayscale and normalisation are one 3x3 matrix and one offset a sample;
values are clamped once, at the end, to what [0, 1] becomes after normalisation.

Left out: blur, solarisation, images that are not square, and sizes that change.

Shapes: B images of a batch, N = 2B views, S side in pixels, P = S*S pixels, C = 3 channels.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.crop import crop_and_flip, sample_crop_boxes

ColourOp = Literal["brightness", "contrast", "saturation", "hue"]
COLOUR_ORDERS: tuple[tuple[ColourOp, ...], ...] = tuple(itertools.permutations(get_args(ColourOp)))

LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
RGB_TO_YIQ = (  # chroma rows sum to 0, so that a rotation keeps grays
    (0.299, 0.587, 0.114),
    (0.5959, -0.2746, -0.3213),
    (0.2115, -0.5227, 0.3112),
)
CHUNK_BYTES = {"cpu": 3 << 18, "cuda": 1 << 28}  # of float32 views; CPU: 64 views of 32 px


@dataclass(frozen=True)
class ViewParameters:
    """Everything random about N views; a view without jitter has factors 1 and hue 0."""

    boxes: Tensor  # [N,4] int64: top, left, height, width in pixels
    flip: Tensor  # [N] bool
    brightness: Tensor  # [N] factor
    contrast: Tensor  # [N] factor
    saturation: Tensor  # [N] factor
    hue: Tensor  # [N] turns
    grayscale: Tensor  # [N] float32, 1 where the view loses its colours
    order: tuple[ColourOp, ...]  # of the whole batch

    def rows(self, part: slice) -> ViewParameters:
        """The parameters of some of the views."""
        tensors = {
            field.name: getattr(self, field.name)[part]
            for field in fields(self)
            if field.name != "order"
        }
        return ViewParameters(**tensors, order=self.order)


# --- drawing ---------------------------------------------------------------------------------


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

    Factors are uniform in [max(0, 1 - m), 1 + m] with m = strength times the magnitude, hue in
    [-m, m] turns with m at most 0.5.
    """
    order = sample_order(generator)
    boxes_N4 = sample_crop_boxes(count, size, config.crop_min_scale, generator)
    uniform_7N = torch.rand((7, count), generator=generator, device=generator.device)
    flip_N, jitter_N, gray_N, *colour_4N = uniform_7N.unbind()
    keep_N = jitter_N >= config.jitter_p

    def factor(uniform_N: Tensor, magnitude: float) -> Tensor:
        low, high = max(0.0, 1 - magnitude), 1 + magnitude
        return (uniform_N * (high - low) + low).masked_fill(keep_N, 1)

    hue = min(0.5, config.hue * config.strength)
    return ViewParameters(
        boxes=boxes_N4,
        flip=flip_N < config.flip_p,
        brightness=factor(colour_4N[0], config.brightness * config.strength),
        contrast=factor(colour_4N[1], config.contrast * config.strength),
        saturation=factor(colour_4N[2], config.saturation * config.strength),
        hue=((2 * colour_4N[3] - 1) * hue).masked_fill(keep_N, 0),
        grayscale=(gray_N < config.grayscale_p).float(),
        order=order,
    )


# --- colours, exact: in place on [N,3,P] in [0,1], torchvision's definitions --------------------


def luma(images_NCP: Tensor) -> Tensor:
    """Brightness of each pixel [N,1,P]: the weighted sum of its channels."""
    red, green, blue = images_NCP[:, 0:1], images_NCP[:, 1:2], images_NCP[:, 2:3]
    gray = red * LUMA[0]
    return gray.add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def adjust_brightness_(images_NCP: Tensor, factor_N: Tensor) -> Tensor:
    """Multiply by the factor; clamped."""
    return images_NCP.mul_(factor_N[:, None, None]).clamp_(0, 1)


def adjust_contrast_(images_NCP: Tensor, factor_N: Tensor) -> Tensor:
    """Blend with the image's mean luma: 0 gives a plain gray image, 1 the image; clamped."""
    mean_N11 = luma(images_NCP.mean(dim=2, keepdim=True))
    factor_N11 = factor_N[:, None, None]
    return images_NCP.mul_(factor_N11).add_(mean_N11 * (1 - factor_N11)).clamp_(0, 1)


def adjust_saturation_(images_NCP: Tensor, factor_N: Tensor) -> Tensor:
    """Blend with each pixel's luma: 0 gives a grayscale image, 1 the image; clamped."""
    return blend_with_luma_(images_NCP, factor_N).clamp_(0, 1)


def blend_with_luma_(images_NCP: Tensor, factor_N: Tensor) -> Tensor:
    """factor * image + (1 - factor) * luma, not clamped; exactly the image at factor 1."""
    gray = luma(images_NCP).expand_as(images_NCP)
    return torch.lerp(gray, images_NCP, factor_N[:, None, None], out=images_NCP)


def adjust_hue_(images_NCP: Tensor, turns_N: Tensor) -> Tensor:
    """Rotate the hue in HSV by turns in [-0.5, 0.5]; exactly the image at 0.

    Value and chroma c stay, so no pixel needs to be sorted into one of HSV's six sectors. With
    m the least channel, the distance of a hue from red is (1 + (g + b - r - m) / c) / 6 turns,
    on green's side if g > b; and a channel at distance d from the hue is m + c at d <= 1/6,
    m at d >= 1/3, linear between.
    """
    red, green, blue = images_NCP.unbind(1)
    least = torch.minimum(red, green)
    torch.minimum(least, blue, out=least)
    chroma = torch.maximum(red, green)
    torch.maximum(chroma, blue, out=chroma).sub_(least)
    six_chroma = (chroma * 6).add_(1e-12)  # a gray pixel has no hue: any will do, but not NaN
    hue = torch.add(green, blue).sub_(red).sub_(least).div_(six_chroma).add_(1 / 6)
    scratch = torch.sub(green, blue)
    torch.copysign(hue, scratch, out=hue)
    hue.add_(turns_N[:, None] + 1).frac_()  # [0, 1) turns
    top = torch.add(least, chroma, alpha=2)
    bottom = least.sub_(chroma)
    # zero turns would come back with rounding errors, so those views keep their own pixels
    rotated_N1 = (turns_N != 0).to(hue.dtype)[:, None]
    # red is farthest from hue 1/2, green and blue are nearest to 1/3 and 2/3
    for channel, opposite, base, sign in (
        (red, 1 / 2, bottom, 1),
        (green, 1 / 3, top, -1),
        (blue, 2 / 3, top, -1),
    ):
        torch.sub(hue, opposite, out=scratch).abs_().clamp_(1 / 6, 1 / 3)
        torch.addcmul(base, six_chroma, scratch, value=sign, out=scratch)
        channel.lerp_(scratch, rotated_N1)
    return images_NCP


# --- colours, linear: a matrix and an offset a view ---------------------------------------------


@dataclass(frozen=True)
class ColourConstants:
    """Matrices [3,3] on one device: their copies are made once, as each would wait for it."""

    identity: Tensor
    gray: Tensor  # every channel becomes the luma
    chroma: Tensor  # the projection on the chromaticity plane of YIQ
    quarter: Tensor  # that, turned by a quarter from red towards green, as HSV counts

    @classmethod
    def on(cls, device: torch.device) -> ColourConstants:
        """Compute them in float64 and keep them as float32."""
        to_yiq = torch.tensor(RGB_TO_YIQ, dtype=torch.float64)
        from_yiq = torch.linalg.inv(to_yiq)
        quarter_turn = torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=torch.float64)
        chroma = torch.diag(torch.tensor([0.0, 1, 1], dtype=torch.float64))
        matrices = (
            torch.eye(3),
            torch.tensor([LUMA]).repeat(3, 1),
            from_yiq @ chroma @ to_yiq,
            from_yiq @ quarter_turn @ to_yiq,
        )
        return cls(*(matrix.to(device, torch.float32) for matrix in matrices))


def colour_matrices(
    parameters: ViewParameters, means_NC: Tensor, constants: ColourConstants
) -> tuple[Tensor, Tensor]:
    """Jitter and grayscale as matrices [N,3,3] and offsets [N,3,1], without any clamping.

    Contrast needs the mean luma of the image as the operations before it leave it: that is
    the matrix so far applied to the channel means, since all of them are linear.
    """
    matrix = constants.identity.expand(len(means_NC), 3, 3)
    offset = torch.zeros_like(means_NC)[:, :, None]

    def blend(factor_N: Tensor) -> Tensor:
        return torch.lerp(constants.gray, constants.identity, factor_N[:, None, None])

    for operation in parameters.order:
        if operation == "brightness":
            factor_N11 = parameters.brightness[:, None, None]
            matrix, offset = matrix * factor_N11, offset * factor_N11
        elif operation == "contrast":
            factor_N11 = parameters.contrast[:, None, None]
            mean_NC1 = constants.gray @ (matrix @ means_NC[:, :, None] + offset)
            matrix = matrix * factor_N11
            offset = torch.lerp(mean_NC1, offset, factor_N11)
        else:
            step = (
                blend(parameters.saturation)
                if operation == "saturation"
                else hue_matrices(parameters.hue, constants)
            )
            matrix, offset = step @ matrix, step @ offset
    gray = blend(1 - parameters.grayscale)
    return gray @ matrix, gray @ offset


def hue_matrices(turns_N: Tensor, constants: ColourConstants) -> Tensor:
    """Matrices [N,3,3] that rotate the chromaticity plane of YIQ; the identity at 0 turns.

    Grays and the Y of every colour stay as they are.
    """
    angle_N11 = turns_N[:, None, None] * (2 * math.pi)
    turned = (angle_N11.cos() - 1) * constants.chroma + angle_N11.sin() * constants.quarter
    return constants.identity + turned


# --- the whole ---------------------------------------------------------------------------------


def normalise(images_BCSS: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images [B,3,H,W] -> float32 (image / 255 - mean) / std: evaluation's preprocessing."""
    return _normalise_(images_BCSS.to(torch.float32).mul_(1 / 255), mean, std)


def _normalise_(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    for channel, (shift, scale) in enumerate(zip(mean, std, strict=True)):
        images[:, channel].sub_(shift).div_(scale)  # numbers: a tensor would have to be copied
    return images


class TwoViews:
    """Makes two views of every image of a batch.

    Args:
        config: the fields under "views".
        mean, std: of the three channels in [0, 1].
        device: where batches and the generator live.
    """

    def __init__(
        self,
        config: TrainConfig,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
    ) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"mean and std need three numbers each, std above 0, got {mean} and {std}"
            )
        self.config = config
        self.mean, self.std = tuple(mean), tuple(std)
        self.device = torch.device(device)
        self._constants = ColourConstants.on(self.device)
        self._mean_C1 = torch.tensor([self.mean], device=self.device).mT
        self._std_C1 = torch.tensor([self.std], device=self.device).mT
        self._chunk_bytes = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cuda"])

    @torch.no_grad()
    def __call__(
        self, images_BCSS: Tensor, generator: torch.Generator, out: Tensor | None = None
    ) -> Tensor:
        """uint8 [B,3,S,S] -> normalised float32 [2B,3,S,S]: all first views, then all second.

        Deterministic for a given state of `generator`, which must be on the same device. `out`
        is written to and returned if given; it must not be needed by a backward pass any more.
        """
        if images_BCSS.dtype != torch.uint8 or images_BCSS.ndim != 4:
            raise ValueError(
                "images must be uint8 of shape [B, 3, S, S], "
                f"got {images_BCSS.dtype} {tuple(images_BCSS.shape)}"
            )
        count, channels, size, width = images_BCSS.shape
        if channels != 3 or size != width:
            raise ValueError(
                f"images must be square with three channels, got {tuple(images_BCSS.shape)}"
            )
        if generator.device.type != self.device.type:
            raise ValueError(
                f"the generator must be on {self.device} like the images, got {generator.device}"
            )
        images_NCSS = torch.cat([images_BCSS, images_BCSS])
        parameters = sample_parameters(self.config, 2 * count, size, generator)
        if out is None:
            out = torch.empty(images_NCSS.shape, device=self.device)
        elif out.shape != images_NCSS.shape or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous of shape {tuple(images_NCSS.shape)}, "
                f"got {tuple(out.shape)} with strides {out.stride()}"
            )
        chunk = max(1, self._chunk_bytes // (4 * channels * size * size))
        with torch.autocast(self.device.type, enabled=False):  # bfloat16 would blur the crop
            for start in range(0, 2 * count, chunk):
                part = slice(start, start + chunk)
                self.augment(images_NCSS[part], parameters.rows(part), out[part])
        return out

    def augment(self, images_NCSS: Tensor, parameters: ViewParameters, out: Tensor) -> None:
        """Write one normalised view of each uint8 image to `out`, as `parameters` say."""
        images = images_NCSS.to(torch.float32).mul_(1 / 255)
        if self.config.jitter == "linear":
            crops_NCSS = crop_and_flip(images, parameters.boxes, parameters.flip)
            self._colours_linear(crops_NCSS.flatten(2), parameters, out.flatten(2))
        else:
            crop_and_flip(images, parameters.boxes, parameters.flip, out)
            self._colours_exact_(out.flatten(2), parameters)

    def _colours_exact_(self, views_NCP: Tensor, parameters: ViewParameters) -> None:
        config = self.config
        for operation in parameters.order:
            if config.jitter_p * config.strength * getattr(config, operation) == 0:
                continue
            if operation == "brightness":
                adjust_brightness_(views_NCP, parameters.brightness)
            elif operation == "contrast":
                adjust_contrast_(views_NCP, parameters.contrast)
            elif operation == "saturation":
                adjust_saturation_(views_NCP, parameters.saturation)
            else:
                adjust_hue_(views_NCP, parameters.hue)
        if config.grayscale_p > 0:
            blend_with_luma_(views_NCP, 1 - parameters.grayscale)
        _normalise_(views_NCP, self.mean, self.std)

    def _colours_linear(self, crops_NCP: Tensor, parameters: ViewParameters, out: Tensor) -> None:
        matrix, offset = colour_matrices(parameters, crops_NCP.mean(dim=2), self._constants)
        offset = (offset - self._mean_C1) / self._std_C1
        torch.baddbmm(offset, matrix / self._std_C1, crops_NCP, out=out)
        for channel, (shift, scale) in enumerate(zip(self.mean, self.std, strict=True)):
            out[:, channel].clamp_(-shift / scale, (1 - shift) / scale)
