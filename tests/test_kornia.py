"""SimCLR's whole pipeline is also kornia's, operation by operation, with the same parameters.

tests/test_augment.py holds every augmentation against torchvision; kornia is written independently
of it, and works on batches as this does.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from trainer.augment import TwoViews
from trainer.config import TrainConfig
from trainer.view_parameters import ViewParameters, sample_parameters

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own use of torch
    from kornia import enhance
    from kornia.geometry.transform import hflip, resize

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
OPERATIONS = {
    "brightness": enhance.adjust_brightness_accumulative,
    "contrast": enhance.adjust_contrast_with_mean_subtraction,
    "saturation": enhance.adjust_saturation_with_gray_subtraction,
    "hue": lambda image, turns: enhance.adjust_hue(image, turns * 2 * math.pi),
}


def by_kornia(images_NCSS: Tensor, parameters: ViewParameters) -> Tensor:
    """Crop, flip, jitter, grayscale, normalise; float [N, 3, S, S] in [0, 1] -> views."""
    size = images_NCSS.shape[-1]
    assert parameters.boxes is not None
    assert parameters.grayscale is not None
    views = []
    for index, image in enumerate(images_NCSS):
        top, left, height, width = parameters.boxes[index].tolist()
        crop = image[None, :, top : top + height, left : left + width]
        views.append(resize(crop, (size, size), align_corners=False))
    views_NCSS = torch.cat(views)
    views_NCSS = torch.where(
        parameters.flip.reshape(-1, 1, 1, 1), hflip(views_NCSS), views_NCSS
    ).clamp(0, 1)
    for operation in parameters.order:
        views_NCSS = OPERATIONS[operation](views_NCSS, getattr(parameters, operation))
    views_NCSS = enhance.adjust_saturation_with_gray_subtraction(
        views_NCSS, 1 - parameters.grayscale
    )
    return enhance.normalize(views_NCSS, torch.tensor(MEAN), torch.tensor(STD))


def test_the_whole_pipeline_equals_kornias() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator)
    config = TrainConfig(strength=1.0)  # crop, flip, jitter with hue in HSV, grayscale
    for seed in range(4):  # the order of the colour operations differs
        views = TwoViews(config, MEAN, STD, "cpu")(images, torch.Generator().manual_seed(seed))
        drawn = sample_parameters(config, 128, 32, torch.Generator().manual_seed(seed))
        expected = by_kornia(images.repeat(2, 1, 1, 1).float() / 255, drawn)
        # kornia's weights of a grey value have three digits
        torch.testing.assert_close(views, expected, atol=2e-3, rtol=0)
