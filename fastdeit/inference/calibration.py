"""Scales of 8-bit activations, from images: one scale for all tokens after GELU and after attention, fixed before inference.

For int8 the outliers of some channels are moved into the weights that follow (Xiao et al. 2023, "SmoothQuant", eq. 4), by powers
of two, which round nothing.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from fastdeit.inference.architecture import FORMATS
from fastdeit.inference.conversion import NORMS, factors_name
from fastdeit.inference.layers import Block
from fastdeit.inference.model import OptimizedModel
from fastdeit.kernels.quantization.bounds import LARGEST, SMALLEST

PERCENTILE = 99.99  # of magnitudes, with range "percentile"
_MIGRATION = 0.5  # SmoothQuant's alpha


def calibrate(
    model: OptimizedModel, images: Iterable[Any], quantized: tuple[str, ...], precision: str, value_range: str
) -> dict[str, Tensor]:
    """The buffers that quantized layers need beside their weights.

    Args:
        model: in bf16, whose activations are measured; its blocks are left with taps.
        images: batches as model takes them, or pairs of a batch and labels.
        quantized: layers, as of `Options`.
        precision: "fp8" or "int8".
        value_range: "maximum", or "percentile", which clips the rarest magnitudes.

    Raises:
        TypeError, ValueError: there are no images, they are not as model takes them or not finite, or all of one class.
    """
    statistics = {layer: _Statistics() for layer in quantized}
    for index, block in enumerate(model.blocks):
        cast(Block, block).tap = functools.partial(_add, statistics, f"blocks.{index}")
    _check_classes(model, images)
    largest, found = LARGEST[FORMATS[precision]], {}
    for layer, seen in statistics.items():
        name = factors_name(layer)
        if name is None:
            reached = seen.reached(100.0 if value_range == "maximum" else PERCENTILE)
            scale = max(reached, SMALLEST) / largest
            found[f"{layer}.input_scale"] = torch.full((1,), scale, dtype=torch.float32, device=model.device)
        elif precision == "int8":
            found[name] = _factors(seen.channels, model.get_buffer(f"{layer}.weight"))
    return found


def _add(statistics: Mapping[str, "_Statistics"], block: str, layer: str, x: Tensor) -> Tensor:
    seen = statistics.get(f"{block}.{layer}")
    if seen is not None:
        seen.add(x, static=layer not in NORMS)
    return x


def batches(images: Any, argument: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images and labels of an iterable of batches, or of pairs with labels.

    Raises:
        TypeError: images is not an iterable of those.
    """
    if isinstance(images, Tensor):
        raise TypeError(f"{argument}: expected an iterable of batches, such as [images], got a tensor")
    if not isinstance(images, Iterable):
        raise TypeError(f"{argument}: expected an iterable of batches of images, got {type(images).__name__}")
    for batch in images:
        labels = None
        if isinstance(batch, tuple | list) and len(batch) == 2:
            batch, labels = batch
        if not isinstance(batch, Tensor):
            raise TypeError(f"{argument}: expected batches of images, or pairs with labels, got {type(batch).__name__}")
        yield batch, labels if isinstance(labels, Tensor) else None


def _check_classes(model: OptimizedModel, images: Iterable[Any]) -> None:
    """Runs the model on all images. Raises ValueError where images or logits are not finite, or all of one class."""
    count, classes = 0, set()
    for batch, labels in batches(images, "calibration"):
        if batch.is_floating_point() and not bool(batch.isfinite().all()):
            raise ValueError("calibration: expected finite images, got NaN or infinity")
        logits = model(batch.to(model.device))
        if not bool(logits.isfinite().all()):
            raise ValueError(
                "calibration: expected finite logits, got NaN or infinity: a weight is not finite or too large"
            )
        count += len(batch)
        known = labels if labels is not None and not labels.is_floating_point() else logits.argmax(-1)
        classes.update(known.unique().tolist())
    if count == 0:
        raise ValueError("calibration: expected images, 256 are enough, got none")
    if len(classes) < 2 and model.architecture.classes > 1:
        raise ValueError(
            f"calibration: expected images of several classes, got {count} of class {classes.pop()} alone; scales that suit one "
            "class clip others"
        )


def _factors(channels: Tensor, weight: Tensor) -> Tensor:
    """The power of two for each channel (C,), from its largest magnitude (C,) and the weight (O, C) that reads it."""
    largest = channels.clamp(min=SMALLEST) ** _MIGRATION
    smoothed = largest / weight.float().abs().amax(0).clamp(min=SMALLEST) ** (1 - _MIGRATION)
    return torch.exp2(-smoothed.log2().round().clamp(-20, 20))


class _Statistics:
    """Statistics of a layer's input: each channel's largest magnitude, and how often each bfloat16 magnitude occurred."""

    def __init__(self) -> None:
        self.channels = torch.zeros(())
        self.counts = torch.zeros(2**15, dtype=torch.int64)

    def add(self, x: Tensor, static: bool) -> None:
        if not x.numel():
            return
        magnitudes = x.abs().flatten(0, -2)
        if static:
            bits = magnitudes.bfloat16().view(torch.int16).flatten().int()  # in the order of what they stand for
            self.counts += torch.bincount(bits, minlength=2**15).cpu()
        else:
            self.channels = torch.maximum(self.channels.to(x.device), magnitudes.amax(0).float())

    def reached(self, percentile: float) -> float:
        """The magnitude that so many percent do not exceed."""
        below = self.counts.cumsum(0)
        index = int(torch.searchsorted(below.double(), below[-1].double() * percentile / 100))
        return torch.tensor(index, dtype=torch.int16).view(torch.bfloat16).item()
