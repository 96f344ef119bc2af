"""Rounding to the 8-bit formats in a kernel."""

import triton
import triton.language as tl

_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to a small float32 it leaves no bits behind the point


@triton.jit
def quantized(y, LARGEST: tl.constexpr, FLOAT8: tl.constexpr):
    """y, fp32 and already divided by its scale, in the format: clamped, rounded to the nearest, ties to even."""
    y = tl.minimum(
        tl.maximum(y, -LARGEST, propagate_nan=tl.PropagateNan.ALL), LARGEST, propagate_nan=tl.PropagateNan.ALL
    )
    if FLOAT8:
        return y.to(tl.float8e4nv)
    else:
        return ((y + _TO_INTEGER) - _TO_INTEGER).to(tl.int8)
