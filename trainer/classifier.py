"""`classifier.safetensors`: an adapted encoder with its head, and all that using it needs.

The file holds the weights of both under `encoder.` and `head.`, and beside them as text the head's
name, the names of the classes, the size and normalisation of the images and the `TrainConfig` of
the adaptation. It can run no code: a head of the user's own is named in it, and imported by nobody
but the user, who passes it.

    classifier = load_classifier("classifier.safetensors")
    classifier.predict(["cat.jpg", "dog.jpg"])  # -> ["cat", "dog"]

Shapes: N images, 3 channels, S side of the square images (pixels), C classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Json, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from trainer.atomic import replacing
from trainer.config import TrainConfig, parse_config
from trainer.export import About
from trainer.heads import HEADS, MakeHead, load_head
from trainer.models import build_encoder
from trainer.transform import ImageTransform, Picture

if TYPE_CHECKING:
    from trainer.adapt import Adapter

FORMAT = "1"
"""Raised when a new version can no longer read the old files."""
FORMAT_KEY = "contrasweep_classifier"
BATCH = 256
"""Images classified at a time."""


class AboutClassifier(About):
    head: str
    classes: Json[tuple[str, ...]]


class Classifier(nn.Module):
    """An encoder and its head to use: normalised float images [N, 3, S, S] -> logits [N, C].

    `transform` makes such an image of a file, a PIL image or pixels; `predict` and `probabilities`
    take those as they are. `classes` are the C names in the order of the logits. In evaluation
    mode as it is loaded.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        config: TrainConfig,
        feature_dim: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        classes: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.config, self.feature_dim = config, feature_dim
        self.mean, self.std, self.classes = mean, std, classes
        self.transform = ImageTransform(config.image_size, mean, std)

    def forward(self, images_N3SS: Tensor) -> Tensor:
        """Logits [N, C] of images of `transform`, stacked."""
        if not images_N3SS.is_floating_point():
            raise ValueError(
                f"the classifier takes normalised float images, got {images_N3SS.dtype}; "
                "use transform for each image, or predict"
            )
        logits_NC: Tensor = self.head(self.encoder(images_N3SS))
        return logits_NC

    @torch.inference_mode()
    def probabilities(self, pictures: Sequence[Picture] | Tensor) -> Tensor:
        """Probabilities [N, C], float32 on the CPU; a picture is whatever `transform` takes."""
        was_training = self.training
        self.eval()
        device = next(self.parameters()).device
        parts = [torch.empty(0, len(self.classes))]
        for start in range(0, len(pictures), BATCH):
            batch = torch.stack([self.transform(each) for each in pictures[start : start + BATCH]])
            batch = batch.to(device).contiguous(memory_format=torch.channels_last)
            parts.append(self(batch).float().softmax(dim=1).cpu())
        self.train(was_training)
        return torch.cat(parts)

    def predict(self, pictures: Sequence[Picture] | Tensor) -> list[str]:
        """The most probable class of each picture."""
        return [self.classes[number] for number in self.probabilities(pictures).argmax(dim=1)]


def save_classifier(path: Path, adapter: Adapter) -> None:
    """Write an adaptation's classifier to `path`, replacing an older file once it is on disk.

    The folder is made if it is missing.
    """
    config, data = adapter.config, adapter.data
    texts = {
        "encoder": config.encoder,
        "head": config.head if config.task == "finetune" else "linear",
        "image_size": str(config.image_size),
        "feature_dim": str(adapter.feature_dim),
        "mean": json.dumps([float(value) for value in data.mean]),
        "std": json.dumps([float(value) for value in data.std]),
        "classes": json.dumps(list(data.classes)),
        "config": config.model_dump_json(),
    }
    state = adapter.classifier.state_dict()
    weights = {key: value.cpu().contiguous().clone() for key, value in state.items()}
    # "pt" is what other readers of PyTorch's weights look for.
    content = save(weights, metadata={"format": "pt", FORMAT_KEY: FORMAT, **texts})
    with replacing(path) as file:
        file.write(content)


def load_classifier(
    path: Path | str, head: str | MakeHead | None = None, device: torch.device | str = "cpu"
) -> Classifier:
    """Read a file of `save_classifier`; a ValueError of one line says why it cannot be read.

    `head` is the user's own head, a function or its reference, which a file with such a head
    needs: nothing that a file names is imported. torch's generators are left as they are.
    """
    path = Path(path).expanduser()
    path = path / "classifier.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"classifier {path} does not exist or is no file; check the path")
    if path.suffix != ".safetensors":
        raise ValueError(f"classifier {path} must be a .safetensors file; no other is opened")
    try:
        with safe_open(path, framework="pt") as file:
            texts: dict[str, str] = file.metadata() or {}
        state = load_file(path)
    except Exception as error:  # of a type of its own, or the file system's
        why = str(error).strip().split("\n")[0]
        raise ValueError(f"classifier {path} cannot be read, save it again: {why}") from None
    if texts.get(FORMAT_KEY) != FORMAT:
        raise ValueError(
            f"{path} is no classifier of format {FORMAT}; `contrasweep adapt` makes one of an "
            "encoder"
        )
    try:
        about = AboutClassifier.model_validate(texts)
        config = parse_config(about.config)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"classifier {path} is damaged: {field}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"classifier {path} is damaged: {error}") from None
    if about.head not in HEADS and head is None:
        raise ValueError(
            f"classifier {path} has the head {about.head!r}, which no file may import; pass your "
            "own: load_classifier(path, head=FUNCTION)"
        )
    make = load_head(about.head if about.head in HEADS and head is None else head or about.head)
    with torch.random.fork_rng(devices=[]):
        try:
            encoder, feature_dim = build_encoder(config.encoder, config.image_size)
        except ValueError as error:
            raise ValueError(f"classifier {path} is damaged: {error}") from None
        built = make(feature_dim, len(about.classes))
    stated = (about.encoder, about.image_size, about.feature_dim)
    if stated != (found := (config.encoder, config.image_size, feature_dim)):
        raise ValueError(
            f"classifier {path} is damaged: it states {stated}, its contents are {found}"
        )
    classifier = Classifier(
        encoder, built, config, feature_dim, about.mean, about.std, about.classes
    )
    try:
        classifier.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).split()[:40])
        raise ValueError(
            f"the weights in classifier {path} do not fit its encoder and the head "
            f"{about.head if head is None else 'that was passed'}: {why}"
        ) from None
    return classifier.to(device).eval()
