"""Row numbers of the train, validation and test splits: seeded, stratified, the same anywhere.

What every recorded result was measured on follows from these functions, so their numbers are
pinned by tests. Leaves out images; a label of -1 is an unknown one.

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

VAL_FRACTION, VAL_MIN, VAL_MAX = 0.1, 300, 5_000
"""The validation split's share of train, and its bounds in images.

At 300 images and an accuracy of 85 % the standard error is 2.1 points, at 5,000 it is 0.5."""

TEST_FRACTION = 0.2


def class_quotas(counts_C: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Share `total` among classes in proportion to `counts_C`, by largest remainder.

    Each share differs from the exact proportion by less than 1 and never exceeds its count.
    Integer arithmetic, and ties go to the lower class: no platform rounds otherwise.
    """
    available = int(counts_C.sum())
    assert 0 <= total <= available, f"{total} of {available}"
    if total == 0:
        return np.zeros_like(counts_C)
    quotas_C = counts_C * total // available
    remainder_C = counts_C * total % available
    largest = np.argsort(-remainder_C, kind="stable")[: total - int(quotas_C.sum())]
    quotas_C[largest] += 1
    return quotas_C


def stratified_pick(
    labels: NDArray[np.int64], total: int, seed: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pick `total` of the rows, every class in proportion; returns (picked, rest) row numbers.

    Both come in random order. Only `Generator.random` is drawn, whose stream numpy keeps.
    """
    keys_N = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))).random(len(labels))
    by_class_N = np.lexsort((keys_N, labels))  # class by class, at random within each
    _, starts_C, counts_C = np.unique(labels[by_class_N], return_index=True, return_counts=True)
    rank_N = np.arange(len(labels)) - np.repeat(starts_C, counts_C)
    chosen_N = rank_N < np.repeat(class_quotas(counts_C, total), counts_C)
    picked, rest = by_class_N[chosen_N], by_class_N[~chosen_N]
    return picked[np.argsort(keys_N[picked])], rest[np.argsort(keys_N[rest])]


def split_indices(
    labels: NDArray[np.int64],
    *,
    test_N: NDArray[np.bool_] | None = None,
    split_seed: int = 0,
    train_limit: int | None = None,
    val_limit: int | None = None,
    test_limit: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Split N labels -> row numbers of (train, val, test), disjoint and each in random order.

    `test_N` marks rows that are the test split; without it, 20 % of each class are taken. `val`
    is 10 % of the rest, at least 300 and at most 5,000 rows, but at most half. Rows of unknown
    label go to `train`; where all are unknown, `val` is taken from them and `test` is not. Limits
    cut the splits afterwards; every step keeps the classes' proportions.
    """
    rows = np.arange(len(labels))
    known_N = labels >= 0
    measured_N = known_N if known_N.any() else ~known_N
    if test_N is None:
        test_N = np.zeros(len(labels), bool)
        pool = rows[measured_N]
        total = round_half_up(len(pool), TEST_FRACTION) if known_N.any() else 0
        picked, left = stratified_pick(labels[pool], total, [split_seed])
        test, rest = pool[picked], pool[left]
        test_N[test] = True
    else:
        test, rest = rows[test_N], rows[~test_N & measured_N]
        test = test[stratified_pick(labels[test], 0, [split_seed])[1]]
    val_total = min(max(round_half_up(len(rest), VAL_FRACTION), VAL_MIN), VAL_MAX, len(rest) // 2)
    val_rows, train_rows = stratified_pick(labels[rest], val_total, [split_seed, 1])
    train, val = rest[train_rows], rest[val_rows]
    unknown = rows[~test_N & ~measured_N]
    if len(unknown):
        train = np.concatenate([train, unknown])
        train = train[stratified_pick(labels[train], 0, [split_seed, 4])[1]]
    train = limited(train, labels, train_limit, [split_seed, 2])
    val = limited(val, labels, val_limit, [split_seed, 3])
    test = limited(test, labels, test_limit, [split_seed, 5])
    return train, val, test


def limited(
    rows: NDArray[np.int64], labels: NDArray[np.int64], limit: int | None, seed: Sequence[int]
) -> NDArray[np.int64]:
    """At most `limit` of the rows, every class in proportion; all of them, in their order, if None.

    `labels` [N] are those of all images, which the rows number.
    """
    if limit is None or limit >= len(rows):
        return rows
    return rows[stratified_pick(labels[rows], limit, seed)[0]]


def round_half_up(count: int, fraction: float) -> int:
    """`count` times a fraction given in whole per cent, rounded in integers."""
    return (count * round(100 * fraction) + 50) // 100
