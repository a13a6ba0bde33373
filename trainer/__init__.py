"""Contrastive pre-training of image encoders on one device; usable without the other rooms.

`from trainer import TrainConfig, Trainer` trains, `from trainer import load_encoder` uses what came
of it. Both are imported at their first use, so that reading a configuration does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.config import TrainConfig, parse_config

if TYPE_CHECKING:
    from trainer.export import ExportedEncoder, load_encoder
    from trainer.loop import Diverged, Report, Trainer

__all__ = [
    "Diverged",
    "ExportedEncoder",
    "Report",
    "TrainConfig",
    "Trainer",
    "load_encoder",
    "parse_config",
]


def __getattr__(name: str) -> Any:
    if name in ("Diverged", "Report", "Trainer"):
        import trainer.loop

        return getattr(trainer.loop, name)
    if name in ("ExportedEncoder", "load_encoder"):
        import trainer.export

        return getattr(trainer.export, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
