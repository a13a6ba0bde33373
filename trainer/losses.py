"""Contrastive losses: pure functions of the two views' embeddings, and the registry of them.

A loss takes z0_BD and z1_BD, where rows with the same index are two views of one image, and
returns a scalar. It normalises the embeddings itself and computes in float32 at least, also
under autocast: similarities divided by a temperature of 0.05 are not safe in bfloat16.

Left out: gathering embeddings of several devices, queues, and labels.

Shapes: B images of a batch, N = 2B embeddings, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from trainer.config import TrainConfig

Loss = Callable[[Tensor, Tensor, TrainConfig], Tensor]

# Below this squared distance of two unit vectors float32 holds rounding errors only (2 - 2 cos
# cancels), and the gradient of the square root would magnify them.
LEAST_SQUARED_DISTANCE = 1e-7


def nt_xent(z0_BD: Tensor, z1_BD: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy of SimCLR.

    Chen et al. 2020, https://arxiv.org/abs/2002.05709, equation 1: with s the cosine similarity
    and j the other view of i, the mean over all N embeddings i of

        -log( exp(s_ij / temperature) / sum over k != i of exp(s_ik / temperature) )

    Identical embeddings give log(N - 1), which is therefore what collapse looks like.
    """
    _check(z0_BD, z1_BD)
    with torch.autocast(z0_BD.device.type, enabled=False):
        z_ND = normalize(torch.cat([_precise(z0_BD), _precise(z1_BD)]), dim=1)
        similarity_NN = (z_ND @ z_ND.T) / temperature
        count = len(z_ND)
        index_N = torch.arange(count, device=z_ND.device)
        # in place: N x N is the largest tensor here, and the product's gradient needs only z
        similarity_NN = similarity_NN.masked_fill_(index_N[:, None] == index_N, float("-inf"))
        return cross_entropy(similarity_NN, (index_N + count // 2) % count)


def margin_contrastive(z0_BD: Tensor, z1_BD: Tensor, margin: float) -> Tensor:
    """Contrastive loss with a margin, in the form that pytorch-metric-learning made common.

    With d the Euclidean distance of two normalised embeddings (0 to 2), the sum of two means

        mean of d over the positive pairs + mean of max(0, margin - d) over the negative pairs

    each over its terms above zero only (0 where there are none), so that the many negatives
    that are already far enough do not dilute the others.

    The original, Hadsell et al. 2006, https://ieeexplore.ieee.org/document/1640964, squares both
    (d^2 / 2 and max(0, margin - d)^2 / 2), takes plain means and does not normalise.
    """
    _check(z0_BD, z1_BD)
    with torch.autocast(z0_BD.device.type, enabled=False):
        z0_BD = normalize(_precise(z0_BD), dim=1)
        z1_BD = normalize(_precise(z1_BD), dim=1)
        positive_B = (z0_BD - z1_BD).norm(dim=1)
        z_ND = torch.cat([z0_BD, z1_BD])
        square_N = z_ND.square().sum(dim=1)  # 1, or 0 of an embedding that is zero
        squared_NN = square_N[:, None] + square_N - 2 * (z_ND @ z_ND.T)
        distance_NN = squared_NN.clamp(min=LEAST_SQUARED_DISTANCE).sqrt()
        image_N = torch.arange(len(z_ND), device=z_ND.device) % len(z0_BD)
        short_NN = (margin - distance_NN).masked_fill(image_N[:, None] == image_N, 0)
        return _mean_above_zero(positive_B) + _mean_above_zero(short_NN.relu())


def _mean_above_zero(terms: Tensor) -> Tensor:
    return terms.sum() / (terms > 0).sum().clamp(min=1)


def _precise(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _check(z0_BD: Tensor, z1_BD: Tensor) -> None:
    if z0_BD.ndim != 2 or z0_BD.shape != z1_BD.shape or not len(z0_BD):
        raise ValueError(
            "a loss needs two embeddings of equal shape [B, D] with B at least 1, "
            f"got {tuple(z0_BD.shape)} and {tuple(z1_BD.shape)}"
        )


def get_loss(name: str) -> Loss:
    """The loss of that name; a ValueError lists the known ones."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; known losses: {', '.join(sorted(LOSSES))}")
    return LOSSES[name]


def _nt_xent(z0_BD: Tensor, z1_BD: Tensor, config: TrainConfig) -> Tensor:
    """NT-Xent (SimCLR, Chen et al. 2020); uses `temperature`"""
    return nt_xent(z0_BD, z1_BD, config.temperature)


def _margin(z0_BD: Tensor, z1_BD: Tensor, config: TrainConfig) -> Tensor:
    """contrastive loss with a margin (after Hadsell et al. 2006); uses `margin`"""
    return margin_contrastive(z0_BD, z1_BD, config.margin)


LOSSES: dict[str, Loss] = {
    "nt_xent": _nt_xent,
    "margin": _margin,
}
