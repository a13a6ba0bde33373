"""Which image when: an endless shuffled order, and the seeds of everything random in a run.

Shapes: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


class EndlessShuffle:
    """An endless shuffled order of image numbers: one fresh permutation after another.

    The permutation of an epoch follows from seed and epoch alone, so that the state of the order
    is nothing but the number of images seen. `images`: how many there are. All on the CPU.
    """

    def __init__(self, images: int, seed: int) -> None:
        self.images = images
        self._seed = seed
        self._orders: dict[int, Tensor] = {}

    def batch(self, start: int, size: int) -> Tensor:
        """Give the numbers [B] at positions start to start + size, across the ends of epochs."""
        parts = []
        while size > 0:
            epoch, offset = divmod(start, self.images)
            part = self._order(epoch)[offset : offset + size]
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return torch.cat(parts)

    def batches(self, start: int, size: int) -> Iterator[Tensor]:
        """Give the numbers [B] of one batch after another, from position `start` on, for ever."""
        while True:
            yield self.batch(start, size)
            start += size

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(derived_seed(self._seed, "order", epoch))
            self._orders = {epoch: torch.randperm(self.images, generator=generator)}
        return self._orders[epoch]


def derived_seed(seed: int, purpose: str, number: int = 0) -> int:
    """Give each use of a run's seed a stream of its own, from 0 to 2^64 - 1."""
    entropy = [seed, int.from_bytes(purpose.encode(), "little"), number]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
