"""Colour operations are torchvision's, hue in HSV is colorsys's, hue in YIQ a rotation.

Shapes as in trainer/colour.py: N images, C = 3 channels, P pixels.
"""

from __future__ import annotations

import colorsys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from trainer import colour
from trainer.view_parameters import NEVER


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hard_images() -> Tensor:
    """Images [40,3,32,32] in [0,1]: noise, and some without chroma, pure or with equal channels."""
    images = torch.rand(40, 3, 32, 32, generator=rng())
    images[0] = 0.5
    images[1, 1:] = 0
    images[2] = 0
    images[3, :, ::2] = images[3, [1, 0, 2], ::2]
    images[4, 1] = images[4, 0]
    images[5] = 1
    return images


def lose_colour(image: Tensor, share: float) -> Tensor:
    return tv.adjust_saturation(image, 1 - share)


OPERATIONS = [  # ours, torchvision's, least and most parameter, the one that changes nothing
    (colour.adjust_brightness_, tv.adjust_brightness, 0, 2.5, 1),
    (colour.adjust_contrast_, tv.adjust_contrast, 0, 2.5, 1),
    (colour.adjust_saturation_, tv.adjust_saturation, 0, 2.5, 1),
    (colour.adjust_hue_, tv.adjust_hue, -0.5, 0.5, 0),
    (colour.lose_colour_, lose_colour, 0, 1, 0),
    (colour.solarize_, tv.solarize, 0, 1, NEVER),
]


@pytest.mark.parametrize(("ours", "theirs", "low", "high", "neutral"), OPERATIONS)
def test_colour_operations_equal_torchvision_s(ours, theirs, low, high, neutral) -> None:
    images = hard_images()
    values_N = torch.rand(40, generator=rng(1)) * (high - low) + low
    values_N[:3] = torch.tensor([low, high, (low + high) / 2])
    views = ours(images.flatten(2).clone(), values_N).view_as(images)
    for index in range(40):
        expected = theirs(images[index], values_N[index].item())
        torch.testing.assert_close(views[index], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("ours", "theirs", "low", "high", "neutral"), OPERATIONS)
def test_a_neutral_value_changes_no_bit_beside_one_that_is_not(
    ours, theirs, low, high, neutral
) -> None:
    images = torch.rand(4, 3, 1024, generator=rng())
    images[:, :, :10] = 1
    views = ours(images.clone(), torch.tensor([neutral, 0.3, neutral, 0.3]))
    assert torch.equal(views[0::2], images[0::2])
    assert not torch.allclose(views[1::2], images[1::2], atol=1e-2)


def test_colour_lost_in_full_is_torchvision_s_grayscale() -> None:
    images = hard_images()
    views = colour.lose_colour_(images.flatten(2).clone(), torch.ones(40)).view_as(images)
    expected = tv.rgb_to_grayscale(images, num_output_channels=3)
    torch.testing.assert_close(views, expected, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=200)
@given(rgb=st.tuples(*[st.floats(0, 1, width=32)] * 3), turns=st.floats(-0.5, 0.5, width=32))
def test_hue_of_a_single_colour_equals_colorsys(
    rgb: tuple[float, float, float], turns: float
) -> None:
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
    expected = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
    pixel = torch.tensor(rgb).view(1, 3, 1)
    found = colour.adjust_hue_(pixel.clone(), torch.tensor([turns])).flatten()
    torch.testing.assert_close(found, torch.tensor(expected), atol=5e-6, rtol=0)


def test_a_linear_hue_rotation_is_a_rotation_that_keeps_gray_and_yiq_luma() -> None:
    constants = colour.ColourConstants.on(torch.device("cpu"))
    turns_N = torch.tensor([0.0, 0.1, -0.1, 0.5, 0.3])
    matrices = colour.hue_matrices(turns_N, constants)
    assert torch.equal(matrices[0], torch.eye(3))
    torch.testing.assert_close(matrices[1] @ matrices[2], torch.eye(3), atol=1e-5, rtol=0)
    ones = torch.ones(3, 1)
    torch.testing.assert_close(matrices @ ones, ones.expand(5, 3, 1), atol=1e-5, rtol=0)
    y = torch.tensor([colour.RGB_TO_YIQ[0]])
    torch.testing.assert_close(y @ matrices, y.expand(5, 1, 3), atol=1e-5, rtol=0)
    # as in HSV, a third of a turn makes red greenish
    third = colour.hue_matrices(torch.tensor([1 / 3]), constants)[0] @ torch.tensor([1.0, 0, 0])
    assert third.argmax() == 1
