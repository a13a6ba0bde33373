"""Contrastive pre-training of image encoders on one device; usable without the other rooms.

`from trainer import TrainConfig, Trainer` trains, `from trainer import load_encoder` uses what came
of it. Both are imported at their first use, so that reading a configuration does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.config import TrainConfig, parse_config

if TYPE_CHECKING:
    from trainer.classifier import Classifier, load_classifier
    from trainer.export import ExportedEncoder, load_encoder
    from trainer.loop import Diverged, Report, Trainer

__all__ = [
    "Classifier",
    "Diverged",
    "ExportedEncoder",
    "Report",
    "TrainConfig",
    "Trainer",
    "load_classifier",
    "load_encoder",
    "parse_config",
]

_HOMES = {
    "Diverged": "trainer.loop",
    "Report": "trainer.loop",
    "Trainer": "trainer.loop",
    "ExportedEncoder": "trainer.export",
    "load_encoder": "trainer.export",
    "Classifier": "trainer.classifier",
    "load_classifier": "trainer.classifier",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
