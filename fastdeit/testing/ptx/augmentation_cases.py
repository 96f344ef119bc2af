"""Calls of `ops.augment` that launch every configuration of its kernels."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastdeit import ops
from fastdeit.backends import use_backend
from fastdeit.kernels.augment.operations import ROW, Operation
from fastdeit.testing.accuracy import Error, poisoned_memory

_ARGUMENTS = {
    "POSTERIZE": (0, 5),
    "SOLARIZE": (0, 100),
    "SOLARIZE_ADD": (0, 60),
    "CONTRAST": (0, 1.4),
    "COLOR": (0, 0.3),
    "BRIGHTNESS": (0, 0.7),
    "SHARPNESS": (0, 1.8),
    "AFFINE": (1, 0.94, -0.34, 4.5, 0.34, 0.94, -2.5),
}


def augmentation(arch: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Name and run of each case; results equal Pillow's bits, so that every error is 0."""
    yield "augment 224x224, layers that ship", functools.partial(_augment, 224, 224, [["EQUALIZE", "AFFINE"]])
    every = [[first, last] for first, last in itertools.pairwise([*Operation.__members__, "NONE"])]
    every += [["CONTRAST", "NONE"]] * 2 + [["NONE", "CONTRAST"]] * 2
    # One pass of `augment_tables`, of whose loads each has threads within the image.
    yield "augment 61x67, every operation", functools.partial(_augment, 61, 67, every, narrow=True)


def _grey_at_a_half(height: int, width: int) -> torch.Tensor:
    """(2, H, W) levels of two images that differ by 1 in a pixel, and whose means lie above and below a half.

    What changes the sum of the levels of both in the same way changes the rounded mean of one.
    """
    pixels = height * width
    above = torch.randint(1, 255, (pixels,), dtype=torch.uint8)
    above[: (pixels // 2 + 1 - int(above.sum())) % pixels] += 1
    below = above.clone()
    below[0] -= 1
    return torch.stack([above, below]).view(2, height, width)


def _augment(height: int, width: int, names: list[list[str]], narrow: bool = False) -> dict[str, tuple[Error, Error]]:
    """Bits of the reference, which are Pillow's.

    names: for each image its operations. narrow: each channel of an image has levels of a range of its own, else all of them; the
    last four images are grey.
    """
    images = torch.randint(256, (len(names), height, width, 3), dtype=torch.uint8)
    if narrow:
        low, high = torch.randint(256, (2, len(names), 1, 1, 3)).sort(0).values
        images = (low + images * (high - low + 1) // 256).byte()
        for first in (-4, -2):
            images[[first, first + 1]] = _grey_at_a_half(height, width)[..., None]
    images = images.permute(0, 3, 1, 2)
    plan = torch.zeros(len(names), len(names[0]), ROW, dtype=torch.float64)
    for image, chosen in enumerate(names):
        for layer, name in enumerate(chosen):
            arguments = _ARGUMENTS.get(name, ())
            plan[image, layer, : 1 + len(arguments)] = torch.tensor([Operation[name], *arguments])
    given: dict[str, Any] = dict(
        flips=torch.arange(len(names), dtype=torch.uint8) // 2 % 4, levels=torch.randn(3, 256), fill=(124, 116, 104)
    )
    expected = ops.augment_reference(images, plan, **given)
    with use_backend("triton"), poisoned_memory():
        found = ops.augment(images, plan, **given)
    if not torch.equal(found, expected):
        raise AssertionError(f"{(found != expected).sum()} of {found.numel()} elements differ from Pillow's")
    return {"output 0": (Error(0.0, 0.0, 0.0, 0.0),) * 2}
