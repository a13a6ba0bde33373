"""Random resized crop and flips of a batch, each sample with its own box.

torchvision's `RandomResizedCrop(antialias=True)` on square images of one size, without a loop:
both axes are resized by one small matrix a sample, so that a crop is two matrix products and
flips cost nothing. `affine_grid` with `grid_sample`, the usual way to batch it, lets pixels
from outside the box in and does not antialias.

Shapes: N images, T tries, U uniform numbers a box, C channels, S side in pixels; in matrices O
output and I input position along one side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TRIES = 10  # torchvision's
CROP_UNIFORMS = 2 * TRIES + 2  # random numbers that a box is made of
LOG_ASPECT = math.log(4 / 3)
FAR_AWAY = 1e9  # the coordinate of a pixel outside the box: no triangle reaches it


def whole_boxes(count: int, size: int, device: torch.device) -> Tensor:
    """Boxes int64 [N,4] of N = `count` whole images."""
    boxes_N4 = torch.zeros(count, 4, dtype=torch.int64, device=device)
    boxes_N4[:, 2:] = size
    return boxes_N4


def crop_boxes(uniform_UN: Tensor, size: int, min_scale: float) -> Tensor:
    """Boxes of a random resized crop, int64 [N,4]: top, left, height, width in pixels.

    Made of U = CROP_UNIFORMS numbers a box, independent and uniform in [0, 1). Area uniform in
    [min_scale, 1] of the image, aspect log-uniform in [3/4, 4/3]; of ten tries the first that
    fits counts, and if none does the whole image is taken, as torchvision's
    `RandomResizedCrop.get_params` does on square images.
    """
    if min_scale >= 1:  # only the whole image has this area; rounding could lose a row of it
        return whole_boxes(uniform_UN.shape[1], size, uniform_UN.device)
    area_TN = uniform_UN[:TRIES] * (1 - min_scale) + min_scale
    log_aspect_TN = uniform_UN[TRIES : 2 * TRIES] * (2 * LOG_ASPECT)
    stretch_TN = ((log_aspect_TN - LOG_ASPECT) / 2).exp()
    side_TN = area_TN.sqrt() * size
    width_TN = (side_TN * stretch_TN).round()
    height_TN = (side_TN / stretch_TN).round()
    fits_TN = (width_TN <= size) & (height_TN <= size) & (width_TN > 0) & (height_TN > 0)
    # max gives the first of equals, as argmax does, in a fifth of its time on a CPU
    any_1N, first_1N = fits_TN.float().max(dim=0, keepdim=True)
    none_N = any_1N[0] == 0
    width_N = width_TN.gather(0, first_1N)[0].masked_fill(none_N, size)
    height_N = height_TN.gather(0, first_1N)[0].masked_fill(none_N, size)
    # a product with a float just below 1 can round up to the bound itself
    top_N = torch.minimum((uniform_UN[-2] * (size - height_N + 1)).floor(), size - height_N)
    left_N = torch.minimum((uniform_UN[-1] * (size - width_N + 1)).floor(), size - width_N)
    return torch.stack([top_N, left_N, height_N, width_N], dim=1).long()


def crop_matrices(start_N: Tensor, length_N: Tensor, size: int, flip_N: Tensor) -> Tensor:
    """Matrices [N,O,I] that resize `length` pixels from `start` on to `size` pixels.

    Antialiased bilinear (a triangle as wide as the shrinkage, cut off at the box and
    normalised), which is what torchvision's `resized_crop(antialias=True)` computes. Where
    `flip_N` is true the result is mirrored.
    """
    length_N1 = length_N[:, None].float()
    position_S = torch.arange(size, device=start_N.device, dtype=torch.float32) + 0.5
    scale_N1 = length_N1 / size
    per_px_N1 = scale_N1.clamp(min=1).reciprocal()  # one over the triangle's half width
    centre_NO = position_S * scale_N1
    centre_NO = torch.where(flip_N[:, None], length_N1 - centre_NO, centre_NO)
    source_NI = position_S - start_N[:, None]
    outside_NI = (source_NI < 0) | (source_NI > length_N1)
    source_NI.masked_fill_(outside_NI, FAR_AWAY)
    distance_NOI = (source_NI * per_px_N1)[:, None, :] - (centre_NO * per_px_N1)[:, :, None]
    # the triangle upside down, which saves a pass: the sum that divides it is negative too
    weights_NOI = distance_NOI.abs_().sub_(1).clamp_(max=0)
    return weights_NOI.div_(weights_NOI.sum(dim=2, keepdim=True))


def crop_and_flip(
    images_NCSS: Tensor,
    boxes_N4: Tensor,
    flip_N: Tensor,
    vflip_N: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Cut the box out of each float image [N,3,S,S] and resize it to S x S.

    The result is mirrored left to right if `flip`, upside down if `vflip`. No pixel outside the
    box has any weight, unlike with `grid_sample`; the whole image comes back bit for bit.
    """
    size = images_NCSS.shape[-1]
    top_N, left_N, height_N, width_N = boxes_N4.unbind(1)
    rows_NOI, columns_NOI = crop_matrices(
        torch.cat([top_N, left_N]),
        torch.cat([height_N, width_N]),
        size,
        torch.cat([vflip_N, flip_N]),
    ).chunk(2)
    return apply_to_axes(images_NCSS, rows_NOI, columns_NOI, out)


def apply_to_axes(
    images_NCSS: Tensor, rows_NOI: Tensor, columns_NOI: Tensor, out: Tensor | None = None
) -> Tensor:
    """Multiply the columns of pixels of [N,C,S,S] by `rows` and the rows of them by `columns`.

    `out` may be the images themselves.
    """
    count, channels, size, _ = images_NCSS.shape
    wide = torch.bmm(images_NCSS.reshape(count, channels * size, size), columns_NOI.mT)
    return torch.matmul(rows_NOI[:, None], wide.view_as(images_NCSS), out=out)
