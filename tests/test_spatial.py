"""Affine resampling, blur and cutout are torchvision's, one sample at a time.

Shapes as in trainer/spatial.py: N images, C channels, S side in pixels.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from trainer.spatial import blur_, blur_matrices, blur_radius, cut_out_, transform


def random_images(count: int, size: int) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(size))


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(8, 48),
    angle=st.floats(-180, 180),
    right=st.integers(-20, 20),
    down=st.integers(-20, 20),
    scale=st.floats(0.3, 2.0),
)
def test_a_transform_equals_torchvision_s_affine(
    size: int, angle: float, right: int, down: int, scale: float
) -> None:
    images = random_images(2, size)
    affine_N4 = torch.tensor([[angle, right, down, scale], [-angle, down, right, 1.0]])
    views = transform(images, affine_N4)
    for index in range(2):
        degrees, dx, dy, factor = affine_N4[index].tolist()
        expected = tv.affine(
            images[index], degrees, [dx, dy], factor, [0.0, 0.0], InterpolationMode.BILINEAR
        )
        torch.testing.assert_close(views[index], expected, atol=5e-5, rtol=0)


def test_no_transform_changes_no_bit_beside_one_that_does() -> None:
    images = random_images(6, 33)
    affine_N4 = torch.tensor([[0.0, 0, 0, 1]]).repeat(6, 1)
    affine_N4[1, 0], affine_N4[3, 1], affine_N4[5, 3] = 10, 2, 1.1
    views = transform(images, affine_N4)
    assert torch.equal(views[::2], images[::2])
    assert not torch.allclose(views[1], images[1], atol=1e-2)


def test_a_shift_by_whole_pixels_moves_them_and_leaves_black() -> None:
    images = random_images(1, 32)
    view = transform(images, torch.tensor([[0.0, 3, -2, 1]]))
    torch.testing.assert_close(view[..., :30, 3:], images[..., 2:, :29], atol=2e-5, rtol=0)
    assert view[..., :3].abs().max() < 1e-5
    assert view[..., 30:, :].abs().max() < 1e-5


@pytest.mark.parametrize("size", [8, 32, 64, 224])
def test_blur_equals_torchvision_s(size: int) -> None:
    sigma_N = torch.tensor([0.05, 0.1, 0.5, 1.0, 2.0, 10.0])
    images = random_images(len(sigma_N), size)
    kernel = 2 * blur_radius(size) + 1
    views = blur_(images.clone(), sigma_N)
    for index, sigma in enumerate(sigma_N.tolist()):
        # in float64: torchvision's own float32 is off by up to 1.4e-6 at 224 px, ours by 3e-7
        expected = tv.gaussian_blur(images[index].double(), [kernel, kernel], [sigma, sigma])
        torch.testing.assert_close(views[index].double(), expected, atol=4e-7, rtol=0)


def test_the_kernel_is_a_tenth_of_the_side_odd_and_at_least_three() -> None:
    lengths = {size: 2 * blur_radius(size) + 1 for size in (8, 32, 64, 96, 224, 1024)}
    assert lengths == {8: 3, 32: 3, 64: 7, 96: 9, 224: 23, 1024: 103}


@settings(deadline=None, max_examples=60)
@given(size=st.integers(8, 240), sigma=st.floats(0, 50, width=32))
def test_blur_matrices_are_weights_without_denormal_numbers(size: int, sigma: float) -> None:
    matrix_OI = blur_matrices(torch.tensor([sigma]), size)[0]
    torch.testing.assert_close(matrix_OI.sum(dim=1), torch.ones(size), atol=1e-5, rtol=0)
    assert ((matrix_OI == 0) | (matrix_OI > 1e-30)).all()
    assert matrix_OI.max() <= 1
    # the reflection keeps the edge pixel single
    position_S = torch.arange(size)
    beyond_OI = (position_S[:, None] - position_S).abs() > blur_radius(size)
    assert (matrix_OI[beyond_OI] == 0).all()


def test_sigma_0_changes_no_bit_beside_one_that_is_not() -> None:
    images = random_images(4, 40)
    views = blur_(images.clone(), torch.tensor([0.0, 0.8, 0.0, 0.8]))
    assert torch.equal(views[::2], images[::2])
    assert not torch.allclose(views[1::2], images[1::2], atol=1e-2)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(8, 40), data=st.data())
def test_a_cutout_blanks_its_square_and_nothing_else(size: int, data: st.DataObject) -> None:
    corner = st.integers(-size, size)
    squares = [
        (data.draw(corner), data.draw(corner), data.draw(st.integers(0, size))) for _ in range(3)
    ]
    images = random_images(3, size) + 1
    views = cut_out_(images.clone(), torch.tensor(squares), value=-7)
    for image, view, (top, left, side) in zip(images, views, squares, strict=True):
        for row in range(size):
            for column in range(0, size, 5):
                inside = top <= row < top + side and left <= column < left + side
                expected = torch.full((3,), -7.0) if inside else image[:, row, column]
                assert torch.equal(view[:, row, column], expected)
