"""A linear classifier on frozen features: how much of the labels they hold, read off linearly.

Multinomial logistic regression, for weights W, biases b and standardised features x:

    mean over the bank of -log softmax(x W + b)[label]  +  l2 / 2 * |W|^2

or, where all classes are to count alike, the mean with a weight for each image. It is convex, so
that its minimum is a property of the features: no learning rate, no epochs, no seed, unlike the
SGD of most published linear evaluations (Chen et al. 2020, https://arxiv.org/abs/2002.05709,
section B.6, gives L-BFGS on the full set as the other protocol, after Kornblith et al. 2019,
https://arxiv.org/abs/1805.08974). Where encoders are measured the penalty is fixed, neither tuned
on the images that are judged nor on any others: on CIFAR-10 and on digits, trained or not, a tenth
and ten times of it change the accuracy by about a point at most, in either direction.

L-BFGS (Liu and Nocedal 1989) runs in coordinates in which the Hessian is bounded by the identity
(Boehning 1992, "Multinomial logistic regression algorithm": Hessian <= X^T X / 2N for each
class, or X^T diag(w) X / 2N with weights w). Features of an encoder are so correlated that on
CIFAR-10 it needs some 30 iterations there and some 200 in the plain ones.

Left out: augmenting the bank, and fine-tuning.

Shapes: N features of the bank, M queries, D width, L classes in the bank, R rows of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from trainer.evaluate import (
    NO_LABEL,
    check_answers,
    check_bank,
    chunks,
    gram,
    precise,
    share_right,
)

PENALTY = 1e-3
TOLERANCE = 3e-6  # of the largest gradient: the minimum to 1e-3 of its value, usually 1e-6
ITERATIONS = 300
HISTORY = 20
NEVER = 100.0
"""By so much a class without images lies below all others: exp(-100) of their share."""


def linear_top1(
    bank_features_ND: Tensor,
    bank_labels_N: Tensor,
    query_features_MD: Tensor,
    query_labels_M: Tensor,
    *,
    l2: float = PENALTY,
) -> float:
    """Share of the queries, in [0, 1], whose label is that of `linear_predictions`."""
    check_answers(query_features_MD, query_labels_M)
    predicted_M = linear_predictions(bank_features_ND, bank_labels_N, query_features_MD, l2=l2)
    return share_right(predicted_M, query_labels_M)


@torch.no_grad()
def linear_predictions(
    bank_features_ND: Tensor,
    bank_labels_N: Tensor,
    query_features_MD: Tensor,
    *,
    l2: float = PENALTY,
) -> Tensor:
    """Label [M] of each query by logistic regression on the bank; NO_LABEL where not finite.

    Features are standardised by mean and deviation of the bank. `l2` is above 0. Classes that
    the bank lacks are never predicted, a bank feature that is not finite is left out. The same
    input gives the same answer.
    """
    check_bank(bank_features_ND, bank_labels_N)
    finite_N = bank_features_ND.isfinite().all(dim=1)
    predicted_M = torch.full((len(query_features_MD),), NO_LABEL, device=bank_features_ND.device)
    if not bool(finite_N.any()):
        return predicted_M
    bank_ND = precise(bank_features_ND[finite_N])
    labels_N = bank_labels_N.to(bank_ND.device)[finite_N]
    classes_L, target_N = torch.unique(labels_N, return_inverse=True)
    scaling = _Scaling.of(bank_ND)
    weight_DL, bias_L = fit(scaling.apply(bank_ND), target_N, len(classes_L), l2)
    for part in chunks(len(query_features_MD), max(bank_ND.shape[1], len(classes_L))):
        query_RD = query_features_MD[part].to(bank_ND.device)
        finite_R = query_RD.isfinite().all(dim=1)
        logits_RL = scaling.apply(query_RD.to(bank_ND.dtype)) @ weight_DL + bias_L
        predicted_R = classes_L[logits_RL.argmax(dim=1)]
        predicted_M[part] = predicted_R.where(finite_R, NO_LABEL)
    return predicted_M


@torch.no_grad()
def linear_classifier(
    features_ND: Tensor,
    labels_N: Tensor,
    classes: int,
    *,
    l2: float = PENALTY,
    class_weights_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same regression as weights [C, D] and biases [C] for features as they are.

    `classes` is C. Those that no label names get a bias that never wins. `class_weights_C` say
    how much an image of each class counts. A feature that is not finite is a ValueError.
    """
    check_bank(features_ND, labels_N)
    if not bool(features_ND.isfinite().all()):
        raise ValueError("features must be finite; the encoder has diverged")
    bank_ND = precise(features_ND)
    labels_N = labels_N.to(bank_ND.device)
    present_L, target_N = torch.unique(labels_N, return_inverse=True)
    weights_N = None if class_weights_C is None else class_weights_C.to(bank_ND)[labels_N]
    scaling = _Scaling.of(bank_ND)
    weight_DL, bias_L = fit(scaling.apply(bank_ND), target_N, len(present_L), l2, weights_N)
    raw_DL = weight_DL.double() / (scaling.scale_D * scaling.largest_D).double()[:, None]
    raw_L = bias_L.double() - (scaling.mean_D / scaling.scale_D).double() @ weight_DL.double()
    weight_CD = raw_DL.new_zeros(classes, bank_ND.shape[1])
    bias_C = raw_L.new_full((classes,), float(raw_L.min()) - NEVER)
    weight_CD[present_L], bias_C[present_L] = raw_DL.T, raw_L
    return weight_CD.to(bank_ND.dtype), bias_C.to(bank_ND.dtype)


class _Scaling(NamedTuple):
    """Standardises features by mean and deviation of a bank, first scaled to avoid overflow."""

    largest_D: Tensor
    mean_D: Tensor
    scale_D: Tensor

    @staticmethod
    def of(bank_ND: Tensor) -> _Scaling:
        largest_D = bank_ND.abs().amax(dim=0).clamp(min=torch.finfo(bank_ND.dtype).tiny)
        std_D, mean_D = torch.std_mean(bank_ND / largest_D, dim=0, correction=0)
        # What does not vary cannot tell: divided by its rounding errors it would.
        return _Scaling(largest_D, mean_D, torch.where(std_D > 1e-6, std_D, 1.0))

    def apply(self, features_RD: Tensor) -> Tensor:
        return (features_RD / self.largest_D).sub_(self.mean_D).div_(self.scale_D)


@torch.no_grad()
def fit(
    features_ND: Tensor,
    target_N: Tensor,
    classes: int,
    l2: float,
    sample_weights_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Minimise the loss above: weights [D, L] and biases [L] of `classes` 0 to L - 1.

    `sample_weights_N` are how much each image counts, 1 on average; None: all alike.
    A ValueError if `l2` is not above 0: the minimum of separable classes is then at infinity.
    """
    if not l2 > 0:
        raise ValueError(f"l2 must be above 0, got {l2}")
    count, width = features_ND.shape
    # W = P V, with P P^T the inverse of the bound on the Hessian
    weighted_ND = features_ND
    if sample_weights_N is not None:
        weighted_ND = features_ND * sample_weights_N.sqrt()[:, None]
    bound_DD = gram(weighted_ND) / (2 * count)
    del weighted_ND
    bound_DD.diagonal().add_(l2)
    factor_DD = torch.linalg.cholesky(bound_DD)
    identity_DD = torch.eye(width, dtype=factor_DD.dtype, device=factor_DD.device)
    p_DD = torch.linalg.solve_triangular(factor_DD.mT, identity_DD, upper=True)
    p_DD = p_DD.to(features_ND.dtype)
    point = features_ND.new_zeros(width + 1, classes)  # V above the biases

    def loss() -> Tensor:
        weight_DL, bias_L = p_DD @ point[:-1], point[-1]
        value: Tensor = l2 / 2 * weight_DL.double().square().sum()
        weight_gradient_DL, bias_gradient_L = l2 * weight_DL, torch.zeros_like(bias_L)
        for part in chunks(count, classes):
            features_RD, target_R1 = features_ND[part], target_N[part, None]
            log_share_RL = log_softmax(torch.addmm(bias_L, features_RD, weight_DL), dim=1)
            right_R1 = log_share_RL.gather(1, target_R1)
            weights_R1 = None if sample_weights_N is None else sample_weights_N[part, None]
            if weights_R1 is not None:
                right_R1 = right_R1 * weights_R1
            value -= right_R1.sum(dtype=torch.float64) / count
            error_RL = log_share_RL.exp_().scatter_add_(
                1, target_R1, torch.full_like(target_R1, -1, dtype=point.dtype)
            )
            if weights_R1 is not None:
                error_RL.mul_(weights_R1)
            weight_gradient_DL.addmm_(features_RD.T, error_RL, alpha=1 / count)
            bias_gradient_L += error_RL.sum(dim=0) / count
        point.grad = torch.cat([p_DD.T @ weight_gradient_DL, bias_gradient_L[None]])
        return value

    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(loss)  # type: ignore[no-untyped-call, arg-type, unused-ignore]
    weight_DL: Tensor = p_DD @ point[:-1]
    return weight_DL, point[-1]
