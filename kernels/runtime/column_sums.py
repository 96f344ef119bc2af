"""Sums over rows in a fixed order, in two steps: programs add strips of rows, then one kernel adds the strips' partial sums.

The first step is part of the kernels that have the values in registers, or a separate kernel for matrices that a GEMM has
written. No atomics, so equal calls give equal bits.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import multiprocessors
from fastdeit.kernels.runtime.launch import cdiv, launch

_TILE = (256, 16)  # strips and columns that a program of the second step adds at a time
_NUM_WARPS = 8
STRIP_TILE = (4, 256, 4)  # rows and columns of a step of the first step's own kernel, and warps: 8 values a thread


@triton.jit
def _add_pairs(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit
def sum_pairs(a, b, axis: tl.constexpr, keep_dims: tl.constexpr = False):
    """The sums of a and of b along an axis, in one reduction: half the barriers of two."""
    return tl.reduce((a, b), axis, _add_pairs, keep_dims=keep_dims)


@triton.jit
def sum_rows(x, ROWS: tl.constexpr):
    """The sums (N,) of the columns of x (ROWS, N), where ROWS is a power of two.

    As `tl.sum(x, axis=0)`, by halves. Where the rows lie in different warps, Triton's reduction writes a thread's columns to shared
    memory ROWS elements apart, which puts all threads of a warp on one bank; a split converts the layout without such conflicts.
    """
    N: tl.constexpr = x.shape[1]
    x = tl.trans(x)
    for step in tl.static_range(ROWS.bit_length() - 1):
        even, odd = tl.split(tl.reshape(x, [N, ROWS >> (step + 1), 2]))
        x = even + odd
    return tl.reshape(x, [N])


_MOST_TABLES = 4  # of one launch of the second step


@triton.jit
def _add_strips(
    partial_ptr, out_ptr, strips, C, BLOCK_STRIPS: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr
):
    C = C // VECTOR * VECTOR
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_STRIPS, BLOCK_C], tl.float32)
    # A table may be narrower than the grid: its last programs have nothing to add.
    for start in tl.range(0, tl.where(tl.program_id(0) * BLOCK_C < C, strips, 0), BLOCK_STRIPS):
        row = start + tl.arange(0, BLOCK_STRIPS)[:, None]
        inside = (row < strips) & (col[None, :] < C)
        total += tl.load(partial_ptr + row * C + col[None, :], inside, other=0.0)
    tl.store(out_ptr + col, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), col < C)


@triton.jit(do_not_specialize=["strips0", "strips1", "strips2", "strips3", "C0", "C1", "C2", "C3"])
def partial_sums_backward_kernel(
    partial0_ptr,  # (strips0, C0) fp32
    partial1_ptr,  # the other tables, None for those that are not there
    partial2_ptr,
    partial3_ptr,
    out0_ptr,  # (C0,) of any dtype
    out1_ptr,
    out2_ptr,
    out3_ptr,
    strips0,
    strips1,
    strips2,
    strips3,
    C0,
    C1,
    C2,
    C3,
    BLOCK_STRIPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides every C: lets loads be 16 bytes wide
):
    """A program owns BLOCK_C columns of one table (program id 1) and adds its rows in a fixed order."""
    if tl.program_id(1) == 0:
        _add_strips(partial0_ptr, out0_ptr, strips0, C0, BLOCK_STRIPS, BLOCK_C, VECTOR)
    if partial1_ptr is not None:
        if tl.program_id(1) == 1:
            _add_strips(partial1_ptr, out1_ptr, strips1, C1, BLOCK_STRIPS, BLOCK_C, VECTOR)
    if partial2_ptr is not None:
        if tl.program_id(1) == 2:
            _add_strips(partial2_ptr, out2_ptr, strips2, C2, BLOCK_STRIPS, BLOCK_C, VECTOR)
    if partial3_ptr is not None:
        if tl.program_id(1) == 3:
            _add_strips(partial3_ptr, out3_ptr, strips3, C3, BLOCK_STRIPS, BLOCK_C, VECTOR)


def row_strips(rows: int, step: int, column_blocks: int, x: torch.Tensor) -> tuple[int, int]:
    """Into how many strips to cut the rows of a grid (column_blocks, strips), and the rows of each, a multiple of step.

    Eight programs a multiprocessor of x's device keep enough loads in flight; each strip writes one partial row.
    """
    steps = cdiv(rows, step)
    strips = min(steps, cdiv(8 * multiprocessors(x), column_blocks))
    rows_per_strip = step * cdiv(steps, strips)
    return cdiv(rows, rows_per_strip), rows_per_strip


@triton.jit
def sum_strip(
    x_ptr, partial_ptr, block, M, N, rows_per_strip, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr
):
    """Writes the sums of BLOCK_N columns of one strip of rows (program id 1) of x (M, N) to the table partial (strips, N)."""
    N = N // VECTOR * VECTOR
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    col = column[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = tl.program_id(1) * rows_per_strip
    for start in tl.range(first, tl.minimum(first + rows_per_strip, M), BLOCK_M, num_stages=4):  # no NaN: row numbers
        row = start + tl.arange(0, BLOCK_M)[:, None]
        total += tl.load(x_ptr + row.to(tl.int64) * N + col, (row < M) & (col < N), other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(1) * N + column, sum_rows(total, BLOCK_M), column < N)


@triton.jit(do_not_specialize=["M", "N0", "N1", "rows_per_strip"])
def column_sums_backward_kernel(
    x0_ptr,  # (M, N0)
    x1_ptr,  # (M, N1), or None
    partial0_ptr,  # (strips, N0) fp32
    partial1_ptr,  # (strips, N1) fp32, or None
    M,
    N0,
    N1,
    rows_per_strip,  # a multiple of BLOCK_M
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides N0 and N1: lets loads be 16 bytes wide
):
    """A program owns BLOCK_N columns of one of the matrices, the first one's before the other's, of a strip (program id 1)."""
    block = tl.program_id(0)
    of_first = tl.cdiv(N0, BLOCK_N)
    if block < of_first:
        sum_strip(x0_ptr, partial0_ptr, block, M, N0, rows_per_strip, BLOCK_M, BLOCK_N, VECTOR)
    elif x1_ptr is not None:
        sum_strip(x1_ptr, partial1_ptr, block - of_first, M, N1, rows_per_strip, BLOCK_M, BLOCK_N, VECTOR)


# Rows (M, C), of partial sums in contiguous fp32, and where their total (C,) goes
Table = tuple[torch.Tensor, torch.Tensor]


def add_partial_sums(*tables: Table) -> None:
    """Writes each table's total, four tables a launch."""
    for first in range(0, len(tables), _MOST_TABLES):
        chosen = tables[first : first + _MOST_TABLES]
        absent = _MOST_TABLES - len(chosen)
        partials, totals = zip(*chosen, strict=True)
        strips, channels = zip(*(partial.shape for partial in partials), strict=True)
        vector = 4
        for C in channels:
            vector = min(vector, C & -C)
        launch(
            partial_sums_backward_kernel,
            (cdiv(max(channels), _TILE[1]), len(chosen)),
            (
                *partials,
                *(None,) * absent,
                *totals,
                *(None,) * absent,
                *strips,
                *(0,) * absent,
                *channels,
                *(0,) * absent,
            ),
            (*_TILE, vector),
            _NUM_WARPS,
        )


def column_sums(*matrices: tuple[torch.Tensor, torch.dtype | None], later: list[Table]) -> list[torch.Tensor | None]:
    """The sums (N,) of the columns of each matrix in its dtype, None for None, which `add_partial_sums(*later)` writes.

    At most two matrices (M, N), contiguous, with as many rows; one launch reads them.
    """
    totals = [None if dtype is None else x.new_empty(x.shape[1], dtype=dtype) for x, dtype in matrices]
    sum_columns(*((x, total) for (x, _), total in zip(matrices, totals, strict=True) if total is not None), later=later)
    return totals


def sum_columns(*matrices: Table, later: list[Table]) -> None:
    """`column_sums` into tensors (N,) that are there."""
    if not matrices:
        return
    M = matrices[0][0].shape[0]
    if M == 0:
        for _, total in matrices:
            total.zero_()
        return
    rows, columns, num_warps = STRIP_TILE
    widths = [x.shape[1] for x, _ in matrices]
    column_blocks = sum(cdiv(width, columns) for width in widths)
    strips, rows_per_strip = row_strips(M, rows, column_blocks, matrices[0][0])
    partials = [x.new_empty(strips, x.shape[1], dtype=torch.float32) for x, _ in matrices]
    later += [(partial, total) for partial, (_, total) in zip(partials, matrices, strict=True)]
    absent = (None,) * (2 - len(matrices))
    launch(
        column_sums_backward_kernel,
        (column_blocks, strips),
        (*(x for x, _ in matrices), *absent, *partials, *absent, M, widths[0], widths[-1], rows_per_strip),
        (rows, columns, min(*(width & -width for width in widths), 16)),
        num_warps,
    )


def sum_later(later: list[Table] | None, *tables: Table) -> None:
    """Leaves the second step to a later launch that has more to add, or takes it now where there is no list for it."""
    if later is None:
        add_partial_sums(*tables)
    else:
        later += tables


def add_all(later: list[Table]) -> None:
    """Writes the totals of the tables in the list, which is then empty."""
    add_partial_sums(*later)
    later.clear()


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Tables of autocast, one and a LayerNorm's three, and the four of a branch of a bf16 model; two matrices in bf16."""
    tile = dict(zip(("BLOCK_STRIPS", "BLOCK_C"), _TILE, strict=True), VECTOR=4)
    sizes = dict.fromkeys((f"{name}{i}" for name in ("strips", "C") for i in range(_MOST_TABLES)), "i32")
    for tables, dtype in ((1, "fp32"), (3, "fp32"), (_MOST_TABLES, "bf16")):
        types = dict.fromkeys((f"partial{i}_ptr" for i in range(tables)), "*fp32") | sizes
        types |= dict.fromkeys((f"out{i}_ptr" for i in range(tables)), f"*{dtype}")
        label = f"{dtype}, {tables} table{'s' if tables > 1 else ''}"
        yield AotConfig(partial_sums_backward_kernel, types, tile, _NUM_WARPS, 1, label, matrix=False)
    rows, columns, num_warps = STRIP_TILE
    strip = dict(BLOCK_M=rows, BLOCK_N=columns, VECTOR=16)
    types = dict.fromkeys(("x0_ptr", "x1_ptr"), "*bf16") | dict.fromkeys(("partial0_ptr", "partial1_ptr"), "*fp32")
    types |= dict.fromkeys(("M", "N0", "N1", "rows_per_strip"), "i32")
    yield AotConfig(column_sums_backward_kernel, types, strip, num_warps, 1, "two matrices", matrix=False)
