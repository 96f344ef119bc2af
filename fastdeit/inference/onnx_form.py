"""An optimized model in operations that ONNX has, and ONNX Runtime on a CPU: float32 or float16 arithmetic, 8 bits as
quantise-dequantise pairs."""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdeit.inference.layers import LAYERS, Block, QuantizedLinear
from fastdeit.inference.model import OptimizedModel
from fastdeit.kernels.quantization.bounds import LARGEST, SMALLEST

OPSET = 21  # the first in which QuantizeLinear says what it writes
_ONNX_TYPES = {torch.float8_e4m3fn: 17, torch.int8: 3}  # TensorProto.FLOAT8E4M3FN and INT8


class OnnxForm(nn.Module):
    """Computes what an optimized model computes. Weights are stored as they are there; bfloat16, which ONNX Runtime's CPU kernels
    do not have, is cast to float32 before use.

    Args:
        optimized: on the CPU.
    """

    def __init__(self, optimized: OptimizedModel) -> None:
        super().__init__()
        self.stored = optimized
        self.dtype = torch.float16 if optimized.dtype == torch.float16 else torch.float32
        plain = optimized.options._replace(quantized=())
        self.computing = OptimizedModel(optimized.architecture, plain, self._weights()).eval()
        for name in dict(self.computing.named_buffers()):  # given at each call
            module, _, buffer = name.rpartition(".")
            setattr(self.computing.get_submodule(module), buffer, torch.empty(0, dtype=self.dtype))
        for ours, theirs in zip(optimized.blocks, self.computing.blocks, strict=True):
            cast(Block, theirs).tap = functools.partial(_quantized, cast(Block, ours))

    def forward(self, images: Tensor) -> Tensor:
        """(B, K, H, W) -> (B, classes)."""
        return torch.func.functional_call(_Run(self.computing), self._weights("model."), (images,))

    def _weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Of `computing`, by its names: each as the graph makes it of what is stored."""
        found = {}
        layers = {f"blocks.{i}.{name}" for i in range(len(self.stored.blocks)) for name in LAYERS}
        quantized = {n for n in layers if isinstance(self.stored.get_submodule(n), QuantizedLinear)}
        for name, tensor in self.stored.named_buffers():
            layer, _, kind = name.rpartition(".")
            if layer in quantized and kind == "weight":
                linear: Any = self.stored.get_submodule(layer)
                scale = linear.scale if linear.input_scale is None else linear.scale / linear.input_scale
                found[prefix + name] = _dequantize(tensor, scale, 0)
            elif layer not in quantized or kind == "bias":
                found[prefix + name] = tensor.to(self.dtype)
        return found


class _Run(nn.Module):
    def __init__(self, model: OptimizedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.run(images)


def _quantized(block: Block, layer: str, x: Tensor) -> Tensor:
    """A layer's input through 8 bits and back."""
    linear = getattr(block, layer)
    if not isinstance(linear, QuantizedLinear):
        return x
    if linear.input_scale is not None:
        scale = linear.input_scale.reshape(())
        return _dequantize(_quantize(x, scale, linear.format), scale, None)
    scale = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST[linear.format]
    one = scale.new_ones(())
    return _dequantize(_quantize(x / scale, one, linear.format), one, None) * scale


def _quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    attributes: Any = {"output_dtype": _ONNX_TYPES[dtype]}
    return torch.onnx.ops.symbolic("QuantizeLinear", (x, scale), attributes, dtype=dtype, shape=x.shape, version=OPSET)


def _dequantize(q: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    attributes: Any = {} if axis is None else {"axis": axis}
    given = (q, scale)
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", given, attributes, dtype=scale.dtype, shape=q.shape, version=OPSET
    )
