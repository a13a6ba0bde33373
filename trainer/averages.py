"""Exponential moving averages of a network's weights.

Two uses: the slow network of MoCo (He et al. 2019, https://arxiv.org/abs/1911.05722, equation 2)
and BYOL (Grill et al. 2020, https://arxiv.org/abs/2006.07733, equation 1), which gives targets;
and averaged weights that are measured and kept in place of the last ones (Polyak and Juditsky
1992; Morales-Brotons et al. 2024, https://arxiv.org/abs/2411.18704).

torch's `AveragedModel` does nearly this. It is not used, as it asks a tensor on the device how
often it was updated, twice a step, for which the host has to wait; it also averages batch norm's
count of batches, and leaves its copy in training mode and with gradients.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverage:
    """average = decay * average + (1 - decay) * weights, once an update.

    `module` is the averaged network: a copy, in evaluation mode and without gradients, equal to
    the given one until the first update.

    Buffers of numbers (batch norm's statistics) are averaged like weights, those of integers
    copied; with `average_buffers` false neither is touched: the slow network, run in training
    mode, gathers statistics of its own.

    With `debias` the average forgets the weights that it began with, as Adam's moments do
    (Kingma and Ba 2014, https://arxiv.org/abs/1412.6980, section 3): after k updates the weights
    of update i count (1 - decay) * decay^(k - i) / (1 - decay^k). Without it a run of 50 steps
    at decay 0.99 would be measured by weights that are 60 % untrained. A slow network has to
    begin where it begins: no `debias` there.

    `decay` must be in [0, 1], with `debias` below 1; a ValueError otherwise.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float,
        *,
        average_buffers: bool = True,
        debias: bool = False,
    ) -> None:
        if not 0 <= decay <= 1 or (debias and decay == 1):
            allowed = "[0, 1)" if debias else "[0, 1]"
            raise ValueError(f"decay must be in {allowed}, got {decay}")
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay
        self._average_buffers = average_buffers
        self._debias = debias
        self._updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the present weights of `module`, which has the averaged one's shape."""
        self._updates += 1
        keep = self.decay
        if self._debias:
            faded = self.decay**self._updates
            keep = (self.decay - faded) / (1 - faded)
        pairs: list[tuple[Tensor, Tensor]]
        pairs = list(zip(self.module.parameters(), module.parameters(), strict=True))
        if self._average_buffers:
            pairs += zip(self.module.buffers(), module.buffers(), strict=True)
        numbers = [pair for pair in pairs if pair[0].is_floating_point()]
        if numbers:
            averages, values = (list(side) for side in zip(*numbers, strict=True))
            torch._foreach_lerp_(averages, values, 1 - keep)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Give the averaged weights, not copied, and how many updates they had."""
        return {"module": self.module.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; the state's tensors are copied."""
        module: dict[str, Tensor] = state["module"]
        self.module.load_state_dict(module)
        self._updates = int(state["updates"])
