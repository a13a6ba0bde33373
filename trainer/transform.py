"""What a user has, a file, a PIL image or pixels -> the tensor that an encoder takes.

Resized as training resizes the images of a folder, so that features are those of the trainer.

Shapes: 3 channels, H x W pixels of any size, S side of the square images (pixels).
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from trainer.augment import normalise
from trainer.images import read_image
from trainer.square import square_pixels

Picture = Image.Image | Tensor | NDArray[np.uint8] | str | PathLike[str]


@dataclass(frozen=True)
class ImageTransform:
    """One picture -> one normalised float32 image [3, S, S]; picklable, as data loaders want it.

    A picture is the path of an image file, a PIL image of any mode and size, or uint8 pixels
    [3, H, W] in RGB order as an array or tensor. `mean` and `std` are of the channels in [0, 1].
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, picture: Picture) -> Tensor:
        """See the class. ValueError in one line for a picture of another kind, or a broken one."""
        pixels = torch.from_numpy(np.array(self.pixels(picture)))
        return normalise(pixels[None], self.mean, self.std)[0]

    def pixels(self, picture: Picture) -> NDArray[np.uint8]:
        """The same before it is normalised: uint8 [3, S, S], which `features` takes."""
        if isinstance(picture, Image.Image):
            try:
                return _of_opened(picture, self.image_size)
            except (ValueError, MemoryError):
                raise
            except Exception as error:  # Pillow's decoders raise anything
                why = str(error).strip().split("\n")[0] or type(error).__name__
                raise ValueError(f"the picture is corrupt: {why}; leave it out") from error
        if isinstance(picture, str | PathLike):
            return read_image(fspath(picture), self.image_size)
        return _of_array(picture, self.image_size)


def _of_opened(image: Image.Image, size: int) -> NDArray[np.uint8]:
    stream = getattr(image, "fp", None)
    if isinstance(image, JpegImageFile) and image.tile and stream is not None and not image.tell():
        # Of a file that is not decoded yet training decodes a part. That changes the size of the
        # image, so it is done to another one of the same file.
        place = stream.tell()
        try:
            with Image.open(stream) as same:
                return square_pixels(same, size)
        finally:
            stream.seek(place)
    return square_pixels(image, size)


def _of_array(pixels: Any, size: int) -> NDArray[np.uint8]:
    shape = tuple(getattr(pixels, "shape", ()))
    kind = str(getattr(pixels, "dtype", type(pixels).__name__)).removeprefix("torch.")
    if kind != "uint8" or len(shape) != 3 or shape[0] != 3:
        raise ValueError(
            "a picture must be a path, a PIL image or uint8 pixels [3, H, W], got "
            f"{kind} {list(shape)}; convert it"
        )
    array = pixels.cpu().numpy() if isinstance(pixels, Tensor) else np.asarray(pixels)
    if array.shape[1:] == (size, size):
        return array
    return square_pixels(Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0))), size)
