"""`TrainConfig`: everything that decides one training run, in one frozen model.

Two runs with equal configurations on the same machine give the same metrics, so a trial's
record is its configuration. Ranges are the widest that make sense; the narrower ones worth
searching stand in `spaces/`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]

LR_REFERENCE_BATCH = 256
"""Batch size at which `TrainConfig.lr` is stated."""

Augmentation = Literal[
    "rotation",
    "translation",
    "scaling",
    "crop",
    "flip",
    "vflip",
    "jitter",
    "grayscale",
    "blur",
    "solarize",
    "cutout",
]
"""What can be done to a view, in the order in which it is done. The chance of each is the field
of its name with `_p` after it."""


class TrainConfig(BaseModel):
    """One run's configuration; an unknown field or a value out of range is an error.

    Sizes of data are in images, `epochs` in passes over the train split, `warmup` and
    `cooldown` in fractions of the whole run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # data
    dataset: str = Field("digits", description="source of images; `contrasweep datasets` lists")
    labelled: str | None = Field(
        None, description="small labelled source that measures an unlabelled one"
    )
    data_dir: str | None = Field(None, description="folder of downloaded data sets")
    in_memory: Literal["auto", "yes", "no"] = Field(
        "auto", description="images decoded once and held in memory, or decoded as they are needed"
    )
    loader_workers: int | None = Field(
        None, ge=0, le=256, description="processes that decode streamed images; none: by the cores"
    )
    image_size: int = Field(32, ge=8, le=1024, description="side of the square images, pixels")
    train_limit: int | None = Field(None, ge=1, description="images kept of train, stratified")
    val_limit: int | None = Field(None, ge=1, description="images kept of val, stratified")
    test_limit: int | None = Field(None, ge=1, description="images kept of test, stratified")

    # what is learned
    task: Literal["pretrain", "linear", "finetune"] = Field(
        "pretrain", description="pretrain without labels; fit a classifier; tune encoder and head"
    )
    encoder: str = Field("conv_small", description="`contrasweep encoders` lists")
    encoder_weights: str | None = Field(None, description="file of weights that the encoder has")
    projector_hidden: int = Field(512, ge=1, le=16384, description="projection head, hidden width")
    projector_out: int = Field(128, ge=1, le=16384, description="projection head, output width")
    projector_layers: int = Field(2, ge=1, le=4, description="projection head, linear layers")
    projector_norm: bool = Field(
        False, description="batch norm without weights after its last layer, as SimSiam has it"
    )
    predictor_hidden: int = Field(512, ge=1, le=16384, description="predictor, hidden width")

    # losses; `contrasweep losses` lists which of these each one reads
    loss: str = Field("nt_xent", description="name, file.py:function or module:function")
    temperature: float = Field(0.2, gt=0, le=10, description="divides the similarities")
    margin: float = Field(1.0, gt=0, le=4, description="margin: least distance of negatives")
    margin_squared: bool = Field(False, description="margin: squared distances, as Hadsell has it")
    triplet_margin: float = Field(
        0.2, gt=0, le=4, description="triplet: how much farther a negative must be"
    )
    dclw_sigma: float = Field(0.5, gt=0, le=10, description="dclw: width of the positives' weights")
    sigmoid_bias: float = Field(
        -5.0, ge=-50, le=50, description="sigmoid: added to the logits; -1 / temperature is even"
    )
    barlow_lambda: float = Field(
        5e-3, ge=0, le=10, description="barlow_twins: weight of the off-diagonal"
    )
    vicreg_invariance: float = Field(25.0, ge=0, le=1000, description="vicreg: weight")
    vicreg_variance: float = Field(25.0, ge=0, le=1000, description="vicreg: weight")
    vicreg_covariance: float = Field(1.0, ge=0, le=1000, description="vicreg: weight")
    align_alpha: float = Field(2.0, gt=0, le=10, description="align_uniform: power of distances")
    uniform_t: float = Field(2.0, gt=0, le=100, description="align_uniform: of the Gaussian")
    uniform_weight: float = Field(1.0, ge=0, le=100, description="align_uniform: of uniformity")
    queue_size: int = Field(4096, ge=1, le=2**20, description="info_nce: keys that are remembered")
    target_momentum: float = Field(
        0.99, ge=0, le=1, description="info_nce, byol: what the slow network keeps a step"
    )

    # views: chances and magnitudes; magnitudes of colour are stated at strength 1
    augment: str = Field(
        "all", description="names of augmentations, such as crop,flip; all: by their chances"
    )
    strength: float = Field(0.5, ge=0, le=5, description="scales all magnitudes of colour")
    crop_p: Probability = Field(1.0, description="chance of a random resized crop")
    crop_min_scale: float = Field(0.2, gt=0, le=1, description="least area of a crop, fraction")
    flip_p: Probability = Field(0.5, description="chance of a horizontal flip")
    vflip_p: Probability = Field(0.0, description="chance of a vertical flip")
    rotation_p: Probability = Field(0.0, description="chance of a rotation")
    rotation: float = Field(15.0, ge=0, le=180, description="most, degrees to either side")
    translation_p: Probability = Field(0.0, description="chance of a translation")
    translation: float = Field(0.1, ge=0, le=1, description="most, fraction of the side, each axis")
    scaling_p: Probability = Field(0.0, description="chance of scaling the content")
    scaling: float = Field(0.2, ge=0, lt=1, description="most, factor 1 - this to 1 + this")
    jitter_p: Probability = Field(0.8, description="chance of the colour jitter")
    jitter: Literal["hsv", "linear"] = Field(
        "hsv", description="hue in HSV (exact) or as a linear rotation in YIQ (faster)"
    )
    brightness: float = Field(0.8, ge=0, le=2, description="jitter magnitude at strength 1")
    contrast: float = Field(0.8, ge=0, le=2, description="jitter magnitude at strength 1")
    saturation: float = Field(0.8, ge=0, le=2, description="jitter magnitude at strength 1")
    hue: float = Field(0.2, ge=0, le=0.5, description="jitter magnitude at strength 1, turns")
    grayscale_p: Probability = Field(0.2, description="chance of losing colour")
    grayscale: float = Field(
        2.0, ge=0, le=5, description="share of colour lost at strength 1; above 1: all of it"
    )
    blur_p: Probability = Field(0.0, description="chance of a Gaussian blur")
    blur_sigma: float = Field(2.0, ge=0, le=10, description="most at strength 1, pixels")
    solarize_p: Probability = Field(0.0, description="chance of inverting the brightest values")
    solarize: float = Field(
        0.5, ge=0, le=1, description="part of the range that is inverted at strength 1"
    )
    cutout_p: Probability = Field(0.0, description="chance of a blank square")
    cutout: float = Field(0.5, ge=0, le=1, description="its side, fraction of the image's")

    # adaptation: tasks linear and finetune
    labels_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the train labels that adaptation may use"
    )
    labels_seed: int = Field(0, ge=0, lt=2**63, description="of which labels these are")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: every class counts alike, however many images it has"
    )
    head: str = Field(
        "linear", description="finetune: linear, mlp, file.py:function or module:function"
    )
    head_init: Literal["random", "probe"] = Field(
        "random", description="finetune: probe: a linear head begins as the classifier of linear"
    )
    head_lr: float = Field(
        1.0, gt=0, le=1000, description="finetune: the head's learning rate, times the encoder's"
    )
    tuned_stages: int | None = Field(
        None, ge=0, le=1000, description="finetune: last stages that are tuned; none: all; 0: head"
    )
    stage_decay: float = Field(
        1.0, gt=0, le=1, description="finetune: learning rate of a stage, times the next one's"
    )
    norm_statistics: Literal["batch", "kept"] = Field(
        "batch", description="finetune: kept: the encoder's batch norms go by those they came with"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="finetune: probability that is spread over all classes"
    )
    probe_l2: float = Field(
        1e-3, gt=0, le=1e3, description="linear, and head_init=probe: weight of the penalty"
    )

    # optimisation
    epochs: float = Field(
        10.0, gt=0, le=100_000, description="length, in passes over as many images as train has"
    )
    batch_size: int = Field(256, ge=2, le=65536, description="images a step, two views each")
    micro_batch_size: int | None = Field(
        None, ge=1, le=65536, description="most images encoded at a time, same gradients; none: all"
    )
    optimizer: str = Field("adamw", description="adam, adamw, sgd or lars")
    lr: float = Field(1e-3, gt=0, le=100, description="peak learning rate at batch size 256")
    lr_scaling: Literal["none", "sqrt", "linear"] = Field(
        "none", description="how the learning rate grows with the batch size"
    )
    weight_decay: float = Field(
        1e-4, ge=0, le=10, description="of matrices; adam: in the gradient, as L2 is"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd and lars")
    lars_trust: float = Field(1e-3, gt=0, le=1, description="lars: trust coefficient")
    clip_norm: float | None = Field(None, gt=0, description="most norm of all gradients together")
    schedule: str = Field("wsd", description="wsd, cosine or constant")
    warmup: float = Field(0.05, ge=0, le=1, description="linear warm-up, fraction of the run")
    cooldown: float = Field(0.1, ge=0, le=1, description="wsd: final decay, fraction of the run")
    ema_decay: float | None = Field(
        None, ge=0, lt=1, description="measure and keep averaged weights; kept of them a step"
    )

    # measuring and running
    report_every: int | None = Field(None, ge=1, description="images; none: once an epoch")
    linear_probe: Literal["end", "always", "never"] = Field(
        "end", description="at which reports a linear classifier is fitted"
    )
    val_loss: bool = Field(False, description="the loss on val at each report")
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, views and order of the data")
    split_seed: int = Field(0, ge=0, lt=2**63, description="of the train/val/test split")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast where the hardware computes in it"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; none: torch's own choice")

    @field_validator("augment", mode="after")
    @classmethod
    def _known_augmentations(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        known = get_args(Augmentation)
        if names in (["all"], ["none"]):
            return names[0]
        for name in names:
            if name not in known:
                raise ValueError(f"{name!r} is none of {', '.join(known)}; or all, or none")
        return ",".join(name for name in known if name in names)

    @model_validator(mode="after")
    def _named_augmentations_happen(self) -> TrainConfig:
        if self.augment not in ("all", "none"):
            for name in self.augment.split(","):
                if getattr(self, f"{name}_p") == 0:
                    raise ValueError(
                        f"augment names {name}, whose chance {name}_p is 0; "
                        f"set {name}_p or leave {name} out"
                    )
        return self

    @property
    def learning_rate(self) -> float:
        """Peak learning rate at this batch size: `lr` scaled by `lr_scaling`."""
        ratio = self.batch_size / LR_REFERENCE_BATCH
        scale = {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[self.lr_scaling]
        return self.lr * scale

    def chance(self, name: Augmentation) -> float:
        """Chance that a view undergoes an augmentation: its field's, 0 if `augment` lacks it."""
        listed = self.augment == "all" or name in self.augment.split(",")
        return float(getattr(self, f"{name}_p")) if listed else 0.0

    def total_images(self, train_images: int) -> int:
        """Length of the run in images, over a train split of that size.

        That is all of the split, also where an adaptation uses a fraction of its labels: few
        labels are seen more often, they are not few steps.
        """
        return max(1, round(self.epochs * train_images))


def parse_config(fields: Mapping[str, object]) -> TrainConfig:
    """Build a `TrainConfig`; a ValueError of one line names field, value and what is allowed."""
    try:
        return TrainConfig.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, TrainConfig.model_fields, n=1)
            known = f"known fields: {', '.join(TrainConfig.model_fields)}"
            hint = f"did you mean {close[0]}?" if close else known
            raise ValueError(f"unknown field {name!r}; {hint}") from None
        if not name:  # of several fields together
            raise ValueError(message) from None
        raise ValueError(f"{name}: {message}, got {first['input']!r}") from None
