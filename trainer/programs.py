"""An encoder as a program that needs nothing of ours: ONNX, or torch's own `.pt2`.

Both take uint8 images [N, 3, S, S] with any N and normalise them within, so that nobody can
forget it or do it twice. Left out: decoding and resizing, which is Pillow's; see `transform.py`.

Shapes: N images, 3 channels, S side of the square images (pixels), F features.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from trainer.export import ExportedEncoder

INPUT, OUTPUT = "images", "features"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CHATTY = ("torch.onnx", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")
CHECKED_BATCHES = (1, 3)
TOLERANCE = 1e-3
"""Of the largest feature: beyond it the program computes something else. Rounding stays below
1e-5."""


class PixelEncoder(nn.Module):
    """uint8 images [N, 3, S, S] -> float32 features [N, F]; on the CPU, in evaluation mode."""

    mean_1311: Tensor
    std_1311: Tensor

    def __init__(self, encoder: ExportedEncoder) -> None:
        super().__init__()
        own = copy.deepcopy(encoder.encoder).cpu().float()
        self.encoder = own.to(memory_format=torch.contiguous_format)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(encoder, name)).reshape(1, 3, 1, 1)
            self.register_buffer(f"{name}_1311", values)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        scaled = images.to(torch.float32) * (1 / 255)
        features: Tensor = self.encoder((scaled - self.mean_1311) / self.std_1311)
        return features.to(torch.float32)


def check_packages() -> None:
    """ValueError if ONNX cannot be had here, with the remedy."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the format onnx needs {', '.join(missing)}; install by: "
            "pip install 'contrasweep[onnx]'"
        )


def traced(encoder: ExportedEncoder) -> ExportedProgram:
    """The encoder's computation, for any number of images; ValueError if it cannot be traced."""
    size = encoder.config.image_size
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(
                PixelEncoder(encoder), (example,), dynamic_shapes={INPUT: {0: batch}}
            )
    except Exception as error:  # of a dozen types, by what of the network it cannot follow
        why = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"torch cannot trace the encoder {encoder.config.encoder}: {why}; export it as "
            "safetensors"
        ) from error


def save_torch(path: Path, program: ExportedProgram, encoder: ExportedEncoder) -> float:
    """Write a program for `torch.export.load`; returns the largest difference of a feature."""
    content = io.BytesIO()
    with _quiet():
        torch.export.save(program, content, extra_files={"contrasweep.json": _about(encoder)})
        path.write_bytes(content.getvalue())
        loaded = torch.export.load(path).module()
    differences = []
    for images in _some_images(encoder):
        with torch.inference_mode():
            differences.append(_difference(loaded(images), encoder, images))
    return max(differences)


def save_onnx(path: Path, program: ExportedProgram, encoder: ExportedEncoder) -> float:
    """Write an ONNX file, weights within; returns the largest difference of a feature.

    Input `images`, output `features`; what `_about` says stands in its metadata.
    """
    import onnxruntime

    with _quiet():
        found = torch.onnx.export(
            program,
            (),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
        assert found is not None
        found.model.metadata_props["contrasweep"] = _about(encoder)
        # beyond 2 GiB, the limit of one file, torch says so; no encoder comes near it
        found.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return max(
        _difference(
            torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0]), encoder, images
        )
        for images in _some_images(encoder)
    )


def _about(encoder: ExportedEncoder) -> str:
    about = {
        "encoder": encoder.config.encoder,
        "image_size": encoder.config.image_size,
        "feature_dim": encoder.feature_dim,
        "mean": encoder.mean,
        "std": encoder.std,
        "classes": encoder.classes,
        "normalised": "within",
    }
    return json.dumps(about)


def _some_images(encoder: ExportedEncoder) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = encoder.config.image_size
    for count in CHECKED_BATCHES:
        shape = (count, 3, size, size)
        yield torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _difference(found_NF: Tensor, encoder: ExportedEncoder, images: Tensor) -> float:
    """Largest difference to the trainer's features; ValueError if it is no rounding."""
    expected_NF = encoder.features(images)
    difference = float((found_NF - expected_NF).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected_NF.abs().max())):
        raise ValueError(
            f"the program's features differ from the trainer's by {difference:.3g}; export the "
            f"encoder {encoder.config.encoder} as safetensors"
        )
    return difference


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's news of its own work: off the standard output, and no warnings."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        try:
            for each in loggers:
                each.setLevel(logging.ERROR)
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
