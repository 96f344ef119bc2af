"""An optimized model for formats without 8-bit products: float32 or float16 arithmetic, 8 bits as quantize-dequantize pairs."""

import copy
import functools
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fastdeit.inference.layers import LAYERS, Block, QuantizedLinear
from fastdeit.inference.model import OptimizedModel
from fastdeit.kernels.quantization.bounds import LARGEST, SMALLEST


class Pairs(Protocol):
    """The operations of a format."""

    def stored(self, weight: Tensor) -> Tensor:
        """An 8-bit weight as the format holds it."""
        ...

    def quantize(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """x / scale in an 8-bit format, or what stands for that."""
        ...

    def dequantize(self, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """What `quantize` gave, times its scale."""
        ...

    def dequantize_weight(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """What `stored` gave of a weight (O, C), times a scale (O,) for each row."""
        ...


class PairsForm(nn.Module):
    """Computes what an optimized model computes. Weights are stored as they are there; those in bfloat16 are cast to float32 before
    use.

    Args:
        optimized: on the CPU.
        pairs: the format's operations.
    """

    def __init__(self, optimized: OptimizedModel, pairs: Pairs) -> None:
        super().__init__()
        self.pairs = pairs
        self.stored = copy.deepcopy(optimized)
        self.dtype = torch.float16 if optimized.dtype == torch.float16 else torch.float32
        self.formats = {name: linear.format for name, linear in _quantized_layers(optimized)}
        for _, linear in _quantized_layers(self.stored):
            linear.weight = pairs.stored(linear.weight)
        plain = optimized.options._replace(quantized=())
        self.computing = OptimizedModel(optimized.architecture, plain, self._weights()).eval()
        for name in dict(self.computing.named_buffers()):  # given at each call
            module, _, buffer = name.rpartition(".")
            setattr(self.computing.get_submodule(module), buffer, torch.empty(0, dtype=self.dtype))
        for ours, theirs in zip(optimized.blocks, self.computing.blocks, strict=True):
            cast(Block, theirs).tap = functools.partial(self._through_8_bits, cast(Block, ours))

    def forward(self, images: Tensor) -> Tensor:
        """(B, K, H, W) -> (B, classes)."""
        return torch.func.functional_call(_Run(self.computing), self._weights("model."), (images,))

    def _weights(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors of `computing` by name, each computed in the graph from the stored one."""
        found = {}
        for name, tensor in self.stored.named_buffers():
            layer, _, kind = name.rpartition(".")
            if layer in self.formats and kind == "weight":
                linear: Any = self.stored.get_submodule(layer)
                scale = linear.scale if linear.input_scale is None else linear.scale / linear.input_scale
                found[prefix + name] = self.pairs.dequantize_weight(tensor, scale, self.formats[layer])
            elif layer not in self.formats or kind == "bias":
                found[prefix + name] = tensor.to(self.dtype)
        return found

    def _through_8_bits(self, block: Block, layer: str, x: Tensor) -> Tensor:
        """A layer's input, quantized and dequantized."""
        linear = getattr(block, layer)
        if not isinstance(linear, QuantizedLinear):
            return x
        if linear.input_scale is not None:
            scale = linear.input_scale.reshape(())
            return self.pairs.dequantize(self.pairs.quantize(x, scale, linear.format), scale, linear.format)
        scale = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST[linear.format]
        one = scale.new_ones(())
        return self.pairs.dequantize(self.pairs.quantize(x / scale, one, linear.format), one, linear.format) * scale


def _quantized_layers(model: OptimizedModel) -> list[tuple[str, Any]]:
    names = (f"blocks.{index}.{layer}" for index in range(len(model.blocks)) for layer in LAYERS)
    layers = ((name, model.get_submodule(name)) for name in names)
    return [(name, layer) for name, layer in layers if isinstance(layer, QuantizedLinear)]


class _Run(nn.Module):
    def __init__(self, model: OptimizedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.run(images)
