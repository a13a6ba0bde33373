"""What every loss does with its inputs: see that they fit, and compute in float32 at least.

Similarities divided by a temperature of 0.05, sums over a batch's pairs and variances are not
safe in bfloat16, which is what embeddings are in under autocast.

Shapes: B images of a batch, D width of an embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def in_float32(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Run a loss outside autocast, on its floating-point tensors in float32 (float64 stays)."""

    @functools.wraps(loss)
    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            # mypy cannot see that the values' types are what they were
            return loss(
                *(_precise(value) for value in args),  # type: ignore[arg-type]
                **{name: _precise(value) for name, value in kwargs.items()},  # type: ignore[arg-type]
            )

    return run


def check_views(z0_BD: Tensor, z1_BD: Tensor, least: int = 1) -> None:
    """Raise a ValueError unless both are [B, D] of one shape, B at least `least`."""
    if z0_BD.ndim != 2 or z0_BD.shape != z1_BD.shape or len(z0_BD) < least:
        raise ValueError(
            f"this loss needs two embeddings of equal shape [B, D] with B at least {least}, "
            f"got {tuple(z0_BD.shape)} and {tuple(z1_BD.shape)}"
        )


def _precise(value: object) -> object:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.float()
    return value
