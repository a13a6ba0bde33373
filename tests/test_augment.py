"""The views are torchvision's, one sample at a time, for every augmentation and for all together.

Shapes as in trainer/augment.py: B images, N views, C channels, S side, P pixels.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from trainer import augment
from trainer.augment import TwoViews, normalise
from trainer.colour import LUMA, RGB_TO_YIQ
from trainer.config import Augmentation, TrainConfig
from trainer.view_parameters import ViewParameters, sample_parameters

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
JITTERS = ("hsv", "linear")

# one configuration for each augmentation alone; not all views undergo it
CONFORMANCE: dict[Augmentation, dict[str, Any]] = {
    "rotation": {"rotation": 60.0},
    "translation": {"translation": 0.3},
    "scaling": {"scaling": 0.5},
    "crop": {"crop_min_scale": 0.1},
    "flip": {},
    "vflip": {},
    "jitter": {},
    "grayscale": {"grayscale": 0.7},
    "blur": {},
    "solarize": {"solarize": 0.43},  # a threshold between two of the 256 values
    "cutout": {},
}
PHOTOMETRIC: tuple[Augmentation, ...] = ("jitter", "grayscale", "blur", "solarize")
NO_MAGNITUDE: dict[Augmentation, dict[str, Any]] = {
    "rotation": {"rotation": 0.0},
    "translation": {"translation": 0.0},
    "scaling": {"scaling": 0.0},
    "crop": {"crop_min_scale": 1.0},
    "jitter": {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
    "grayscale": {"grayscale": 0.0},
    "blur": {"blur_sigma": 0.0},
    "solarize": {"solarize": 0.0},
    "cutout": {"cutout": 0.0},
}
EVERYTHING = {f"{name}_p": 0.7 for name in CONFORMANCE} | {"strength": 1.0, "crop_min_scale": 0.1}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """Half noise, half smooth: noise has every hue, smooth images have plain areas."""
    generator = rng(seed)
    noise = torch.rand(count, 3, size, size, generator=generator)
    smooth = torch.nn.functional.interpolate(
        torch.rand(count, 3, 3, 3, generator=generator), (size, size), mode="bicubic"
    )
    mixed = torch.where(torch.arange(count)[:, None, None, None] % 2 == 0, noise, smooth)
    return (mixed.clamp(0, 1) * 255).round().byte()


def two_views(config: TrainConfig | None = None, **fields: Any) -> TwoViews:
    return TwoViews(config or TrainConfig(**fields), MEAN, STD, "cpu")


def only(name: Augmentation, chance: float = 0.6, **fields: Any) -> TrainConfig:
    settings = {"strength": 1.0, f"{name}_p": chance} | CONFORMANCE[name] | fields
    return TrainConfig(augment=name, **settings)


def twice(images_BCSS: Tensor) -> Tensor:
    return normalise(images_BCSS, MEAN, STD).repeat(2, 1, 1, 1)


# --- the oracle: torchvision, one uint8 image at a time -----------------------------------------


def place(image: Tensor, parameters: ViewParameters, index: int) -> Tensor:
    """What comes before the colours."""
    size = image.shape[-1]
    if parameters.affine is not None:
        angle, right, down, scale = parameters.affine[index].tolist()
        image = tv.affine(
            image, angle, [right, down], scale, [0.0, 0.0], tv.InterpolationMode.BILINEAR
        )
    if parameters.boxes is not None:
        box = parameters.boxes[index].tolist()
        image = tv.resized_crop(image, *box, [size, size], antialias=True)
    image = tv.horizontal_flip(image) if parameters.flip[index] else image
    return tv.vertical_flip(image) if parameters.vflip[index] else image


def recolour(image: Tensor, parameters: ViewParameters, index: int) -> Tensor:
    adjust = {
        "brightness": tv.adjust_brightness,
        "contrast": tv.adjust_contrast,
        "saturation": tv.adjust_saturation,
        "hue": tv.adjust_hue,
    }
    for operation in parameters.order:
        factor_N = getattr(parameters, operation)
        if factor_N is not None:
            image = adjust[operation](image, factor_N[index].item())
    if parameters.grayscale is not None:
        image = tv.adjust_saturation(image, 1 - parameters.grayscale[index].item())
    return image


def recolour_linearly(image: Tensor, parameters: ViewParameters, index: int) -> Tensor:
    """In float64, operation by operation; no torchvision function rotates hue in YIQ."""
    pixels_CP = image.flatten(1).double()
    luma = torch.tensor(LUMA, dtype=torch.float64)
    to_yiq = torch.tensor(RGB_TO_YIQ, dtype=torch.float64)
    for operation in parameters.order:
        factor_N = getattr(parameters, operation)
        if factor_N is None:
            continue
        factor, gray_P = factor_N[index].item(), luma @ pixels_CP
        if operation == "brightness":
            pixels_CP = pixels_CP * factor
        elif operation == "contrast":
            pixels_CP = pixels_CP * factor + (1 - factor) * gray_P.mean()
        elif operation == "saturation":
            pixels_CP = pixels_CP * factor + (1 - factor) * gray_P
        else:
            cos, sin = math.cos(2 * math.pi * factor), math.sin(2 * math.pi * factor)
            turn = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]]).double()
            pixels_CP = to_yiq.inverse() @ turn @ to_yiq @ pixels_CP
    if parameters.grayscale is not None:
        share = parameters.grayscale[index].item()
        pixels_CP = (1 - share) * pixels_CP + share * (luma @ pixels_CP)
    return pixels_CP.clamp(0, 1).view_as(image).float()


def finish(image: Tensor, parameters: ViewParameters, index: int) -> Tensor:
    """What comes after the colours."""
    size = image.shape[-1]
    if parameters.blur is not None and parameters.blur[index] > 0:
        kernel = 2 * max(1, size // 10 // 2) + 1
        image = tv.gaussian_blur(image, [kernel, kernel], [parameters.blur[index].item()] * 2)
    if parameters.solarize is not None and parameters.solarize[index] <= 1:
        image = tv.solarize(image, parameters.solarize[index].item())
    image = tv.normalize(image, list(MEAN), list(STD))
    if parameters.cutout is not None and parameters.cutout[index, 2] > 0:
        top, left, side = parameters.cutout[index].tolist()
        height, width = min(top + side, size) - max(top, 0), min(left + side, size) - max(left, 0)
        image = tv.erase(image, max(top, 0), max(left, 0), height, width, torch.zeros(()))
    return image


def reference_view(
    image_CSS: Tensor, parameters: ViewParameters, index: int, jitter: str
) -> Tensor:
    image = place(tv.to_dtype(image_CSS, torch.float32, scale=True), parameters, index)
    colours = recolour_linearly if jitter == "linear" else recolour
    return finish(colours(image, parameters, index), parameters, index)


def assert_views_are_the_reference(config: TrainConfig, images: Tensor, seed: int) -> None:
    count, size = len(images), images.shape[-1]
    views = TwoViews(config, MEAN, STD, "cpu")(images, rng(seed))
    parameters = sample_parameters(config, 2 * count, size, rng(seed))
    assert views.dtype == torch.float32
    assert views.shape == (2 * count, 3, size, size)
    for index in range(2 * count):
        expected = reference_view(images[index % count], parameters, index, config.jitter)
        torch.testing.assert_close(views[index], expected, atol=1e-4, rtol=1e-4)


# --- every augmentation ------------------------------------------------------------------------


def test_the_suite_knows_every_augmentation() -> None:
    assert tuple(CONFORMANCE) == get_args(Augmentation)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("name", CONFORMANCE)
def test_each_alone_equals_torchvision(name: Augmentation, jitter: str, size: int) -> None:
    assert_views_are_the_reference(only(name, jitter=jitter), random_images(12, size), seed=size)


@pytest.mark.parametrize("name", CONFORMANCE)
def test_each_changes_the_views_chosen_for_it_and_no_bit_of_the_others(name: Augmentation) -> None:
    images = random_images(64)
    changed_N = (two_views(only(name))(images, rng()) != twice(images)).flatten(1).any(dim=1)
    assert 0.4 < changed_N.float().mean() < 0.8  # the chance is 0.6
    assert (changed_N[:64] != changed_N[64:]).any()


@pytest.mark.parametrize("name", ["jitter", "grayscale"])
def test_linear_colours_leave_views_that_are_not_chosen_alone(name: Augmentation) -> None:
    images = random_images(64)
    config = only(name, jitter="linear")
    views = two_views(config)(images, rng())
    same_N = (views - twice(images)).flatten(1).abs().amax(dim=1) < 1e-5
    parameters = sample_parameters(config, 128, 32, rng())
    kept_N = parameters.brightness == 1 if name == "jitter" else parameters.grayscale == 0
    assert torch.equal(same_N, kept_N)
    assert 0 < kept_N.sum() < 128


@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("name", CONFORMANCE)
def test_each_keeps_its_own_parameters_for_every_view(name: Augmentation, jitter: str) -> None:
    image = random_images(1).expand(32, 3, 32, 32)
    chance = 0.5 if name in ("flip", "vflip", "grayscale", "solarize") else 1.0
    views = two_views(only(name, chance, jitter=jitter))(image, rng())
    distinct = len(torch.unique(views.flatten(1), dim=0))
    assert distinct == 2 if chance < 1 else distinct > 32


@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_photometric_ones_at_strength_0_change_no_bit(name: Augmentation, jitter: str) -> None:
    images = random_images(8)
    images[0, :, :4] = 255  # plain white is at every threshold
    views = two_views(only(name, 1.0, strength=0.0, jitter=jitter))(images, rng())
    assert torch.equal(views, twice(images))


@pytest.mark.parametrize("name", NO_MAGNITUDE)
def test_each_at_magnitude_0_changes_no_bit(name: Augmentation) -> None:
    images = random_images(8)
    images[0, :, :4] = 255
    views = two_views(only(name, 1.0, **NO_MAGNITUDE[name]))(images, rng())
    assert torch.equal(views, twice(images))


@pytest.mark.parametrize("name", [name for name in CONFORMANCE if name not in PHOTOMETRIC])
def test_strength_scales_no_geometry(name: Augmentation) -> None:
    images = random_images(4)
    weak, strong = (two_views(only(name, 1.0, strength=s))(images, rng()) for s in (0.0, 5.0))
    assert torch.equal(weak, strong)


@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("name", CONFORMANCE)
def test_each_keeps_the_range_of_a_normalised_image(name: Augmentation, jitter: str) -> None:
    config = only(name, 1.0, strength=3.0, jitter=jitter)
    views = two_views(config)(random_images(32), rng())
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        assert views[:, channel].min() >= -mean / std - 1e-5
        assert views[:, channel].max() <= (1 - mean) / std + 1e-5


# --- all together ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("jitter", JITTERS)
def test_the_default_pipeline_equals_torchvision_s(jitter: str, size: int) -> None:
    config = TrainConfig(strength=1.0, grayscale_p=0.3, crop_min_scale=0.1, jitter=jitter)
    assert_views_are_the_reference(config, random_images(70 if size == 32 else 12, size), seed=3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("jitter", JITTERS)
def test_all_at_once_equal_torchvision_s_one_after_another(jitter: str, seed: int) -> None:
    # at threshold 1/2 solarisation is continuous, so that rounding before it stays small
    config = TrainConfig(**EVERYTHING, jitter=jitter, solarize=0.5)
    assert_views_are_the_reference(config, random_images(24, seed=seed), seed)


@settings(deadline=None, max_examples=25)
@given(
    names=st.sets(st.sampled_from(get_args(Augmentation))),
    jitter=st.sampled_from(JITTERS),
    size=st.integers(8, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_subset_at_any_size_equals_torchvision(
    names: set[str], jitter: str, size: int, seed: int
) -> None:
    subset = ",".join(names) or "none"
    config = TrainConfig(**EVERYTHING, jitter=jitter, augment=subset)
    assert_views_are_the_reference(config, random_images(3, size, seed), seed)


@pytest.mark.parametrize("jitter", JITTERS)
def test_without_augmentation_both_views_are_the_normalised_image(jitter: str) -> None:
    images = random_images(10)
    assert torch.equal(two_views(augment="none", jitter=jitter)(images, rng()), twice(images))
    reference = tv.normalize(images / 255, list(MEAN), list(STD))
    torch.testing.assert_close(normalise(images, MEAN, STD), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("jitter", JITTERS)
def test_views_are_decided_by_the_generator_s_state_alone(
    jitter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**EVERYTHING, jitter=jitter)
    images = random_images(40)
    generator = rng(5)
    state = generator.get_state()
    first = two_views(config)(images, generator)
    second = two_views(config)(images, generator)
    generator.set_state(state)
    torch.manual_seed(99)
    assert torch.equal(two_views(config)(images, generator), first)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first[:40], first[40:])
    monkeypatch.setitem(augment.CHUNK_BYTES, "cpu", 7 * 4 * 3 * 32 * 32)
    other_chunks = two_views(config)(images, rng(5))
    torch.testing.assert_close(other_chunks, first, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("jitter", JITTERS)
def test_a_permutation_of_images_and_parameters_permutes_the_views(jitter: str) -> None:
    config = TrainConfig(**EVERYTHING, jitter=jitter)
    images, order_N = random_images(40), torch.randperm(40, generator=rng())
    parameters = sample_parameters(config, 40, 32, rng())
    views, permuted = torch.empty(2, 40, 3, 32, 32)
    two_views(config).augment(images, parameters, views)
    two_views(config).augment(images[order_N], parameters.rows(order_N), permuted)
    torch.testing.assert_close(permuted, views[order_N], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("augmentations", ["all", "none"])
def test_images_stay_as_they_are(augmentations: str) -> None:
    config = TrainConfig(**EVERYTHING, augment=augmentations)
    images = random_images(8)
    before = images.clone()
    two_views(config)(images, rng())
    assert torch.equal(images, before)


def test_autocast_around_the_views_does_not_blur_them() -> None:
    config = TrainConfig(**EVERYTHING, jitter="linear")
    images = random_images(8)
    with torch.autocast("cpu", torch.bfloat16):
        views = two_views(config)(images, rng())
    assert views.dtype == torch.float32
    assert torch.equal(views, two_views(config)(images, rng()))


def test_plain_images_of_every_colour_stay_finite() -> None:
    levels = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
    images = torch.cartesian_prod(levels, levels, levels)[:, :, None, None].repeat(1, 1, 8, 8)
    for jitter in JITTERS:
        config = TrainConfig(**EVERYTHING, jitter=jitter)
        assert two_views(config)(images, rng()).isfinite().all()


# --- errors and devices ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 32, 32), r"must be uint8.*float32"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"must be uint8.*\(3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 16, dtype=torch.uint8), r"square.*\(2, 3, 32, 16\)"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), r"three channels.*\(2, 1, 32, 32\)"),
    ],
)
def test_unfit_images_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_views()(images, rng())


def test_unfit_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="std above 0"):
        TwoViews(TrainConfig(), MEAN, (0.2, 0.2, 0.0), "cpu")
    with pytest.raises(ValueError, match="three numbers"):
        TwoViews(TrainConfig(), (0.5,), STD, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("jitter", JITTERS)
def test_views_on_a_gpu_never_wait_for_it(jitter: str) -> None:
    views = TwoViews(TrainConfig(**EVERYTHING, jitter=jitter), MEAN, STD, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    images = random_images(16).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = views(images, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.isfinite().all()
