"""What can be said of a configuration before anything is built, and of its data and weights.

Each check raises a ValueError of one line: the rule, the value, the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from trainer.config import TrainConfig
from trainer.datasets import DataSplits
from trainer.device import seeded_rng
from trainer.heads import check_head
from trainer.losses import get_loss
from trainer.models import build_encoder, check_encoder, feature_dim_of, load_encoder_weights
from trainer.optim import OPTIMIZERS, SCHEDULES
from trainer.pretrained import check_exported
from trainer.stages import count_stages


def check_names(config: TrainConfig) -> None:
    """Raise a one-line ValueError if `config` names a part that nobody has or that does not fit."""
    parts: dict[str, Iterable[str]] = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}
    for field, known in parts.items():
        name = getattr(config, field)
        if name not in known:
            raise ValueError(f"{field} must be one of {', '.join(known)}; got {name!r}")
    check_encoder(config.encoder, config.image_size)
    if config.encoder_weights is not None and not Path(config.encoder_weights).is_file():
        raise ValueError(f"encoder_weights {config.encoder_weights!r} is no file; check the path")
    if config.task == "pretrain":
        get_loss(config.loss)
        return
    if config.encoder_weights is not None:
        check_exported(Path(config.encoder_weights), config.encoder, config.image_size)
    if config.task == "finetune":
        check_head(config.head, feature_dim_of(config.encoder, config.image_size))
        if config.head_init == "probe" and config.head != "linear":
            raise ValueError(
                f"head_init=probe is for head=linear, got head={config.head}; leave one of them out"
            )
        if config.micro_batch_size == 1:
            raise ValueError(
                "micro_batch_size must be at least 2 for task=finetune, whose batch norms see one "
                "micro-batch at a time; got 1"
            )
        if config.tuned_stages is not None:
            there = count_stages(config.encoder, config.image_size)
            if config.tuned_stages > there:
                raise ValueError(
                    f"tuned_stages must be at most the {there} stages of {config.encoder}, got "
                    f"{config.tuned_stages}; lower it, or leave it out to tune them all"
                )


def check_fits(config: TrainConfig, data: DataSplits) -> None:
    """Raise a one-line ValueError if `data` is too small for `config`, or lacks needed labels."""
    if config.task != "pretrain":
        _check_labels(config, data)
        return
    if config.batch_size > len(data.train):
        raise ValueError(
            f"batch_size must be at most the {len(data.train):,} images of the train split, "
            f"got {config.batch_size:,}; use more images or fix it by --set batch_size=VALUE"
        )
    if "labels" in get_loss(config.loss).needs and (data.train.labels < 0).any():
        raise ValueError(
            f"the loss {config.loss} needs a label of every train image, and data set "
            f"{data.name!r} lacks some; use another loss"
        )
    if config.val_loss and len(data.val) < 2:
        raise ValueError(
            f"val_loss needs at least 2 images of the validation split, got {len(data.val)}; "
            "raise val_limit or leave val_loss out"
        )
    if config.val_loss and "labels" in get_loss(config.loss).needs and (data.val.labels < 0).any():
        raise ValueError(
            f"val_loss of the loss {config.loss} needs a label of every validation image, and "
            f"data set {data.name!r} lacks some; leave val_loss out"
        )


def _check_labels(config: TrainConfig, data: DataSplits) -> None:
    # A batch may be larger than what is labelled: it then holds an image twice, in two views.
    there = len(np.unique(data.train.labels[data.train.labels >= 0]))
    if there < 2:
        remedy = "use another data set"
        if config.labelled is not None:
            remedy = f"give {config.labelled} as the data set, and leave labelled out"
        raise ValueError(
            f"task={config.task} needs train images of at least 2 classes, and data set "
            f"{data.name!r} has {there}; {remedy}"
        )
    if not (data.val.labels >= 0).all() or not len(data.val):
        raise ValueError(
            f"task={config.task} needs labelled validation images, and data set {data.name!r} "
            "lacks them; use another data set"
        )


def check_weights(configs: Iterable[TrainConfig]) -> None:
    """Raise a one-line ValueError if `encoder_weights` do not fit an encoder; loads each once."""
    pairs = {(c.encoder, c.image_size, c.encoder_weights) for c in configs}
    for encoder, image_size, weights in pairs:
        if weights is not None:
            with seeded_rng(torch.device("cpu"), 0):
                load_encoder_weights(build_encoder(encoder, image_size)[0], Path(weights))
