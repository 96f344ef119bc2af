"""The pointwise half of an MLP, between two GEMMs of cuBLAS.

Forward writes activation(z). Backward reads the pre-activation z and the gradient of the activation, and in one pass writes the
gradient of z, activation(z) again (the second weight gradient's operand, which forward need not keep) and the column sums that are
the first bias's gradient (`column_sums`). The second bias's, sums of a matrix with as many rows, may come from the same launch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastdeit.kernels.gemm.tiles import assume_multiple_of
from fastdeit.kernels.mlp.activation_functions import activate, activate_with_derivative
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.column_sums import Table, row_strips, sum_later, sum_rows, sum_strip
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


@triton.jit
def _strip_backward(
    block,
    dh_ptr,
    z_ptr,
    dz_ptr,
    h_ptr,
    dbias_partial_ptr,
    M,
    N,
    rows_per_strip,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    N = assume_multiple_of(N, VECTOR)
    strip = tl.program_id(1)
    col = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
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
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(dbias_partial_ptr + strip * N + column, sum_rows(dbias, BLOCK_M), column < N)


@triton.jit(do_not_specialize=["M", "N", "C", "rows_per_strip"])
def activation_backward_kernel(
    dh_ptr,  # (M, N)
    z_ptr,  # (M, N)
    dz_ptr,  # (M, N)
    h_ptr,  # (M, N), or None where the second weight is frozen
    dbias_partial_ptr,  # (strips, N) fp32, or None
    summed_ptr,  # (M, C), or None
    sum_partial_ptr,  # (strips, C) fp32, its partial sums, or None
    M,
    N,
    C,
    rows_per_strip,  # a multiple of BLOCK_M
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides N and C: lets loads be 16 bytes wide
):
    """A program owns BLOCK_N columns (program id 0) of one strip of rows (program id 1), of dz or, after those, of `summed`."""
    block = tl.program_id(0)
    of_dz = tl.cdiv(N, BLOCK_N)
    if block < of_dz:
        _strip_backward(
            block,
            dh_ptr,
            z_ptr,
            dz_ptr,
            h_ptr,
            dbias_partial_ptr,
            M,
            N,
            rows_per_strip,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N,
            VECTOR,
        )
    elif summed_ptr is not None:
        sum_strip(summed_ptr, sum_partial_ptr, block - of_dz, M, C, rows_per_strip, BLOCK_M, BLOCK_N, VECTOR)


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
    summed: Table | None = None,
    later: list[Table] | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dz (M, N) in z's dtype, activation(z) if needed, and the column sums of dz (N,) in dbias_dtype if that is given.

    dh and z are (M, N), contiguous. `summed` is a contiguous matrix (M, C) and where its column sums (C,) go, which the same launch
    makes. With `later` all sums are there once `add_partial_sums` has run on it.
    """
    M, N = z.shape
    dz = torch.empty_like(z)
    h = torch.empty_like(z) if needs_h else None
    dbias = None if dbias_dtype is None else z.new_empty(N, dtype=dbias_dtype)
    sums = [] if dbias is None else [(z, dbias)]
    sums += [] if summed is None else [summed]
    if z.numel() == 0:
        for _, total in sums:
            total.zero_()
        return dz, h, dbias
    config = config or select_config()
    C = 0 if summed is None else summed[0].shape[1]
    column_blocks = cdiv(N, config.columns) + cdiv(C, config.columns)
    strips, rows_per_strip = row_strips(M, config.rows, column_blocks, z)
    tables = [(z.new_empty(strips, x.shape[1], dtype=torch.float32), total) for x, total in sums]
    dbias_partial = None if dbias is None else tables[0][0]
    beside = (None, None) if summed is None else (summed[0], tables[-1][0])
    launch(
        activation_backward_kernel,
        (column_blocks, strips),
        (dh, z, dz, h, dbias_partial, *beside, M, N, C, rows_per_strip),
        (activation, config.rows, config.columns, min(N & -N, (C & -C) or 16, 16)),
        config.num_warps,
    )
    sum_later(later, *tables)
    return dz, h, dbias


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Every activation in bf16, with all outputs, and GELU in fp16 too; GELU in bf16 also with a matrix that is summed."""
    config = select_config()
    for activation, dtype in (*((a, "*bf16") for a in ("gelu", "gelu_tanh", "quick_gelu")), ("gelu", "*fp16")):
        label = f"{activation} {dtype[1:]}"
        forward = dict(z_ptr=dtype, h_ptr=dtype, SIZE="i32")
        tile = dict(ACTIVATION=activation, BLOCK=config.block, VECTOR=16)
        yield AotConfig(activation_forward_kernel, forward, tile, config.num_warps, 1, label, matrix=False)
        backward = dict.fromkeys(("dh_ptr", "z_ptr", "dz_ptr", "h_ptr"), dtype)
        backward |= dict.fromkeys(("M", "N", "C", "rows_per_strip"), "i32") | dict(dbias_partial_ptr="*fp32")
        tile = dict(ACTIVATION=activation, BLOCK_M=config.rows, BLOCK_N=config.columns, VECTOR=16)
        yield AotConfig(activation_backward_kernel, backward, tile, config.num_warps, 1, label, matrix=False)
        if label == "gelu bf16":
            backward |= dict(summed_ptr=dtype, sum_partial_ptr="*fp32")
            label += " and column sums"
            yield AotConfig(activation_backward_kernel, backward, tile, config.num_warps, 1, label, matrix=False)
