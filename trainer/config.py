"""`TrainConfig`: everything that decides one training run, in one frozen model.

Two runs with equal configurations on the same machine give the same metrics, so a trial's
record is its configuration. Ranges are the widest that make sense; the narrower ones worth
searching stand in `spaces/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Probability = Annotated[float, Field(ge=0, le=1)]

LR_REFERENCE_BATCH = 256
"""Batch size at which `TrainConfig.lr` is stated."""


class TrainConfig(BaseModel):
    """One run's configuration; an unknown field or a value out of range is an error.

    Sizes of data are in images, `epochs` in passes over the train split, `warmup` and
    `cooldown` in fractions of the whole run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # data
    dataset: str = Field("digits", description="source of images; `contrasweep datasets` lists")
    data_dir: str | None = Field(None, description="folder of downloaded data sets")
    image_size: int = Field(32, ge=8, le=1024, description="side of the square images, pixels")
    train_limit: int | None = Field(None, ge=1, description="images kept of train, stratified")
    val_limit: int | None = Field(None, ge=1, description="images kept of val, stratified")

    # what is learned
    encoder: str = Field("conv_small", description="`contrasweep encoders` lists")
    projector_hidden: int = Field(512, ge=1, le=16384, description="projection head, hidden width")
    projector_out: int = Field(128, ge=1, le=16384, description="projection head, output width")
    loss: str = Field("nt_xent", description="`contrasweep losses` lists")
    temperature: float = Field(0.2, gt=0, le=10, description="nt_xent: divides the similarities")
    margin: float = Field(1.0, gt=0, le=4, description="margin: least distance of negatives")

    # views (He, Chen: SimCLR; magnitudes are multiplied by `strength`)
    strength: float = Field(0.5, ge=0, le=5, description="scales the colour jitter's magnitudes")
    crop_min_scale: float = Field(0.2, gt=0, le=1, description="least area of a crop, fraction")
    flip_p: Probability = Field(0.5, description="chance of a horizontal flip")
    jitter_p: Probability = Field(0.8, description="chance of the colour jitter")
    jitter: Literal["hsv", "linear"] = Field(
        "hsv", description="hue in HSV (exact) or as a linear rotation in YIQ (faster)"
    )
    brightness: float = Field(0.8, ge=0, le=2, description="jitter magnitude at strength 1")
    contrast: float = Field(0.8, ge=0, le=2, description="jitter magnitude at strength 1")
    saturation: float = Field(0.8, ge=0, le=2, description="jitter magnitude at strength 1")
    hue: float = Field(0.2, ge=0, le=0.5, description="jitter magnitude at strength 1, turns")
    grayscale_p: Probability = Field(0.2, description="chance of losing all colour")

    # optimisation
    epochs: float = Field(10.0, gt=0, le=100_000, description="length of the run")
    batch_size: int = Field(256, ge=2, le=65536, description="images a step, two views each")
    optimizer: str = Field("adamw", description="adamw or sgd")
    lr: float = Field(1e-3, gt=0, le=100, description="peak learning rate at batch size 256")
    lr_scaling: Literal["none", "sqrt", "linear"] = Field(
        "none", description="how the learning rate grows with the batch size"
    )
    weight_decay: float = Field(1e-4, ge=0, le=10)
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    schedule: str = Field("wsd", description="wsd or cosine")
    warmup: float = Field(0.05, ge=0, le=1, description="linear warm-up, fraction of the run")
    cooldown: float = Field(0.1, ge=0, le=1, description="wsd: final decay, fraction of the run")

    # measuring and running
    report_every: int | None = Field(None, ge=1, description="images; none: once an epoch")
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, views and order of the data")
    split_seed: int = Field(0, ge=0, lt=2**63, description="of the train/val/test split")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast where the hardware computes in it"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; none: torch's own choice")

    @property
    def learning_rate(self) -> float:
        """Peak learning rate at this batch size: `lr` scaled by `lr_scaling`."""
        ratio = self.batch_size / LR_REFERENCE_BATCH
        scale = {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[self.lr_scaling]
        return self.lr * scale

    def total_images(self, train_images: int) -> int:
        """Length of the run in images, over a train split of that size."""
        return max(1, round(self.epochs * train_images))


def parse_config(fields: Mapping[str, object]) -> TrainConfig:
    """Build a `TrainConfig`; a ValueError of one line names field, value and what is allowed."""
    try:
        return TrainConfig.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "configuration"
        if first["type"] == "extra_forbidden":
            known = ", ".join(TrainConfig.model_fields)
            raise ValueError(f"unknown field {name!r}; known fields: {known}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{name}: {message}, got {first['input']!r}") from None
