"""The kernels between two GEMMs of 8-bit operands: scales and bias of the first, activation, cast for the second.

    y = activation(z * row_scale * column_scale + bias)
    q = y / scale

Each part but the last cast may be absent: on float8 products, which cuBLAS scales, only activation and cast are left; behind
attention that is not this package's the cast alone; before a residual addition of int8 products scales and bias alone.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastdeit.kernels.gemm.tiles import assume_multiple_of
from fastdeit.kernels.mlp.activation_functions import activate
from fastdeit.kernels.quantization.formats import quantized
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.launch import cdiv, launch

BLOCK_M, BLOCK_N, NUM_WARPS = 4, 256, 4  # of a program: 8 values a thread


@triton.jit(do_not_specialize=["M", "N"])
def rescale_kernel(
    z_ptr,  # (M, N), a float dtype or int32
    row_scale_ptr,  # (M,) fp32 or None
    column_scale_ptr,  # (N,) fp32 or None
    bias_ptr,  # (N,) or None
    scale_ptr,  # (1,) fp32, None where out is no 8-bit format
    out_ptr,  # (M, N)
    M,
    N,
    ACTIVATION: tl.constexpr,  # or None
    VECTOR: tl.constexpr,  # a power of two that divides N: lets loads be 16 bytes wide
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns BLOCK_M x BLOCK_N values."""
    N = assume_multiple_of(N, VECTOR)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (row < M) & (col < N)
    at = row.to(tl.int64) * N + col
    y = tl.load(z_ptr + at, inside, other=0).to(tl.float32)
    if row_scale_ptr is not None:
        y *= tl.load(row_scale_ptr + row, row < M, other=0.0)
    if column_scale_ptr is not None:
        y *= tl.load(column_scale_ptr + col, col < N, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, col < N, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        y = activate(y, ACTIVATION)
    if scale_ptr is not None:
        y = quantized(y * tl.div_rn(1.0, tl.load(scale_ptr)), out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), inside)


def rescale(
    z: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str | None,
    scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """z (..., N), row_scale (...), column_scale and bias (N,), scale (1,), all contiguous -> (..., N) in out_dtype."""
    N = z.shape[-1]
    out = z.new_empty(*z.shape, dtype=out_dtype)
    if out.numel():
        M = z.numel() // N
        constexprs = (activation, min(N & -N, 16), BLOCK_M, BLOCK_N)
        args = (z, row_scale, column_scale, bias, scale, out, M, N)
        launch(rescale_kernel, (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N)), args, constexprs, NUM_WARPS)
    return out


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Behind GELU in float8, and the epilogues of int8 products."""
    forms: list[tuple[str, str, str, bool, str | None]] = [
        ("int8 product", "i32", "bf16", True, None),
        ("int8 product gelu int8", "i32", "i8", True, "gelu"),
    ]
    if arch >= 89:
        forms.append(("gelu float8", "bf16", "fp8e4nv", False, "gelu"))
    for label, z, out, scaled, activation in forms:
        types = dict(z_ptr=f"*{z}", out_ptr=f"*{out}", M="i32", N="i32")
        if scaled:
            types |= dict(row_scale_ptr="*fp32", column_scale_ptr="*fp32", bias_ptr="*bf16")
        if out != "bf16":
            types["scale_ptr"] = "*fp32"
        constexprs = dict(ACTIVATION=activation, VECTOR=16, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
        yield AotConfig(rescale_kernel, types, constexprs, NUM_WARPS, 1, label, matrix=False)
