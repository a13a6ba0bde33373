"""`adapt`: how an encoder is tuned to labels, once it is pre-trained.

For `--set encoder_weights=encoder.safetensors`, whose encoder and image size are the file's. How
much of it is tuned matters most where labels are few: everything, its last one or two stages, or
the head alone. Learning rates are AdamW's at 256 images; the head, which begins at random, has one
of its own as a multiple. Views are those of SimCLR's fine-tuning, crops and flips
(https://arxiv.org/abs/2002.05709, appendix B.5). Fix `--set flip_p=0` for images that mean
something else when mirrored, such as digits. Leaves out: which labels are used and class weights,
which change what is asked for, and the length of the run.
"""

from __future__ import annotations

from typing import Any

from optuna.trial import BaseTrial


def adapt(trial: BaseTrial) -> dict[str, Any]:
    """Tuned stages, head, learning rates, weight decay, crop, smoothing (AdamW)."""
    tuned = trial.suggest_categorical("tuned_stages", [None, 2, 1, 0])
    fields: dict[str, Any] = {
        "task": "finetune",
        "tuned_stages": tuned,
        "head": trial.suggest_categorical("head", ["linear", "mlp"]),
        "head_lr": trial.suggest_float("head_lr", 0.5, 50.0, log=True),
        "optimizer": "adamw",
        "lr": trial.suggest_float("lr", 5e-5, 5e-3, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 0.1, log=True),
        "label_smoothing": trial.suggest_float("label_smoothing", 0.0, 0.2),
        "jitter_p": 0.0,
        "grayscale_p": 0.0,
        "crop_min_scale": trial.suggest_float("crop_min_scale", 0.1, 0.9, log=True),
        "batch_size": 128,
    }
    if tuned not in (0, 1):
        fields["stage_decay"] = trial.suggest_float("stage_decay", 0.4, 1.0)
    return fields
