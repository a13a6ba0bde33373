"""`simclr`: NT-Xent with SimCLR's augmentations, for colour images and a GPU.

Chen et al., A Simple Framework for Contrastive Learning of Visual Representations (2020),
https://arxiv.org/abs/2002.05709: the best temperature falls as the batch grows, and crop and
colour jitter matter most. The learning rate is AdamW's at 256 images and grows with the root of
the batch, so that one range serves all batch sizes. Leaves out: the encoder, the projection
head and the length of the run, which cost time and are the user's to fix.
"""

from __future__ import annotations

from typing import Any

from optuna.trial import BaseTrial


def simclr(trial: BaseTrial) -> dict[str, Any]:
    """Temperature, views, learning rate, weight decay and batch size (AdamW)."""
    return {
        "loss": "nt_xent",
        "temperature": trial.suggest_float("temperature", 0.05, 1.0, log=True),
        "strength": trial.suggest_float("strength", 0.1, 1.5),
        "crop_min_scale": trial.suggest_float("crop_min_scale", 0.05, 0.5, log=True),
        "optimizer": "adamw",
        "lr": trial.suggest_float("lr", 1e-4, 5e-3, log=True),
        "lr_scaling": "sqrt",
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 0.1, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [128, 256, 512, 1024, 2048]),
    }
