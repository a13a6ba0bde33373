"""Checkpoints: one file with the configuration, the mark and the trainer's state.

Written atomically (beside, fsync, rename), so that a file of that name is always a whole one.
Read with `torch.load(weights_only=True)`, so that a file from elsewhere cannot run code.
Left out: the choice of what to keep and when; that is the caller's.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.atomic import replacing
from trainer.config import TrainConfig, parse_config

FORMAT = 2
"""Raised when a new version can no longer read the old files."""


@dataclass(frozen=True)
class Checkpoint:
    """What one file holds: `mark` in images, `state` for `Trainer.load_state_dict`."""

    config: TrainConfig
    mark: int
    state: dict[str, Any]


def save_checkpoint(path: Path, state: dict[str, Any], config: TrainConfig, mark: int) -> None:
    """Write a checkpoint to `path`, replacing an older one only once the new one is on disk.

    `state` holds tensors and plain Python only. The folder is made if it is missing. OSError where
    it cannot be written.
    """
    content = {"format": FORMAT, "config": config.model_dump(), "mark": mark, "state": state}
    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # Closing its archive, torch fails once more and hides why the disk refused.
            raise _system_error(error) or error from None


def _system_error(error: BaseException) -> OSError | None:
    """The OSError that an error was raised upon, if there is one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, its tensors on the CPU; a ValueError says why it cannot be read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path} does not exist; check the path") from None
    except Exception as error:  # a broken file raises a dozen types, by where it is broken
        raise ValueError(
            f"checkpoint {path} cannot be read, use an earlier one: {why_unreadable(error)}"
        ) from None
    match content:
        case {
            "format": int(version),
            "config": dict(config),
            "mark": int(mark),
            "state": dict(state),
        } if version == FORMAT:
            try:
                return Checkpoint(parse_config(config), mark, state)
            except ValueError as error:
                raise ValueError(
                    f"checkpoint {path} holds a wrong configuration: {error}"
                ) from None
    raise ValueError(f"checkpoint {path} is not one of a trainer of format {FORMAT}; use another")


def why_unreadable(error: Exception) -> str:
    """In a few words, why torch could not read a file of tensors.

    Torch's own text on what is more than tensors proposes to load it unsafely.
    """
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values, or is damaged"
    return str(error).strip().split("\n")[0] or type(error).__name__
