"""8 bits in operations that Inductor compiles for a CPU: its C++ has no float8, so that values of that format are float32 ones, and
weights are stored as bytes."""

import torch
from torch import Tensor

from fastdeit.kernels.quantization.bounds import LARGEST
from fastdeit.ops.quantized_formats import quantize_reference

_DROPPED = 20  # bits of a float32 mantissa that e4m3 does not have
_SMALLEST_NORMAL, _SUBNORMAL_STEPS = (
    2.0**-6,
    2.0**9,
)  # of e4m3; below the former its values are even, so many steps to one


class InductorPairs:
    """`Pairs` whose quantized activations are float32."""

    def stored(self, weight: Tensor) -> Tensor:
        return weight.view(torch.uint8) if weight.is_floating_point() else weight

    def quantize(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        y = x.float() * (1 / scale)
        return rounded_to_e4m3(y) if dtype.is_floating_point else quantize_reference(y, dtype).float()

    def dequantize(self, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return q * scale

    def dequantize_weight(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        values = _e4m3_values()[weight.int()] if dtype.is_floating_point else weight.float()
        return values * scale[:, None]


def rounded_to_e4m3(y: Tensor) -> Tensor:
    """y, float32, clamped and rounded to the nearest value of float8 e4m3, ties to even, in float32."""
    largest = LARGEST[torch.float8_e4m3fn]
    y = y.clamp(-largest, largest)
    bits = y.view(torch.int32)
    half = (1 << (_DROPPED - 1)) - 1 + (bits >> _DROPPED & 1)  # rounds a tie up where the last bit that stays is set
    normal = (bits + half >> _DROPPED << _DROPPED).view(torch.float32)
    return torch.where(y.abs() < _SMALLEST_NORMAL, (y * _SUBNORMAL_STEPS).round() / _SUBNORMAL_STEPS, normal)


def _e4m3_values() -> Tensor:
    """The e4m3 values of all 256 bytes, in float32."""
    byte = torch.arange(256)
    exponent, mantissa = byte >> 3 & 15, (byte & 7).float()
    normal = torch.ldexp(1 + mantissa / 8, exponent - 7)
    magnitude = torch.where(exponent > 0, normal, mantissa / _SUBNORMAL_STEPS)
    return torch.where(byte < 128, magnitude, -magnitude)
