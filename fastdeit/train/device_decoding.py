"""JPEG files decoded, cropped and resized on the device, a batch at a time, and augmented there next: `decode_on: device`.

The pixels are not those of a CPU: nvJPEG computes the inverse DCT and upsamples chroma in its own way, and the resampling is in
float32. Nothing here has been timed on a GPU. Two launches an image are counted beside the decoder's call.
"""

import io
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastdeit.train.config import Config
from fastdeit.train.config_checks import DEVICE_DECODERS
from fastdeit.train.decoders import Box, NvImageCodec, with_decoder
from fastdeit.train.encoded_images import INTERPOLATIONS, OUTSIDE, EncodedImages, Part
from fastdeit.train.ring import Batch, Ticket, as_arrays
from fastdeit.train.transform_errors import described

_LUMA = (19595, 38470, 7471)  # of 65536, as Pillow converts to grey


class DeviceDecoder(Protocol):
    """Decodes common JPEG files to RGB on a device."""

    def decode(self, files: Sequence[np.ndarray], parts: Sequence[Part]) -> list[Tensor | None]:
        """The crop of each file, (height, width, 3) uint8 on the device; None, or another shape, where the library fails."""


class DeviceDecoding:
    """Makes the images of a batch that `EncodedImages` left encoded.

    Args:
        decoder: of files.
        source: of the batches; makes again, by Pillow in this process, what the decoder refuses.
        device: of the images.
    """

    def __init__(self, decoder: DeviceDecoder, source: EncodedImages, device: torch.device) -> None:
        self.decoder = decoder
        self.source = source
        self.device = device

    def __call__(self, batch: Batch, ticket: Ticket) -> tuple[tuple[Tensor, ...], list[str]]:
        """Images (B, H, W, C) uint8, plans, flips and classes on the device; and what was found to be unreadable.

        Work that the current stream has not done yet may still read the batch.
        """
        arena, *_, rows = as_arrays(batch)
        arena = arena.reshape(-1)
        parts = [Part.of_row(row) for row in rows.tolist()]
        contents = [
            np.frombuffer(ticket.beyond[place], np.uint8)
            if part.start == OUTSIDE
            else arena[part.start : part.start + part.length]
            for place, part in enumerate(parts)
        ]
        decoded, whole = self._decoded(contents, parts), self._whole(contents, parts)
        messages: list[str] = []
        for place, crop in decoded.items():
            if crop is None:
                whole[place] = np.empty(batch.images.shape[1:], np.uint8)
                messages += self.source.made_here(ticket.keys[place], batch, place, whole[place])
        crops = {place: crop for place, crop in decoded.items() if crop is not None}
        modes = [INTERPOLATIONS[parts[place].interpolation] for place in crops]
        images = resized(list(crops.values()), modes, batch.images.shape[1:], self.device)
        if whole:
            others = torch.from_numpy(np.stack(list(whole.values())))
            if self.device.type == "cuda":
                others = others.pin_memory()
            pieces = dict(zip(whole, others.to(self.device, non_blocking=True).split(1), strict=True))
            pieces |= zip(crops, images.split(1), strict=False)
            images = torch.cat([pieces[place] for place in range(len(parts))])
        rest = (batch.plans, batch.flips, batch.classes)
        return (images, *(t.to(self.device, non_blocking=True, copy=True) for t in rest)), messages

    def _decoded(self, contents: Sequence[np.ndarray], parts: Sequence[Part]) -> dict[int, Tensor | None]:
        """The crops of files by index in the batch; None for files that the decoder refuses."""
        places = [place for place, part in enumerate(parts) if part.encoded]
        if not places:
            return {}
        found = self.decoder.decode([contents[place] for place in places], [parts[place] for place in places])
        shapes = ((parts[place].box.height, parts[place].box.width, 3) for place in places)
        return {
            place: crop if crop is not None and crop.shape == shape and crop.dtype == torch.uint8 else None
            for place, crop, shape in zip(places, found, shapes, strict=True)
        }

    def _whole(self, contents: Sequence[np.ndarray], parts: Sequence[Part]) -> dict[int, np.ndarray]:
        """The images that workers made, by index in the batch."""
        channels = self.source.pipeline.channels
        return {
            place: contents[place].reshape(part.box.height, part.box.width, channels)
            for place, part in enumerate(parts)
            if not part.encoded
        }


def resized(crops: Sequence[Tensor], modes: Sequence[str], shape: Sequence[int], device: torch.device) -> Tensor:
    """Crops (h, w, 3) uint8 of any sizes as images (B, *shape) uint8, with antialiasing; of one channel by Pillow's weights.

    Args:
        modes: "bilinear" or "bicubic" for each.
        shape: height, width and channels.
    """
    height, width, channels = shape
    made = [torch.empty((0, channels, height, width), device=device)]
    for crop, mode in zip(crops, modes, strict=True):
        planes = crop.permute(2, 0, 1) if channels == 3 else _grey(crop)[None]
        planes = planes[None].to(torch.float32, memory_format=torch.contiguous_format)
        made.append(F.interpolate(planes, (height, width), mode=mode, antialias=True))
    return torch.cat(made).add_(0.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _grey(crop: Tensor) -> Tensor:
    red, green, blue = (weight * crop[..., channel].int() for channel, weight in enumerate(_LUMA))
    return (red + green + blue + 0x8000) >> 16


def create_device_decoder(config: Config, device: torch.device) -> DeviceDecoder:
    """The decoder of config's JPEG files on device.

    Raises:
        ImportError: it is not installed, or has no nvJPEG.
    """
    name = with_decoder(config).decoder
    decoders: dict[str, Callable[[torch.device], DeviceDecoder]]
    decoders = {"nvimgcodec": _NvImageCodec, "torchvision": _Torchvision}
    try:
        made = decoders[name](device)
        (image,) = made.decode(*_sample())
        problem = None if image is not None else "the library gives no image"
    except Exception as error:
        problem = described(error)
    if problem is not None:
        raise ImportError(
            f"decode_on: {name} cannot decode JPEG files on {device}: {problem}. It needs nvJPEG (nvimgcodec's is "
            f"nvidia-nvjpeg-cu12); take another decoder ({' or '.join(DEVICE_DECODERS)}), or set decode_on to cpu"
        )
    return made


def _sample() -> tuple[list[np.ndarray], list[Part]]:
    """A file that every decoder can decode."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    data = np.frombuffer(file.getvalue(), np.uint8)
    return [data], [Part(0, len(data), True, Box(0, 0, 16, 16), 0)]


class _NvImageCodec:
    """NVIDIA's nvImageCodec: nvJPEG decodes the crop alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.library = NvImageCodec(device if device.type == "cuda" else None)

    def decode(self, files: Sequence[np.ndarray], parts: Sequence[Part]) -> list[Tensor | None]:
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        found = self.library.decode_all(files, [part.box for part in parts], stream)
        if self.device.type == "cuda":
            return [None if image is None else torch.from_dlpack(image) for image in found]
        return [None if image is None else torch.from_numpy(np.asarray(image)) for image in found]


class _Torchvision:
    """torchvision's decoder: nvJPEG decodes whole images."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def decode(self, files: Sequence[np.ndarray], parts: Sequence[Part]) -> list[Tensor | None]:
        encoded = [torch.from_numpy(file) if file.flags.writeable else torch.tensor(file) for file in files]
        try:
            images = self._images(encoded)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of one file, which it does not name
            images = [self._image(one) for one in encoded]
        return [
            None if image is None else _part(image.permute(1, 2, 0), part)
            for image, part in zip(images, parts, strict=True)
        ]

    def _images(self, encoded: list[Tensor]) -> list[Tensor | None]:
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self.device)

    def _image(self, encoded: Tensor) -> Tensor | None:
        try:
            return self._images([encoded])[0]
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None


def _part(image: Tensor, part: Part) -> Tensor:
    left, top, width, height = part.box
    return image[top : top + height, left : left + width]
