"""Sums over rows in a fixed order, in two steps: programs add strips of rows, then one kernel adds the strips' partial sums.

The first step lives in the kernels that have the values in registers anyway. No atomics, so equal calls give equal bits.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import multiprocessors
from fastdeit.kernels.runtime.launch import cdiv, launch

_TILE = (256, 16)  # partial rows and columns that a program of the second step adds at a time
_NUM_WARPS = 8


@triton.jit
def _add_pairs(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit
def sum_pairs(a, b, axis: tl.constexpr, keep_dims: tl.constexpr = False):
    """The sums of a and of b along an axis, in one reduction: half the barriers of two."""
    return tl.reduce((a, b), axis, _add_pairs, keep_dims=keep_dims)


@triton.jit(do_not_specialize=["PROGRAMS", "C"])
def partial_sums_backward_kernel(
    partial_ptr,  # (tables, PROGRAMS, C) fp32
    out0_ptr,  # (C,) of any dtype; the tables' sums in order, None for those that are not there
    out1_ptr,
    out2_ptr,
    PROGRAMS,
    C,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides C: lets loads be 16 bytes wide
):
    """A program owns BLOCK_C columns of one table (program id 1) and adds its rows in a fixed order."""
    C = C // VECTOR * VECTOR
    table = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_PROGRAMS, BLOCK_C], tl.float32)
    for start in tl.range(0, PROGRAMS, BLOCK_PROGRAMS):
        row = start + tl.arange(0, BLOCK_PROGRAMS)[:, None]
        inside = (row < PROGRAMS) & (col[None, :] < C)
        total += tl.load(partial_ptr + (table * PROGRAMS + row) * C + col[None, :], inside, other=0.0)
    result = tl.sum(total, axis=0)
    if table == 0:
        tl.store(out0_ptr + col, result.to(out0_ptr.dtype.element_ty), col < C)
    if out1_ptr is not None:
        if table == 1:
            tl.store(out1_ptr + col, result.to(out1_ptr.dtype.element_ty), col < C)
    if out2_ptr is not None:
        if table == 2:
            tl.store(out2_ptr + col, result.to(out2_ptr.dtype.element_ty), col < C)


def row_strips(rows: int, step: int, column_blocks: int, x: torch.Tensor) -> tuple[int, int]:
    """Into how many strips to cut the rows of a grid (column_blocks, strips), and the rows of each, a multiple of step.

    Eight programs a multiprocessor of x's device keep enough loads in flight; each strip writes one partial row.
    """
    steps = cdiv(rows, step)
    strips = min(steps, cdiv(8 * multiprocessors(x), column_blocks))
    rows_per_strip = step * cdiv(steps, strips)
    return cdiv(rows, rows_per_strip), rows_per_strip


def add_partial_sums(partial: torch.Tensor, *totals: torch.Tensor) -> None:
    """Writes the sums over the second last dimension of partial ([tables,] strips, C), contiguous fp32, into the tables' (C,)."""
    strips, channels = partial.shape[-2:]
    absent = (None,) * (3 - len(totals))
    grid = (cdiv(channels, _TILE[1]), len(totals))
    args = (partial, *totals, *absent, strips, channels)
    launch(partial_sums_backward_kernel, grid, args, (*_TILE, min(channels & -channels, 4)), _NUM_WARPS)


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """The one configuration."""
    types = dict(partial_ptr="*fp32", out0_ptr="*fp32", out1_ptr="*fp32", out2_ptr="*fp32", PROGRAMS="i32", C="i32")
    tile = dict(zip(("BLOCK_PROGRAMS", "BLOCK_C"), _TILE, strict=True), VECTOR=4)
    yield AotConfig(partial_sums_backward_kernel, types, tile, _NUM_WARPS, 1, "fp32", matrix=False)
