"""The kernels of DeiT-Ti's MLP in one kernel: a program owns rows, and walks over blocks of hidden columns."""

import triton
import triton.language as tl

from fastdeit.kernels.gemm.tiles import assume_multiple_of, in_range_of
from fastdeit.kernels.mlp.activation_functions import activate

CHANNELS = tl.constexpr(192)
LEFT = tl.constexpr(128)  # of the channels
RIGHT = tl.constexpr(64)

# ---- pieces of the kernels. A piece is BLOCK_M rows from row0 on, and BLOCK_N of the channels from COL0 on.


@triton.jit
def _load(ptr, row_stride, row0, M, COL0: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zeros past M."""
    row, col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N) + COL0
    at = row[:, None] * row_stride + col[None, :]
    return tl.load(ptr + row0.to(tl.int64) * row_stride + at, (row < M - row0)[:, None], other=0.0)


@triton.jit
def _add(
    x, branch_ptr, branch_stride, x_new_ptr, row0, M, COL0: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """x + branch, fp32, and stored. Rounded to the stream's dtype first, as all others see it."""
    if branch_ptr is not None:
        x = x.to(tl.float32) + _load(branch_ptr, branch_stride, row0, M, COL0, BLOCK_M, BLOCK_N).to(tl.float32)
        x = x.to(x_new_ptr.dtype.element_ty)
        row, col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N) + COL0
        at = row[:, None] * CHANNELS + col[None, :]
        tl.store(x_new_ptr + row0.to(tl.int64) * CHANNELS + at, x, (row < M - row0)[:, None])
    return x.to(tl.float32)


@triton.jit
def _affine(x_hat, weight_ptr, bias_ptr, COL0: tl.constexpr, BLOCK_N: tl.constexpr):
    col = tl.arange(0, BLOCK_N) + COL0
    if weight_ptr is not None:
        x_hat *= tl.load(weight_ptr + col).to(tl.float32)[None, :]
    if bias_ptr is not None:
        x_hat += tl.load(bias_ptr + col).to(tl.float32)[None, :]
    return x_hat


@triton.jit
def _front(
    x_ptr,
    branch_ptr,
    x_new_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    x_stride,
    branch_stride,
    eps,
    row0,
    M,
    dtype: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The first product's input, left and right."""
    x_stride, branch_stride = assume_multiple_of(x_stride, VECTOR), assume_multiple_of(branch_stride, VECTOR)
    left = _load(x_ptr, x_stride, row0, M, 0, BLOCK_M, LEFT)
    right = _load(x_ptr, x_stride, row0, M, LEFT, BLOCK_M, RIGHT)
    if NORM:
        left = _add(left, branch_ptr, branch_stride, x_new_ptr, row0, M, 0, BLOCK_M, LEFT)
        right = _add(right, branch_ptr, branch_stride, x_new_ptr, row0, M, LEFT, BLOCK_M, RIGHT)
        mean = (tl.sum(left, axis=1) + tl.sum(right, axis=1)) / CHANNELS
        left -= mean[:, None]
        right -= mean[:, None]
        rstd = tl.rsqrt((tl.sum(left * left, axis=1) + tl.sum(right * right, axis=1)) / CHANNELS + eps)
        left = _affine(left * rstd[:, None], norm_weight_ptr, norm_bias_ptr, 0, LEFT)
        right = _affine(right * rstd[:, None], norm_weight_ptr, norm_bias_ptr, LEFT, RIGHT)
    return left.to(dtype), right.to(dtype)


@triton.jit
def _hidden(z, b1_ptr, start, dtype: tl.constexpr, ACTIVATION: tl.constexpr, HIDDEN: tl.constexpr):
    """Of the first product's columns from `start` on, the second product's input."""
    if b1_ptr is not None:
        z += tl.load(b1_ptr + start + tl.arange(0, HIDDEN)).to(tl.float32)[None, :]
    return activate(in_range_of(z, dtype), ACTIVATION).to(dtype)


@triton.jit
def _finish(
    acc,
    b2_ptr,
    gamma_ptr,
    out_ptr,
    row0,
    M,
    dtype: tl.constexpr,
    COL0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, col = row0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N) + COL0
    if b2_ptr is not None:
        acc += tl.load(b2_ptr + col).to(tl.float32)[None, :]
    if gamma_ptr is not None:
        acc = in_range_of(acc, dtype) * tl.load(gamma_ptr + col).to(tl.float32)[None, :]
    # Offsets unlike those of the loads: the compiler would keep shared ones in registers through the loop, and spill.
    at = row.to(tl.int64)[:, None] * CHANNELS + col[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), (row < M)[:, None])


@triton.jit(do_not_specialize=["M", "H", "x_stride", "branch_stride", "w1_stride", "w2_stride"])
def fused_mlp_forward_kernel(
    x_ptr,  # (M, CHANNELS), row stride x_stride
    branch_ptr,  # (M, CHANNELS), row stride branch_stride, or None
    x_new_ptr,  # (M, CHANNELS), None without a branch
    norm_weight_ptr,  # (CHANNELS,) or None
    norm_bias_ptr,  # (CHANNELS,) or None
    w1_ptr,  # (H, CHANNELS), row stride w1_stride, in the dtype of the products
    b1_ptr,  # (H,) or None
    w2_ptr,  # (CHANNELS, H), row stride w2_stride, likewise
    b2_ptr,  # (CHANNELS,) or None
    gamma_ptr,  # (CHANNELS,) or None
    out_ptr,  # (M, CHANNELS)
    M,
    H,  # a multiple of HIDDEN
    x_stride,
    branch_stride,
    w1_stride,
    w2_stride,
    eps,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,  # whether there is a LayerNorm in front, and before it a branch to add
    BLOCK_M: tl.constexpr,
    HIDDEN: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides H and all strides: lets loads be 16 bytes wide
):
    """A program owns BLOCK_M rows."""
    dtype: tl.constexpr = w1_ptr.dtype.element_ty
    row0 = tl.program_id(0) * BLOCK_M
    x_left, x_right = _front(
        x_ptr,
        branch_ptr,
        x_new_ptr,
        norm_weight_ptr,
        norm_bias_ptr,
        x_stride,
        branch_stride,
        eps,
        row0,
        M,
        dtype,
        NORM,
        BLOCK_M,
        VECTOR,
    )
    w1_stride, w2_stride = assume_multiple_of(w1_stride, VECTOR), assume_multiple_of(w2_stride, VECTOR)
    left_col, right_col, hidden = tl.arange(0, LEFT), tl.arange(0, RIGHT) + LEFT, tl.arange(0, HIDDEN)
    w1 = w1_ptr + hidden[None, :] * w1_stride
    w2 = w2_ptr + hidden[:, None]
    left = tl.zeros([BLOCK_M, LEFT], tl.float32)
    right = tl.zeros([BLOCK_M, RIGHT], tl.float32)
    for start in tl.range(0, assume_multiple_of(H, HIDDEN), HIDDEN):
        z = tl.dot(x_left, tl.load(w1 + left_col[:, None]), input_precision="ieee")
        z = tl.dot(x_right, tl.load(w1 + right_col[:, None]), z, input_precision="ieee")
        h = _hidden(z, b1_ptr, start, dtype, ACTIVATION, HIDDEN)
        left = tl.dot(h, tl.load(w2 + left_col[None, :] * w2_stride), left, input_precision="ieee")
        right = tl.dot(h, tl.load(w2 + right_col[None, :] * w2_stride), right, input_precision="ieee")
        w1 += HIDDEN * w1_stride
        w2 += HIDDEN
    _finish(left, b2_ptr, gamma_ptr, out_ptr, row0, M, dtype, 0, BLOCK_M, LEFT)
    _finish(right, b2_ptr, gamma_ptr, out_ptr, row0, M, dtype, LEFT, BLOCK_M, RIGHT)


@triton.jit(do_not_specialize=["M", "H", "x_stride", "branch_stride"])
def fused_mlp_forward_descriptor_kernel(
    x_ptr,  # as above; read once, so that only weights come by descriptors
    branch_ptr,
    x_new_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    w1_left_desc,  # of w1 (H, CHANNELS), block [HIDDEN, LEFT]
    w1_right_desc,  # block [HIDDEN, RIGHT]
    b1_ptr,
    w2_left_desc,  # of w2 (CHANNELS, H), block [LEFT, HIDDEN]
    w2_right_desc,  # block [RIGHT, HIDDEN]
    b2_ptr,
    gamma_ptr,
    out_ptr,
    M,
    H,
    x_stride,
    branch_stride,
    eps,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HIDDEN: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program owns BLOCK_M rows."""
    dtype: tl.constexpr = w1_left_desc.dtype
    row0 = tl.program_id(0) * BLOCK_M
    x_left, x_right = _front(
        x_ptr,
        branch_ptr,
        x_new_ptr,
        norm_weight_ptr,
        norm_bias_ptr,
        x_stride,
        branch_stride,
        eps,
        row0,
        M,
        dtype,
        NORM,
        BLOCK_M,
        VECTOR,
    )
    left = tl.zeros([BLOCK_M, LEFT], tl.float32)
    right = tl.zeros([BLOCK_M, RIGHT], tl.float32)
    for start in tl.range(0, H, HIDDEN):
        z = tl.dot(x_left, w1_left_desc.load([start, 0]).T)
        z = tl.dot(x_right, w1_right_desc.load([start, LEFT]).T, z)
        h = _hidden(z, b1_ptr, start, dtype, ACTIVATION, HIDDEN)
        left = tl.dot(h, w2_left_desc.load([0, start]).T, left)
        right = tl.dot(h, w2_right_desc.load([LEFT, start]).T, right)
    _finish(left, b2_ptr, gamma_ptr, out_ptr, row0, M, dtype, 0, BLOCK_M, LEFT)
    _finish(right, b2_ptr, gamma_ptr, out_ptr, row0, M, dtype, LEFT, BLOCK_M, RIGHT)
