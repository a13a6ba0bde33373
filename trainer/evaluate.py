"""What a representation is worth: kNN accuracy, and measures that need no labels.

Everything is computed in float32 or float64, whatever precision the features come in, and in
chunks, so that a bank of 20,000 x 2,048 features needs no more than some 100 MB beside itself.
Features that are not finite never raise: kNN counts them as wrong, the others return NaN.

The label-free measures compare runs of one method only (they are not objectives across
methods), and show collapse.

Left out: the linear probe, and gathering features, which is the caller's.

Shapes: N features of the bank, M queries, B embeddings, D width, K neighbours, L classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK_VALUES = 1 << 23  # of one temporary: 32 MB of float32, 64 MB of float64
RANKME_EPSILON = 1e-7  # the paper's


@torch.no_grad()
def knn_top1(
    bank_features_ND: Tensor,
    bank_labels_N: Tensor,
    query_features_MD: Tensor,
    query_labels_M: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.1,
) -> float:
    """Share of the queries, in [0, 1], that a weighted vote of k neighbours labels rightly.

    Wu et al. 2018, https://arxiv.org/abs/1805.01978, section 3.4: a neighbour at cosine
    similarity s votes with exp(s / temperature). A bank smaller than k votes as a whole.
    A bank feature that is not finite is nobody's neighbour, such a query counts as wrong.
    """
    if not len(bank_features_ND) or not len(query_features_MD):
        raise ValueError(
            "kNN needs at least one feature in the bank and one query, "
            f"got {len(bank_features_ND)} and {len(query_features_MD)}"
        )
    device = bank_features_ND.device
    bank_ND, finite_N = _unit_and_finite(bank_features_ND)
    labels_N, answers_M = bank_labels_N.to(device), query_labels_M.to(device)
    classes = int(torch.maximum(labels_N.max(), answers_M.max())) + 1
    k = min(k, len(bank_ND))
    rows = max(1, CHUNK_VALUES // len(bank_ND))
    right = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(query_features_MD), rows):
        part = slice(start, start + rows)
        query_RD, finite_R = _unit_and_finite(query_features_MD[part].to(device))
        similarity_RN = (query_RD @ bank_ND.T).masked_fill_(~finite_N, -math.inf)
        nearest_RK, index_RK = similarity_RN.topk(k, dim=1)
        # weights relative to the nearest: the same vote, and no overflow at low temperatures
        weights_RK = ((nearest_RK - nearest_RK[:, :1]) / temperature).exp()
        votes_RL = torch.zeros(len(query_RD), classes, device=device)
        votes_RL.scatter_add_(1, labels_N[index_RK], weights_RK)
        right += ((votes_RL.argmax(dim=1) == answers_M[part]) & finite_R).sum()
    usable = bool(finite_N.any())
    return int(right) / len(query_features_MD) if usable else 0.0


@torch.no_grad()
def alignment(z0_BD: Tensor, z1_BD: Tensor) -> float:
    """Mean squared distance of the normalised embeddings of two views: 0 (best) to 4.

    Wang and Isola 2020, https://arxiv.org/abs/2005.10242, with alpha = 2.
    """
    difference_BD = normalize(_precise(z0_BD), dim=1) - normalize(_precise(z1_BD), dim=1)
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
    z_BD = normalize(_precise(z_BD), dim=1)
    rows = max(1, CHUNK_VALUES // count)
    sums = []
    for start in range(0, count, rows):
        chunk_RD = z_BD[start : start + rows]
        squared_RB = (2 - 2 * (chunk_RD @ z_BD.T)).clamp_(min=0)
        squared_RB.diagonal(start).fill_(math.inf)  # an embedding is no pair with itself
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
    features_ND = _precise(features_ND)
    if not bool(features_ND.isfinite().all()):
        return math.nan
    largest = float(features_ND.abs().max()) if features_ND.numel() else 0.0
    if largest == 0:
        return 0.0
    if features_ND.shape[0] < features_ND.shape[1]:
        features_ND = features_ND.T
    width = features_ND.shape[1]
    gram_DD = torch.zeros(width, width, dtype=torch.float64, device=features_ND.device)
    rows = max(1, CHUNK_VALUES // width)
    for start in range(0, len(features_ND), rows):
        scaled_RD = (
            features_ND[start : start + rows].double() / largest
        )  # the rank has no scale, squares have limits
        gram_DD.addmm_(scaled_RD.T, scaled_RD)
    singular_D = torch.linalg.eigvalsh(gram_DD).clamp(min=0).sqrt()
    share_D = singular_D / singular_D.sum() + RANKME_EPSILON
    return float(torch.exp(-(share_D * share_D.log()).sum()))


@torch.no_grad()
def feature_std(features_ND: Tensor) -> float:
    """Standard deviation of the normalised features, mean over dimensions, times sqrt(D).

    Chen and He 2021 (SimSiam), https://arxiv.org/abs/2011.10566, figure 2: near 1 where
    features spread over the sphere, 0 where they have collapsed to one point.
    """
    unit_ND = normalize(_precise(features_ND), dim=1)
    std_D = unit_ND.std(dim=0, correction=0)
    return float(std_D.double().mean()) * math.sqrt(features_ND.shape[1])


def _unit_and_finite(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised features with rows of zeros where one is not finite, and which are finite."""
    features_ND = _precise(features_ND)
    finite_N = features_ND.isfinite().all(dim=1)
    return normalize(features_ND.masked_fill(~finite_N[:, None], 0), dim=1), finite_N


def _precise(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()
