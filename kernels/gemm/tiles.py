"""What the GEMM kernels share: how tiles are numbered, the product over pointers, and what follows it, piece by piece.

A product is a b, with a (M, K) and b either a linear layer's weight (N, K), for its forward, or (K, N), for its data gradient.
"""

import triton
import triton.language as tl

from fastdeit.kernels.mlp.activation_functions import activate, activate_with_derivative


@triton.jit
def tile_origin(tile, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of a tile. Columns go fastest: programs that run together share rows of a, and b stays in L2."""
    tile = tl.full([], 0, tl.int32) + tile  # a tensor under the interpreter too
    blocks = tl.cdiv(N, BLOCK_N)
    return tile // blocks * BLOCK_M, tile % blocks * BLOCK_N


@triton.jit
def assume_multiple_of(x, VECTOR: tl.constexpr):
    """x, which is a multiple of VECTOR, in a form that the compiler sees it in: lets loads be 16 bytes wide."""
    return x // VECTOR * VECTOR


@triton.jit
def product(
    a_ptr,
    b_ptr,
    row0,
    col0,
    M,
    N,
    K,
    a_stride,
    b_stride,
    B_BY_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A tile of the product, fp32. Rows past M and columns past N hold copies of others, which must not be used.

    Only the tile's origin needs int64: strides are bounded so that offsets within it fit 32 bits.
    """
    a_stride, b_stride, K = (
        assume_multiple_of(a_stride, VECTOR),
        assume_multiple_of(b_stride, VECTOR),
        assume_multiple_of(K, VECTOR),
    )
    k = tl.arange(0, BLOCK_K)
    row = tl.arange(0, BLOCK_M)
    row = tl.where(row < M - row0, row, 0)
    a = a_ptr + row0.to(tl.int64) * a_stride + (row[:, None] * a_stride + k[None, :])
    col = tl.arange(0, BLOCK_N)
    col = tl.where(col < N - col0, col, 0)
    if B_BY_COLUMNS:
        b = b_ptr + col0.to(tl.int64) * b_stride + (k[:, None] + col[None, :] * b_stride)
        step = BLOCK_K
    else:
        col = tl.max_contiguous(tl.multiple_of(col, VECTOR), VECTOR)
        b = b_ptr + col0 + (k[:, None] * b_stride + col[None, :])
        step = BLOCK_K * b_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        left = K - start
        acc = tl.dot(
            tl.load(a, k[None, :] < left, other=0.0),
            tl.load(b, k[:, None] < left, other=0.0),
            acc,
            input_precision="ieee",
        )
        a += BLOCK_K
        b += step
    return acc


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.reshape(x, [BLOCK_M, 2, BLOCK_N // 2]).permute(0, 2, 1).split()


@triton.jit
def quarters(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's columns in four pieces, left to right: an epilogue on one at a time takes fewer registers and less shared memory."""
    left, right = _halves(x, BLOCK_M, BLOCK_N)
    piece0, piece1 = _halves(left, BLOCK_M, BLOCK_N // 2)
    piece2, piece3 = _halves(right, BLOCK_M, BLOCK_N // 2)
    return piece0, piece1, piece2, piece3


@triton.jit
def in_range_of(x, dtype: tl.constexpr):
    """x as the library's product gives it where that overflows: fp16 rounds to infinity. The other dtypes have fp32's range."""
    if dtype == tl.float16:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def forward_epilogue(
    z,
    row0,
    col0,
    bias_ptr,
    gamma_ptr,
    drop_path_scale_ptr,
    residual_ptr,
    M,
    N,
    TOKENS,
    dtype: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Pre-activation and result of a piece of the product, fp32: bias, activation, gamma, drop-path factor, residual."""
    N = assume_multiple_of(N, VECTOR)
    col = col0 + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + col, col < N, other=0.0).to(tl.float32)[None, :]
    z = in_range_of(z, dtype)
    out = z
    if ACTIVATION is not None:
        out = activate(z, ACTIVATION)
    if gamma_ptr is not None:
        out *= tl.load(gamma_ptr + col, col < N, other=0.0).to(tl.float32)[None, :]
    row = row0 + tl.arange(0, BLOCK_M)
    if drop_path_scale_ptr is not None:
        out *= tl.load(drop_path_scale_ptr + row // TOKENS, row < M, other=0.0)[:, None]
    if residual_ptr is not None:
        inside = (row < M)[:, None] & (col < N)[None, :]
        at = row.to(tl.int64)[:, None] * N + col[None, :]
        out += tl.load(residual_ptr + at, inside, other=0.0).to(tl.float32)
    return z, out


@triton.jit
def backward_epilogue(
    dh,
    z,
    row0,
    col0,
    dbias_partial_ptr,
    M,
    N,
    dtype: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dz = dh * activation'(z), fp32, of a piece; the piece's column sums go to its row of partial sums."""
    _, slope = activate_with_derivative(z.to(tl.float32), ACTIVATION)
    dz = in_range_of(dh, dtype) * slope
    if dbias_partial_ptr is not None:
        row, col = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
        total = tl.sum(tl.where((row < M)[:, None], dz, 0.0), axis=0)
        tl.store(dbias_partial_ptr + (row0 // BLOCK_M) * N + col, total, col < N)
    return dz


@triton.jit
def store_piece(ptr, x, row0, col0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr):
    """To a contiguous (M, N) tensor."""
    N = assume_multiple_of(N, VECTOR)
    row, col = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), (row < M)[:, None] & (col < N)[None, :])


@triton.jit
def load_piece(ptr, row0, col0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr):
    """Of a contiguous (M, N) tensor; zeros outside."""
    N = assume_multiple_of(N, VECTOR)
    row, col = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    return tl.load(ptr + at, (row < M)[:, None] & (col < N)[None, :], other=0.0)
