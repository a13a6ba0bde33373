"""Colours of a batch of images, each with its own parameters: exact in place, or linear.

Exact: torchvision's operations, each clamped to [0, 1], hue rotated in HSV. Linear: hue rotated
linearly in YIQ, as NVIDIA DALI's colour twist does, so that jitter and grayscale are one 3x3
matrix and one offset a view, with no clamp between them.

Left out: gamma, equalisation, posterisation, and orders of the jitter that differ within a
batch.

Shapes: N images, C = 3 channels, P pixels of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.view_parameters import ColourOp, ViewParameters

LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
RGB_TO_YIQ = (  # chroma rows sum to 0, so that a rotation keeps grays
    (0.299, 0.587, 0.114),
    (0.5959, -0.2746, -0.3213),
    (0.2115, -0.5227, 0.3112),
)


# --- exact: in place on [N,3,P] in [0,1], torchvision's definitions ----------------------------


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
    # lerp would take twice as long: a CPU does not vectorise it over a broadcast start
    return images_NCP.mul_(factor_N11).add_(mean_N11 * (1 - factor_N11)).clamp_(0, 1)


def adjust_saturation_(images_NCP: Tensor, factor_N: Tensor) -> Tensor:
    """Blend with each pixel's luma: 0 gives a grayscale image, 1 the image; clamped."""
    return _blend_with_luma_(images_NCP, factor_N).clamp_(0, 1)


def lose_colour_(images_NCP: Tensor, share_N: Tensor) -> Tensor:
    """Take away a share in [0, 1] of each pixel's colour: 0 keeps the image, 1 makes it gray."""
    return _blend_with_luma_(images_NCP, 1 - share_N)


def _blend_with_luma_(images_NCP: Tensor, factor_N: Tensor) -> Tensor:
    """factor * image + (1 - factor) * luma, not clamped; exactly the image at factor 1."""
    gray_NCP = luma(images_NCP).expand_as(images_NCP)
    return torch.lerp(gray_NCP, images_NCP, factor_N[:, None, None], out=images_NCP)


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


def solarize_(images_NCP: Tensor, threshold_N: Tensor) -> Tensor:
    """Invert the values at or above the threshold; a threshold above 1 keeps the image."""
    # 0 or 1 as float32: comparing into booleans and `where` take twice as long on a CPU
    inverted_NCP = torch.empty_like(images_NCP)
    torch.ge(images_NCP, threshold_N[:, None, None], out=inverted_NCP)
    return images_NCP.lerp_(1 - images_NCP, inverted_NCP)


def recolour_exactly_(images_NCP: Tensor, parameters: ViewParameters) -> Tensor:
    """The jitter's operations in the order of the parameters, then grayscale."""
    for operation in parameters.order:
        value_N: Tensor | None = getattr(parameters, operation)
        if value_N is not None:
            COLOUR_OPS[operation](images_NCP, value_N)
    if parameters.grayscale is not None:
        lose_colour_(images_NCP, parameters.grayscale)
    return images_NCP


# --- linear: a matrix and an offset a view -----------------------------------------------------


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
        value_N: Tensor | None = getattr(parameters, operation)
        if value_N is None:
            continue
        if operation == "brightness":
            matrix, offset = matrix * value_N[:, None, None], offset * value_N[:, None, None]
        elif operation == "contrast":
            factor_N11 = value_N[:, None, None]
            mean_NC1 = constants.gray @ (matrix @ means_NC[:, :, None] + offset)
            matrix = matrix * factor_N11
            offset = torch.lerp(mean_NC1, offset, factor_N11)
        else:
            step = blend(value_N) if operation == "saturation" else hue_matrices(value_N, constants)
            matrix, offset = step @ matrix, step @ offset
    if parameters.grayscale is not None:
        gray = blend(1 - parameters.grayscale)
        matrix, offset = gray @ matrix, gray @ offset
    return matrix, offset


def hue_matrices(turns_N: Tensor, constants: ColourConstants) -> Tensor:
    """Matrices [N,3,3] that rotate the chromaticity plane of YIQ; the identity at 0 turns.

    Grays and the Y of every colour stay as they are.
    """
    angle_N11 = turns_N[:, None, None] * (2 * math.pi)
    turned = (angle_N11.cos() - 1) * constants.chroma + angle_N11.sin() * constants.quarter
    return constants.identity + turned


COLOUR_OPS: dict[ColourOp, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": adjust_brightness_,
    "contrast": adjust_contrast_,
    "saturation": adjust_saturation_,
    "hue": adjust_hue_,
}
