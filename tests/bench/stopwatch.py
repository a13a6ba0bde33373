"""What benchmarks of the trainer share: clocks, the time of a step, and images of noise."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from trainer.datasets import DataSplits, Split

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def seconds(
    step: Callable[[], object], device: torch.device, clock: Clock, *, steps: int = 1
) -> float:
    """Seconds a step, over so many."""
    start = clock()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / steps


def noise(size: int, *, train: int, val: int = 64, bank: int = 64) -> DataSplits:
    """So many images of noise, `size` pixels a side; the bank is of the train images."""
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
        return Split(images, rng.integers(0, 10, count))

    trained = split(train)
    banked = Split(trained.images[:bank], trained.labels[:bank])
    classes = tuple(str(number) for number in range(10))
    return DataSplits("noise", classes, trained, split(val), split(64), banked, (), MEAN, STD)
