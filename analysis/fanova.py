"""Shares of single parameters in an objective, fast enough to be computed hundreds of times.

fANOVA: Hutter, Hoos, Leyton-Brown 2014, http://proceedings.mlr.press/v32/hutter14.pdf. A forest
predicts the objective; a parameter's share is the variance of its marginal, the forest's mean
over all other parameters, which for a tree is an exact sum over its leaves' boxes.
PED-ANOVA: Watanabe, Bansal, Hutter 2023, https://arxiv.org/abs/2304.10255. The Pearson divergence
between where the best tenth lies and where all lie, each a Parzen estimate on a grid.

Both agree with Optuna's evaluators where those measure the same (tests compare them). They are
not Optuna's because its fANOVA takes quadratic time (17 s of two cores for 400 trials and 8
parameters), measures log ranges linearly and a choice as a cube of its levels, and because its
PED-ANOVA spends its time on trial objects. Left out: interactions.

N trials, D parameters, L leaves of all trees together, G cells of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from analysis.scales import Floats

Counts = NDArray[np.int64]

TARGET_QUANTILE = 0.1
"""Of PED-ANOVA: what tells the best tenth from the rest."""
GRID = 50
"""Cells of PED-ANOVA's grid over a continuous range, as in Optuna."""


def fanova_variances(
    units_ND: Floats, values_N: Floats, counts_N: Counts, *, trees: int, seed: int
) -> Floats | None:
    """Each parameter's share of the variance of a forest, [D]; None where no tree varies.

    `units_ND` are settings in [0, 1] of their ranges; `counts_N` says how often a trial counts.
    """
    from sklearn.tree import DecisionTreeRegressor

    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(len(values_N)), counts_N)
    units32_ND = units_ND.astype(np.float32)
    grown: list[Any] = []
    for _ in range(trees):
        bag_N = np.bincount(rng.choice(rows, len(rows)), minlength=len(values_N)).astype(float)
        kept = np.flatnonzero(bag_N)
        model = DecisionTreeRegressor(random_state=int(rng.integers(2**31)))
        model.fit(units32_ND[kept], values_N[kept], bag_N[kept], check_input=False)
        if model.tree_.node_count > 1:
            grown.append(model.tree_)
    return forest_variances(grown, units_ND.shape[1])


def forest_variances(trees: Sequence[Any], width: int) -> Floats | None:
    """The same of a grown forest, scikit-learn's trees over [0, 1] in each of `width` columns."""
    if not trees:
        return None
    low_LD, high_LD, value_L, tree_L = _leaves(trees, width)
    volume_L = (high_LD - low_LD).prod(axis=1)
    mean_T = np.bincount(tree_L, volume_L * value_L)
    centred_L = value_L - mean_T[tree_L]
    total_T = np.bincount(tree_L, volume_L * centred_L**2)
    varied = total_T > 0
    if not varied.any():
        return None
    shares = []
    for d in range(width):
        variance_T = _marginal_variance(
            low_LD[:, d], high_LD[:, d], centred_L * volume_L, tree_L, len(trees)
        )
        shares.append((variance_T[varied] / total_T[varied]).mean())
    return np.array(shares)


def _leaves(trees: Sequence[Any], width: int) -> tuple[Floats, Floats, Floats, NDArray[np.int64]]:
    """Boxes (low and high, [L, D]), values [L] and tree [L] of all leaves."""
    starts = np.cumsum([0, *(tree.node_count for tree in trees)])
    feature = np.concatenate([tree.feature for tree in trees])
    threshold = np.concatenate([tree.threshold for tree in trees])
    offset = np.repeat(starts[:-1], np.diff(starts))
    left = np.concatenate([tree.children_left for tree in trees]) + offset
    right = np.concatenate([tree.children_right for tree in trees]) + offset
    value = np.concatenate([tree.value[:, 0, 0] for tree in trees])
    owner = np.repeat(np.arange(len(trees)), np.diff(starts))
    low, high = np.zeros((starts[-1], width)), np.ones((starts[-1], width))
    level = starts[:-1]
    while len(level):  # all trees at once, one depth after the other
        level = level[feature[level] >= 0]
        a, b, f, t = left[level], right[level], feature[level], threshold[level]
        low[a], high[a] = low[level], high[level]
        low[b], high[b] = low[level], high[level]
        high[a, f] = t
        low[b, f] = t
        level = np.concatenate([a, b])
    leaf = np.flatnonzero(feature < 0)
    return low[leaf], high[leaf], value[leaf], owner[leaf]


def _marginal_variance(
    low_L: Floats, high_L: Floats, weighted_L: Floats, tree_L: NDArray[np.int64], trees: int
) -> Floats:
    """Variance of each tree's marginal over one parameter, [T].

    The marginal is a step function: each leaf adds its value times the volume of its other
    sides from where its box begins to where it ends.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        height_L = np.where(high_L > low_L, weighted_L / (high_L - low_L), 0.0)
    place = np.concatenate([low_L, high_L]) + 2.0 * np.tile(tree_L, 2)  # trees side by side
    step = np.concatenate([height_L, -height_L])
    order = np.argsort(place, kind="stable")
    place, height = place[order], np.cumsum(step[order])
    # between two trees the height is zero, so that the gap adds nothing
    area = height[:-1] ** 2 * np.diff(place)
    tree = (place[:-1] // 2.0).astype(np.int64)
    return np.asarray(np.bincount(tree, area, minlength=trees)[:trees], dtype=float)


def cells(units_N: Floats, size: int) -> NDArray[np.int64]:
    """The cell of a grid in which each setting in [0, 1] lies, -1 where it is missing."""
    place = np.where(np.isnan(units_N), 0.0, units_N)
    found = np.clip(np.ceil(place * (size - 1) - 0.5), 0, size - 1).astype(np.int64)
    return np.where(np.isnan(units_N), -1, found)


def ped_anova_divergence(
    cells_N: NDArray[np.int64],
    size: int,
    is_choice: bool,
    counts_N: Counts,
    best_N: NDArray[np.bool_],
) -> float:
    """How far the best trials' settings lie from all trials' settings, >= 0.

    Trials without the parameter are a regime of their own (condPED-ANOVA,
    https://arxiv.org/abs/2601.20800): what is left is weighted by its shares of the best and of
    all trials.
    """
    has = cells_N >= 0
    all_G: Any = np.bincount(cells_N[has], counts_N[has], minlength=size)
    top_G: Any = np.bincount(cells_N[has & best_N], counts_N[has & best_N], minlength=size)
    if size < 2 or all_G.sum() < 2 or top_G.sum() < 1:
        return 0.0
    density_top = _parzen(top_G, is_choice) + 1e-12
    density_all = _parzen(all_G, is_choice) + 1e-12
    divergence = float(density_all @ (density_top / density_all - 1) ** 2)
    of_best = top_G.sum() / counts_N[best_N].sum()
    of_all = all_G.sum() / counts_N.sum()
    return float(of_best**2 / of_all) * divergence


def _parzen(counts_G: Floats, is_choice: bool) -> Floats:
    """Optuna's Parzen estimate over a grid: one kernel an occupied cell and one for the prior."""
    size = len(counts_G)
    occupied = np.flatnonzero(counts_G)
    weights = np.append(counts_G[occupied], 1.0)
    weights /= weights.sum()
    if is_choice:
        kernels = np.full((len(weights), size), 1.0 / len(weights))
        kernels[np.arange(len(occupied)), occupied] += 1.0
        return np.asarray(weights @ (kernels / kernels.sum(axis=1, keepdims=True)))
    counts = counts_G[occupied]
    total, running = counts.sum(), np.cumsum(counts)
    mean = occupied @ counts / total
    spread = math.sqrt((occupied - mean) ** 2 @ counts / max(1.0, total - 1))
    first = np.searchsorted(running, total // 4, side="left")
    third = np.searchsorted(running, total * 3 // 4, side="right")
    quartiles = occupied[min(len(occupied) - 1, third)] - occupied[first]
    sigma = max(1.059 * min(quartiles / 1.34, spread) * total**-0.2, 0.5 / 1.64)
    centres = np.append(occupied, (size - 1) / 2.0)
    sigmas = np.append(np.full(len(occupied), sigma), float(size))
    edges = np.arange(size + 1) - 0.5
    mass = np.diff(ndtr((edges[None, :] - centres[:, None]) / sigmas[:, None]), axis=1)
    return np.asarray(weights @ (mass / mass.sum(axis=1, keepdims=True)))
