"""One image file, decoded."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image

from fastdeit.train.transform_errors import described


class UnreadableImageError(ValueError):
    """An image cannot be decoded; the message starts with its path."""


def read_image(path: str | Path, mode: str) -> Image.Image:
    """In PIL's `mode`, decoded whole. Raises UnreadableImageError that names path."""
    try:
        return open_image(path, mode)
    except Exception as error:  # what PIL raises depends on the format and on where the file is damaged
        raise UnreadableImageError(f"{path}: cannot be read as an image: {described(error)}") from error


def open_image(file: str | Path | BinaryIO, mode: str) -> Image.Image:
    """As `read_image`, of an open file as well, with the errors that PIL raises."""
    with Image.open(file) as image:
        return image.convert(mode)
