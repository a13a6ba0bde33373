"""A user's own loss: found by reference, tried once, and called in float32.

It is a function of two embeddings [B, D] (rows of one index are two views of one image) and the
`TrainConfig`, that returns a scalar:

    def mine(z0_BD, z1_BD, config):
        '''First line: what this loss is.'''
        return (z0_BD - z1_BD).square().sum(dim=1).mean() / config.temperature

Left out: predictors, momentum networks, queues and labels, which only the losses here can ask for.

Shapes: B images of a batch, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.device import is_of_accelerator, is_out_of_memory
from trainer.loss_inputs import in_float32
from trainer.user_code import find_function, raised

UserLoss = Callable[[Tensor, Tensor, TrainConfig], Tensor]


def load_function(ref: str) -> tuple[UserLoss, str]:
    """Import `FILE.py:FUNCTION` or `MODULE:FUNCTION`; give the function and its description.

    A file is imported by its path, under a name of its own and without a change of `sys.path`.
    The function is tried on a few random embeddings, and wrapped so that it gets float32 outside
    autocast; what it raises in training is a ValueError in one line. The description is its
    docstring's first line, or `ref`.

    ValueError in one line: no such file, module or function, a file that fails to import, a
    function that raises, or one that returns anything but a finite scalar with a finite gradient
    to both embeddings.
    """
    found, file = find_function(ref, "loss", "of two views and config")
    function: UserLoss = in_float32(found)
    _try_out(ref, function, file)
    first_line = (found.__doc__ or "").strip().partition("\n")[0].strip()
    return _blamed(ref, function, file), first_line or ref


def _blamed(ref: str, function: UserLoss, file: str | None) -> UserLoss:
    """The function, with what it raises in training as a ValueError of one line.

    But for memory that has run out and errors of the accelerator: they are not the loss's fault.
    """

    def blamed(z0_BD: Tensor, z1_BD: Tensor, config: TrainConfig) -> Tensor:
        try:
            return function(z0_BD, z1_BD, config)
        except Exception as error:
            if is_out_of_memory(error) or is_of_accelerator(error):
                raise
            shape = list(z0_BD.shape)
            raise ValueError(f"loss {ref!r} fails on {shape}: {raised(error, file)}") from error

    return blamed


def _try_out(ref: str, function: UserLoss, file: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    z0_BD, z1_BD = (torch.randn(8, 16, generator=generator).requires_grad_() for _ in range(2))
    # What the function draws must not move the generators of the caller.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            value: object = function(z0_BD, z1_BD, TrainConfig())
        except Exception as error:
            raise ValueError(
                f"loss {ref!r} fails on embeddings of [8, 16]: {raised(error, file)}"
            ) from error
        if not isinstance(value, Tensor) or value.shape != ():
            shape = f" of {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            kind = type(value).__name__
            raise ValueError(f"loss {ref!r} must return a scalar tensor, got a {kind}{shape}")
        if not value.isfinite():
            raise ValueError(
                f"loss {ref!r} must be finite on random embeddings, got {value.item()}"
            )
        found: tuple[Tensor | None, ...] = (None, None)
        if value.requires_grad:
            found = torch.autograd.grad(value, (z0_BD, z1_BD), allow_unused=True)
    for name, gradient_BD in zip(("z0_BD", "z1_BD"), found, strict=True):
        if gradient_BD is None or not gradient_BD.isfinite().all():
            what = "no" if gradient_BD is None else "a gradient that is not finite"
            raise ValueError(f"loss {ref!r} must give a gradient to {name}, got {what}")
