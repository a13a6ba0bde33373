"""Contrastive pre-training of image encoders on one device; usable without the other rooms.

`from trainer import TrainConfig, Trainer`. The trainer is imported at its first use, so that
reading a configuration does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.config import TrainConfig, parse_config

if TYPE_CHECKING:
    from trainer.loop import Diverged, Report, Trainer

__all__ = ["Diverged", "Report", "TrainConfig", "Trainer", "parse_config"]


def __getattr__(name: str) -> Any:
    if name in ("Diverged", "Report", "Trainer"):
        import trainer.loop

        return getattr(trainer.loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
