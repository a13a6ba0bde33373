"""Losses that compare pairs of embeddings: each pulls positives together, pushes negatives apart.

Each is a pure function of the two views' embeddings z0_BD and z1_BD (rows of one index are two
views of one image) and of its own parameters, normalises the embeddings to unit length itself,
and returns a scalar. All matrices of pairs are made a chunk of rows at a time (row_chunks.py).
Distances are Euclidean, of unit vectors: 0 to 2. An embedding of zeros has no direction, and
counts as orthogonal to every other.

Left out: gathering embeddings of several devices, and mining of hard pairs.

Shapes: B images of a batch, N = 2B embeddings (all of view 0, then all of view 1), Q keys of a
queue, D width of an embedding, R rows of a chunk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from trainer.loss_inputs import check_views, in_float32
from trainer.row_chunks import row_chunks, sum_over_rows

# Below this squared distance of two unit vectors float32 holds rounding errors only (2 - 2 cos
# cancels), and the gradient of the square root would magnify them.
LEAST_SQUARED_DISTANCE = 1e-7


@in_float32
def nt_xent(z0_BD: Tensor, z1_BD: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy of SimCLR.

    Chen et al. 2020, https://arxiv.org/abs/2002.05709, equation 1: with s the cosine similarity
    and j the other view of i, the mean over all N embeddings i of

        -log( exp(s_ij / temperature) / sum over k != i of exp(s_ik / temperature) )

    Identical embeddings give log(N - 1), which is therefore what collapse looks like.
    """
    check_views(z0_BD, z1_BD)
    z_ND = normalize(torch.cat([z0_BD, z1_BD]), dim=1)

    def term(start: int, rows_RD: Tensor, all_ND: Tensor) -> tuple[Tensor]:
        logit_RN = (rows_RD / temperature) @ all_ND.T
        self_R, partner_R = _own_columns(start, logit_RN)
        _exclude(logit_RN, self_R)
        return (cross_entropy(logit_RN, partner_R, reduction="sum"),)

    (total,) = sum_over_rows(term, [z_ND], [z_ND])
    return total / len(z_ND)


@in_float32
def info_nce(
    q0_BD: Tensor,
    q1_BD: Tensor,
    k0_BD: Tensor,
    k1_BD: Tensor,
    queue_QD: Tensor | None,
    temperature: float,
) -> Tensor:
    """InfoNCE of MoCo: queries against keys of a momentum encoder, over both views.

    He et al. 2020, https://arxiv.org/abs/1911.05722, equation 1: with k+ the key of the image's
    other view, the mean over all N queries q of

        -log( exp(q.k+ / temperature) / sum over k of exp(q.k / temperature) )

    where k runs over the other view's keys of the whole batch, k+ among them, and the queue.
    MoCo v1 and v2 have the queue's negatives only, MoCo v3 (Chen et al. 2021,
    https://arxiv.org/abs/2104.02057) the batch's only: with both, a queue that is still empty
    needs no case of its own. The papers take one direction, or 2 x temperature times the sum of
    both; here it is the mean. Queries and keys are normalised here, the queue's keys are expected
    to be; neither keys nor queue get a gradient.
    """
    check_views(q0_BD, q1_BD)
    check_views(q0_BD, k0_BD)
    check_views(k0_BD, k1_BD)
    queue_QD = k0_BD.new_empty(0, k0_BD.shape[1]) if queue_QD is None else queue_QD
    if queue_QD.ndim != 2 or queue_QD.shape[1] != k0_BD.shape[1]:
        raise ValueError(
            f"the queue's keys must be [Q, {k0_BD.shape[1]}], as wide as the embeddings, "
            f"got {tuple(queue_QD.shape)}"
        )

    def term(start: int, query_RD: Tensor, keys_MD: Tensor) -> tuple[Tensor]:
        logit_RM = (query_RD / temperature) @ keys_MD.T
        right_R = torch.arange(start, start + len(query_RD), device=query_RD.device)
        return (cross_entropy(logit_RM, right_R, reduction="sum"),)

    def one_way(query_BD: Tensor, key_BD: Tensor) -> Tensor:
        keys_MD = torch.cat([normalize(key_BD, dim=1), queue_QD]).detach()
        (total,) = sum_over_rows(term, [normalize(query_BD, dim=1)], [keys_MD])
        return total

    return (one_way(q0_BD, k1_BD) + one_way(q1_BD, k0_BD)) / (2 * len(q0_BD))


@in_float32
def margin_contrastive(
    z0_BD: Tensor, z1_BD: Tensor, margin: float, *, squared: bool = False
) -> Tensor:
    """Contrastive loss with a margin, in one of two forms. With d the distance of a pair:

    - Unsquared, as pytorch-metric-learning made it common: the sum of two means

          mean of d over the positive pairs + mean of max(0, margin - d) over the negative pairs

      each over its terms above zero only (0 where there are none), so that the many negatives
      that are already far enough do not dilute the others.
    - `squared`, the original's, Hadsell et al. 2006, https://ieeexplore.ieee.org/document/1640964,
      equation 4: d^2 / 2 and max(0, margin - d)^2 / 2, each a plain mean over all its pairs (the
      paper sums the pairs it is given, and does not normalise).
    """
    check_views(z0_BD, z1_BD)
    z0_BD, z1_BD = normalize(z0_BD, dim=1), normalize(z1_BD, dim=1)
    z_ND = torch.cat([z0_BD, z1_BD])
    positive_B: Tensor = (z0_BD - z1_BD).norm(dim=1)  # by the difference, which does not cancel

    def term(start: int, rows_RD: Tensor, all_ND: Tensor) -> tuple[Tensor, Tensor]:
        short_RN = (margin - _distances_to_other_images(start, rows_RD, all_ND)).relu()
        above_zero = (short_RN > 0).sum()
        return ((short_RN.square() / 2) if squared else short_RN).sum(), above_zero

    total, above_zero = sum_over_rows(term, [z_ND], [z_ND])
    if squared:
        pairs = max(1, len(z_ND) * (len(z_ND) - 2))
        return positive_B.square().mean() / 2 + total / pairs
    apart = (positive_B > 0).sum()
    return positive_B.sum() / apart.clamp(min=1) + total / above_zero.clamp(min=1)


@in_float32
def triplet(z0_BD: Tensor, z1_BD: Tensor, margin: float) -> Tensor:
    """Triplet loss over all triplets of a batch.

    Schroff et al. 2015, https://arxiv.org/abs/1503.03832, equation 1, with distances unsquared as
    in pytorch-metric-learning: each embedding is an anchor a, its other view the positive p, each
    embedding of another image a negative n, and the loss is the mean of

        max(0, d_ap - d_an + margin)

    over those above zero (0 where there are none). Collapse gives `margin`.
    """
    check_views(z0_BD, z1_BD)
    z0_BD, z1_BD = normalize(z0_BD, dim=1), normalize(z1_BD, dim=1)
    z_ND = torch.cat([z0_BD, z1_BD])
    positive_N = (z0_BD - z1_BD).norm(dim=1).repeat(2)

    def term(
        start: int, rows_RD: Tensor, positive_R: Tensor, all_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        negative_RN = _distances_to_other_images(start, rows_RD, all_ND)
        violation_RN = (positive_R[:, None] + margin - negative_RN).relu()
        return violation_RN.sum(), (violation_RN > 0).sum()

    total, above_zero = sum_over_rows(term, [z_ND, positive_N], [z_ND])
    return total / above_zero.clamp(min=1)


@in_float32
def dcl(z0_BD: Tensor, z1_BD: Tensor, temperature: float, weight_B: Tensor | None = None) -> Tensor:
    """Decoupled contrastive loss: NT-Xent without the positive in the denominator.

    Yeh et al. 2022, https://arxiv.org/abs/2110.06848, equation 6: with s the cosine similarity and
    j the other view of i, the mean over all N embeddings i of

        -w_i s_ij / temperature + log( sum over k, neither i nor j, of exp(s_ik / temperature) )

    `weight_B` weighs the images' positives (none: 1). Unlike NT-Xent it may be negative. At
    least two images, since one has no negatives.
    """
    check_views(z0_BD, z1_BD, least=2)
    z0_BD, z1_BD = normalize(z0_BD, dim=1), normalize(z1_BD, dim=1)
    z_ND = torch.cat([z0_BD, z1_BD])
    positive_B = (z0_BD * z1_BD).sum(dim=1) / temperature
    if weight_B is not None:
        positive_B = positive_B * weight_B

    def term(start: int, rows_RD: Tensor, positive_R: Tensor, all_ND: Tensor) -> tuple[Tensor]:
        logit_RN = (rows_RD / temperature) @ all_ND.T
        _exclude(logit_RN, *_own_columns(start, logit_RN))
        return ((logit_RN.logsumexp(dim=1) - positive_R).sum(),)

    (total,) = sum_over_rows(term, [z_ND, positive_B.repeat(2)], [z_ND])
    return total / len(z_ND)


@in_float32
def dclw(z0_BD: Tensor, z1_BD: Tensor, temperature: float, sigma: float) -> Tensor:
    """Decoupled contrastive loss that weighs hard positives more.

    Yeh et al. 2022, https://arxiv.org/abs/2110.06848, section 3.2: `dcl` with the negative von
    Mises-Fisher weight of image i, with s_i the cosine similarity of its two views,

        w_i = 2 - exp(s_i / sigma) / (mean over images b of exp(s_b / sigma))

    which is below 2, 1 in the mean, and a constant to the gradient.
    """
    check_views(z0_BD, z1_BD, least=2)
    with torch.no_grad():
        similarity_B = (normalize(z0_BD, dim=1) * normalize(z1_BD, dim=1)).sum(dim=1)
        weight_B = 2 - len(z0_BD) * (similarity_B / sigma).softmax(dim=0)
    return dcl(z0_BD, z1_BD, temperature, weight_B)


@in_float32
def sigmoid(z0_BD: Tensor, z1_BD: Tensor, temperature: float, bias: float) -> Tensor:
    """Pairwise sigmoid loss of SigLIP: each pair of the two views is a yes-or-no question.

    Zhai et al. 2023, https://arxiv.org/abs/2303.15343, equation 1: with s_ij the cosine similarity
    of view 0 of image i and view 1 of image j, and y_ij = 1 if i = j and -1 if not,

        -1/B  sum over i, j of  log sigmoid( y_ij (s_ij / temperature + bias) )

    Two views of images stand in for the paper's image and text, so that negatives are of the
    other view only. The paper learns both parameters, from temperature 0.1 and bias -10; here
    they are fixed. With a bias of -1 / temperature a pair is an even question where its
    similarity is 1, as at the paper's start; far below that negatives hardly count.
    """
    check_views(z0_BD, z1_BD)

    def term(start: int, rows_RD: Tensor, others_BD: Tensor) -> tuple[Tensor]:
        logit_RB = (rows_RD / temperature) @ others_BD.T + bias
        row_R = torch.arange(start, start + len(rows_RD), device=rows_RD.device)
        same_RB = row_R[:, None] == torch.arange(len(others_BD), device=rows_RD.device)
        return (-logsigmoid(torch.where(same_RB, logit_RB, -logit_RB)).sum(),)

    (total,) = sum_over_rows(term, [normalize(z0_BD, dim=1)], [normalize(z1_BD, dim=1)])
    return total / len(z0_BD)


@in_float32
def sup_con(z0_BD: Tensor, z1_BD: Tensor, labels_B: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss: NT-Xent whose positives are all embeddings of one class.

    Khosla et al. 2020, https://arxiv.org/abs/2004.11362, equation 2 (L_out), over N: with P(i) the
    other embeddings of i's class, its own second view among them, the mean over i of

        -1/|P(i)|  sum over p in P(i) of  log( exp(s_ip / T) / sum over k != i of exp(s_ik / T) )

    `labels_B` are int64 class numbers; images of one number are one class, whatever it is. With a
    class for each image it is NT-Xent.
    """
    check_views(z0_BD, z1_BD)
    if labels_B.shape != z0_BD.shape[:1]:
        raise ValueError(
            f"sup_con needs one label an image, {len(z0_BD)}, got a shape of "
            f"{tuple(labels_B.shape)}"
        )
    z_ND = normalize(torch.cat([z0_BD, z1_BD]), dim=1)
    label_N = labels_B.to(z_ND.device).repeat(2)

    def term(
        start: int, rows_RD: Tensor, label_R: Tensor, all_ND: Tensor, label_N: Tensor
    ) -> tuple[Tensor]:
        logit_RN = (rows_RD / temperature) @ all_ND.T
        self_R, _ = _own_columns(start, logit_RN)
        _exclude(logit_RN, self_R)
        positive_RN = label_R[:, None] == label_N
        count_R = positive_RN.sum(dim=1) - 1  # the other view is always one
        positive_RN.scatter_(1, self_R[:, None], False)
        mean_R = logit_RN.masked_fill(~positive_RN, 0).sum(dim=1) / count_R
        return ((logit_RN.logsumexp(dim=1) - mean_R).sum(),)

    (total,) = sum_over_rows(term, [z_ND, label_N], [z_ND, label_N])
    return total / len(z_ND)


@in_float32
def align_uniform(
    z0_BD: Tensor, z1_BD: Tensor, alpha: float, t: float, uniform_weight: float
) -> Tensor:
    """Alignment and uniformity on the unit sphere.

    Wang & Isola 2020, https://arxiv.org/abs/2005.10242, equations 4 and 5: with x_i and y_i the
    two views of image i, the sum of

        mean over i of |x_i - y_i|^alpha
        + uniform_weight times the mean over both views of log(mean over i != j of exp(-t d_ij^2))

    where d_ij compares embeddings of one view. Uniformity alone lies in [-4t, 0], 0 at collapse.
    At least two images, since one has no pair.
    """
    check_views(z0_BD, z1_BD, least=2)
    z0_BD, z1_BD = normalize(z0_BD, dim=1), normalize(z1_BD, dim=1)
    # Clamped, since powers below 1 have no gradient at 0.
    squared_B = (z0_BD - z1_BD).square().sum(dim=1).clamp(min=1e-12)
    uniform = (_uniformity(z0_BD, t) + _uniformity(z1_BD, t)) / 2
    return squared_B.pow(alpha / 2).mean() + uniform_weight * uniform


def _uniformity(z_BD: Tensor, t: float) -> Tensor:
    # exp(-t d^2) vanishes in float32 for large t. Relative to the nearest pair the sum is at
    # least 1 and its terms at most, and with d^2 = 2 - 2s the shift comes out again.
    with torch.no_grad():
        nearest = torch.stack(
            [
                _to_others(part.start, z_BD[part], z_BD).max()
                for part in row_chunks(len(z_BD), len(z_BD))
            ]
        ).max()

    def term(start: int, rows_RD: Tensor, all_BD: Tensor) -> tuple[Tensor]:
        return ((2 * t * (_to_others(start, rows_RD, all_BD) - nearest)).exp().sum(),)

    (total,) = sum_over_rows(term, [z_BD], [z_BD])
    return (total / (len(z_BD) * (len(z_BD) - 1))).log() - 2 * t * (1 - nearest)


def _to_others(start: int, rows_RD: Tensor, all_ND: Tensor) -> Tensor:
    """Similarities of unit vectors, [R, N]; minus infinite of a row with itself."""
    similarity_RN = rows_RD @ all_ND.T
    self_R, _ = _own_columns(start, similarity_RN)
    _exclude(similarity_RN, self_R)
    return similarity_RN


def _own_columns(start: int, pairs_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of each row's own embedding and of its other view, [R] each."""
    rows, count = pairs_RN.shape
    self_R = torch.arange(start, start + rows, device=pairs_RN.device)
    return self_R, (self_R + count // 2) % count


@torch.no_grad()  # what is excluded gets a gradient of exactly 0 from each loss here
def _exclude(pairs_RN: Tensor, *columns_R: Tensor) -> None:
    """Set one column a row, for each of `columns_R`, to minus infinity, in place."""
    pairs_RN.scatter_(1, torch.stack(columns_R, dim=1), -math.inf)


def _distances_to_other_images(start: int, rows_RD: Tensor, all_ND: Tensor) -> Tensor:
    """Distances of unit vectors, [R, N]; infinite between embeddings of one image."""
    similarity_RN = rows_RD @ all_ND.T
    _exclude(similarity_RN, *_own_columns(start, similarity_RN))
    return (2 - 2 * similarity_RN).clamp(min=LEAST_SQUARED_DISTANCE).sqrt()
