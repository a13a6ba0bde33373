"""Losses without negatives: of the features' correlations, and of a predictor's regression.

Correlation losses (Barlow Twins, VICReg) read the batch column by column: collapse is kept away by
asking each of the D features to vary, and to say something that the others do not. Their D x D
matrices are made a chunk of rows at a time (row_chunks.py), as projections of 8,192 are usual.
Regression losses (BYOL, SimSiam) predict one view from the other; what keeps them from collapse is
the stopped gradient and the predictor, not the loss.

Left out: gathering embeddings of several devices, and the networks themselves.

Shapes: B images of a batch, D width of an embedding, R features of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from trainer.loss_inputs import check_views, in_float32
from trainer.row_chunks import sum_over_rows

BARLOW_EPSILON = 1e-5
"""Added to the variance that a feature is divided by: that of the paper's batch normalisation."""
VICREG_EPSILON = 1e-4
"""Added to the variance under the square root: the paper's."""


@in_float32
def barlow_twins(z0_BD: Tensor, z1_BD: Tensor, off_diagonal_weight: float) -> Tensor:
    """Barlow Twins: the cross-correlation of the two views' features is to be the identity.

    Zbontar et al. 2021, https://arxiv.org/abs/2103.03230, equation 1: with c_ij the correlation of
    feature i of view 0 and feature j of view 1 over the batch (biased variance, plus 1e-5),

        sum over i of (1 - c_ii)^2 + off_diagonal_weight times the sum over i != j of c_ij^2

    Constant features give D. Not normalised by row. At least two images.
    """
    check_views(z0_BD, z1_BD, least=2)

    def term(start: int, rows_RB: Tensor, all_DB: Tensor) -> tuple[Tensor]:
        correlation_RD = (rows_RB @ all_DB.T) / all_DB.shape[1]
        on_R = correlation_RD.diagonal(offset=start).clone()
        _clear_diagonal(start, correlation_RD)
        off = correlation_RD.square().sum()
        return ((1 - on_R).square().sum() + off_diagonal_weight * off,)

    features0_DB, features1_DB = _standardised(z0_BD).T, _standardised(z1_BD).T
    (total,) = sum_over_rows(term, [features0_DB], [features1_DB])
    return total


@in_float32
def vicreg(
    z0_BD: Tensor, z1_BD: Tensor, invariance: float, variance: float, covariance: float
) -> Tensor:
    """VICReg: variance, invariance, covariance; the arguments are their weights.

    Bardes et al. 2022, https://arxiv.org/abs/2105.04906, equations 1 to 6, with the scales of the
    authors' code:

        invariance times the mean of (z0 - z1)^2 over images and features
        + variance times the mean over views and features of max(0, 1 - sqrt(var + 1e-4))
        + covariance times the sum over views of (sum over i != j of cov_ij^2) / D

    with unbiased variance and covariance over the batch (the paper's text has the variance term
    summed over the views, and the distance over features). Not normalised by row. At least two
    images.
    """
    check_views(z0_BD, z1_BD, least=2)
    distance = mse_loss(z0_BD, z1_BD)
    hinge = (_variance_hinge(z0_BD) + _variance_hinge(z1_BD)) / 2
    correlated = _squared_covariances(z0_BD) + _squared_covariances(z1_BD)
    return invariance * distance + variance * hinge + covariance * correlated / z0_BD.shape[1]


@in_float32
def byol(p0_BD: Tensor, p1_BD: Tensor, target0_BD: Tensor, target1_BD: Tensor) -> Tensor:
    """BYOL: each view's prediction regresses the momentum network's projection of the other.

    Grill et al. 2020, https://arxiv.org/abs/2006.07733, equation 2, summed over both directions
    as there: the mean over images of

        (2 - 2 cos(p0, target1)) + (2 - 2 cos(p1, target0))

    which lies in [0, 8]. The targets get no gradient.
    """
    return 4 + 4 * _regression(p0_BD, p1_BD, target0_BD, target1_BD)


@in_float32
def simsiam(p0_BD: Tensor, p1_BD: Tensor, z0_BD: Tensor, z1_BD: Tensor) -> Tensor:
    """SimSiam: each view's prediction regresses the other's projection, whose gradient is stopped.

    Chen & He 2020, https://arxiv.org/abs/2011.10566, equation 2: the mean over images of

        -cos(p0, z1) / 2 - cos(p1, z0) / 2

    which lies in [-1, 1]; -1 is reached at collapse too. The projections get no gradient here,
    only through their predictions.
    """
    return _regression(p0_BD, p1_BD, z0_BD, z1_BD)


def _regression(p0_BD: Tensor, p1_BD: Tensor, target0_BD: Tensor, target1_BD: Tensor) -> Tensor:
    """Negative cosine similarity, mean over images and both directions, in [-1, 1]."""
    for other_BD in (p1_BD, target0_BD, target1_BD):
        check_views(p0_BD, other_BD)
    cosine0_B = (normalize(p0_BD, dim=1) * normalize(target1_BD.detach(), dim=1)).sum(dim=1)
    cosine1_B = (normalize(p1_BD, dim=1) * normalize(target0_BD.detach(), dim=1)).sum(dim=1)
    return -(cosine0_B + cosine1_B).mean() / 2


def _standardised(z_BD: Tensor) -> Tensor:
    variance_D, mean_D = torch.var_mean(z_BD, dim=0, correction=0)
    return (z_BD - mean_D) * (variance_D + BARLOW_EPSILON).rsqrt()


def _variance_hinge(z_BD: Tensor) -> Tensor:
    return (1 - (z_BD.var(dim=0) + VICREG_EPSILON).sqrt()).relu().mean()


def _squared_covariances(z_BD: Tensor) -> Tensor:
    """Sum of the squared covariances of different features, over the batch."""

    def term(start: int, rows_RB: Tensor, all_DB: Tensor) -> tuple[Tensor]:
        covariance_RD = (rows_RB @ all_DB.T) / (all_DB.shape[1] - 1)
        _clear_diagonal(start, covariance_RD)
        return (covariance_RD.square().sum(),)

    features_DB = (z_BD - z_BD.mean(dim=0)).T
    (total,) = sum_over_rows(term, [features_DB], [features_DB])
    return total


@torch.no_grad()  # the square of what is cleared has a gradient of exactly 0
def _clear_diagonal(start: int, matrix_RD: Tensor) -> None:
    """Set the elements of a feature with itself to 0, in place."""
    matrix_RD.diagonal(offset=start).zero_()
