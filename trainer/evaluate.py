"""What a representation is worth: kNN accuracy, and measures that need no labels.

Everything is computed in float32 or float64, whatever precision the features come in, and in
chunks, so that a bank of 20,000 x 2,048 features needs no more than some 100 MB beside itself
(where some of it is not finite, another copy of it).
Features that are not finite never raise: kNN counts them as wrong, the others return NaN.

The label-free measures compare runs of one method only (they are not objectives across
methods), and show collapse.

Left out: gathering features, which is the caller's. The linear classifier is in `linear_probe.py`.

Shapes: N features of the bank, M queries, B embeddings, D width, K neighbours, L classes, R rows
of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK_VALUES = 1 << 23  # of one temporary: 32 MB of float32, 64 MB of float64
GROUP = 32  # of a bank's columns: near sqrt(N / k), where both searches are short
NO_LABEL = -1
"""Predicted where a query's features are not finite, or all of the bank's: right for no image."""
RANKME_EPSILON = 1e-7  # the paper's
COLLAPSED_STD = 0.01
"""`feature_std` below which features are one point. Untrained encoders reach down to .03 (ResNet-34
with its initial running statistics), a healthy `conv_small` on digits to .05."""
COLLAPSED_RANK = 1.1
"""Participation ratio below which features are one line, 95 % of their variance along it.
Untrained encoders reach down to 2.0 (vit_small on digits), SupCon on two classes to 1.65."""
COLLAPSE_NEEDS = 10
"""Fewest images and fewest dimensions in which a line tells anything."""


def knn_top1(
    bank_features_ND: Tensor,
    bank_labels_N: Tensor,
    query_features_MD: Tensor,
    query_labels_M: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.1,
) -> float:
    """Share of the queries, in [0, 1], whose label is that of `knn_predictions`."""
    check_answers(query_features_MD, query_labels_M)
    predicted_M = knn_predictions(
        bank_features_ND, bank_labels_N, query_features_MD, k=k, temperature=temperature
    )
    return share_right(predicted_M, query_labels_M)


@torch.no_grad()
def knn_predictions(
    bank_features_ND: Tensor,
    bank_labels_N: Tensor,
    query_features_MD: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.1,
) -> Tensor:
    """Label [M] of each query by a weighted vote of its k neighbours; NO_LABEL without a vote.

    Wu et al. 2018, https://arxiv.org/abs/1805.01978, section 3.4: a neighbour at cosine
    similarity s votes with exp(s / temperature). A bank smaller than k votes as a whole.
    A bank feature that is not finite is nobody's neighbour, such a query has no vote.
    """
    check_bank(bank_features_ND, bank_labels_N)
    device = bank_features_ND.device
    bank_ND, finite_N = _unit_and_finite(bank_features_ND)
    labels_N = bank_labels_N.to(device)
    predicted_M = torch.full((len(query_features_MD),), NO_LABEL, device=device)
    if not bool(finite_N.all()):
        bank_ND, labels_N = bank_ND[finite_N], labels_N[finite_N]
        if not len(bank_ND):
            return predicted_M
    classes = int(labels_N.max()) + 1
    k = min(k, len(bank_ND))
    for part in chunks(len(query_features_MD), len(bank_ND)):
        query_RD, finite_R = _unit_and_finite(query_features_MD[part].to(device))
        nearest_RK, index_RK = _largest(query_RD @ bank_ND.T, k)
        # weights relative to the nearest: the same vote, and no overflow at low temperatures
        weights_RK = ((nearest_RK - nearest_RK[:, :1]) / temperature).exp()
        votes_RL = weights_RK.new_zeros(len(query_RD), classes)
        votes_RL.scatter_add_(1, labels_N[index_RK], weights_RK)
        predicted_M[part] = votes_RL.argmax(dim=1).where(finite_R, NO_LABEL)
    return predicted_M


@torch.no_grad()
def alignment(z0_BD: Tensor, z1_BD: Tensor) -> float:
    """Mean squared distance of the normalised embeddings of two views: 0 (best) to 4.

    Wang and Isola 2020, https://arxiv.org/abs/2005.10242, with alpha = 2.
    """
    difference_BD = normalize(precise(z0_BD), dim=1) - normalize(precise(z1_BD), dim=1)
    return float(difference_BD.square().sum(dim=1).double().mean())


@torch.no_grad()
def uniformity(z_BD: Tensor, t: float = 2.0) -> float:
    """log of the mean over pairs of exp(-t * squared distance) of normalised embeddings.

    Wang and Isola 2020, https://arxiv.org/abs/2005.10242, with their t = 2. 0 is collapse;
    spread over a sphere of many dimensions it comes near -2t. Needs two embeddings.
    """
    count = len(z_BD)
    if count < 2:
        raise ValueError(f"uniformity needs at least 2 embeddings, got {count}")
    z_BD = normalize(precise(z_BD), dim=1)
    sums = []
    for part in chunks(count, count):
        squared_RB = (2 - 2 * (z_BD[part] @ z_BD.T)).clamp_(min=0)
        squared_RB.diagonal(part.start).fill_(math.inf)  # an embedding is no pair with itself
        sums.append(torch.logsumexp(-t * squared_RB, dim=1).double())
    return float(torch.cat(sums).logsumexp(dim=0)) - math.log(count * (count - 1))


@torch.no_grad()
def rankme(features_ND: Tensor) -> float:
    """Effective rank of the features: exp of the entropy of their normalised singular values.

    Garrido et al. 2023, https://arxiv.org/abs/2210.02885, equation 1: between 1 and min(N, D)
    up to its epsilon, on features as they are (neither centred nor normalised). The singular
    values are roots of the eigenvalues of the smaller Gram matrix, in float64. Features that
    are all zero have rank 0; NaN where a feature is not finite.
    """
    features_ND = precise(features_ND)
    if not bool(features_ND.isfinite().all()):
        return math.nan
    largest = float(features_ND.abs().max()) if features_ND.numel() else 0.0
    if largest == 0:
        return 0.0
    if features_ND.shape[0] < features_ND.shape[1]:
        features_ND = features_ND.T
    gram_DD = gram(features_ND, scale=1 / largest)  # the rank has no scale, squares have limits
    singular_D = torch.linalg.eigvalsh(gram_DD).clamp(min=0).sqrt()
    share_D = singular_D / singular_D.sum() + RANKME_EPSILON
    return float(torch.exp(-(share_D * share_D.log()).sum()))


@torch.no_grad()
def feature_std(features_ND: Tensor) -> float:
    """Standard deviation of the normalised features, mean over dimensions, times sqrt(D).

    Chen and He 2021 (SimSiam), https://arxiv.org/abs/2011.10566, figure 2: near 1 where
    features spread over the sphere, 0 where they have collapsed to one point.
    """
    unit_ND = normalize(precise(features_ND), dim=1)
    std_D = unit_ND.std(dim=0, correction=0)
    return float(std_D.double().mean()) * math.sqrt(features_ND.shape[1])


@torch.no_grad()
def collapse(features_ND: Tensor) -> str | None:
    """Say in one line why these features have collapsed; None where they have not.

    Either to one point (`feature_std`; complete collapse), or to one line (dimensional collapse,
    Jing et al. 2021, https://arxiv.org/abs/2110.09348, at its worst): the participation ratio
    (sum of l)^2 / sum of l^2, for the eigenvalues l of the covariance of the normalised features,
    is k where k directions share the variance alike, and near 1 where the features lie on one
    axis or a short arc. Normalised, since the lengths alone are a line in healthy networks
    (untrained ResNet-34: 1.07 without, 7.2 with). The thresholds are far below what untrained
    and usefully trained encoders show; milder collapse is `rankme`'s to tell.
    """
    count, width = features_ND.shape
    broken = count - int(features_ND.isfinite().all(dim=1).sum())
    if broken:
        return f"features are not finite for {broken} of {count} images"
    if count < 2:
        return None
    spread = feature_std(features_ND)
    if spread < COLLAPSED_STD:
        return f"features collapsed: standard deviation {spread:.3g} < {COLLAPSED_STD}, one point"
    if min(count, width) < COLLAPSE_NEEDS:
        return None
    unit_ND = normalize(precise(features_ND), dim=1)
    covariance_DD = gram(unit_ND - unit_ND.mean(dim=0))
    rank = float(covariance_DD.trace().square() / covariance_DD.square().sum())
    if rank < COLLAPSED_RANK:
        return f"features collapsed: effective rank {rank:.3g} < {COLLAPSED_RANK}, one line"
    return None


def check_bank(bank_features_ND: Tensor, bank_labels_N: Tensor) -> None:
    """Raise a ValueError if there is nothing known to compare with."""
    if not len(bank_features_ND):
        raise ValueError("accuracy needs at least one feature in the bank, got 0")
    _check_labels(bank_labels_N)


def check_answers(query_features_MD: Tensor, query_labels_M: Tensor) -> None:
    """Raise a ValueError if there is nothing to compare, or a query without a label."""
    if not len(query_features_MD):
        raise ValueError("accuracy needs at least one query, got 0")
    _check_labels(query_labels_M)


def _check_labels(labels_N: Tensor) -> None:
    least = int(labels_N.min())
    if least < 0:
        raise ValueError(f"labels must be at least 0, got {least}; leave unlabelled images out")


def share_right(predicted_M: Tensor, labels_M: Tensor) -> float:
    """Share of predicted labels, in [0, 1], that are the true ones."""
    return int((predicted_M == labels_M.to(predicted_M.device)).sum()) / len(labels_M)


def gram(features_ND: Tensor, scale: float = 1.0) -> Tensor:
    """Give X^T X of X = scale * features: [D, D] in float64."""
    width = features_ND.shape[1]
    gram_DD = torch.zeros(width, width, dtype=torch.float64, device=features_ND.device)
    for part in chunks(len(features_ND), width):
        scaled_RD = features_ND[part].double() * scale
        gram_DD.addmm_(scaled_RD.T, scaled_RD)
    return gram_DD


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Cut `rows` rows of `width` values so that a chunk has at most `CHUNK_VALUES`."""
    step = max(1, CHUNK_VALUES // width)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def precise(features: Tensor) -> Tensor:
    """Give features of less than float32's precision in float32, others as they are."""
    return features if features.dtype == torch.float64 else features.float()


def _largest(values_RN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, falling, and where they stand: `topk` in half its time.

    They stand in the k groups of neighbouring columns whose maxima are the largest, so that only
    these groups need to be searched, and the columns that no whole group is left for.
    """
    rows, count = values_RN.shape
    groups = count // GROUP
    if groups <= 2 * k:
        return values_RN.topk(k, dim=1)
    whole = groups * GROUP
    maxima_RG = values_RN[:, :whole].reshape(rows, groups, GROUP).amax(dim=2)
    group_RK1 = maxima_RG.topk(k, dim=1).indices[:, :, None]
    column_N = torch.arange(count, device=values_RN.device)
    column_RC = (group_RK1 * GROUP + column_N[:GROUP]).flatten(1)
    column_RC = torch.cat([column_RC, column_N[whole:].expand(rows, -1)], dim=1)
    found_RK, at_RK = values_RN.gather(1, column_RC).topk(k, dim=1)
    return found_RK, column_RC.gather(1, at_RK)


def _unit_and_finite(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised features with rows of zeros where one is not finite, and which are finite."""
    features_ND = precise(features_ND)
    finite_N = features_ND.isfinite().all(dim=1)
    return normalize(features_ND.masked_fill(~finite_N[:, None], 0), dim=1), finite_N
