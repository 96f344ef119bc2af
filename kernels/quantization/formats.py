"""Rounding to the 8-bit formats in a kernel."""

import torch
import triton
import triton.language as tl

from fastdeit.kernels.quantization.bounds import LARGEST

_LARGEST_FLOAT8 = tl.constexpr(LARGEST[torch.float8_e4m3fn])
_LARGEST_INT8 = tl.constexpr(LARGEST[torch.int8])
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to a small float32 it leaves no bits behind the point


@triton.jit
def quantized(y, DTYPE: tl.constexpr):
    """y, fp32 and already divided by its scale, as float8e4nv or int8: clamped, rounded to the nearest, ties to even."""
    if tl.float8e4nv == DTYPE:
        return _clamped(y, _LARGEST_FLOAT8).to(DTYPE)
    else:
        return ((_clamped(y, _LARGEST_INT8) + _TO_INTEGER) - _TO_INTEGER).to(DTYPE)


@triton.jit
def _clamped(y, LARGEST: tl.constexpr):
    y = tl.maximum(y, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(y, LARGEST, propagate_nan=tl.PropagateNan.ALL)
