"""Scales, bias, activation and cast between two products of 8-bit operands. There is no gradient."""

from typing import Any

import torch
from torch import Tensor

from fastdeit import backends
from fastdeit.ops import launchers
from fastdeit.ops.arguments import check_strided, check_vector
from fastdeit.ops.matmul import contiguous
from fastdeit.ops.mlp_op import ACTIVATIONS
from fastdeit.ops.quantized_formats import FORMATS, check_scale, quantize_reference, why_no_format
from fastdeit.refusals import or_reference

_OUT = (*FORMATS, *backends.KERNEL_DTYPES, torch.float64)


@or_reference
def rescale(
    z: Tensor,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """activation(z * row_scale * column_scale + bias), quantized to 8 bits by a given scale or in a float dtype, in one pass.

    Args:
        z: (..., N), a float dtype, or int32 as products of int8 have it; any strides.
        row_scale: (...) float32 or None.
        column_scale: (N,) float32 or None.
        bias: (N,), a float dtype, or None.
        activation: None, or as `mlp` takes it.
        scale: (1,) float32, the value of one step of the result, if out_dtype is torch.float8_e4m3fn or torch.int8; else None.
        out_dtype: of the result. What does not fit an 8-bit format becomes its largest value; int8 has no NaN.

    Returns:
        (..., N), contiguous.

    Raises:
        TypeError: a dtype is another.
        ValueError: a shape or device does not fit z, activation is another, or scale is missing or superfluous.
    """
    _check(z, row_scale, column_scale, bias, activation, scale, out_dtype)
    options: dict[str, Any] = dict(
        row_scale=row_scale, column_scale=column_scale, bias=bias, activation=activation, scale=scale
    )
    if why_reference(z, out_dtype) is not None:
        return rescale_reference(z, **options, out_dtype=out_dtype)
    run = _registered if backends.registered_path(z) else _launched
    return run(z, row_scale, column_scale, bias, activation, scale, out_dtype)


def rescale_reference(
    z: Tensor,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Reference of `rescale` in plain PyTorch. With float64 tensors it is the oracle."""
    y = z.to(torch.float64 if torch.float64 in (z.dtype, out_dtype) else torch.float32)
    if row_scale is not None:
        y = y * row_scale[..., None]
    if column_scale is not None:
        y = y * column_scale
    if bias is not None:
        y = y + bias
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y.to(out_dtype) if scale is None else quantize_reference(y * (1 / scale), out_dtype)


def why_reference(z: Tensor, out_dtype: torch.dtype) -> str | None:
    """None when `rescale` runs its kernel on z, else why it runs the reference."""
    like = z if z.is_floating_point() else z.new_empty(0, dtype=torch.float32)
    return why_no_format(z, out_dtype) or backends.why_reference(like, kernels=("quantization",))


def _check(z, row_scale, column_scale, bias, activation, scale, out_dtype) -> None:
    if not isinstance(z, Tensor) or not (z.is_floating_point() or z.dtype == torch.int32):
        given = getattr(z, "dtype", type(z).__name__)
        raise TypeError(f"z: expected a floating-point or int32 tensor, got {given}")
    check_strided("z", z)
    if z.dim() == 0:
        raise ValueError("z: expected shape (..., N), got a tensor without dimensions")
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise ValueError(f"activation: expected None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if out_dtype not in _OUT:
        raise TypeError(f"out_dtype: expected one of {', '.join(map(str, _OUT))}, got {out_dtype}")
    check_scale("row_scale", row_scale, z.shape[:-1], z)
    check_scale("column_scale", column_scale, z.shape[-1:], z)
    check_vector("bias", bias, z.shape[-1], z)
    if (scale is not None) != (out_dtype in FORMATS):
        wanted = "a scale" if out_dtype in FORMATS else "None"
        raise ValueError(f"scale: expected {wanted} for {out_dtype}, got {scale if scale is None else 'one'}")
    check_scale("scale", scale, (1,), z)


def _launched(z, row_scale, column_scale, bias, activation, scale, out_dtype):
    z, row_scale, column_scale, bias = map(contiguous, (z, row_scale, column_scale, bias))
    return launchers.rescale(z, row_scale, column_scale, bias, activation, scale, out_dtype)


@torch.library.custom_op("fastdeit::rescale", mutates_args=())
def _registered(
    z: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return _launched(z, row_scale, column_scale, bias, activation, scale, out_dtype)


@_registered.register_fake
def _(z, row_scale, column_scale, bias, activation, scale, out_dtype):
    return z.new_empty(z.shape, dtype=out_dtype)
