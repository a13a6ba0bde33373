"""Splits are seeded, stratified, disjoint, and the same numbers on every platform."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.splits import class_quotas, limited, split_indices, stratified_pick

labels_strategy = st.lists(st.integers(1, 60), min_size=1, max_size=8).map(
    lambda counts: np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
)


@given(counts=st.lists(st.integers(0, 10_000), min_size=1, max_size=20), share=st.floats(0, 1))
def test_quotas_sum_to_the_total_and_are_within_one_of_proportion(
    counts: list[int], share: float
) -> None:
    total = int(share * sum(counts))
    quotas = class_quotas(np.array(counts), total)
    assert quotas.sum() == total
    assert (quotas <= counts).all()
    if total:
        assert (np.abs(quotas - np.array(counts) * total / sum(counts)) < 1).all()


def test_quotas_give_what_is_left_to_the_largest_remainders() -> None:
    assert class_quotas(np.array([5, 3, 2]), 4).tolist() == [2, 1, 1]
    assert class_quotas(np.array([1, 1, 1]), 2).tolist() == [1, 1, 0]


@given(
    labels=labels_strategy,
    seed=st.integers(0, 2**63 - 1),
    own_test=st.booleans(),
    train_limit=st.none() | st.integers(1, 200),
    val_limit=st.none() | st.integers(1, 50),
    test_limit=st.none() | st.integers(1, 50),
)
def test_splits_are_disjoint_stratified_deterministic_and_within_limits(
    labels: np.ndarray,
    seed: int,
    own_test: bool,
    train_limit: int | None,
    val_limit: int | None,
    test_limit: int | None,
) -> None:
    total = len(labels)
    test_mask = np.arange(total) % 5 == 0 if own_test else None
    whole = split_indices(labels, test_N=test_mask, split_seed=seed)
    assert sorted(np.concatenate(whole).tolist()) == list(range(total))  # disjoint, and covers
    if test_mask is not None:
        assert sorted(whole[2].tolist()) == np.flatnonzero(test_mask).tolist()

    cut = split_indices(
        labels,
        test_N=test_mask,
        split_seed=seed,
        train_limit=train_limit,
        val_limit=val_limit,
        test_limit=test_limit,
    )
    again = split_indices(
        labels,
        test_N=test_mask,
        split_seed=seed,
        train_limit=train_limit,
        val_limit=val_limit,
        test_limit=test_limit,
    )
    for one, other in zip(cut, again, strict=True):
        assert one.tolist() == other.tolist()
    for part, full, limit in zip(cut, whole, (train_limit, val_limit, test_limit), strict=True):
        assert len(part) == (len(full) if limit is None else min(limit, len(full)))
        assert set(part.tolist()) <= set(full.tolist())

    def assert_proportional(part: np.ndarray, base: np.ndarray) -> None:
        for label in np.unique(labels):
            exact = (labels[base] == label).sum() * len(part) / max(len(base), 1)
            assert abs((labels[part] == label).sum() - exact) < 1

    rest = np.concatenate(whole[:2])
    if not own_test:
        assert_proportional(whole[2], np.arange(total))
    assert_proportional(whole[1], rest)
    assert_proportional(cut[0], whole[0])
    assert_proportional(cut[1], whole[1])
    assert_proportional(cut[2], whole[2])


@pytest.mark.parametrize(
    ("total", "val"),
    [(2, 1), (100, 50), (599, 299), (601, 300), (10_000, 1_000), (80_000, 5_000)],
)
def test_val_is_a_tenth_within_its_bounds_and_at_most_half(total: int, val: int) -> None:
    labels = np.arange(total) % 2
    train, got, test = split_indices(labels, test_N=np.zeros(total, bool))
    assert (len(got), len(test), len(train)) == (val, 0, total - val)


def test_a_prefix_of_a_split_is_a_random_sample() -> None:
    train, _, test = split_indices(np.repeat([0, 1], 5_000))
    for rows in (train, test):
        assert 0.4 < (rows[:500] < 5_000).mean() < 0.6
        assert (np.diff(rows) < 0).mean() > 0.3


def test_rows_of_unknown_label_go_to_train_and_to_nothing_else() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([-1, 0, 1], [3_000, 1_000, 500]))
    test_mask = (labels >= 0) & (np.arange(len(labels)) % 5 == 0)
    for mask in (None, test_mask):
        train, val, test = split_indices(labels, test_N=mask)
        assert sorted(np.concatenate([train, val, test]).tolist()) == list(range(len(labels)))
        assert (labels[val] >= 0).all()
        assert (labels[test] >= 0).all()
        assert len(val) == 300  # of the labelled alone: a tenth would be less
        # Mixed: a prefix holds both kinds in proportion.
        share = (labels[train] < 0).mean()
        assert abs((labels[train[:500]] < 0).mean() - share) < 0.1
        cut, _, _ = split_indices(labels, test_N=mask, train_limit=100)
        assert abs((labels[cut] < 0).sum() - 100 * share) < 1


def test_without_any_label_val_is_a_random_part_and_test_is_only_what_is_held_out() -> None:
    labels = np.full(10_000, -1)
    train, val, test = split_indices(labels)
    assert (len(train), len(val), len(test)) == (9_000, 1_000, 0)
    assert 0.4 < (val < 5_000).mean() < 0.6
    mask = np.arange(len(labels)) >= 9_000
    train, val, test = split_indices(labels, test_N=mask)
    assert (len(train), len(val), len(test)) == (8_100, 900, 1_000)
    assert test.min() == 9_000


@given(labels=labels_strategy, limit=st.none() | st.integers(1, 100))
def test_limited_keeps_proportions_or_everything(labels: np.ndarray, limit: int | None) -> None:
    rows = np.random.default_rng(1).permutation(len(labels))[: len(labels) // 2 + 1]
    kept = limited(rows, labels, limit, [0])
    if limit is None or limit >= len(rows):
        assert kept.tolist() == rows.tolist()
        return
    assert len(kept) == len(set(kept.tolist())) == limit
    assert set(kept.tolist()) <= set(rows.tolist())
    for label in np.unique(labels[rows]):
        exact = (labels[rows] == label).sum() * limit / len(rows)
        assert abs((labels[kept] == label).sum() - exact) < 1


def test_seeds_change_the_split() -> None:
    labels = np.repeat([0, 1], 1_000)
    one, other = (split_indices(labels, split_seed=seed) for seed in (0, 1))
    assert set(one[2].tolist()) != set(other[2].tolist())
    assert set(one[1].tolist()) != set(other[1].tolist())


def test_limits_do_not_move_the_other_splits() -> None:
    labels = np.repeat([0, 1, 2], 1_000)
    whole = split_indices(labels)
    for place, name in enumerate(("train_limit", "val_limit", "test_limit")):
        cut = split_indices(labels, **{name: 100})  # type: ignore[arg-type]
        for other in range(3):
            same = cut[other].tolist() == whole[other].tolist()
            assert same == (other != place)


def test_the_split_is_the_same_on_every_platform() -> None:
    """Pinned: a change of these numbers changes what every recorded run was measured on."""
    picked, rest = stratified_pick(np.repeat([0, 1, 2], [5, 3, 2]), 4, [0])
    assert picked.tolist() == [3, 2, 8, 6]
    assert rest.tolist() == [1, 0, 7, 4, 5, 9]
    train, val, test = split_indices(np.repeat([0, 1], [12, 8]), train_limit=4)
    assert train.tolist() == [1, 18, 6, 2]
    assert val.tolist() == [0, 4, 17, 10, 9, 12, 8, 14]
    assert test.tolist() == [11, 3, 13, 15]
