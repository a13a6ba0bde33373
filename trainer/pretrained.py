"""What a file of `encoder.safetensors` says of its encoder, without reading its weights.

An adaptation takes the encoder's name, the size of the images and their normalisation from there:
with others the weights are not what they were trained to be. Left out: reading the weights, and
files from elsewhere, which say nothing and get the normalisation of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import safe_open

from trainer.config import TrainConfig
from trainer.datasets import DataSplits
from trainer.export import FORMAT_KEY, About

ABOUT = ("encoder", "image_size")
"""Fields of `TrainConfig` that an exported encoder decides."""


def fields_of(path: Path | str) -> dict[str, Any]:
    """`encoder` and `image_size` of an exported encoder; nothing of a file from elsewhere."""
    about = _about(Path(path))
    return {} if about is None else {name: getattr(about, name) for name in ABOUT}


def with_fields_of_encoder(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `TrainConfig` with those that the encoder to adapt decides, where none are given.

    For pre-training they are as they were: it may go on from another size of images.
    """
    weights = fields.get("encoder_weights")
    if weights is None or fields.get("task", "pretrain") == "pretrain":
        return dict(fields)
    there = fields_of(weights) if Path(weights).is_file() else {}
    return {**there, **fields}


def check_exported(path: Path, encoder: str, image_size: int) -> None:
    """Raise a one-line ValueError if the file holds another encoder, or one of other images."""
    stated = fields_of(path)
    for name, found in {"encoder": encoder, "image_size": image_size}.items():
        if stated and stated[name] != found:
            raise ValueError(
                f"{name} is {found}, but {path} holds {stated['encoder']} for images of "
                f"{stated['image_size']} pixels; set {name}={stated[name]} or leave it out"
            )


def normalised_as_trained(config: TrainConfig, data: DataSplits) -> DataSplits:
    """The data with the mean and deviation that the configuration's encoder was trained with.

    As they are where there is no exported encoder to adapt.
    """
    if config.task == "pretrain" or config.encoder_weights is None:
        return data
    about = _about(Path(config.encoder_weights))
    return data if about is None else replace(data, mean=about.mean, std=about.std)


def _about(path: Path) -> About | None:
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="np") as file:
            texts: dict[str, str] = file.metadata() or {}
    except Exception as error:  # of a type of its own, or the file system's
        why = str(error).strip().split("\n")[0]
        raise ValueError(f"encoder {path} cannot be read, export it again: {why}") from None
    if FORMAT_KEY not in texts:
        return None
    try:
        return About.model_validate(texts)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"encoder {path} is damaged: {field}: {first['msg']}") from None
