"""What moves, mixes or blanks the pixels of a batch, the crop apart, each image its own way.

Rotation, translation and scaling are one resampling, with torchvision's conventions; the blur
is SimCLR's (Chen et al. 2020, https://arxiv.org/abs/2002.05709, appendix A), the cutout that of
DeVries and Taylor 2017 (https://arxiv.org/abs/1708.04552).

Left out: shear, perspective, fills other than black, and blurs that are not Gaussian.

Shapes: N images, C channels, S side in pixels, K taps of a kernel; in matrices O output and I
input position along one side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from trainer.crop import apply_to_axes

LEAST_SIGMA = 1e-6  # pixels: no neighbour has any weight, and 0 / 0 does not arise
LEAST_WEIGHT = 1e-20  # below it 0: products with denormal numbers are ten times slower on a CPU


def transform(images_NCSS: Tensor, affine_N4: Tensor) -> Tensor:
    """Rotate, scale and move the content of each float image [N,C,S,S]: a new tensor.

    `affine` is degrees clockwise, pixels to the right, pixels down, and a factor above 0: what
    torchvision's `affine` with bilinear interpolation and no shear makes of them. The centre of
    the image is the centre; what comes from outside is 0. An image with 0, 0, 0, 1 keeps its
    pixels bit for bit.
    """
    size = images_NCSS.shape[-1]
    angle_N, right_N, down_N, scale_N = affine_N4.unbind(1)
    radians_N = angle_N.deg2rad()
    cos_N, sin_N = radians_N.cos() / scale_N, radians_N.sin() / scale_N
    # where an output pixel comes from, in coordinates from -1 to 1 over the image's side
    x_N, y_N = right_N * (2 / size), down_N * (2 / size)
    row0_N3 = torch.stack([cos_N, sin_N, -(cos_N * x_N + sin_N * y_N)], dim=1)
    row1_N3 = torch.stack([-sin_N, cos_N, sin_N * x_N - cos_N * y_N], dim=1)
    inverse_N23 = torch.stack([row0_N3, row1_N3], dim=1)
    grid_NSS2 = F.affine_grid(inverse_N23, list(images_NCSS.shape), align_corners=False)
    moved_NCSS = F.grid_sample(images_NCSS, grid_NSS2, align_corners=False)
    kept_N = (angle_N == 0) & (right_N == 0) & (down_N == 0) & (scale_N == 1)
    return torch.where(kept_N[:, None, None, None], images_NCSS, moved_NCSS)


def blur_(images_NCSS: Tensor, sigma_N: Tensor) -> Tensor:
    """Blur each float image [N,C,S,S] in place by a Gaussian of `sigma` >= 0 pixels.

    The kernel is a tenth of the side long, odd and at least 3, as SimCLR has it; borders are
    reflected; torchvision's `gaussian_blur`. An image with sigma 0 keeps its pixels bit for bit.

    Both axes are multiplied by a banded matrix. A separable convolution costs as much at 32 px
    and twice as much at 224 px on a CPU, and has N * C groups, which GPUs are slow at.
    """
    blurs_NOI = blur_matrices(sigma_N, images_NCSS.shape[-1])
    return apply_to_axes(images_NCSS, blurs_NOI, blurs_NOI, out=images_NCSS)


def blur_radius(size: int) -> int:
    """Taps of the kernel on either side of its middle, for images of `size` px."""
    return max(1, size // 10 // 2)


def blur_matrices(sigma_N: Tensor, size: int) -> Tensor:
    """Matrices [N,O,I] that blur one side of `size` pixels; its rows sum to 1."""
    radius = blur_radius(size)
    offset_K = torch.arange(-radius, radius + 1, device=sigma_N.device)
    z_NK = offset_K / sigma_N.clamp(min=LEAST_SIGMA)[:, None]
    weights_NK = z_NK.square_().mul_(-0.5).exp_()
    weights_NK = weights_NK.div_(weights_NK.sum(dim=1, keepdim=True))
    weights_NK = weights_NK.masked_fill_(weights_NK < LEAST_WEIGHT, 0)
    source_OK = (torch.arange(size, device=sigma_N.device)[:, None] + offset_K).abs_()
    source_OK = torch.where(source_OK < size, source_OK, 2 * (size - 1) - source_OK)
    blurs_NOI = weights_NK.new_zeros(len(sigma_N), size, size)
    # a reflected tap is added to the one that its pixel has already: two terms, in any order
    return blurs_NOI.scatter_add_(
        2,
        source_OK.expand(len(sigma_N), -1, -1),
        weights_NK[:, None, :].expand(-1, size, -1),
    )


def cut_out_(images_NCSS: Tensor, squares_N3: Tensor, value: float = 0.0) -> Tensor:
    """Fill one square of each image [N,C,S,S] in place: its top, left and side in pixels.

    It may reach beyond the border; side 0 fills nothing.
    """
    position_S = torch.arange(images_NCSS.shape[-1], device=images_NCSS.device)
    top_N1, left_N1, side_N1 = squares_N3[:, :, None].unbind(1)
    rows_NS = (position_S >= top_N1) & (position_S < top_N1 + side_N1)
    columns_NS = (position_S >= left_N1) & (position_S < left_N1 + side_N1)
    inside_N1SS = (rows_NS[:, :, None] & columns_NS[:, None, :])[:, None]
    return images_NCSS.masked_fill_(inside_N1SS, value)
