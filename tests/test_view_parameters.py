"""Parameters have the chances and distributions that the configuration states.

The seeds are fixed, so that a statistical test passes always or never. Each rejects what is
true in 0.1 % of the seeds.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from scipy import stats
from torch import Tensor

from trainer.config import Augmentation, TrainConfig
from trainer.view_parameters import (
    DRAWS,
    NEVER,
    ViewParameters,
    sample_order,
    sample_parameters,
)

N = 20_000
SIZE = 32
SIGNIFICANCE = 1e-3
EVERYTHING = {f"{name}_p": 1.0 for name in get_args(Augmentation)} | {"strength": 1.0}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(count: int = N, seed: int = 0, **settings: Any) -> ViewParameters:
    return sample_parameters(TrainConfig(**settings), count, SIZE, rng(seed))


def assert_uniform(values_N: Tensor, low: float, high: float) -> None:
    assert values_N.min() >= low - 1e-6
    assert values_N.max() <= high + 1e-6
    test = stats.kstest(values_N.double().numpy(), stats.uniform(low, high - low).cdf)
    assert test.pvalue > SIGNIFICANCE


def assert_chance(chosen_N: Tensor, chance: float) -> None:
    test = stats.binomtest(int(chosen_N.sum()), len(chosen_N), chance)
    assert test.pvalue > SIGNIFICANCE


def chosen(name: Augmentation, parameters: ViewParameters) -> Tensor:
    """Whose value is not the neutral one, bool [N]."""
    column = {"rotation": 0, "translation": (1, 2), "scaling": 3}
    if name in column:
        neutral = torch.tensor([0.0, 0, 0, 1])
        differs_N4 = parameters.affine != neutral
        return differs_N4[:, column[name]].reshape(len(differs_N4), -1).any(dim=1)
    if name == "crop":
        return (parameters.boxes != torch.tensor([0, 0, SIZE, SIZE])).any(dim=1)
    if name == "jitter":
        return parameters.brightness != 1
    if name == "solarize":
        return parameters.solarize < NEVER
    if name == "cutout":
        return parameters.cutout[:, 2] > 0
    return getattr(parameters, name) > 0


@pytest.mark.parametrize("chance", [0.03, 0.35, 0.9])
@pytest.mark.parametrize("name", get_args(Augmentation))
def test_views_are_chosen_at_the_chance_of_the_configuration(
    name: Augmentation, chance: float
) -> None:
    # magnitudes so large that a chosen view has next to never the neutral value by chance
    wide = {"crop_min_scale": 0.01, "translation": 1.0}
    parameters = sample(augment=name, **{f"{name}_p": chance}, **wide)
    chosen_N = chosen(name, parameters)
    if name == "translation":  # but for 1 / 65 squared of them, here
        chance *= 1 - 1 / (2 * SIZE) ** 2
    assert_chance(chosen_N, chance)


def test_who_is_chosen_for_one_augmentation_does_not_depend_on_another() -> None:
    names = get_args(Augmentation)
    parameters = sample(**{f"{name}_p": 0.5 for name in names}, crop_min_scale=0.01)
    chosen_KN = torch.stack([chosen(name, parameters).float() for name in names])
    correlations = torch.corrcoef(chosen_KN) - torch.eye(len(names))
    assert correlations.abs().max() < 4 / math.sqrt(N)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_magnitudes_are_uniform_in_their_ranges(strength: float) -> None:
    parameters = sample(**(EVERYTHING | {"strength": strength}), rotation=40.0, scaling=0.3)
    assert_uniform(parameters.affine[:, 0], -40, 40)
    assert_uniform(parameters.affine[:, 3], 0.7, 1.3)
    for factor_N in (parameters.brightness, parameters.contrast, parameters.saturation):
        assert_uniform(factor_N, 1 - 0.8 * strength, 1 + 0.8 * strength)
    assert_uniform(parameters.hue, -0.2 * strength, 0.2 * strength)
    assert_uniform(parameters.blur, 0.1 * strength, 2.0 * strength)
    magnitudes = torch.stack(
        [
            *parameters.affine.unbind(1),
            parameters.brightness,
            parameters.contrast,
            parameters.saturation,
            parameters.hue,
            parameters.blur,
        ]
    )
    correlations = torch.corrcoef(magnitudes) - torch.eye(len(magnitudes))
    assert correlations.abs().max() < 4 / math.sqrt(N)


def test_translations_are_whole_pixels_as_torchvision_rounds_them() -> None:
    parameters = sample(**EVERYTHING, translation=0.1)  # 3.2 of 32 pixels to either side
    for pixels_N in parameters.affine[:, 1:3].unbind(1):
        values, counts = torch.unique(pixels_N, return_counts=True)
        assert values.tolist() == [-3, -2, -1, 0, 1, 2, 3]
        expected = torch.tensor([0.7, 1, 1, 1, 1, 1, 0.7]) / 6.4 * N
        assert stats.chisquare(counts.numpy(), expected.double().numpy()).pvalue > SIGNIFICANCE


def test_cutouts_are_centred_on_any_pixel_alike_and_of_one_side() -> None:
    parameters = sample(**EVERYTHING, cutout=0.3)
    top_N, left_N, side_N = parameters.cutout.unbind(1)
    assert (side_N == 10).all()
    for corner_N in (top_N, left_N):
        counts = torch.bincount(corner_N + 5, minlength=SIZE)
        assert len(counts) == SIZE
        assert stats.chisquare(counts.numpy()).pvalue > SIGNIFICANCE


def test_magnitudes_are_capped() -> None:
    parameters = sample(**(EVERYTHING | {"strength": 5.0}), solarize=0.5, count=5_000)
    assert 0 <= parameters.contrast.min() < 0.05
    assert 4.9 < parameters.contrast.max() <= 5
    assert 0.49 < parameters.hue.abs().max() <= 0.5
    assert (parameters.grayscale == 1).all()
    assert (parameters.solarize == 0).all()


def test_strength_scales_the_share_of_colour_lost_and_of_values_inverted() -> None:
    fields = EVERYTHING | {"strength": 0.5}
    parameters = sample(**fields, grayscale=0.8, solarize=0.6, count=10)
    assert torch.equal(parameters.grayscale, torch.full((10,), 0.4))
    torch.testing.assert_close(parameters.solarize, torch.full((10,), 0.7))


@pytest.mark.parametrize("name", get_args(Augmentation))
def test_what_is_off_has_no_parameters_and_leaves_the_others_draws_alone(
    name: Augmentation,
) -> None:
    everything, generator = sample(**EVERYTHING, count=50), rng()
    config = TrainConfig(**(EVERYTHING | {f"{name}_p": 0.0}))
    without = sample_parameters(config, 50, SIZE, generator)
    whole = rng()
    sample_parameters(TrainConfig(**EVERYTHING), 50, SIZE, whole)
    assert torch.equal(generator.get_state(), whole.get_state())
    gone = {
        "jitter": {"brightness", "contrast", "saturation", "hue"},
        "rotation": {"affine"},
        "translation": {"affine"},
        "scaling": {"affine"},
        "crop": {"boxes"},
    }.get(name, {name})
    for field in fields(ViewParameters):
        ours, theirs = getattr(without, field.name), getattr(everything, field.name)
        if field.name in gone:
            if ours is not None:  # shared with others that are on
                assert (ours != theirs).any()
        elif isinstance(theirs, Tensor):
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs


def test_without_augmentation_there_is_nothing_to_do() -> None:
    parameters = sample(**EVERYTHING, augment="none", count=5)
    assert not parameters.recolours
    assert not parameters.flip.any()
    assert not parameters.vflip.any()
    kept = {"flip", "vflip", "order"}
    values = {f.name: getattr(parameters, f.name) for f in fields(ViewParameters)}
    assert {name for name, value in values.items() if value is not None} == kept


def test_rows_are_those_of_every_parameter() -> None:
    parameters = sample(**EVERYTHING, count=9)
    part = parameters.rows(slice(2, 5))
    assert part.order == parameters.order
    for field in fields(ViewParameters):
        value = getattr(parameters, field.name)
        if isinstance(value, Tensor):
            assert torch.equal(getattr(part, field.name), value[2:5])


def test_every_draw_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number on which no parameter depends would be a mistake."""
    config = TrainConfig(**(EVERYTHING | {f"{n}_p": 0.5 for n in get_args(Augmentation)}))
    read: set[int] = set()
    original = torch.rand
    for row in range(len(DRAWS)):

        def moved(*args: Any, row: int = row, **kwargs: Any) -> Tensor:
            uniform = original(*args, **kwargs)
            uniform[row] = (uniform[row] + 0.37) % 1
            return uniform

        plain = sample_parameters(config, 400, SIZE, rng())
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", moved)
            other = sample_parameters(config, 400, SIZE, rng())
        for field in fields(ViewParameters):
            a, b = getattr(plain, field.name), getattr(other, field.name)
            if isinstance(a, Tensor) and not torch.equal(a, b):
                read.add(row)
    assert read == set(range(len(DRAWS)))


def test_the_order_of_the_colour_operations_varies_between_batches() -> None:
    generator = rng()
    counts: dict[tuple[str, ...], int] = {}
    for _ in range(2400):
        order = sample_order(generator)
        counts[order] = counts.get(order, 0) + 1
        torch.rand(3, generator=generator)
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > SIGNIFICANCE
    assert sample_order(generator) == sample_order(generator)
