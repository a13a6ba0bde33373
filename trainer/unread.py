"""Fields that a configuration sets and nothing in it reads: a margin for a loss that has none.

Whoever sets one expects it to count, so what they set is refused before anything is trained.
Defaults, and what a search draws for other choices than the one at hand, are nobody's mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import get_args

from trainer.config import Augmentation, TrainConfig
from trainer.losses import LOSSES, get_loss
from trainer.optim import OPTIMIZERS, SCHEDULES

MAGNITUDES: dict[Augmentation, tuple[str, ...]] = {
    "rotation": ("rotation",),
    "translation": ("translation",),
    "scaling": ("scaling",),
    "jitter": ("brightness", "contrast", "saturation", "hue"),
    "grayscale": ("grayscale",),
    "blur": ("blur_sigma",),
    "solarize": ("solarize",),
    "cutout": ("cutout",),
}
SCALED: tuple[Augmentation, ...] = ("jitter", "grayscale", "blur", "solarize")
"""What `strength` scales."""


PRETRAINING = (
    *("loss", "projector_hidden", "projector_out", "projector_layers", "projector_norm"),
    *("linear_probe",),
)
"""What pre-training alone reads, beside the fields of its losses."""
TUNING = (
    *("head", "head_init", "head_lr", "tuned_stages", "stage_decay", "norm_statistics"),
    *("label_smoothing",),
)
"""What fine-tuning alone reads."""
ADAPTATION = ("labels_fraction", "labels_seed", "class_weights")
TRAINING = (
    *("epochs", "batch_size", "micro_batch_size", "optimizer", "lr", "lr_scaling", "weight_decay"),
    *("clip_norm", "schedule", "warmup", "ema_decay", "report_every"),
)
"""What training by gradients reads, beside the fields of optimisers and schedules."""


def unread_fields(config: TrainConfig) -> dict[str, str]:
    """The fields that do not count in this configuration, each with the reason."""
    unread = _unread_of_task(config)
    if config.task == "pretrain":
        unread |= _unread_of_losses(config)
    if config.task != "linear":
        unread |= _unread_of_choices(config) | _unread_of_views(config)
    return unread


def _unread_of_task(config: TrainConfig) -> dict[str, str]:
    of_losses = {field for loss in LOSSES.values() for field in loss.own_fields}
    by_gradients = [
        *TRAINING,
        *(field for each in OPTIMIZERS.values() for field in each.fields),
        *(field for each in SCHEDULES.values() for field in each.fields),
        *("augment", "strength", "jitter", "crop_min_scale"),
        *(f"{name}_p" for name in get_args(Augmentation)),
        *(field for fields in MAGNITUDES.values() for field in fields),
    ]
    readers: dict[str, tuple[str, ...]] = {
        **dict.fromkeys((*PRETRAINING, *sorted(of_losses)), ("pretrain",)),
        **dict.fromkeys(TUNING, ("finetune",)),
        **dict.fromkeys(ADAPTATION, ("linear", "finetune")),
        **dict.fromkeys(by_gradients, ("pretrain", "finetune")),
        "probe_l2": ("linear",),
    }
    if config.head_init == "probe":
        readers["probe_l2"] = ("linear", "finetune")
    unread = {
        field: f"task={config.task} does not read it (task={' or '.join(tasks)} would)"
        for field, tasks in readers.items()
        if config.task not in tasks
    }
    if config.task != "pretrain" and config.labels_fraction == 1:
        unread["labels_seed"] = "labels_fraction is 1, so that all labels are used"
    if config.task == "finetune" and config.tuned_stages == 0:
        unread["norm_statistics"] = "tuned_stages is 0, so that all are kept"
    if config.task == "finetune" and config.tuned_stages in (0, 1):
        unread["stage_decay"] = f"tuned_stages is {config.tuned_stages}"
    return unread


def _unread_of_losses(config: TrainConfig) -> dict[str, str]:
    fields = {name: loss.own_fields for name, loss in LOSSES.items()}
    unread = _unread_of_choice("loss", config.loss, get_loss(config.loss).own_fields, fields)
    if config.loss == "align_uniform" and config.uniform_weight == 0:
        unread["uniform_t"] = "uniform_weight is 0"
    if config.projector_layers == 1:
        unread["projector_hidden"] = "projector_layers is 1, so there is no hidden one"
    return unread


def _unread_of_choices(config: TrainConfig) -> dict[str, str]:
    optimizers = {name: each.fields for name, each in OPTIMIZERS.items()}
    schedules = {name: each.fields for name, each in SCHEDULES.items()}
    unread: dict[str, str] = {}
    for choice, fields in (("optimizer", optimizers), ("schedule", schedules)):
        chosen = getattr(config, choice)
        unread |= _unread_of_choice(choice, chosen, fields.get(chosen, ()), fields)
    return unread


def _unread_of_choice(
    choice: str, chosen: str, read: Iterable[str], fields: Mapping[str, tuple[str, ...]]
) -> dict[str, str]:
    """What others of a choice read and `chosen`, which reads `read`, does not."""
    unread = {}
    for field in sorted({field for each in fields.values() for field in each} - set(read)):
        readers = ", ".join(name for name, each in fields.items() if field in each)
        unread[field] = f"{choice}={chosen} does not read it ({choice}={readers} would)"
    return unread


def _unread_of_views(config: TrainConfig) -> dict[str, str]:
    unread = {}
    for name in get_args(Augmentation):
        magnitudes = MAGNITUDES.get(name, ())
        if config.augment != "all" and config.chance(name) == 0:
            unread[f"{name}_p"] = f"augment={config.augment} leaves {name} out"
        if config.chance(name) == 0:
            unread |= dict.fromkeys(magnitudes, f"the chance of {name} is 0")
        elif name in SCALED and config.strength == 0:
            unread |= dict.fromkeys((f"{name}_p", *magnitudes), "strength is 0")
        elif magnitudes and not any(getattr(config, field) for field in magnitudes):
            unread[f"{name}_p"] = f"{', '.join(magnitudes)}: 0"
    if config.chance("crop") == 0:
        unread["crop_min_scale"] = "the chance of crop is 0"
    elif config.crop_min_scale == 1:
        unread["crop_p"] = "crop_min_scale is 1, the whole image"
    scaled = [
        name
        for name in SCALED
        if config.chance(name) and any(getattr(config, field) for field in MAGNITUDES[name])
    ]
    if not scaled:
        unread["strength"] = f"there is no {', '.join(SCALED[:-1])} or {SCALED[-1]}"
    if config.strength == 0 or not {"jitter", "grayscale"} & set(scaled):
        unread["jitter"] = "there is no jitter and no grayscale"
    return unread


def check_read(given: Iterable[str], configs: Iterable[TrainConfig]) -> None:
    """Raise a one-line ValueError for a field of `given` that none of the configurations reads."""
    unread = [unread_fields(config) for config in configs]
    for field in given:
        if unread and all(field in each for each in unread):
            raise ValueError(f"{field} has no effect: {unread[0][field]}; leave it out")
