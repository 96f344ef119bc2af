"""An encoded image: its size is known, and only the requested part of its pixels is decoded."""

import io
import math
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastdeit.train.decoders import Box, Decoder
from fastdeit.train.image_files import MAX_MEGAPIXELS, eight_bits, open_image
from fastdeit.train.jpeg_header import JpegHeader, common_jpeg


class ImageSource(Protocol):
    """width and height in pixels; parts of it in the mode that the data set asks for."""

    width: int
    height: int

    def image(self, box: Box | None = None) -> Image.Image:
        """A part of it, or all. Raises what PIL raises if it cannot be decoded."""

    def array(self, box: Box) -> np.ndarray:
        """The same as (height, width, channels) uint8."""


def image_source(
    file: bytes | Image.Image, mode: str, decoder: Decoder | None, max_megapixels: float = MAX_MEGAPIXELS
) -> ImageSource:
    """What file holds, to be decoded by decoder as far as that can, else by Pillow.

    Raises:
        Whatever `open_image` raises of what it cannot read.
    """
    if isinstance(file, Image.Image):
        return DecodedImage(eight_bits(file).convert(mode))
    header = common_jpeg(file) if decoder is not None else None
    if header is None or header.width * header.height > max_megapixels * 1e6:
        return _by_pillow(file, mode, max_megapixels)
    return EncodedJpeg(file, header, mode, decoder)


class DecodedImage:
    """An image that is whole already."""

    def __init__(self, image: Image.Image) -> None:
        self.whole = image
        self.width, self.height = image.size

    def image(self, box: Box | None = None) -> Image.Image:
        if box is None or box == (0, 0, self.width, self.height):
            return self.whole
        return self.whole.crop((box.left, box.top, box.left + box.width, box.top + box.height))

    def array(self, box: Box) -> np.ndarray:
        return np.asarray(self.image(box)).reshape(box.height, box.width, -1)


class EncodedJpeg:
    """A common JPEG, of which only the part that is asked for is decoded where the decoder can do so."""

    def __init__(self, data: bytes, header: JpegHeader, mode: str, decoder: Decoder) -> None:
        self.data, self.header, self.mode, self.decoder = data, header, mode, decoder
        self.width, self.height = header.width, header.height

    def image(self, box: Box | None = None) -> Image.Image:
        box = box or Box(0, 0, self.width, self.height)
        pixels = self._decoded(box)
        if pixels is None:
            return _by_pillow(self.data, self.mode, math.inf).image(box)
        image = Image.fromarray(np.ascontiguousarray(pixels))  # which of a part makes bytes one by one
        return image if self.mode == "RGB" else image.convert(self.mode)

    def array(self, box: Box) -> np.ndarray:
        if self.mode == "RGB":
            pixels = self._decoded(box)
            if pixels is not None:
                return pixels
        return np.asarray(self.image(box)).reshape(box.height, box.width, -1)

    def _decoded(self, box: Box) -> np.ndarray | None:
        """RGB, or None where the decoder fails."""
        try:
            pixels = self.decoder.decode(self.data, self.header, box)
        except Exception:  # of a library's own kind: Pillow says what is wrong with the file
            return None
        return pixels if pixels.shape == (box.height, box.width, 3) and pixels.dtype == np.uint8 else None


def _by_pillow(data: bytes, mode: str, max_megapixels: float) -> DecodedImage:
    try:
        return DecodedImage(open_image(io.BytesIO(data), mode, max_megapixels))
    except UnidentifiedImageError:  # its message names an object, another one each time
        raise UnidentifiedImageError("cannot identify image file") from None
