"""An opened image of any kind -> square `uint8` pixels, as all of training sees them.

Pillow and numpy alone: it runs in worker processes, which never import torch.

Shapes: 3 channels, S pixels a side.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

_EXIF_ORIENTATION = 0x0112


def square_pixels(image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """An image -> uint8 [3, S, S]: upright, RGB, centre square, antialiased.

    Shorter side to `image_size` and centre crop in one resampling; transparency becomes white,
    16-bit grey its upper 8 bits. A JPEG that was opened and not yet decoded is decoded by this, at
    a part of its size where that is enough. Raises whatever Pillow raises for a corrupt file, and
    a ValueError for numbers without a known range (float TIFF) and for an image of no pixels.
    """
    # JPEG can decode at 1/2, 1/4 or 1/8 for a fraction of the time; twice the wanted size
    # is kept, so that the resampling below still does the antialiasing.
    image.draft("RGB", (2 * image_size, 2 * image_size))
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image = _to_rgb(image)
    width, height = image.size
    side = min(width, height)
    if side == 0:
        raise ValueError(f"an image needs pixels, got {width} x {height}")
    if image.size != (image_size, image_size):
        left, top = (width - side) / 2, (height - side) / 2
        image = image.resize(
            (image_size, image_size),
            Image.Resampling.BICUBIC,
            box=(left, top, left + side, top + side),
        )
    return np.asarray(image).transpose(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit PNG and TIFF: Pillow's own conversion clips at 255
        grey_SS = np.asarray(image).astype(np.int64)
        return Image.fromarray((grey_SS.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # Pillow would clip at 0 and 255, and most have a range of 0 to 1
        raise ValueError("floating-point pixels have no known range; convert them to 8 or 16 bits")
    if image.has_transparency_data:  # what lies beneath transparent pixels is arbitrary
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
