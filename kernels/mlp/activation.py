"""The pointwise half of an MLP, between two GEMMs of cuBLAS.

Forward writes activation(z). Backward reads the pre-activation z and the gradient of the activation, and in one pass writes the
gradient of z, activation(z) again (the second weight gradient's operand, which forward need not keep) and the column sums that are
the first bias's gradient (`column_sums`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastdeit.kernels.gemm.tiles import assume_multiple_of
from fastdeit.kernels.mlp.activation_functions import activate, activate_with_derivative
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.column_sums import Table, row_strips, sum_later, sum_rows
from fastdeit.kernels.runtime.launch import cdiv, launch


@dataclass(frozen=True)
class Config:
    block: int  # elements of a forward program
    rows: int  # of a backward program's step
    columns: int
    num_warps: int


def select_config() -> Config:
    """8 values of each stream a thread: 16-byte loads and the fewest registers, hence the most loads in flight."""
    return Config(block=1024, rows=4, columns=256, num_warps=4)


@triton.jit(do_not_specialize=["SIZE"])
def activation_forward_kernel(
    z_ptr,  # (SIZE,)
    h_ptr,  # (SIZE,)
    SIZE,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides SIZE: lets loads be 16 bytes wide
):
    """A program owns BLOCK consecutive elements."""
    SIZE = assume_multiple_of(SIZE, VECTOR)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + at, at < SIZE, other=0.0).to(tl.float32)
    tl.store(h_ptr + at, activate(z, ACTIVATION).to(h_ptr.dtype.element_ty), at < SIZE)


@triton.jit(do_not_specialize=["M", "N", "rows_per_strip"])
def activation_backward_kernel(
    dh_ptr,  # (M, N)
    z_ptr,  # (M, N)
    dz_ptr,  # (M, N)
    h_ptr,  # (M, N), or None where the second weight is frozen
    dbias_partial_ptr,  # (strips, N) fp32, or None
    M,
    N,
    rows_per_strip,  # a multiple of BLOCK_M
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides N: lets loads be 16 bytes wide
):
    """A program owns BLOCK_N columns (program id 0) of one strip of rows (program id 1)."""
    N = assume_multiple_of(N, VECTOR)
    strip = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = strip * rows_per_strip
    last = tl.minimum(first + rows_per_strip, M)  # no NaN: row numbers
    for start in tl.range(first, last, BLOCK_M, num_stages=3):
        row = start + tl.arange(0, BLOCK_M)[:, None]
        inside = (row < M) & (col < N)
        at = row.to(tl.int64) * N + col
        z = tl.load(z_ptr + at, inside, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + at, inside, other=0.0).to(tl.float32)
        h, slope = activate_with_derivative(z, ACTIVATION)
        dz = dh * slope
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), inside)
        if h_ptr is not None:
            tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), inside)
        if dbias_partial_ptr is not None:
            dbias += dz
    if dbias_partial_ptr is not None:
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(dbias_partial_ptr + strip * N + column, sum_rows(dbias, BLOCK_M), column < N)


def activation_forward(z: torch.Tensor, activation: str, config: Config | None = None) -> torch.Tensor:
    """activation(z) for contiguous z of any shape, in z's dtype."""
    h = torch.empty_like(z)
    if z.numel():
        config, size = config or select_config(), z.numel()
        constexprs = (activation, config.block, min(size & -size, 16))
        launch(activation_forward_kernel, (cdiv(size, config.block),), (z, h, size), constexprs, config.num_warps)
    return h


def activation_backward(
    dh: torch.Tensor,
    z: torch.Tensor,
    activation: str,
    *,
    needs_h: bool = True,
    dbias_dtype: torch.dtype | None = None,
    later: list[Table] | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dz (M, N) in z's dtype, activation(z) if needed, and the column sums of dz (N,) in dbias_dtype if that is given.

    dh and z are (M, N), contiguous. With `later` the sums are there once `add_partial_sums` has run on it.
    """
    M, N = z.shape
    dz = torch.empty_like(z)
    h = torch.empty_like(z) if needs_h else None
    dbias = None if dbias_dtype is None else z.new_empty(N, dtype=dbias_dtype)
    if z.numel() == 0:
        return dz, h, dbias if dbias is None else dbias.zero_()
    config = config or select_config()
    column_blocks = cdiv(N, config.columns)
    strips, rows_per_strip = row_strips(M, config.rows, column_blocks, z)
    partial = None if dbias is None else z.new_empty((strips, N), dtype=torch.float32)
    launch(
        activation_backward_kernel,
        (column_blocks, strips),
        (dh, z, dz, h, partial, M, N, rows_per_strip),
        (activation, config.rows, config.columns, min(N & -N, 16)),
        config.num_warps,
    )
    if dbias is not None:
        sum_later(later, (partial, dbias))
    return dz, h, dbias


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Every activation in bf16, with all outputs, and GELU in fp16 and fp32 too."""
    config = select_config()
    for activation, dtype in (*((a, "*bf16") for a in ("gelu", "gelu_tanh", "quick_gelu")), ("gelu", "*fp16")):
        label = f"{activation} {dtype[1:]}"
        forward = dict(z_ptr=dtype, h_ptr=dtype, SIZE="i32")
        tile = dict(ACTIVATION=activation, BLOCK=config.block, VECTOR=16)
        yield AotConfig(activation_forward_kernel, forward, tile, config.num_warps, 1, label, matrix=False)
        backward = dict.fromkeys(("dh_ptr", "z_ptr", "dz_ptr", "h_ptr"), dtype)
        backward |= dict(dbias_partial_ptr="*fp32", M="i32", N="i32", rows_per_strip="i32")
        tile = dict(ACTIVATION=activation, BLOCK_M=config.rows, BLOCK_N=config.columns, VECTOR=16)
        yield AotConfig(activation_backward_kernel, backward, tile, config.num_warps, 1, label, matrix=False)
