"""Sums over the rows of a matrix that never exists as a whole: memory for large batches.

A loss over pairs compares every row with every column. At 8,192 images that matrix of
16,384 x 16,384 float32 takes 1 GiB, and autograd keeps several of its size. Here a chunk of rows
is compared at a time, and its gradients are taken at once, in the forward pass, so that nothing
of it needs to stay: the backward pass only multiplies them by the incoming scalar. That is one
matrix product less a chunk than recomputation (torch.utils.checkpoint) needs.

Left out: second derivatives of what takes more than one chunk.

Shapes: N rows, M columns, R rows of one chunk; further dimensions are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_VALUES = 1 << 23
"""Most values of a chunk's R x M matrix; autograd holds about four of its size for a moment.

32 MiB of float32, which is where glibc's malloc begins to give each block back: smaller ones
fragment its heap by 200 MB in a step, at the same speed. Batches of up to 1,024 images are one
chunk, and so plain autograd.
"""

Term = Callable[..., tuple[Tensor, ...]]
"""(start, one chunk of each row tensor, each whole tensor) -> scalars, each a sum over the chunk's
rows; `start` is the number of the chunk's first row."""


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Cut `rows` into slices of equal length (the last may be shorter), at least one row each."""
    size = _chunk_size(columns)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def sum_over_rows(
    term: Term, rows: Sequence[Tensor], wholes: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Add up what `term` gives for each chunk of rows: scalars, as many as it gives.

    The first has a gradient, to every tensor of `rows` [N, ...] and `wholes` ([M, ...] the first
    one) that requires it; the others, such as counts of terms, are constants. `term` must reach
    what needs a gradient through its arguments only.
    """
    if _chunk_size(len(wholes[0])) >= len(rows[0]):
        return term(0, *rows, *wholes)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*rows, *wholes)):
        sums: tuple[Tensor, ...] = _EagerSum.apply(term, len(rows), *rows, *wholes)
        return sums
    parts = [
        term(part.start, *(t[part] for t in rows), *wholes)
        for part in row_chunks(len(rows[0]), len(wholes[0]))
    ]
    return tuple(torch.stack(each).sum() for each in zip(*parts, strict=True))


class _EagerSum(torch.autograd.Function):
    """`sum_over_rows` over several chunks, differentiated while each chunk is at hand."""

    @staticmethod
    def forward(ctx: Any, term: Term, row_count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[2:]
        gradients = [
            torch.zeros_like(t) if n else None for t, n in zip(tensors, needed, strict=True)
        ]
        rows, wholes = tensors[:row_count], tensors[row_count:]
        wholes = tuple(_leaf(t, n) for t, n in zip(wholes, needed[row_count:], strict=True))
        parts = []
        for part in row_chunks(len(rows[0]), len(wholes[0])):
            chunk = tuple(_leaf(t[part], n) for t, n in zip(rows, needed, strict=False))
            with torch.enable_grad():
                first, *others = term(part.start, *chunk, *wholes)
            leaves = [leaf for leaf in (*chunk, *wholes) if leaf.requires_grad]
            found = iter(torch.autograd.grad(first, leaves, allow_unused=True))
            for number, gradient in enumerate(gradients):
                if gradient is None or (new := next(found)) is None:
                    continue
                (gradient[part] if number < row_count else gradient).add_(new)
            parts.append((first.detach(), *others))
        ctx.save_for_backward(*gradients)
        sums = tuple(torch.stack(each).sum() for each in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, *_constants: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None else g * incoming for g in ctx.saved_tensors)
        return (None, None, *scaled)


def _leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    return tensor.detach().requires_grad_(requires_grad)


def _chunk_size(columns: int) -> int:
    return max(1, CHUNK_VALUES // columns)
