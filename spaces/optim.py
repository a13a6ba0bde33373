"""`optim`: optimiser, learning rate, weight decay, schedule, averaging and batch size.

Learning rates are stated at 256 images and grow with the root of the batch. Each kind of optimiser
has its own range of rates and decays, hence parameters of its own (`lr_sgd`, `lr_lars`, `l2`): one
name with two ranges would be two parameters that no sampler can tell apart. LARS never has weight
decay 0, which would turn its scaling off. Leaves out: loss, views and encoder.
"""

from __future__ import annotations

from typing import Any

from optuna.trial import BaseTrial


def optim(trial: BaseTrial) -> dict[str, Any]:
    """Optimiser with its rate and decay, momentum, schedule, averaged weights and batch size."""
    optimizer = trial.suggest_categorical("optimizer", ["adamw", "adam", "sgd", "lars"])
    schedule = trial.suggest_categorical("schedule", ["wsd", "cosine"])
    fields: dict[str, Any] = {
        "optimizer": optimizer,
        "schedule": schedule,
        "warmup": trial.suggest_float("warmup", 0.0, 0.1),
        "batch_size": trial.suggest_categorical("batch_size", [128, 256, 512, 1024]),
        "lr_scaling": "sqrt",
        "ema_decay": trial.suggest_categorical("ema_decay", [None, 0.99, 0.999]),
    }
    if optimizer == "sgd":
        fields["lr"] = trial.suggest_float("lr_sgd", 1e-2, 1.0, log=True)
    elif optimizer == "lars":
        fields["lr"] = trial.suggest_float("lr_lars", 0.15, 5.0, log=True)
    else:
        fields["lr"] = trial.suggest_float("lr", 1e-4, 5e-3, log=True)
    if optimizer == "adamw":
        fields["weight_decay"] = trial.suggest_float("weight_decay", 1e-4, 0.1, log=True)
    else:
        fields["weight_decay"] = trial.suggest_float("l2", 1e-6, 1e-3, log=True)
    if optimizer in ("sgd", "lars"):
        fields["momentum"] = trial.suggest_categorical("momentum", [0.9, 0.8, 0.95])
    if schedule == "wsd":
        fields["cooldown"] = trial.suggest_float("cooldown", 0.05, 0.5)
    return fields
