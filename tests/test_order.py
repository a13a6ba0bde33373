"""The order of the images: every one equally often, shuffled anew, from anywhere; seeds."""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.order import EndlessShuffle, derived_seed


@given(
    images=st.integers(1, 60),
    fraction=st.floats(0.01, 1),
    steps=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_order_shows_every_image_equally_often(
    images: int, fraction: float, steps: int, seed: int
) -> None:
    size = max(1, int(images * fraction))
    order = EndlessShuffle(images, seed)
    batches = [order.batch(step * size, size) for step in range(steps)]
    assert all(len(batch) == size for batch in batches)
    times = Counter(torch.cat(batches).tolist())
    seen = steps * size
    assert {times[image] for image in range(images)} <= {seen // images, -(-seen // images)}


def test_the_order_is_shuffled_anew_each_epoch_and_can_start_anywhere() -> None:
    order = EndlessShuffle(100, 3)
    first, second = order.batch(0, 100), order.batch(100, 100)
    assert not torch.equal(first, torch.arange(100))
    assert not torch.equal(first, second)
    fresh = EndlessShuffle(100, 3).batch(70, 60)
    assert torch.equal(fresh, torch.cat([first[70:], second[:30]]))


def test_batches_are_those_of_their_positions() -> None:
    order = EndlessShuffle(50, 1)
    found = list(itertools.islice(order.batches(30, 20), 4))
    expected = [EndlessShuffle(50, 1).batch(start, 20) for start in (30, 50, 70, 90)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_every_use_of_a_seed_has_a_stream_of_its_own() -> None:
    seeds = {
        derived_seed(seed, purpose, number)
        for seed in (0, 1, 2**63 - 1)
        for purpose in ("order", "views", "weights", "dropout")
        for number in (0, 1, 10**9)
    }
    assert len(seeds) == 36
    assert all(0 <= seed < 2**64 for seed in seeds)
