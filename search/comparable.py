"""Whether an objective's values can be compared between the configurations of a sweep.

An accuracy means the same for all of them, that of an adapted classifier where the same labels
were used. A contrastive loss does not: the same embedding scores NT-Xent 2.07 at temperature 0.2
and 5.93 at 1 (512 images), and less in a smaller batch or on weaker views, so that minimising it
chooses low temperatures, small batches and easy views. The effective rank of the features tells
runs of one method apart, of one encoder (Garrido et al. 2023, https://arxiv.org/abs/2210.02885).
Left out: what a user's own loss reads beside the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from search.objectives import OBJECTIVES, OF_ADAPTATION, SECOND_OBJECTIVES
from trainer.config import TrainConfig

LEAVES_THE_LOSS = frozenset(
    {
        *("in_memory", "loader_workers", "train_limit", "test_limit"),
        *("encoder", "encoder_weights"),
        *("epochs", "micro_batch_size", "optimizer", "lr", "lr_scaling", "weight_decay"),
        *("momentum", "lars_trust", "clip_norm", "schedule", "warmup", "cooldown", "ema_decay"),
        *("report_every", "linear_probe", "seed", "device", "precision", "threads"),
    }
)
"""Fields that may vary where `val_loss` is compared: how well the loss is minimised, not which one
on what. Every other field must not, one that is new included."""

_MOVERS = {
    "part of the loss": (
        *("loss", "temperature", "margin", "margin_squared", "triplet_margin", "dclw_sigma"),
        *("sigmoid_bias", "barlow_lambda", "vicreg_invariance", "vicreg_variance"),
        *("vicreg_covariance", "align_alpha", "uniform_t", "uniform_weight", "target_momentum"),
        *("predictor_hidden",),
    ),
    "the number of negatives": ("batch_size", "queue_size"),
    "the projection that the loss is of": (
        *("projector_hidden", "projector_out", "projector_layers", "projector_norm"),
    ),
    "how hard the views are": (
        *("augment", "strength", "crop_p", "crop_min_scale", "flip_p", "vflip_p", "rotation_p"),
        *("rotation", "translation_p", "translation", "scaling_p", "scaling", "jitter_p"),
        *("jitter", "brightness", "contrast", "saturation", "hue", "grayscale_p", "grayscale"),
        *("blur_p", "blur_sigma", "solarize_p", "solarize", "cutout_p", "cutout"),
    ),
    "the images that are measured": (
        *("dataset", "labelled", "data_dir", "image_size", "val_limit", "split_seed"),
    ),
    "whether it is measured": ("val_loss",),
    "what is trained": ("task",),
    "the loss of an adaptation": (
        *("class_weights", "label_smoothing", "head", "head_lr", "tuned_stages", "stage_decay"),
        *("head_init", "norm_statistics", "probe_l2"),
    ),
    "which labels are used": ("labels_fraction", "labels_seed"),
}
MOVES_THE_LOSS = {field: reason for reason, fields in _MOVERS.items() for field in fields}
"""Fields that must not vary where `val_loss` is compared -> what they change."""
MOVES_THE_ACCURACY = dict.fromkeys(("labels_fraction", "labels_seed"), "which labels are used")
"""The same for the accuracy of an adaptation: with more labels it is higher."""
MOVES_THE_RANK = {"loss": "the method", "encoder": "the width of the features"}
"""The same for `rankme`."""


def varied(configurations: Sequence[TrainConfig]) -> dict[str, set[object]]:
    """The fields that are not the same in all configurations, in their order, with their values."""
    values: dict[str, set[object]] = {
        field: {getattr(each, field) for each in configurations}
        for field in TrainConfig.model_fields
    }
    return {field: found for field, found in values.items() if len(found) > 1}


def check_comparable(objectives: Sequence[str], configurations: Sequence[TrainConfig]) -> None:
    """Raise a one-line ValueError if the configurations' values of an objective do not compare.

    It names the fields in which they differ and that move its scale. A field that none of the
    configurations reads moves nothing.
    """
    _check_task(objectives, configurations)
    if "val_loss" in objectives and not all(each.val_loss for each in configurations):
        raise ValueError(
            "the objective val_loss is measured at every report; got val_loss=false, leave it out"
        )
    differing = varied(configurations)
    for objective in objectives:
        moving = _read(_moving(objective, differing), configurations)
        if moving:
            what = "; ".join(
                f"{', '.join(field for field in moving if moving[field] == reason)} ({reason})"
                for reason in dict.fromkeys(moving.values())
            )
            raise ValueError(
                f"values of the objective {objective} are not comparable between trials that "
                f"differ in {what}; fix what differs, such as by --set {next(iter(moving))}=VALUE"
                f"{'' if objective in OF_ADAPTATION else ', or use --objective knn_top1'}"
            )


def _check_task(objectives: Sequence[str], configurations: Sequence[TrainConfig]) -> None:
    tasks = {each.task for each in configurations}
    adapts = "pretrain" not in tasks
    if "pretrain" in tasks and len(tasks) > 1:
        raise ValueError(
            "a sweep is of pre-training or of adaptation, and this space has both: "
            f"{', '.join(sorted(tasks))}; fix one, such as by --set task=finetune"
        )
    for objective in objectives:
        if objective in SECOND_OBJECTIVES or not tasks:
            continue
        if (objective in OF_ADAPTATION) != adapts:
            known = [name for name in OBJECTIVES if (name in OF_ADAPTATION) == adapts]
            raise ValueError(
                f"the objective {objective} is not measured with task={min(tasks)}; use "
                f"--objective {' or '.join(known)}"
            )


def _moving(objective: str, differing: Iterable[str]) -> dict[str, str]:
    """Those of the differing fields that move an objective's scale, each with what it changes."""
    if objective == "val_loss":
        unknown = "not known to leave the loss alone"
        return {
            field: MOVES_THE_LOSS.get(field, unknown)
            for field in differing
            if field not in LEAVES_THE_LOSS
        }
    if objective in OF_ADAPTATION:
        return {
            field: MOVES_THE_ACCURACY[field] for field in differing if field in MOVES_THE_ACCURACY
        }
    if objective == "rankme":
        return {field: MOVES_THE_RANK[field] for field in differing if field in MOVES_THE_RANK}
    return {}


def _read(moving: dict[str, str], configurations: Sequence[TrainConfig]) -> dict[str, str]:
    """Those of the fields that at least one of the configurations reads."""
    from trainer.unread import unread_fields

    unread = [unread_fields(each) for each in configurations] if moving else []
    return {
        field: reason
        for field, reason in moving.items()
        if not all(field in each for each in unread)
    }
