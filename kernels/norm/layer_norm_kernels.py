"""The LayerNorm kernels, forward and backward, with the residual addition in front."""

import triton
import triton.language as tl

from fastdeit.kernels.norm.subsets import row_of_subset
from fastdeit.kernels.runtime.column_sums import sum_pairs


@triton.jit
def _row_offset(row, TOKENS, sample_stride, token_stride, C: tl.constexpr, VECTOR: tl.constexpr, DENSE: tl.constexpr):
    # The division by TOKENS alone is a fifth of the instructions of a bf16 row: contiguous streams do without.
    if DENSE:
        return row.to(tl.int64) * C
    # int64: B * N * C passes 2^31 at batch sizes people use. Rows themselves fit 32 bits, as a grid does, and dividing in 64 is a
    # function call, across which the compiler spills registers. The hint stands on the scalar that is added to the columns: on
    # the strides it is lost, and loads are one element wide.
    sample = row // TOKENS
    token = row - sample * TOKENS
    offset = sample.to(tl.int64) * sample_stride + token.to(tl.int64) * token_stride
    return tl.multiple_of(offset, VECTOR)


@triton.jit(
    do_not_specialize=[
        "TOKENS",
        "branch_kept",
        "kept",
        "x_sample_stride",
        "x_token_stride",
        "branch_sample_stride",
        "branch_token_stride",
    ]
)
def layer_norm_forward_kernel(
    x_ptr,  # (B, TOKENS, C), strides (x_sample_stride, x_token_stride, 1)
    branch_ptr,  # (branch_kept, TOKENS, C) strided likewise, or None
    gamma_ptr,  # (C,) or None
    drop_path_scale_ptr,  # (B,) fp32 or None
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    x_new_ptr,  # (B * TOKENS, C), None without a branch
    y_ptr,  # (kept * TOKENS, C)
    mean_ptr,  # (kept * TOKENS,) fp32, None when no gradient will be asked for
    rstd_ptr,  # (kept * TOKENS,) fp32, likewise
    branch_slots_ptr,  # (B,) int64, the branch's of `Subsets`; None where it has all B samples
    slots_ptr,  # (B,) int64, of what is normalised, likewise
    TOKENS,
    branch_kept,  # without slots these two are not read
    kept,
    x_sample_stride,
    x_token_stride,
    branch_sample_stride,
    branch_token_stride,
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,  # C rounded up to a power of two
    VECTOR: tl.constexpr,  # a power of two that divides every stride and C: lets loads be 16 bytes wide
    DENSE: tl.constexpr,  # x and branch are contiguous
):
    """A program owns one row of the stream, of which there are B * TOKENS."""
    row = tl.program_id(0)
    col = tl.arange(0, CHANNELS)
    inside = col < C
    dense = row.to(tl.int64) * C + col

    x_row = _row_offset(row, TOKENS, x_sample_stride, x_token_stride, C, VECTOR, DENSE)
    x = tl.load(x_ptr + x_row + col, inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch_row, added = row_of_subset(row, True, branch_slots_ptr, branch_kept, TOKENS)
        branch_row = _row_offset(branch_row, TOKENS, branch_sample_stride, branch_token_stride, C, VECTOR, DENSE)
        branch = tl.load(branch_ptr + branch_row + col, inside & added, other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            branch *= tl.load(gamma_ptr + col, inside, other=0.0).to(tl.float32)
        if drop_path_scale_ptr is not None:
            branch *= tl.load(drop_path_scale_ptr + row // TOKENS)
        # Rounded to the residual stream's dtype first, so that backward, which reads x_new, sees what the statistics saw.
        x_new = (x + branch).to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + dense, x_new, inside)
        x = x_new.to(tl.float32)

    mean = tl.sum(x, axis=0) / C
    centred = tl.where(inside, x - mean, 0.0)  # padding must not count in the variance
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / C + eps)
    y = centred * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + col, inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, inside, other=0.0).to(tl.float32)
    row, normalised = row_of_subset(row, True, slots_ptr, kept, TOKENS)
    tl.store(y_ptr + row.to(tl.int64) * C + col, y.to(y_ptr.dtype.element_ty), inside & normalised)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, normalised)
        tl.store(rstd_ptr + row, rstd, normalised)


@triton.jit(
    do_not_specialize=[
        "M",
        "TOKENS",
        "x_sample_stride",
        "x_token_stride",
        "branch_sample_stride",
        "branch_token_stride",
        "dy_sample_stride",
        "dy_token_stride",
        "dx_new_sample_stride",
        "dx_new_token_stride",
    ]
)
def layer_norm_backward_kernel(
    dy_ptr,  # (B, TOKENS, C), strided as x
    dx_new_ptr,  # (B, TOKENS, C), the gradient of the residual stream after this layer, or None
    x_ptr,  # (B, TOKENS, C), what was normalised
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    weight_ptr,  # (C,) or None
    branch_ptr,  # (B, TOKENS, C), only where gamma's gradient is wanted
    gamma_ptr,  # (C,) or None
    drop_path_scale_ptr,  # (B,) fp32 or None
    dx_ptr,  # (M, C) or None
    dbranch_ptr,  # (M, C) or None
    dweight_partial_ptr,  # (programs, C) fp32 or None
    dbias_partial_ptr,  # (programs, C) fp32 or None
    dgamma_partial_ptr,  # (programs, C) fp32 or None
    M,  # B * TOKENS
    TOKENS,
    dy_sample_stride,
    dy_token_stride,
    dx_new_sample_stride,
    dx_new_token_stride,
    x_sample_stride,
    x_token_stride,
    branch_sample_stride,
    branch_token_stride,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
    DENSE: tl.constexpr,  # all inputs of rows are contiguous
    STAGES: tl.constexpr,  # of the loop's pipeline; 1 for rows too wide to keep weight and gamma in registers
):
    """A program owns every num_programs-th row, and one row of each table of partial sums."""
    col = tl.arange(0, CHANNELS)
    inside = col < C
    dweight = tl.zeros([CHANNELS], tl.float32)
    dbias = tl.zeros([CHANNELS], tl.float32)
    dgamma = tl.zeros([CHANNELS], tl.float32)
    if STAGES > 1:
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + col, inside, other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            gamma = tl.load(gamma_ptr + col, inside, other=0.0).to(tl.float32)
    for index in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=STAGES):
        row = tl.full([], 0, tl.int32) + index  # a tensor under the interpreter too
        dense = row.to(tl.int64) * C + col
        dy_row = _row_offset(row, TOKENS, dy_sample_stride, dy_token_stride, C, VECTOR, DENSE)
        x_row = _row_offset(row, TOKENS, x_sample_stride, x_token_stride, C, VECTOR, DENSE)
        dy = tl.load(dy_ptr + dy_row + col, inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + x_row + col, inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        x_hat = (x - mean) * rstd  # past C anything finite, or NaN as in all of the row: dy is zero there
        if dbias_partial_ptr is not None:
            dbias += dy
        if dweight_partial_ptr is not None:
            dweight += dy * x_hat
        if weight_ptr is not None:
            if STAGES == 1:
                weight = tl.load(weight_ptr + col, inside, other=0.0).to(tl.float32)
            dy *= weight
        if STAGES == 1:  # with both sums at once the widest rows would spill more
            along_x_hat, along_one = tl.sum(dy * x_hat, axis=0), tl.sum(dy, axis=0)
        else:
            along_x_hat, along_one = sum_pairs(dy * x_hat, dy, axis=0)
        dx = (dy - x_hat * (along_x_hat / C) - along_one / C) * rstd
        if dx_new_ptr is not None:
            dx_new_row = _row_offset(row, TOKENS, dx_new_sample_stride, dx_new_token_stride, C, VECTOR, DENSE)
            dx += tl.load(dx_new_ptr + dx_new_row + col, inside, other=0.0).to(tl.float32)
        if dx_ptr is not None:
            tl.store(dx_ptr + dense, dx.to(dx_ptr.dtype.element_ty), inside)
        if drop_path_scale_ptr is not None:
            dx *= tl.load(drop_path_scale_ptr + row // TOKENS)
        if dgamma_partial_ptr is not None:
            branch_row = _row_offset(row, TOKENS, branch_sample_stride, branch_token_stride, C, VECTOR, DENSE)
            branch = tl.load(branch_ptr + branch_row + col, inside, other=0.0).to(tl.float32)
            dgamma += tl.where(inside, dx * branch, 0.0)
        if dbranch_ptr is not None:
            if gamma_ptr is not None:
                if STAGES == 1:
                    gamma = tl.load(gamma_ptr + col, inside, other=0.0).to(tl.float32)
                dx *= gamma
            tl.store(dbranch_ptr + dense, dx.to(dbranch_ptr.dtype.element_ty), inside)

    partial = tl.program_id(0) * C + col
    if dweight_partial_ptr is not None:
        tl.store(dweight_partial_ptr + partial, dweight, inside)
    if dbias_partial_ptr is not None:
        tl.store(dbias_partial_ptr + partial, dbias, inside)
    if dgamma_partial_ptr is not None:
        tl.store(dgamma_partial_ptr + partial, dgamma, inside)
