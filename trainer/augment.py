"""Two random views of a batch, made on the device in batched operations.

The augmentations of SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709, appendix A) and
more: an affine resampling (rotation, translation, scaling), random resized crop, flips, colour
jitter, grayscale, Gaussian blur, solarisation, normalisation, cutout, in this order. Definitions
are torchvision's and every view has its own parameters; only the order of the four colour
operations is drawn once a batch. What is drawn stands in view_parameters.py; what is done with
it in spatial.py, crop.py and colour.py.

How it is fast: nothing loops over samples or waits for the device, a crop with its flips is two
small matrix products, colours are worked on in place, and a CPU goes through the batch in
chunks whose intermediate results stay in its cache. What no view undergoes costs nothing. All
random numbers are drawn before the first chunk, so the views do not depend on the size of the
chunks.

`jitter="hsv"` is torchvision's colour jitter: four operations, each clamped to [0, 1], hue
rotated in HSV. `jitter="linear"` rotates hue linearly in YIQ and makes jitter and grayscale one
matrix a view, with normalisation in it where neither blur nor solarisation stands between;
values are clamped once, after it.

Left out: images that are not square, and sizes that change.

Shapes: B images of a batch, N = 2B views, S side in pixels, P = S*S pixels, C = 3 channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.colour import ColourConstants, colour_matrices, recolour_exactly_, solarize_
from trainer.config import TrainConfig
from trainer.crop import crop_and_flip
from trainer.spatial import blur_, cut_out_, transform
from trainer.view_parameters import ViewParameters, sample_parameters

CHUNK_BYTES = {"cpu": 3 << 18, "cuda": 1 << 28}  # of float32 views; CPU: 64 views of 32 px


def normalise(images_BCSS: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images [B,3,H,W] -> float32 (image / 255 - mean) / std: evaluation's preprocessing."""
    return _normalise_(images_BCSS.to(torch.float32).mul_(1 / 255), mean, std)


def _normalise_(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    for channel, (shift, scale) in enumerate(zip(mean, std, strict=True)):
        images[:, channel].sub_(shift).div_(scale)  # numbers: a tensor would have to be copied
    return images


class TwoViews:
    """Makes two views of every image of a batch.

    Args:
        config: the fields under "views".
        mean, std: of the three channels in [0, 1].
        device: where batches and the generator live.
    """

    def __init__(
        self,
        config: TrainConfig,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
    ) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"mean and std need three numbers each, std above 0, got {mean} and {std}"
            )
        self.config = config
        self.mean, self.std = tuple(mean), tuple(std)
        self.device = torch.device(device)
        self._constants = ColourConstants.on(self.device)
        self._mean_C1 = torch.tensor([self.mean], device=self.device).mT
        self._std_C1 = torch.tensor([self.std], device=self.device).mT
        self._chunk_bytes = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cuda"])

    @torch.no_grad()
    def __call__(self, images_BCSS: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 [B,3,S,S] -> normalised float32 [2B,3,S,S]: all first views, then all second.

        Deterministic for a given state of `generator`, which must be on the same device.
        """
        self._check(images_BCSS, generator)
        return self.one_each(torch.cat([images_BCSS, images_BCSS]), generator)

    @torch.no_grad()
    def one_each(self, images_BCSS: Tensor, generator: torch.Generator) -> Tensor:
        """One view of every image: uint8 [B,3,S,S] -> normalised float32 [B,3,S,S]."""
        self._check(images_BCSS, generator)
        count, channels, size, _ = images_BCSS.shape
        parameters = sample_parameters(self.config, count, size, generator)
        out = torch.empty(images_BCSS.shape, device=self.device)
        chunk = max(1, self._chunk_bytes // (4 * channels * size * size))
        with torch.autocast(self.device.type, enabled=False):  # bfloat16 would blur the crop
            for start in range(0, count, chunk):
                part = slice(start, start + chunk)
                self.augment(images_BCSS[part], parameters.rows(part), out[part])
        return out

    def _check(self, images_BCSS: Tensor, generator: torch.Generator) -> None:
        if images_BCSS.dtype != torch.uint8 or images_BCSS.ndim != 4:
            raise ValueError(
                "images must be uint8 of shape [B, 3, S, S], "
                f"got {images_BCSS.dtype} {tuple(images_BCSS.shape)}"
            )
        if images_BCSS.shape[1] != 3 or images_BCSS.shape[2] != images_BCSS.shape[3]:
            raise ValueError(
                f"images must be square with three channels, got {tuple(images_BCSS.shape)}"
            )
        if generator.device.type != self.device.type:
            raise ValueError(
                f"the generator must be on {self.device} like the images, got {generator.device}"
            )

    def augment(self, images_NCSS: Tensor, parameters: ViewParameters, out: Tensor) -> None:
        """Write one normalised view of each uint8 image to `out`, as `parameters` say."""
        images = images_NCSS.to(torch.float32).mul_(1 / 255)
        if parameters.affine is not None:
            images = transform(images, parameters.affine)
        linear = self.config.jitter == "linear" and parameters.recolours
        if parameters.boxes is not None:
            # the linear colours read one tensor and write another, the exact ones work in place
            target = None if linear else out
            images = crop_and_flip(
                images, parameters.boxes, parameters.flip, parameters.vflip, target
            )
        fused = linear and parameters.blur is None and parameters.solarize is None
        if linear:
            self._recolour_linearly(images.flatten(2), parameters, out.flatten(2), fused)
        else:
            if images is not out:
                out.copy_(images)
            recolour_exactly_(out.flatten(2), parameters)
        if parameters.blur is not None:
            blur_(out, parameters.blur)
        if parameters.solarize is not None:
            solarize_(out.flatten(2), parameters.solarize)
        if not fused:
            _normalise_(out, self.mean, self.std)
        if parameters.cutout is not None:
            cut_out_(out, parameters.cutout)  # with 0, which is the mean

    def _recolour_linearly(
        self, images_NCP: Tensor, parameters: ViewParameters, out: Tensor, normalised: bool
    ) -> None:
        matrix, offset = colour_matrices(parameters, images_NCP.mean(dim=2), self._constants)
        if not normalised:
            torch.baddbmm(offset, matrix, images_NCP, out=out).clamp_(0, 1)
            return
        offset = (offset - self._mean_C1) / self._std_C1
        torch.baddbmm(offset, matrix / self._std_C1, images_NCP, out=out)
        for channel, (shift, scale) in enumerate(zip(self.mean, self.std, strict=True)):
            out[:, channel].clamp_(-shift / scale, (1 - shift) / scale)
