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

import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.device import is_of_accelerator, is_out_of_memory
from trainer.loss_inputs import in_float32

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
    place, _, name = ref.rpartition(":")
    if not place or not name:
        raise ValueError(f"loss {ref!r} must be FILE.py:FUNCTION or MODULE:FUNCTION")
    path = loss_file(ref)
    module = _import_module(place) if path is None else _import_file(path)
    if not hasattr(module, name):
        raise ValueError(f"loss {ref!r}: {place} has no function {name!r}")
    found: object = getattr(module, name)
    if not callable(found):
        kind = type(found).__name__
        raise ValueError(f"loss {ref!r} is of type {kind}, not a function of two views and config")
    file = getattr(module, "__file__", None)
    function: UserLoss = in_float32(found)
    _try_out(ref, function, file)
    first_line = (found.__doc__ or "").strip().partition("\n")[0].strip()
    return _blamed(ref, function, file), first_line or ref


def loss_file(ref: str) -> Path | None:
    """Absolute path of the file that `FILE.py:FUNCTION` names; none for any other reference."""
    place, _, _ = ref.rpartition(":")
    return Path(place).expanduser().resolve() if place.endswith(".py") else None


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"loss file {str(path)!r} does not exist")
    # Named by path and contents: two files of one name do not clash, an edited file is read anew.
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read loss file {str(path)!r}: {error.strerror}") from None
    name = f"contrasweep_loss_{hashlib.sha256(bytes(path) + source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None  # the name ends with .py
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # it is the user's code: anything may be raised
        del sys.modules[name]
        raise ValueError(
            f"loss file {str(path)!r} fails to import: {_raised(error, str(path))}"
        ) from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"loss module {name!r} fails to import: {_raised(error, None)}") from error


def _raised(error: BaseException, file: str | None) -> str:
    """Kind, message and place of an exception in one line: its innermost line, in `file` if so."""
    message = " ".join(str(error).split())
    if isinstance(error, SyntaxError):  # its message names the line
        return f"{type(error).__name__}: {message}"
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename == file), frames[-1])
    kind = f"{type(error).__name__}: {message}".removesuffix(": ")
    return f"{kind} ({frame.filename}, line {frame.lineno})"


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
            raise ValueError(f"loss {ref!r} fails on {shape}: {_raised(error, file)}") from error

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
                f"loss {ref!r} fails on embeddings of [8, 16]: {_raised(error, file)}"
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
