"""Shared by the ops on 8-bit tensors: the formats, their rounding in PyTorch, and checks."""

from typing import Any

import torch
from torch import Tensor

from fastdeit import backends
from fastdeit.kernels.quantization.bounds import LARGEST, SMALLEST
from fastdeit.kernels.runtime.architecture import architecture
from fastdeit.ops.arguments import check_strided

FORMATS = tuple(LARGEST)


def quantize_reference(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y, already divided by its scale, clamped and rounded to the nearest value of the format, ties to even."""
    largest = LARGEST[dtype]
    y = y.clamp(-largest, largest)
    if dtype.is_floating_point:
        return y.to(dtype)
    return y.round().nan_to_num(0.0).to(dtype)  # int8 has no NaN; the scale of a row carries one


def quantize_rows_reference(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y (..., C) float32 or float64 in the format, and the scale of each row, (...): its largest magnitude over the format's."""
    largest = y.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    bound = torch.full_like(largest, LARGEST[dtype])  # a tensor: PyTorch divides by and of numbers with two roundings
    return quantize_reference(y * (bound / largest), dtype), (largest / bound)[..., 0]


def check_format(name: str, dtype: Any) -> None:
    if dtype not in FORMATS:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, FORMATS))}, got {dtype}")


def check_scale(name: str, scale: Any, shape: tuple[int, ...], x: Tensor, optional: bool = True) -> None:
    """None if that is allowed, or float32 (float64 for the oracle) of a shape, on x's device."""
    if scale is None and optional:
        return
    if not isinstance(scale, Tensor) or scale.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected a float32 tensor, got {getattr(scale, 'dtype', type(scale).__name__)}")
    check_strided(name, scale)
    if scale.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(scale.shape)}")
    if scale.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, got {scale.device}")


def why_no_format(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why kernels do not round to dtype on x's device; None if they do, or where it is no 8-bit float."""
    if dtype == torch.float8_e4m3fn and x.is_cuda and architecture(x) < 89:
        return backends.refuse(
            f"compute capability {architecture(x) / 10:.1f} has no conversion to float8, 8.9 and newer have"
        )
    return None
