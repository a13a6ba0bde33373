"""The views are torchvision's, one sample at a time; the randomness has the stated shape.

Shapes as in trainer/augment.py: B images, N views, C channels, S side, P pixels.
"""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from trainer import augment
from trainer.augment import TwoViews, ViewParameters, normalise
from trainer.config import TrainConfig

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
PLAIN = {"strength": 0.0, "crop_min_scale": 1.0, "flip_p": 0.0, "grayscale_p": 0.0}


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


def two_views(**fields: object) -> TwoViews:
    return TwoViews(TrainConfig(**fields), MEAN, STD, "cpu")  # type: ignore[arg-type]


def reference_view(image_CSS: Tensor, parameters: ViewParameters, index: int) -> Tensor:
    """torchvision's view of one uint8 image with the parameters of view `index`."""
    size = image_CSS.shape[-1]
    top, left, height, width = parameters.boxes[index].tolist()
    image = tv.to_dtype(image_CSS, torch.float32, scale=True)
    image = tv.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    if parameters.flip[index]:
        image = tv.horizontal_flip(image)
    adjust = {
        "brightness": tv.adjust_brightness,
        "contrast": tv.adjust_contrast,
        "saturation": tv.adjust_saturation,
        "hue": tv.adjust_hue,
    }
    for operation in parameters.order:
        image = adjust[operation](image, getattr(parameters, operation)[index].item())
    if parameters.grayscale[index]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    return tv.normalize(image, list(MEAN), list(STD))


# --- colours -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (augment.adjust_brightness_, tv.adjust_brightness, 0, 2.5),
        (augment.adjust_contrast_, tv.adjust_contrast, 0, 2.5),
        (augment.adjust_saturation_, tv.adjust_saturation, 0, 2.5),
        (augment.adjust_hue_, tv.adjust_hue, -0.5, 0.5),
    ],
)
def test_colour_operations_equal_torchvision_s(ours, theirs, low, high) -> None:
    images = random_images(40).float() / 255
    images[0] = 0.5  # no chroma
    images[1, 1:] = 0  # pure red
    images[2] = 0
    images[3, :, ::2] = images[3, [1, 0, 2], ::2]
    factors = torch.rand(40, generator=rng()) * (high - low) + low
    factors[:3] = torch.tensor([low, high, (low + high) / 2])
    views = ours(images.flatten(2).clone(), factors).view_as(images)
    for index in range(40):
        expected = theirs(images[index], factors[index].item())
        torch.testing.assert_close(views[index], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("operation", "neutral"),
    [
        (augment.adjust_brightness_, 1.0),
        (augment.adjust_contrast_, 1.0),
        (augment.adjust_saturation_, 1.0),
        (augment.adjust_hue_, 0.0),
    ],
)
def test_a_neutral_factor_changes_no_bit_beside_one_that_is_not(operation, neutral) -> None:
    images = (random_images(4).float() / 255).flatten(2)
    views = operation(images.clone(), torch.tensor([neutral, 0.3, neutral, 0.3]))
    assert torch.equal(views[0::2], images[0::2])
    assert not torch.allclose(views[1::2], images[1::2], atol=1e-2)


@settings(deadline=None, max_examples=200)
@given(rgb=st.tuples(*[st.floats(0, 1, width=32)] * 3), turns=st.floats(-0.5, 0.5, width=32))
def test_hue_of_a_single_colour_equals_colorsys(
    rgb: tuple[float, float, float], turns: float
) -> None:
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
    expected = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
    pixel = torch.tensor(rgb).view(1, 3, 1)
    found = augment.adjust_hue_(pixel.clone(), torch.tensor([turns])).flatten()
    torch.testing.assert_close(found, torch.tensor(expected), atol=5e-6, rtol=0)


def test_a_linear_hue_rotation_is_a_rotation_that_keeps_gray_and_yiq_luma() -> None:
    constants = augment.ColourConstants.on(torch.device("cpu"))
    turns = torch.tensor([0.0, 0.1, -0.1, 0.5, 0.3])
    matrices = augment.hue_matrices(turns, constants)
    assert torch.equal(matrices[0], torch.eye(3))
    torch.testing.assert_close(matrices[1] @ matrices[2], torch.eye(3), atol=1e-5, rtol=0)
    ones = torch.ones(3, 1)
    torch.testing.assert_close(matrices @ ones, ones.expand(5, 3, 1), atol=1e-5, rtol=0)
    y = torch.tensor([augment.RGB_TO_YIQ[0]])
    torch.testing.assert_close(y @ matrices, y.expand(5, 1, 3), atol=1e-5, rtol=0)
    # as in HSV, a third of a turn makes red greenish
    third = augment.hue_matrices(torch.tensor([1 / 3]), constants)[0] @ torch.tensor([1.0, 0, 0])
    assert third.argmax() == 1


# --- the whole ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_views_equal_torchvision_one_sample_at_a_time(seed: int) -> None:
    config = TrainConfig(strength=1.0, jitter_p=0.8, grayscale_p=0.3, crop_min_scale=0.1)
    images = random_images(70, seed=seed)  # two views each: more than two chunks
    views = TwoViews(config, MEAN, STD, "cpu")(images, rng(seed))
    parameters = augment.sample_parameters(config, 140, 32, rng(seed))
    for index in range(140):
        expected = reference_view(images[index % 70], parameters, index)
        torch.testing.assert_close(views[index], expected, atol=1e-4, rtol=1e-4)


def test_linear_views_equal_their_operations_applied_one_by_one() -> None:
    config = TrainConfig(jitter="linear", strength=1.0, grayscale_p=0.3)
    images = random_images(48)
    views = TwoViews(config, MEAN, STD, "cpu")(images, rng(3))
    parameters = augment.sample_parameters(config, 96, 32, rng(3))
    luma = torch.tensor(augment.LUMA, dtype=torch.float64)
    to_yiq = torch.tensor(augment.RGB_TO_YIQ, dtype=torch.float64)
    for index in range(96):
        box = parameters.boxes[index].tolist()
        image = tv.resized_crop(images[index % 48] / 255, *box, [32, 32], antialias=True)
        image = (image.flip(-1) if parameters.flip[index] else image).flatten(1).double()
        for operation in parameters.order:
            factor = getattr(parameters, operation)[index].item()
            gray = luma @ image
            if operation == "brightness":
                image = image * factor
            elif operation == "contrast":
                image = image * factor + (1 - factor) * gray.mean()
            elif operation == "saturation":
                image = image * factor + (1 - factor) * gray
            else:
                cos, sin = math.cos(2 * math.pi * factor), math.sin(2 * math.pi * factor)
                turn = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]]).double()
                image = to_yiq.inverse() @ turn @ to_yiq @ image
        if parameters.grayscale[index]:
            image = (luma @ image).expand(3, -1)
        expected = tv.normalize(image.clamp(0, 1).view(3, 32, 32).float(), list(MEAN), list(STD))
        torch.testing.assert_close(views[index], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("jitter", ["hsv", "linear"])
def test_without_any_augmentation_both_views_are_the_normalised_image(jitter: str) -> None:
    images = random_images(10)
    views = two_views(jitter=jitter, **PLAIN)(images, rng())
    expected = normalise(images, MEAN, STD)
    assert views.dtype == torch.float32
    torch.testing.assert_close(views, torch.cat([expected, expected]), atol=1e-5, rtol=1e-5)
    reference = tv.normalize(images / 255, list(MEAN), list(STD))
    torch.testing.assert_close(expected, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("jitter", ["hsv", "linear"])
def test_a_view_without_jitter_keeps_its_colours_beside_jittered_ones(jitter: str) -> None:
    fields = {**PLAIN, "strength": 1.0, "jitter_p": 0.5, "jitter": jitter}
    images = random_images(64)
    views = two_views(**fields)(images, rng())
    kept = augment.sample_parameters(TrainConfig(**fields), 128, 32, rng()).brightness == 1
    same = (views - normalise(images, MEAN, STD).repeat(2, 1, 1, 1)).abs().amax(
        dim=(1, 2, 3)
    ) < 1e-5
    assert torch.equal(same, kept)
    assert 0 < kept.sum() < 128


@pytest.mark.parametrize("jitter", ["hsv", "linear"])
def test_views_are_decided_by_the_generator_s_state_alone(
    jitter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = random_images(40)
    generator = rng(5)
    state = generator.get_state()
    first = two_views(jitter=jitter)(images, generator)
    second = two_views(jitter=jitter)(images, generator)
    generator.set_state(state)
    torch.manual_seed(99)
    assert torch.equal(two_views(jitter=jitter)(images, generator), first)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first[:40], first[40:])
    monkeypatch.setitem(augment.CHUNK_BYTES, "cpu", 7 * 4 * 3 * 32 * 32)
    other_chunks = two_views(jitter=jitter)(images, rng(5))
    torch.testing.assert_close(other_chunks, first, atol=1e-5, rtol=1e-5)


def test_views_are_written_to_a_given_buffer_and_images_stay() -> None:
    images = random_images(8)
    before = images.clone()
    out = torch.empty(16, 3, 32, 32)
    views = two_views()(images, rng(), out)
    assert views is out
    assert torch.equal(out, two_views()(images, rng()))
    assert torch.equal(images, before)


def test_autocast_around_the_views_does_not_blur_them() -> None:
    images = random_images(8)
    with torch.autocast("cpu", torch.bfloat16):
        views = two_views(jitter="linear")(images, rng())
    assert views.dtype == torch.float32
    assert torch.equal(views, two_views(jitter="linear")(images, rng()))


@pytest.mark.parametrize("jitter", ["hsv", "linear"])
def test_views_stay_in_the_range_of_a_normalised_image(jitter: str) -> None:
    views = two_views(jitter=jitter, strength=3.0, grayscale_p=0.5)(random_images(64), rng())
    for channel in range(3):
        low, high = -MEAN[channel] / STD[channel], (1 - MEAN[channel]) / STD[channel]
        assert views[:, channel].min() >= low - 1e-5
        assert views[:, channel].max() <= high + 1e-5


# --- distributions -----------------------------------------------------------------------------


def test_parameters_have_the_rates_and_ranges_of_the_configuration() -> None:
    config = TrainConfig(flip_p=0.3, jitter_p=0.7, grayscale_p=0.15, strength=0.5)
    n = 40_000
    parameters = augment.sample_parameters(config, n, 32, rng())
    jittered = parameters.brightness != 1
    for rate, expected in (
        (parameters.flip, 0.3),
        (jittered, 0.7),
        (parameters.grayscale, 0.15),
    ):
        assert abs(rate.float().mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    for factor in (parameters.brightness, parameters.contrast, parameters.saturation):
        assert torch.equal(factor != 1, jittered)
        assert factor.min() >= 0.6
        assert factor.max() <= 1.4
        torch.testing.assert_close(factor[jittered].std().item(), 0.8 / 12**0.5, atol=5e-3, rtol=0)
    assert parameters.hue.abs().max() <= 0.1
    assert torch.equal(parameters.hue != 0, jittered)
    pairs = torch.stack([parameters.brightness, parameters.contrast, parameters.hue])[:, jittered]
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 0.03


def test_magnitudes_are_capped_factors_at_zero_and_hue_at_half_a_turn() -> None:
    config = TrainConfig(strength=5.0, jitter_p=1.0)
    parameters = augment.sample_parameters(config, 5000, 32, rng())
    assert 0 <= parameters.contrast.min() < 0.05
    assert 4.9 < parameters.contrast.max() <= 5
    assert 0.49 < parameters.hue.abs().max() <= 0.5


def test_the_order_of_the_colour_operations_varies_between_batches() -> None:
    generator = rng()
    counts: dict[tuple[str, ...], int] = {}
    for _ in range(2400):
        order = augment.sample_order(generator)
        counts[order] = counts.get(order, 0) + 1
        torch.rand(3, generator=generator)
    assert len(counts) == 24
    chi_squared = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi_squared < 49.7  # 0.1 % of 23 degrees of freedom
    assert augment.sample_order(generator) == augment.sample_order(generator)


# --- errors ------------------------------------------------------------------------------------


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


def test_unfit_statistics_and_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="std above 0"):
        TwoViews(TrainConfig(), MEAN, (0.2, 0.2, 0.0), "cpu")
    with pytest.raises(ValueError, match="three numbers"):
        TwoViews(TrainConfig(), (0.5,), STD, "cpu")
    with pytest.raises(ValueError, match=r"contiguous of shape \(4, 3, 32, 32\)"):
        two_views()(random_images(2), rng(), torch.empty(4, 32, 32, 3).permute(0, 3, 1, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("jitter", ["hsv", "linear"])
def test_views_on_a_gpu_never_wait_for_it(jitter: str) -> None:
    views = TwoViews(TrainConfig(jitter=jitter), MEAN, STD, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    images = random_images(16).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = views(images, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.isfinite().all()
