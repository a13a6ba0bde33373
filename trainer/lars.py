"""LARS: momentum SGD whose step for each matrix is in proportion to the matrix.

You, Gitman and Ginsburg 2017, "Large Batch Training of Convolutional Networks",
https://arxiv.org/abs/1708.03888, equation 6, in the form in which SimCLR (section 2.2) and
solo-learn train with it. For a matrix w of gradient g, with momentum m:

    ratio = trust * |w| / (|g| + weight_decay * |w|)      1 where |w| or |g| is 0
    m     = momentum * m + ratio * (g + weight_decay * w)
    w     = w - lr * m

Groups with `adapted` false, the vectors (biases, norms), have ratio 1 throughout. The ratio does
not hang on the weight decay: with 0 it is trust * |w| / |g|, where lightning-bolts and its
descendants fall back to plain SGD, a step some thousand times as long. Left out: Nesterov's
momentum and dampening, which nobody uses with it.

Shapes: P parameters of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


def trust_ratios(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], trust: float, weight_decay: float
) -> Tensor:
    """Give what multiplies the step of each weight: [P], at least 0, finite if they are.

    You et al. 2017, https://arxiv.org/abs/1708.03888, equation 6; 1 where a norm is 0, so that
    a matrix that starts at 0 can leave it.
    """
    weight_P = torch.stack(torch._foreach_norm(list(weights)))
    gradient_P = torch.stack(torch._foreach_norm(list(gradients)))
    ratio_P = trust * weight_P / (gradient_P + weight_decay * weight_P)
    # `where`, as asking which norms are 0 would make the host wait for the device.
    return torch.where((weight_P > 0) & (gradient_P > 0), ratio_P, 1.0)


class LARS(torch.optim.Optimizer):
    """The update above; `lr`, `momentum`, `weight_decay`, `trust`, `adapted` are per group."""

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, {**defaults, "adapted": True})

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's is overloaded
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every parameter that has a gradient; `closure`, if any, first makes them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            decay = group["weight_decay"]
            steps = torch._foreach_add(gradients, weights, alpha=decay)
            if group["adapted"]:
                ratio_P = trust_ratios(weights, gradients, group["trust"], decay)
                torch._foreach_mul_(steps, list(ratio_P.unbind()))
            momenta = [self._momentum(weight) for weight in weights]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, steps)
            torch._foreach_add_(weights, momenta, alpha=-group["lr"])
        return loss

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum_buffer"]
        return momentum
