"""Crops are torchvision's, one sample at a time, and let nothing in from outside the box."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from trainer.crop import CROP_UNIFORMS, crop_and_flip, crop_boxes, whole_boxes


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample_boxes(count: int, size: int, min_scale: float, generator: torch.Generator) -> Tensor:
    uniform_UN = torch.rand(CROP_UNIFORMS, count, generator=generator)
    return crop_boxes(uniform_UN, size, min_scale)


@pytest.mark.parametrize("size", [8, 32, 33])
def test_crop_equals_torchvision_resized_crop(size: int) -> None:
    count = 64
    images = torch.rand(count, 3, size, size, generator=rng())
    boxes = sample_boxes(count, size, 0.02, rng(1))
    flip = torch.arange(count) % 2 == 1
    vflip = torch.arange(count) % 3 == 1
    views = crop_and_flip(images, boxes, flip, vflip)
    for index in range(count):
        expected = tv.resized_crop(
            images[index], *boxes[index].tolist(), [size] * 2, antialias=True
        )
        expected = tv.horizontal_flip(expected) if flip[index] else expected
        expected = tv.vertical_flip(expected) if vflip[index] else expected
        torch.testing.assert_close(views[index], expected, atol=3e-6, rtol=0)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), size=st.integers(8, 40))
def test_no_pixel_from_outside_the_box_has_weight(data: st.DataObject, size: int) -> None:
    height, width = data.draw(st.integers(1, size)), data.draw(st.integers(1, size))
    top, left = data.draw(st.integers(0, size - height)), data.draw(st.integers(0, size - width))
    inside = torch.rand(1, 3, size, size)
    poisoned = torch.full_like(inside, 1e6)
    box = (..., slice(top, top + height), slice(left, left + width))
    poisoned[box] = inside[box]
    boxes = torch.tensor([[top, left, height, width]])
    flip, vflip = torch.tensor([[data.draw(st.booleans())], [data.draw(st.booleans())]])
    view = crop_and_flip(poisoned, boxes, flip, vflip)
    assert view.max() <= inside[box].max() + 1e-5
    assert view.min() >= inside[box].min() - 1e-5


def test_the_whole_image_is_an_exact_crop_and_a_flip_an_exact_mirror() -> None:
    images = torch.rand(4, 3, 32, 32)
    boxes = whole_boxes(4, 32, torch.device("cpu"))
    flip, vflip = torch.tensor([[False, True, False, True], [False, False, True, True]])
    views = crop_and_flip(images, boxes, flip, vflip)
    assert torch.equal(views[0], images[0])
    assert torch.equal(views[1], images[1].flip(-1))
    assert torch.equal(views[2], images[2].flip(-2))
    assert torch.equal(views[3], images[3].flip(-1, -2))


@settings(deadline=None, max_examples=50)
@given(size=st.integers(8, 224), min_scale=st.floats(1e-4, 1), seed=st.integers(0, 2**32 - 1))
def test_boxes_lie_inside_the_image(size: int, min_scale: float, seed: int) -> None:
    top, left, height, width = sample_boxes(500, size, min_scale, rng(seed)).T
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= size).all()
    assert (left + width <= size).all()


@pytest.mark.parametrize("min_scale", [0.05, 0.2, 0.8])
def test_boxes_are_distributed_as_torchvision_s(min_scale: float) -> None:
    size, count = 64, 3000
    crop = RandomResizedCrop(size, scale=(min_scale, 1.0))
    torch.manual_seed(0)
    image = torch.empty(3, size, size)
    drawn = [crop.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn], float)
    ours = sample_boxes(50_000, size, min_scale, rng()).double().numpy()
    for column in range(4):
        a, b = np.sort(theirs[:, column]), np.sort(ours[:, column])
        grid = np.arange(size + 1)
        gap = np.searchsorted(a, grid, "right") / len(a) - np.searchsorted(b, grid, "right") / len(
            b
        )
        assert np.abs(gap).max() < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov at 0.1 %
    area = ours[:, 2] * ours[:, 3] / size**2
    assert area.min() > min_scale * 0.95  # sides are whole pixels
    assert area.max() <= 1
