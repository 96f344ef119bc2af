"""From one encoded image to a training image: crop, resize, flip, and augmentation, done or planned.

All random numbers are those of the transforms that `train_transform` made, drawn in their order, so that the images are timm's
whichever way they are made.
"""

import random
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from fastdeit.train.decoders import Box
from fastdeit.train.image_sources import EncodedJpeg, ImageSource
from fastdeit.train.plans import Planner, Recorder, why_not_planned
from fastdeit.train.transform_errors import NamedTransforms, TransformFailure

LEFT_RIGHT, TOP_BOTTOM = 1, 2  # flips as `fastdeit.ops.augment` has them
_RESAMPLING = {
    InterpolationMode.NEAREST: Image.Resampling.NEAREST,
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
}
_RESIZE = {
    InterpolationMode.BILINEAR: torch.ops.aten._upsample_bilinear2d_aa.out,
    InterpolationMode.BICUBIC: torch.ops.aten._upsample_bicubic2d_aa.out,
}
# A crop that is larger in relation to the result is resized on the CPU: PyTorch's kernel for CUDA keeps the weights of a result's
# pixel, and rows of as many, in 48 KB of shared memory.
LARGEST_REDUCTION = 32
_TRANSPOSE = {LEFT_RIGHT: Image.Transpose.FLIP_LEFT_RIGHT, TOP_BOTTOM: Image.Transpose.FLIP_TOP_BOTTOM}


class PlannedImage(NamedTuple):
    """What has been drawn of an image that is not made yet.

    Attributes:
        source: of the whole image.
        box: the crop.
        mode: how it is to be resized.
        flips: that are left to do.
        image: the crop, resized, where something had to be done to it that no plan describes.
    """

    source: ImageSource
    box: Box
    mode: InterpolationMode
    flips: int
    image: Image.Image | None


class ImagePipeline:
    """Makes training images.

    Args:
        transform: of `train_transform`: a crop, flips, augmentation, and the conversion to a tensor.
        size: height and width of the result.
        mode: PIL's.
        resize: "pillow", exactly as timm's, or "torch", PyTorch's antialiased kernel on uint8.
        planned: leave flips and augmentation to `fastdeit.ops.augment`.

    Raises:
        ValueError: the transforms cannot be planned.
    """

    def __init__(
        self, transform: NamedTransforms, size: tuple[int, int], mode: str, resize: str, planned: bool
    ) -> None:
        self.height, self.width = size
        self.channels = 1 if mode == "L" else 3
        self.resize = resize
        self.crop_option, self.crop = transform.steps[0]
        self.flips, steps = split_flips(transform)
        self.augmentation = steps
        self.planner = None
        if planned:
            reason = why_not_planned(steps)
            if reason is not None:
                raise ValueError(reason)
            self.planner = Planner(steps)

    @property
    def layers(self) -> int:
        """Rows of a plan."""
        return 0 if self.planner is None else self.planner.layers

    def __call__(self, source: ImageSource, out: np.ndarray, rows: np.ndarray) -> int:
        """Writes the image into out and its plan into rows, and returns the flips that are left to do.

        Args:
            out: (height, width, channels) uint8.
            rows: (layers, 8) float64.

        Raises:
            TransformFailure: a transform failed. Whatever PIL raises: the image cannot be decoded.
        """
        if self.plans_first:
            planned = self.planned(source, rows)
            self.finish(planned, out)
            return planned.flips
        image, flips = self.augmented(self.resized(*self.part(source)), rows)
        self.write(image, out)
        return flips

    @property
    def plans_first(self) -> bool:
        """Whether all random numbers of an image can be drawn before it is decoded: `planned`, then `finish`."""
        return self.planner is not None and self.draws_crop

    @property
    def draws_crop(self) -> bool:
        """Whether the crop is one of random size."""
        return isinstance(self.crop, RandomResizedCropAndInterpolation)

    def planned(self, source: ImageSource, rows: np.ndarray) -> "PlannedImage":
        """Draws all that is random about an image, and writes its plan into rows. Raises as `__call__`."""
        box, mode = self.drawn_crop(source)
        flips = self._drawn_flips()
        made = PlannedImage(source, box, mode, flips, None)

        def decoded() -> Image.Image | np.ndarray:
            try:
                part = self.cropped(made)
            except Exception as error:
                raise _UndecodableError(error) from error
            return self.resized(part, mode)

        try:
            image = self._noted(decoded, flips, rows)
        except _UndecodableError as error:
            raise error.error from None
        return made if image is None else made._replace(flips=0, image=image)

    def finish(self, planned: "PlannedImage", out: np.ndarray) -> None:
        """Writes the image into out, (height, width, channels) uint8. Raises as `__call__`."""
        if planned.image is None:
            self.resize_into(self.cropped(planned), planned.mode, out)
        else:
            self.write(planned.image, out)

    def cropped(self, planned: "PlannedImage") -> Image.Image | np.ndarray:
        """The crop, decoded."""
        source = planned.source
        return source.array(planned.box) if self.resize == "torch" else source.image(planned.box)

    def part(self, source: ImageSource) -> tuple[Image.Image | np.ndarray, InterpolationMode | None]:
        """The random crop, decoded, and how it is to be resized; the whole image where the crop is not one of a size to draw."""
        if not self.draws_crop:
            return source.image(), None
        box, mode = self.drawn_crop(source)
        return (source.array if self.resize == "torch" else source.image)(box), mode

    def drawn_crop(self, source: ImageSource) -> tuple[Box, InterpolationMode]:
        """The random crop of an image of source's size, and how it is to be resized."""
        crop: Any = self.crop
        with _Named(self.crop_option):
            top, left, height, width = crop.get_params(_Extent(source.width, source.height), crop.scale, crop.ratio)
            mode = crop.interpolation
            return Box(left, top, width, height), random.choice(mode) if isinstance(mode, tuple | list) else mode

    def encoded(self, source: ImageSource, rows: np.ndarray) -> tuple[bytes, bool, Box, InterpolationMode, int]:
        """What is left to the device of an image of a random crop with a plan; writes the plan into rows.

        Returns:
            A JPEG file, True, the part of it and how that is to be resized; or, where the device cannot make the image, the image
            itself, (height, width, channels) uint8, False and its extent. Last the flips that are left to do.
        """
        planned = self.planned(source, rows)
        box, mode, flips, image = planned[1:]
        reduction = max(box.width / self.width, box.height / self.height)
        if image is None and isinstance(source, EncodedJpeg) and reduction <= LARGEST_REDUCTION:
            return source.data, True, box, mode, flips
        made = self.resized(self.cropped(planned), mode) if image is None else image
        return np.asarray(made).tobytes(), False, Box(0, 0, self.width, self.height), mode, flips

    def resized(
        self, part: Image.Image | np.ndarray, interpolation: InterpolationMode | None
    ) -> Image.Image | np.ndarray:
        """The crop in the result's size: an image, or (height, width, channels) uint8."""
        with _Named(self.crop_option):
            if interpolation is None:
                return self.crop(part)
            if self.resize == "torch":
                out = np.empty((self.height, self.width, self.channels), np.uint8)
                self.resize_into(part, interpolation, out)
                return out
            return part.resize((self.width, self.height), _RESAMPLING[interpolation])

    def resize_into(self, part: Image.Image | np.ndarray, interpolation: InterpolationMode, out: np.ndarray) -> None:
        """Writes what `resized` gives of a random crop into out, (height, width, channels) uint8."""
        if self.resize == "torch":
            with _Named(self.crop_option):
                _resize_by_torch(part, interpolation, out)
        else:
            self.write(self.resized(part, interpolation), out)

    def augmented(self, image: Image.Image | np.ndarray, rows: np.ndarray) -> tuple[Image.Image | np.ndarray, int]:
        """The image after what is not planned, and the flips that are left to do; writes the plan into rows."""
        flips = self._drawn_flips()
        if self.planner is None:
            with _Named("hflip"):
                image = flipped(as_image(image), flips)
            for option, step in self.augmentation:
                with _Named(option):
                    image = step(image)
            return image, 0
        changed = self._noted(lambda: image, flips, rows)
        return (image, flips) if changed is None else (changed, 0)

    def _drawn_flips(self) -> int:
        flips = 0
        for option, step in self.flips:
            with _Named(option):
                if torch.rand(1).item() < np.float32(step.p):  # as torchvision's tensor compares
                    flips |= LEFT_RIGHT if isinstance(step, transforms.RandomHorizontalFlip) else TOP_BOTTOM
        return flips

    def _noted(self, made: Callable[[], Image.Image | np.ndarray], flips: int, rows: np.ndarray) -> Image.Image | None:
        """Writes the plan into rows. Where it begins with something that no plan describes, that is done to the image that `made`
        gives, and the result returned, flipped; else None, and the flips are left to do."""
        planner = self.planner
        assert planner is not None
        recorder = Recorder((self.width, self.height), lambda: flipped(as_image(made()), flips))
        for option, step in planner.steps:
            with _Named(option):
                step(recorder)
        with _Named("aa"):
            planner.write(recorder, rows)
        return recorder.image

    def write(self, image: Image.Image | np.ndarray, out: np.ndarray) -> None:
        with _Named("img_size"):
            out[:] = np.asarray(image).reshape(out.shape)


def split_flips(transform: NamedTransforms) -> tuple[list, list]:
    """The flips of a training transform, and the augmentation after them, without the conversion to a tensor at its end."""
    flips = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)
    steps = list(transform.steps[1:-1])
    return [s for s in steps if isinstance(s[1], flips)], [s for s in steps if not isinstance(s[1], flips)]


def _resize_by_torch(pixels: np.ndarray, mode: InterpolationMode, out: np.ndarray) -> None:
    """Resizes pixels (H, W, C) uint8 to out, by PyTorch's antialiased kernel: within a few levels of Pillow's, in a third of its
    time. `torch.nn.functional.interpolate` calls it for memory of its own, which would have to be copied."""
    if not (pixels.flags.c_contiguous and pixels.flags.writeable):  # PyTorch warns of memory that it must not write to
        pixels = pixels.copy()
    _RESIZE[mode](_channels_first(pixels), out.shape[:2], False, out=_channels_first(out))


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    """(1, C, H, W) in the memory of (H, W, C)."""
    return torch.from_numpy(pixels.reshape(1, *pixels.shape).transpose(0, 3, 1, 2))


def as_image(pixels: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(pixels, Image.Image):
        return pixels
    return Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]))


def flipped(image: Image.Image, flips: int) -> Image.Image:
    for flip, method in _TRANSPOSE.items():
        image = image.transpose(method) if flips & flip else image
    return image


class _Extent(Image.Image):
    """An image without pixels: drawing a crop asks for an image's size alone."""

    def __init__(self, width: int, height: int) -> None:  # PIL's takes longer than drawing the crop, for nothing
        self.extent = width, height

    @property
    def size(self) -> tuple[int, int]:
        return self.extent


class _UndecodableError(Exception):
    """An image that was to be augmented cannot be decoded; `error` says why."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Named:
    """Makes of an error in a transform one that names the transform's option. An image enters six; generators take longer."""

    def __init__(self, option: str) -> None:
        self.option = option

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, _UndecodableError):
            raise TransformFailure(self.option) from error
