"""ONNX's operations for 8 bits, which ONNX Runtime has on a CPU."""

from typing import Any

import torch
from torch import Tensor

OPSET = 21  # the first in which QuantizeLinear says what it writes
_ONNX_TYPES = {torch.float8_e4m3fn: 17, torch.int8: 3}  # TensorProto.FLOAT8E4M3FN and INT8


class OnnxPairs:
    """`Pairs` of QuantizeLinear and DequantizeLinear."""

    def stored(self, weight: Tensor) -> Tensor:
        return weight

    def quantize(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        attributes: Any = {"output_dtype": _ONNX_TYPES[dtype]}
        given = (x, scale)
        return torch.onnx.ops.symbolic("QuantizeLinear", given, attributes, dtype=dtype, shape=x.shape, version=OPSET)

    def dequantize(self, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return _dequantize(q, scale, {})

    def dequantize_weight(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return _dequantize(weight, scale, {"axis": 0})


def _dequantize(q: Tensor, scale: Tensor, attributes: Any) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (q, scale), attributes, dtype=scale.dtype, shape=q.shape, version=OPSET
    )
