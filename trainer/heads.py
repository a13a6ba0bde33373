"""Heads that turn features into classes, by name or a user's own.

A head of the user's own is a function of the number of features and the number of classes that
returns a module, [B, F] -> [B, L]:

    def mine(features, classes):
        return nn.Sequential(nn.Dropout(0.2), nn.Linear(features, classes))

It is imported where the user names it, never because a file does.

Shapes: B images, F features, L classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.device import is_of_accelerator, is_out_of_memory
from trainer.user_code import find_function, raised

MakeHead = Callable[[int, int], nn.Module]


def linear(features: int, classes: int) -> nn.Module:
    """One linear layer."""
    return nn.Linear(features, classes)


def mlp(features: int, classes: int) -> nn.Module:
    """One hidden layer as wide as the features, with batch norm and ReLU."""
    hidden = nn.Linear(features, features, bias=False)  # the norm's shift does what a bias would
    norm = nn.BatchNorm1d(features)
    return nn.Sequential(hidden, norm, nn.ReLU(inplace=True), nn.Linear(features, classes))


def load_head(ref: str | MakeHead) -> MakeHead:
    """Find a head by name, `FILE.py:FUNCTION` or `MODULE:FUNCTION`; a function stays what it is.

    The result refuses, in a ValueError of one line, a function that raises or returns anything
    but a module of the right shape. Of an unknown name that line lists the known ones.
    """
    if callable(ref):
        name = getattr(ref, "__name__", type(ref).__name__)
        return _checked(name, ref, getattr(ref, "__globals__", {}).get("__file__"))
    if ref in HEADS:
        return HEADS[ref]
    if ":" not in ref:
        known = ", ".join(HEADS)
        raise ValueError(
            f"unknown head {ref!r}; known: {known}; or give FILE.py:FUNCTION or MODULE:FUNCTION"
        )
    return _checked(ref, *find_function(ref, "head", "of features and classes"))


def check_head(ref: str, features: int) -> None:
    """Raise a one-line ValueError if there is no such head, or none for so many features."""
    make = load_head(ref)
    with torch.random.fork_rng(devices=[]):
        make(features, 2)


def _checked(name: str, make: MakeHead, file: str | None) -> MakeHead:
    def made(features: int, classes: int) -> nn.Module:
        try:
            head: object = make(features, classes)
            if not isinstance(head, nn.Module):
                kind = type(head).__name__
                raise ValueError(f"head {name!r} must return an nn.Module, got a {kind}")
            was_training = head.training
            with torch.no_grad():
                logits: object = head.eval()(torch.zeros(2, features))
            head.train(was_training)
        except Exception as error:
            if is_out_of_memory(error) or is_of_accelerator(error):
                raise
            if isinstance(error, ValueError) and str(error).startswith(f"head {name!r} must"):
                raise
            raise ValueError(
                f"head {name!r} fails for {features} features and {classes} classes: "
                f"{raised(error, file)}"
            ) from error
        if not isinstance(logits, Tensor) or logits.shape != (2, classes):
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"head {name!r} must turn [2, {features}] into [2, {classes}], got {shape}"
            )
        return head

    return made


HEADS: dict[str, MakeHead] = {"linear": linear, "mlp": mlp}
