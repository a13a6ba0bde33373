"""`encoder.safetensors`: a trained encoder in one file that says all that using it needs.

The file holds the encoder's weights, and beside them as text its name, image size and number of
features, the mean and standard deviation that images are normalised with, the names of the
classes and the whole `TrainConfig`. Other programs read it with the safetensors library; it can
run no code. What training alone needs, such as the projection head, is in checkpoints.

    encoder = load_encoder("encoder.safetensors")
    batch_N3SS = torch.stack([encoder.transform(path) for path in paths])
    features_NF = encoder(batch_N3SS)

Shapes: N images, 3 channels, S side of the square images (pixels), F features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from trainer.atomic import replacing
from trainer.augment import normalise
from trainer.config import TrainConfig, parse_config
from trainer.models import build_encoder, load_encoder_weights
from trainer.transform import ImageTransform

FORMAT = "1"
"""Raised when a new version can no longer read the old files."""
FORMAT_KEY = "contrasweep"
"""Entry of the metadata that holds `FORMAT`; files without it are from elsewhere."""
FILE = "encoder.safetensors"
"""Its usual name."""
BATCH = 512
"""Images encoded at a time."""

Positive = Annotated[float, Field(gt=0)]


class About(BaseModel):
    """What stands beside the weights, in text, as safetensors has it."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    encoder: str
    image_size: int
    feature_dim: int
    mean: Json[tuple[float, float, float]]
    std: Json[tuple[Positive, Positive, Positive]]
    classes: Json[tuple[str, ...]]
    config: Json[dict[str, Any]]


class ExportedEncoder(nn.Module):
    """An encoder to use: normalised float images [N, 3, S, S] -> features [N, F].

    `transform` makes such an image of a file, a PIL image or pixels; `features` takes pixels as
    they are. `mean` and `std` are of the three channels in [0, 1]; `classes` are the names of
    those that it was measured on, perhaps none; `feature_dim` is F; `encoder` the network within.
    It is given in evaluation mode, to be used; `train()` and an optimiser train it further.
    """

    def __init__(
        self,
        encoder: nn.Module,
        config: TrainConfig,
        feature_dim: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        classes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config
        self.feature_dim = feature_dim
        self.mean, self.std = mean, std
        self.classes = classes
        self.transform = ImageTransform(config.image_size, mean, std)
        self.train(encoder.training)

    def forward(self, images_N3SS: Tensor) -> Tensor:
        """Encode images of `transform`, stacked: [N, F]."""
        if not images_N3SS.is_floating_point():
            raise ValueError(
                f"the encoder takes normalised float images, got {images_N3SS.dtype}; "
                "use transform for each image, or features for uint8 ones"
            )
        features: Tensor = self.encoder(images_N3SS)
        return features

    @torch.inference_mode()
    def features(self, images_N3SS: NDArray[np.uint8] | Tensor) -> Tensor:
        """Encode uint8 images [N, 3, S, S], S = `config.image_size`: float32 [N, F] on the CPU.

        Computed in float32 on the encoder's device, a batch at a time. Images of another type or
        shape are a ValueError.
        """
        size = self.config.image_size
        shape, kind = tuple(images_N3SS.shape), str(images_N3SS.dtype).removeprefix("torch.")
        if kind != "uint8" or len(shape) != 4 or shape[1:] != (3, size, size):
            raise ValueError(
                f"images must be uint8 [N, 3, {size}, {size}], got {kind} {list(shape)}; "
                "resize and convert them"
            )
        device = next(self.encoder.parameters()).device
        parts = [torch.empty(0, self.feature_dim)]
        for start in range(0, len(images_N3SS), BATCH):
            part = images_N3SS[start : start + BATCH]
            if isinstance(part, np.ndarray):
                part = torch.from_numpy(part.copy())  # may be read-only, or strided backwards
            batch = normalise(part.to(device), self.mean, self.std)
            features = self.encoder(batch.contiguous(memory_format=torch.channels_last))
            parts.append(features.float().cpu())
        return torch.cat(parts)


def save_encoder(
    path: Path,
    encoder: nn.Module,
    *,
    config: TrainConfig,
    feature_dim: int,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str],
) -> None:
    """Write an encoder of `config` to `path`, replacing an older file once the new is on disk.

    `mean` and `std` are those that it was trained with, of the three channels in [0, 1];
    `classes` the names of the classes in the order of their numbers, or nothing. The folder is
    made if it is missing.
    """
    texts = {
        "encoder": config.encoder,
        "image_size": str(config.image_size),
        "feature_dim": str(feature_dim),
        "mean": json.dumps([float(value) for value in mean]),
        "std": json.dumps([float(value) for value in std]),
        "classes": json.dumps(list(classes)),
        "config": config.model_dump_json(),
    }
    weights = {key: value.cpu().contiguous() for key, value in encoder.state_dict().items()}
    # "pt" is what other readers of PyTorch's weights look for.
    content = save(weights, metadata={"format": "pt", FORMAT_KEY: FORMAT, **texts})
    with replacing(path) as file:
        file.write(content)


def save_exported(path: Path, encoder: ExportedEncoder) -> None:
    """Write an encoder that was read, or came out of a checkpoint, as `save_encoder` does."""
    save_encoder(
        path,
        encoder.encoder,
        config=encoder.config,
        feature_dim=encoder.feature_dim,
        mean=encoder.mean,
        std=encoder.std,
        classes=encoder.classes,
    )


def fingerprint(encoder: ExportedEncoder) -> str:
    """32 hex digits that tell encoders apart: of weights, configuration and normalisation."""
    about = [encoder.config.model_dump_json(), encoder.mean, encoder.std, encoder.classes]
    digest = hashlib.sha256(json.dumps(about).encode())
    for key, value in sorted(encoder.encoder.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def encoder_file(path: Path | str) -> Path:
    """The file that a path names: itself, or `encoder.safetensors` in a folder.

    ValueError where there is none, or where it is plainly one of another format.
    """
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"encoder {path} does not exist or is no file; give an {FILE} or its folder"
        )
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(
            f"encoder {path} cannot be read: it is a pickle or an archive, which may hold code, "
            f"and was not opened; give an {FILE}"
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"encoder {path} must be a .safetensors file; give an {FILE}")
    return path


def load_encoder(path: Path | str, device: torch.device | str = "cpu") -> ExportedEncoder:
    """Read a file of `save_encoder`, or the one in a folder; it can run no code.

    A ValueError of one line says why it cannot be read. torch's generators are left as they are.
    """
    path = encoder_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except Exception as error:  # of a type of its own, or the file system's
        why = str(error).strip().split("\n")[0]
        raise ValueError(f"encoder {path} cannot be read, export it again: {why}") from None
    if metadata.get(FORMAT_KEY) != FORMAT:
        raise ValueError(
            f"encoder {path} is not one of a trainer of format {FORMAT}; use encoder_weights to "
            "train from it, or export it again"
        )
    try:
        about = About.model_validate(metadata)
        config = parse_config(about.config)
        with torch.random.fork_rng(devices=[]):
            encoder, feature_dim = build_encoder(config.encoder, config.image_size)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"encoder {path} is damaged: {field}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"encoder {path} is damaged: {error}") from None
    stated = (about.encoder, about.image_size, about.feature_dim)
    built = (config.encoder, config.image_size, feature_dim)
    if stated != built:
        raise ValueError(f"encoder {path} is damaged: it states {stated}, its contents are {built}")
    load_encoder_weights(encoder, path)
    return ExportedEncoder(
        encoder.to(device).eval(), config, feature_dim, about.mean, about.std, about.classes
    )
