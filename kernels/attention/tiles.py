"""What the attention kernels share: tiles of a head, their products, and one step of the online softmax.

A head dimension that is no power of two is split in two, D0 + D1 >= D, such as 80 = 64 + 16: a tile is a pair of tensors. With
D1 = 0 the second one is an alias that nothing uses. Inputs are seen as (B, N, heads, D); in a packed qkv, K's heads follow Q's and
V's follow K's.

Every kernel walks over the masked tail of the rows first and over the full blocks after it: a product behind a loop that may run
zero times makes ptxas wait for each product before it issues the next (C7515).
"""

import triton
import triton.language as tl

from fastdeit.kernels.quantization.formats import quantized

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)  # exponentials are base 2: that is the instruction there is
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # of float32


@triton.jit
def program_tile(N, H, BLOCK_M: tl.constexpr):
    """One-dimensional grid, tiles of one (batch, head) next to each other, so that they find its K and V in the L2 cache."""
    tiles = tl.cdiv(N, BLOCK_M)
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
    return tile * BLOCK_M, batch_head // H, batch_head % H, batch_head.to(tl.int64) * N


@triton.jit
def head_base(pointer, batch, head, batch_stride, head_stride, VECTOR: tl.constexpr):
    """Where a head starts. Strides count VECTOR elements, so that the compiler sees what they are multiples of."""
    return pointer + (batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride) * VECTOR


@triton.jit
def load_piece(base, row, col, token_stride, N, D, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    pointers = base + row * token_stride + col
    if MASK_ROWS and MASK_COLS:
        return tl.load(pointers, (row < N) & (col < D), other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, row < N, other=0.0)
    elif MASK_COLS:
        return tl.load(pointers, col < D, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_tile(
    base,
    start,
    token_stride,
    N,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    VECTOR: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Rows start ... of one head as a pair of pieces, zeros past N and past D. Only the scalar offset of the tile is int64."""
    tile = base + token_stride.to(tl.int64) * (start * VECTOR)
    row = tl.arange(0, BLOCK_M)[:, None]
    token_stride *= VECTOR
    piece0 = load_piece(tile, row, tl.arange(0, D0)[None, :], token_stride, N - start, D, MASK_ROWS, D0 > D)
    piece1 = piece0
    if D1 > 0:
        piece1 = load_piece(
            tile, row, D0 + tl.arange(0, D1)[None, :], token_stride, N - start, D, MASK_ROWS, D0 + D1 > D
        )
    return piece0, piece1


@triton.jit
def store_tile(
    base,
    start,
    token_stride,
    N,
    piece0,
    piece1,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    VECTOR: tl.constexpr,
):
    tile = base + token_stride.to(tl.int64) * (start * VECTOR)
    row = tl.arange(0, BLOCK_M)[:, None]
    token_stride *= VECTOR
    col = tl.arange(0, D0)[None, :]
    inside = row < N - start
    tl.store(tile + row * token_stride + col, piece0.to(base.dtype.element_ty), inside & (col < D))
    if D1 > 0:
        col = D0 + tl.arange(0, D1)[None, :]
        tl.store(tile + row * token_stride + col, piece1.to(base.dtype.element_ty), inside & (col < D))


@triton.jit
def load_tile_desc(desc0, desc1, batch, head, start, BLOCK_M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """`load_tile` through descriptors of (B, heads, N, D), which fill with zeros past N and past D by themselves."""
    piece0 = desc0.load([batch, head, start, 0]).reshape(BLOCK_M, D0)
    piece1 = piece0
    if D1 > 0:
        piece1 = desc1.load([batch, head, start, D0]).reshape(BLOCK_M, D1)
    return piece0, piece1


@triton.jit
def store_tile_desc(
    desc0, desc1, batch, head, start, piece0, piece1, BLOCK_M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    desc0.store([batch, head, start, 0], piece0.to(desc0.dtype).reshape(1, 1, BLOCK_M, D0))
    if D1 > 0:
        desc1.store([batch, head, start, D0], piece1.to(desc1.dtype).reshape(1, 1, BLOCK_M, D1))


@triton.jit
def zeros_pair(BLOCK_M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    zeros0 = tl.zeros([BLOCK_M, D0], tl.float32)
    zeros1 = zeros0
    if D1 > 0:
        zeros1 = tl.zeros([BLOCK_M, D1], tl.float32)
    return zeros0, zeros1


@triton.jit
def product_over_d(a0, a1, b0, b1, D1: tl.constexpr):
    """a @ b^T, summed over the head dimension."""
    s = tl.dot(a0, b0.T, input_precision="tf32")
    if D1 > 0:
        s = tl.dot(a1, b1.T, s, input_precision="tf32")
    return s


@triton.jit
def product_to_d(p, b0, b1, acc0, acc1, D1: tl.constexpr):
    """acc + p @ b, a tile of the head dimension."""
    acc0 = tl.dot(p, b0, acc0, input_precision="tf32")
    if D1 > 0:
        acc1 = tl.dot(p, b1, acc1, input_precision="tf32")
    return acc0, acc1


@triton.jit
def softmax_step(
    q0,
    q1,
    k0,
    k1,
    v0,
    v1,
    highest,
    total,
    acc0,
    acc1,
    scale,
    keys,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr,
):
    """One block of keys of the online softmax (Milakov and Gimelshein 2018); of the first one's BLOCK_N, `keys` are real.

    There `total` and the accumulators hold zeros, which are not rescaled: LLVM would copy the rescaled registers between
    wgmma.fence and wgmma, where the PTX ISA forbids any access to them.
    """
    s = product_over_d(q0, q1, k0, k1, D1)
    if FIRST:
        s = tl.where(tl.arange(0, BLOCK_N)[None, :] < keys, s, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(s, 1) * scale, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(s * scale - new_highest[:, None])
    if FIRST:
        total = tl.sum(p, 1)
    else:
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(p, 1)
        acc0 = acc0 * shrink[:, None]
        if D1 > 0:
            acc1 = acc1 * shrink[:, None]
    acc0, acc1 = product_to_d(p.to(v0.dtype), v0, v1, acc0, acc1, D1)
    return new_highest, total, acc0, acc1


@triton.jit
def normalised(acc0, acc1, total, out_scale_ptr, DTYPE: tl.constexpr, D1: tl.constexpr):
    """The accumulators over the sums of their weights: fp32, or with a scale of the output DTYPE, an 8-bit format."""
    inverse = 1.0 / total
    if out_scale_ptr is not None:
        inverse *= tl.div_rn(1.0, tl.load(out_scale_ptr))
    acc0, acc1 = acc0 * inverse[:, None], acc1 * inverse[:, None]
    if out_scale_ptr is not None:
        acc0 = quantized(acc0, DTYPE)
        if D1 > 0:
            acc1 = quantized(acc1, DTYPE)
    return acc0, acc1


@triton.jit
def dq_step(
    q0,
    q1,
    do0,
    do1,
    k0,
    k1,
    v0,
    v1,
    lse,
    delta,
    dq0,
    dq1,
    scale,
    keys,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
):
    """Adds one block of keys to dQ / scale."""
    p = tl.exp2(product_over_d(q0, q1, k0, k1, D1) * scale - lse[:, None])
    ds = p * (product_over_d(do0, do1, v0, v1, D1) - delta[:, None])
    if MASK:
        ds = tl.where(tl.arange(0, BLOCK_N)[None, :] < keys, ds, 0.0)
    return product_to_d(ds.to(k0.dtype), k0, k1, dq0, dq1, D1)


@triton.jit
def dkv_step(
    k0,
    k1,
    v0,
    v1,
    q0,
    q1,
    do0,
    do1,
    lse,
    delta,
    dk0,
    dk1,
    dv0,
    dv1,
    scale,
    queries,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
):
    """Adds one block of queries to dK / scale and dV, with S and P transposed, so that P is in registers where dV needs it.

    Padded queries are selected away from both: their P may be Inf, and Inf times a padded zero is NaN."""
    p = tl.exp2(product_over_d(k0, k1, q0, q1, D1) * scale - lse[None, :])
    if MASK:
        p = tl.where(tl.arange(0, BLOCK_N)[None, :] < queries, p, 0.0)
    dv0, dv1 = product_to_d(p.to(do0.dtype), do0, do1, dv0, dv1, D1)
    ds = p * (product_over_d(v0, v1, do0, do1, D1) - delta[None, :])
    if MASK:
        ds = tl.where(tl.arange(0, BLOCK_N)[None, :] < queries, ds, 0.0)
    dk0, dk1 = product_to_d(ds.to(q0.dtype), q0, q1, dk0, dk1, D1)
    return dk0, dk1, dv0, dv1


@triton.jit
def row_products(a0, a1, b0, b1, D1: tl.constexpr):
    """Sums over the head dimension of a * b."""
    total = tl.sum(a0.to(tl.float32) * b0.to(tl.float32), 1)
    if D1 > 0:
        total += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    return total
