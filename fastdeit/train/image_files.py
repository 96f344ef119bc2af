"""One image file, decoded."""

import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from fastdeit.train.transform_errors import described

MAX_MEGAPIXELS = 500.0  # 1.5 GB once decoded; the largest photographs of single cameras have 150
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")  # PIL's modes of grey images
GREY = ("1", "L", "LA")
_LIMIT = threading.Lock()  # around PIL's own limit, which holds for the whole process


class UnreadableImageError(ValueError):
    """An image cannot be decoded; the message starts with its path."""


def read_image(path: str | Path, mode: str | None, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """`open_image`. Raises UnreadableImageError that names path."""
    try:
        return open_image(path, mode, max_megapixels)
    except Exception as error:  # what PIL raises depends on the format and on where the file is damaged
        raise UnreadableImageError(f"{path}: cannot be read as an image: {described(error)}") from error


def open_image(file: str | Path | BinaryIO, mode: str | None, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """The image in PIL's `mode`, decoded whole.

    Args:
        file: a path or an open file.
        mode: `L` or `RGB`; None for that of the two which the image's colours need.
        max_megapixels: refuse an image with more pixels, before it is decoded.

    Raises:
        ValueError: more pixels than that, or a mode that has no white (32-bit integers, floating point).
        Exception: PIL's, which depend on the format and on where the file is damaged.
    """
    with _opened_at_any_size(file) as image:
        megapixels = image.width * image.height / 1e6
        if megapixels > max_megapixels:
            raise ValueError(
                f"{image.width}x{image.height} are {megapixels:.1f} megapixels, max_image_megapixels is {max_megapixels:g}"
            )
        image = eight_bits(image)
        return image.convert(mode or ("L" if image.mode in GREY else "RGB"))


def eight_bits(image: Image.Image) -> Image.Image:
    """image, or its 8-bit version where PIL's `convert` would clip rather than scale.

    Raises:
        ValueError: which value is white cannot be known.
    """
    sixteen = image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen:
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} ({image.format}) does not say which value is white; expected 8 or 16 bits")
    return image


def _opened_at_any_size(file: str | Path | BinaryIO) -> Image.Image:
    """As Image.open, which reads the header, without PIL's limit against decompression bombs."""
    with _LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
