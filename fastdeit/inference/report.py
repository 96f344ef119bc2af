"""Accuracy of a precision: agreement with the model in float32, the error of logits, and the error of each layer."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.inference.calibration import batches
from fastdeit.inference.conversion import converted
from fastdeit.inference.host import Host
from fastdeit.inference.layers import LAYERS, Block, QuantizedLinear, Tokens
from fastdeit.inference.model import OptimizedModel
from fastdeit.ops.quantized_formats import quantize_rows_reference


class LayerError(NamedTuple):
    """The error of one quantized layer, for its input in the float32 model."""

    name: str  # the module's, as `exclude` takes it
    error: float  # RMS of the error over RMS of the output


class Report(NamedTuple):
    """What `OptimizedModel.report` found; `str()` of it is a table.

    Attributes:
        images: their number.
        agreement: share of images whose largest logit is the model's in float32.
        logit_error: RMS of the error over RMS of the logits.
        layers: by error, the largest first; empty where no layer is quantized.
    """

    precision: str
    images: int
    agreement: float
    logit_error: float
    layers: tuple[LayerError, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.precision} on {self.images} images: {self.agreement:.2%} top-1 agreement with float32, "
            f"logit error {self.logit_error:.2%} (relative RMS)"
        ]
        if self.layers:
            width = max(len(layer.name) for layer in self.layers)
            lines += ["", f"{'layer, for exclude'.ljust(width)}  error", f"{'-' * width}  -----"]
            lines += [f"{layer.name.ljust(width)}  {layer.error:.2%}" for layer in self.layers]
        return "\n".join(lines)


def report(optimized: OptimizedModel, model: nn.Module, loader: Iterable[Any]) -> Report:
    """Compares an optimized model with the model that it was made of, in float32.

    Args:
        loader: batches of images as optimized takes them, or pairs with labels, which are not read.

    Raises:
        TypeError, ValueError: as `OptimizedModel.forward` for the images, as `refresh` for the model, or there are no images.
    """
    host = Host(model)
    optimized.check_architecture(host)
    plain = optimized.options._replace(precision="bf16", quantized=())
    exact = OptimizedModel(optimized.architecture, plain, converted(host, plain, dtype=torch.float32)).eval()
    layers = _observed(optimized, exact)
    logits, agreeing, images = _Sums(), 0, 0
    for batch, _ in batches(loader, "loader"):
        batch = batch.to(optimized.device)
        got, expected = optimized(batch), exact(batch)
        logits.add(got, expected)
        agreeing += int((got.argmax(-1) == expected.argmax(-1)).sum())
        images += len(batch)
    if images == 0:
        raise ValueError("loader: expected images, got none")
    ranked = sorted((LayerError(name, sums.error()) for name, sums in layers.items()), key=lambda layer: -layer.error)
    return Report(optimized.options.precision, images, agreeing / images, logits.error(), tuple(ranked))


class _Sums:
    """Sums of squares of errors and of expected values."""

    def __init__(self) -> None:
        self.errors = self.expected = 0.0

    def add(self, got: Tensor, expected: Tensor) -> None:
        self.errors += (got.double() - expected.double()).square().sum().item()
        self.expected += expected.double().square().sum().item()

    def error(self) -> float:
        return (self.errors / self.expected) ** 0.5 if self.expected else 0.0


def _observed(optimized: OptimizedModel, exact: OptimizedModel) -> dict[str, _Sums]:
    """Sums by module name, to which each run of `exact` adds."""
    found: dict[str, _Sums] = {}
    pairs = zip(optimized.blocks, exact.blocks, optimized.architecture.blocks, strict=True)
    for ours, theirs, block in pairs:
        sums = {layer: _Sums() for layer in LAYERS if isinstance(getattr(ours, layer), QuantizedLinear)}
        cast(Block, theirs).tap = functools.partial(_compare, cast(Block, ours), cast(Block, theirs), sums)
        found |= {name: sums[layer] for layer, name in zip(LAYERS, block.names, strict=True) if layer in sums}
    return found


def _compare(ours: Block, theirs: Block, sums: Mapping[str, _Sums], layer: str, x: Tensor) -> Tensor:
    if layer in sums:
        linear = getattr(theirs, layer)
        sums[layer].add(_output(ours, layer, x), F.linear(x, linear.weight, linear.bias))
    return x


def _output(block: Block, layer: str, x: Tensor) -> Tensor:
    """A quantized layer's output for an input in float32."""
    linear: Any = getattr(block, layer)
    if linear.input_scale is not None:
        return linear(linear.received(x))
    factors = (block.norm1 if layer == "qkv" else block.norm2).weight
    values, scale = quantize_rows_reference(x if factors is None else x * factors.float(), linear.format)
    return linear(Tokens(values, scale))
