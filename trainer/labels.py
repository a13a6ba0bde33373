"""Which labels an adaptation may use, and how much each class counts.

The subsets of one seed are nested: what is labelled at 1 % is labelled at 10 % too, so that
fractions differ by what is added and by nothing else. Plain numpy, the same on every machine.

Shapes: N images, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_PURPOSE = 7  # of the seed: the splits of a data set draw by 0 to 6


def labelled_rows(labels_N: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Row numbers, rising, of a stratified share of the labelled images; label -1 is an unknown.

    Of a class with n images they are `fraction` n, rounded half up, and at least one. Which ones
    follows from the seed, and those of a smaller fraction are among them. `fraction` is in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"labels_fraction must be in (0, 1], got {fraction:g}")
    sequence = np.random.SeedSequence([seed, _PURPOSE])
    keys_N = np.random.Generator(np.random.PCG64(sequence)).random(len(labels_N))
    chosen = []
    for label in np.unique(labels_N[labels_N >= 0]):
        rows = np.flatnonzero(labels_N == label)
        count = max(1, int(np.floor(fraction * len(rows) + 0.5 + 1e-9)))  # 0.3 * 5 is below 1.5
        chosen.append(rows[np.argsort(keys_N[rows], kind="stable")][:count])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def balanced_weights(labels_N: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Weights [C] with which all classes that there are count alike, however many images each has.

    N / (present classes x images of the class), as scikit-learn's `class_weight="balanced"` has
    it; their mean over the images is 1. A class without an image has weight 0.
    """
    counts_C = np.bincount(labels_N, minlength=classes).astype(np.float64)
    present = counts_C > 0
    weights_C = np.zeros(classes)
    weights_C[present] = len(labels_N) / (present.sum() * counts_C[present])
    return weights_C
