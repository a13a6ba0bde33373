"""An exported encoder as MLflow serves it: uint8 images in, features out.

MLflow's models name the module that loads them; this is that one, and a copy of this room travels
with each model, so that the server needs nothing of ours installed. No pickle is involved: the
model's data are an `encoder.safetensors`. MLflow itself is not imported.

Shapes: N images, 3 channels, S side of the square images (pixels), F features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.export import ExportedEncoder, load_encoder


class ServedEncoder:
    """What MLflow calls."""

    def __init__(self, encoder: ExportedEncoder) -> None:
        self.encoder = encoder

    def predict(self, images: Any, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """uint8 images [N, 3, S, S] -> float32 features [N, F].

        A ValueError, which the server answers with, for images of another type or shape.
        """
        del params  # there are none
        features: NDArray[np.float32] = self.encoder.features(np.asarray(images)).numpy()
        return features


def _load_pyfunc(path: str) -> ServedEncoder:
    """MLflow's hook: `path` is that of the model's data."""
    return ServedEncoder(load_encoder(path))
