"""Seeds that follow from a sweep's own: the same for the same trial and use, whenever asked."""

from __future__ import annotations

import hashlib


def derived_seed(sweep_seed: int, number: int, use: str) -> int:
    """A seed in [0, 2^31) for one trial and one use ("sampler", "trial", ...) of a sweep."""
    text = f"contrasweep {use} {sweep_seed} {number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


def derived_fraction(sweep_seed: int, number: int, use: str) -> float:
    """A number in [0, 1), uniform over trials."""
    return derived_seed(sweep_seed, number, use) / 2**31
