"""The kernels that fold a LayerNorm's or a LayerScale's parameters into weights, and their gradients out of them."""

import triton
import triton.language as tl

from fastdeit.kernels.gemm.tiles import assume_multiple_of
from fastdeit.kernels.runtime.column_sums import sum_rows


@triton.jit
def _fold(
    block,
    weight_ptr,
    bias_ptr,
    column_scale_ptr,
    column_shift_ptr,
    row_scale_ptr,
    folded_ptr,
    folded_bias_ptr,
    N,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """row_scale * weight * column_scale, and row_scale * (bias + weight column_shift), of one block of BLOCK_M rows."""
    C = assume_multiple_of(C, VECTOR)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    shifted = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row, row < N, other=0.0).to(tl.float32)
    for start in tl.range(0, C, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        inside = (row[:, None] < N) & (col[None, :] < C)
        at = row[:, None].to(tl.int64) * C + col[None, :]
        weight = tl.load(weight_ptr + at, inside, other=0.0).to(tl.float32)
        if column_shift_ptr is not None:
            shifted += weight * tl.load(column_shift_ptr + col, col < C, other=0.0).to(tl.float32)[None, :]
        if column_scale_ptr is not None:
            weight *= tl.load(column_scale_ptr + col, col < C, other=0.0).to(tl.float32)[None, :]
        if row_scale_ptr is not None:
            weight *= row_scale[:, None]
        tl.store(folded_ptr + at, weight.to(folded_ptr.dtype.element_ty), inside)
    if folded_bias_ptr is not None:
        bias = tl.sum(shifted, axis=1)
        if bias_ptr is not None:
            bias += tl.load(bias_ptr + row, row < N, other=0.0).to(tl.float32)
        if row_scale_ptr is not None:
            bias *= row_scale
        tl.store(folded_bias_ptr + row, bias.to(folded_bias_ptr.dtype.element_ty), row < N)


@triton.jit(do_not_specialize=["N", "C"])
def fold_forward_kernel(
    weight_ptr,  # (N, C)
    bias_ptr,  # (N,) or None
    column_scale_ptr,  # (C,) or None
    column_shift_ptr,  # (C,) or None
    row_scale_ptr,  # (N,) or None
    folded_ptr,  # (N, C)
    folded_bias_ptr,  # (N,) or None
    N,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides C: lets loads be 16 bytes wide
):
    """A program owns BLOCK_M rows."""
    _fold(
        tl.program_id(0),
        weight_ptr,
        bias_ptr,
        column_scale_ptr,
        column_shift_ptr,
        row_scale_ptr,
        folded_ptr,
        folded_bias_ptr,
        N,
        C,
        BLOCK_M,
        BLOCK_N,
        VECTOR,
    )


@triton.jit
def _fold_both(
    block,
    weight0_ptr,
    bias0_ptr,
    column_scale0_ptr,
    column_shift0_ptr,
    folded0_ptr,
    folded_bias0_ptr,
    weight1_ptr,
    bias1_ptr,
    row_scale1_ptr,
    folded1_ptr,
    folded_bias1_ptr,
    N0,
    C0,
    N1,
    C1,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A block of a branch's two layers, those of the first one before the other's; arguments as in `fold_both_forward_kernel`."""
    of_first = tl.cdiv(N0, BLOCK_M)
    if block < of_first:
        _fold(
            block,
            weight0_ptr,
            bias0_ptr,
            column_scale0_ptr,
            column_shift0_ptr,
            None,
            folded0_ptr,
            folded_bias0_ptr,
            N0,
            C0,
            BLOCK_M,
            BLOCK_N,
            VECTOR,
        )
    else:
        _fold(
            block - of_first,
            weight1_ptr,
            bias1_ptr,
            None,
            None,
            row_scale1_ptr,
            folded1_ptr,
            folded_bias1_ptr,
            N1,
            C1,
            BLOCK_M,
            BLOCK_N,
            VECTOR,
        )


@triton.jit(do_not_specialize=["N0", "C0", "N1", "C1"])
def fold_both_forward_kernel(
    # of the layer behind a LayerNorm, (N0, C0); each as in `fold_forward_kernel`
    weight0_ptr,
    bias0_ptr,
    column_scale0_ptr,
    column_shift0_ptr,
    folded0_ptr,
    folded_bias0_ptr,
    # of the layer before a LayerScale, (N1, C1)
    weight1_ptr,
    bias1_ptr,
    row_scale1_ptr,
    folded1_ptr,
    folded_bias1_ptr,
    N0,
    C0,
    N1,
    C1,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides C0 and C1
):
    """A program owns BLOCK_M rows of one of the weights, the first one's before the other's."""
    _fold_both(
        tl.program_id(0),
        weight0_ptr,
        bias0_ptr,
        column_scale0_ptr,
        column_shift0_ptr,
        folded0_ptr,
        folded_bias0_ptr,
        weight1_ptr,
        bias1_ptr,
        row_scale1_ptr,
        folded1_ptr,
        folded_bias1_ptr,
        N0,
        C0,
        N1,
        C1,
        BLOCK_M,
        BLOCK_N,
        VECTOR,
    )


@triton.jit(do_not_specialize=["N0", "C0", "N1", "C1", "N2", "C2", "N3", "C3"])
def fold_four_forward_kernel(
    # of one branch's layers, as in `fold_both_forward_kernel`
    weight0_ptr,
    bias0_ptr,
    column_scale0_ptr,
    column_shift0_ptr,
    folded0_ptr,
    folded_bias0_ptr,
    weight1_ptr,
    bias1_ptr,
    row_scale1_ptr,
    folded1_ptr,
    folded_bias1_ptr,
    N0,
    C0,
    N1,
    C1,
    # of another branch's layers, None where those are
    weight2_ptr,
    bias2_ptr,
    column_scale2_ptr,
    column_shift2_ptr,
    folded2_ptr,
    folded_bias2_ptr,
    weight3_ptr,
    bias3_ptr,
    row_scale3_ptr,
    folded3_ptr,
    folded_bias3_ptr,
    N2,
    C2,
    N3,
    C3,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides C0 to C3
):
    """A program owns BLOCK_M rows of one of the weights, one after the other. It selects the branch's arguments, so that the
    code is that of one branch."""
    block = tl.program_id(0)
    of_first = tl.cdiv(N0, BLOCK_M) + tl.cdiv(N1, BLOCK_M)
    first = block < of_first
    weight0_ptr = tl.where(first, weight0_ptr, weight2_ptr)
    if bias0_ptr is not None:
        bias0_ptr = tl.where(first, bias0_ptr, bias2_ptr)
    if column_scale0_ptr is not None:
        column_scale0_ptr = tl.where(first, column_scale0_ptr, column_scale2_ptr)
    if column_shift0_ptr is not None:
        column_shift0_ptr = tl.where(first, column_shift0_ptr, column_shift2_ptr)
    folded0_ptr = tl.where(first, folded0_ptr, folded2_ptr)
    if folded_bias0_ptr is not None:
        folded_bias0_ptr = tl.where(first, folded_bias0_ptr, folded_bias2_ptr)
    weight1_ptr = tl.where(first, weight1_ptr, weight3_ptr)
    if bias1_ptr is not None:
        bias1_ptr = tl.where(first, bias1_ptr, bias3_ptr)
    if row_scale1_ptr is not None:
        row_scale1_ptr = tl.where(first, row_scale1_ptr, row_scale3_ptr)
    folded1_ptr = tl.where(first, folded1_ptr, folded3_ptr)
    if folded_bias1_ptr is not None:
        folded_bias1_ptr = tl.where(first, folded_bias1_ptr, folded_bias3_ptr)
    _fold_both(
        tl.where(first, block, block - of_first),
        weight0_ptr,
        bias0_ptr,
        column_scale0_ptr,
        column_shift0_ptr,
        folded0_ptr,
        folded_bias0_ptr,
        weight1_ptr,
        bias1_ptr,
        row_scale1_ptr,
        folded1_ptr,
        folded_bias1_ptr,
        tl.where(first, N0, N2),
        tl.where(first, C0, C2),
        tl.where(first, N1, N3),
        tl.where(first, C1, C3),
        BLOCK_M,
        BLOCK_N,
        VECTOR,
    )


@triton.jit
def _sum_partials(partial_ptr, strips, row, N, BLOCK_STRIPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sums (BLOCK_M,) of some columns of a table of partial sums (strips, N), in a fixed order."""
    total = tl.zeros([BLOCK_M, BLOCK_STRIPS], tl.float32)
    for start in tl.range(0, strips, BLOCK_STRIPS):
        strip = start + tl.arange(0, BLOCK_STRIPS)[None, :]
        total += tl.load(partial_ptr + strip * N + row[:, None], (strip < strips) & (row[:, None] < N), other=0.0)
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=["N", "C", "rows_per_strip", "dbias_strips"])
def fold_columns_backward_kernel(
    dfolded_ptr,  # (N, C) fp32, or None where neither the weight's gradient nor the scale's is wanted
    dbias_partial_ptr,  # (dbias_strips, N) fp32, whose sums are the folded bias's gradient, or None
    dbias_ptr,  # (N,) fp32, where those go, or None
    weight_ptr,  # (N, C)
    column_scale_ptr,  # (C,) or None
    column_shift_ptr,  # (C,) or None
    dweight_ptr,  # (N, C) or None; may be dfolded
    dscale_partial_ptr,  # (strips, C) fp32, or None
    dshift_partial_ptr,  # (strips, C) fp32, or None
    N,
    C,
    rows_per_strip,  # a multiple of BLOCK_M
    dbias_strips,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_STRIPS: tl.constexpr,  # of partial sums, added at a time
):
    """A program owns BLOCK_N columns of one strip of rows (program id 1). Those of the first columns write the bias's gradient."""
    C = assume_multiple_of(C, VECTOR)
    strip = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dscale = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dshift = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if column_scale_ptr is not None:
        scale = tl.load(column_scale_ptr + col, col < C, other=0.0).to(tl.float32)[None, :]
    if column_shift_ptr is not None:
        shift = tl.load(column_shift_ptr + col, col < C, other=0.0).to(tl.float32)[None, :]
    first = strip * rows_per_strip
    for start in tl.range(first, tl.minimum(first + rows_per_strip, N), BLOCK_M):  # no NaN: row numbers
        row = start + tl.arange(0, BLOCK_M)
        inside = (row[:, None] < N) & (col[None, :] < C)
        at = row[:, None].to(tl.int64) * C + col[None, :]
        if dbias_partial_ptr is not None:
            sums = _sum_partials(dbias_partial_ptr, dbias_strips, row, N, BLOCK_STRIPS, BLOCK_M)
            if dbias_ptr is not None:
                tl.store(dbias_ptr + row, sums, (row < N) & (tl.program_id(0) == 0))
            dbias = sums[:, None]
        if dscale_partial_ptr is not None or dshift_partial_ptr is not None:
            weight = tl.load(weight_ptr + at, inside, other=0.0).to(tl.float32)
        if dshift_partial_ptr is not None:
            dshift += weight * dbias
        if dfolded_ptr is not None:
            gradient = tl.load(dfolded_ptr + at, inside, other=0.0)
            if dscale_partial_ptr is not None:
                dscale += weight * gradient
            if dweight_ptr is not None:
                if column_scale_ptr is not None:
                    gradient *= scale
                if column_shift_ptr is not None:
                    gradient += dbias * shift
                tl.store(dweight_ptr + at, gradient.to(dweight_ptr.dtype.element_ty), inside)
    if dscale_partial_ptr is not None:
        tl.store(dscale_partial_ptr + strip * C + col, sum_rows(dscale, BLOCK_M), col < C)
    if dshift_partial_ptr is not None:
        tl.store(dshift_partial_ptr + strip * C + col, sum_rows(dshift, BLOCK_M), col < C)


@triton.jit(do_not_specialize=["N", "C"])
def fold_rows_backward_kernel(
    dfolded_ptr,  # (N, C) fp32, or None where neither the weight's gradient nor the scale's is wanted
    dfolded_bias_ptr,  # (N,) fp32, or None where neither the bias's gradient nor the scale's is wanted
    weight_ptr,  # (N, C)
    bias_ptr,  # (N,) or None
    row_scale_ptr,  # (N,)
    dweight_ptr,  # (N, C) or None; may be dfolded
    dbias_ptr,  # (N,) or None
    dscale_ptr,  # (N,) or None
    N,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program owns BLOCK_M rows."""
    C = assume_multiple_of(C, VECTOR)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = tl.load(row_scale_ptr + row, row < N, other=0.0).to(tl.float32)
    along_row = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if dfolded_ptr is not None:
        for start in tl.range(0, C, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)
            inside = (row[:, None] < N) & (col[None, :] < C)
            at = row[:, None].to(tl.int64) * C + col[None, :]
            gradient = tl.load(dfolded_ptr + at, inside, other=0.0)
            if dscale_ptr is not None:
                along_row += gradient * tl.load(weight_ptr + at, inside, other=0.0).to(tl.float32)
            if dweight_ptr is not None:
                tl.store(dweight_ptr + at, (gradient * scale[:, None]).to(dweight_ptr.dtype.element_ty), inside)
    dscale = tl.sum(along_row, axis=1)
    if dfolded_bias_ptr is not None:
        dbias = tl.load(dfolded_bias_ptr + row, row < N, other=0.0)
        if bias_ptr is not None:
            dscale += dbias * tl.load(bias_ptr + row, row < N, other=0.0).to(tl.float32)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + row, (dbias * scale).to(dbias_ptr.dtype.element_ty), row < N)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + row, dscale.to(dscale_ptr.dtype.element_ty), row < N)
