"""The data gradient of an MLP's second layer, with the activation's derivative in the epilogue of its matrix product.

    dz = (dy W) * activation'(z)

The same pass writes activation(z) again, the second weight gradient's operand, which forward need not keep, and the column sums of
dz that are the first bias's gradient: a partial row for every row of tiles, which a second kernel adds in a fixed order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastdeit.kernels.gemm.config import Gemm, candidates
from fastdeit.kernels.gemm.forward import aot_config, persistent_grid, vector
from fastdeit.kernels.gemm.tiles import backward_epilogue, load_piece, product, quarters, store_piece, tile_origin
from fastdeit.kernels.mlp.activation_functions import activate
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.column_sums import Table, sum_later
from fastdeit.kernels.runtime.launch import cdiv, descriptor, launch


@triton.jit
def _finish(
    dh,
    row0,
    col0,
    z_ptr,
    dz_ptr,
    h_ptr,
    dbias_partial_ptr,
    M,
    N,
    dtype: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    z = load_piece(z_ptr, row0, col0, M, N, BLOCK_M, BLOCK_N, VECTOR)
    if h_ptr is not None:  # written first: what both share is computed once all the same, and fewer registers are live
        store_piece(h_ptr, activate(z.to(tl.float32), ACTIVATION), row0, col0, M, N, BLOCK_M, BLOCK_N, VECTOR)
    dz = backward_epilogue(dh, z, row0, col0, dbias_partial_ptr, M, N, dtype, ACTIVATION, BLOCK_M, BLOCK_N)
    store_piece(dz_ptr, dz, row0, col0, M, N, BLOCK_M, BLOCK_N, VECTOR)


@triton.jit(do_not_specialize=["M", "N", "K", "a_stride", "b_stride"])
def gemm_backward_kernel(
    a_ptr,  # (M, K), row stride a_stride: the gradient dy
    b_ptr,  # (K, N), row stride b_stride: the weight W
    z_ptr,  # (M, N)
    dz_ptr,  # (M, N)
    h_ptr,  # (M, N) or None
    dbias_partial_ptr,  # (rows of tiles, N) fp32, or None
    M,
    N,
    K,
    a_stride,
    b_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program owns one tile."""
    row0, col0 = tile_origin(tl.program_id(0), N, BLOCK_M, BLOCK_N)
    acc = product(a_ptr, b_ptr, row0, col0, M, N, K, a_stride, b_stride, False, BLOCK_M, BLOCK_N, BLOCK_K, VECTOR)
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    PIECE: tl.constexpr = BLOCK_N // 4
    rest = (z_ptr, dz_ptr, h_ptr, dbias_partial_ptr, M, N)
    pieces = quarters(acc, BLOCK_M, BLOCK_N)
    for i in tl.static_range(4):
        _finish(pieces[i], row0, col0 + i * PIECE, *rest, dtype, ACTIVATION, BLOCK_M, PIECE, VECTOR)


@triton.jit
def _finish_desc(
    dh,
    row0,
    col0,
    z_desc,
    dz_desc,
    h_desc,
    dbias_partial_ptr,
    M,
    N,
    dtype: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    z = z_desc.load([row0, col0])
    if h_desc is not None:  # first, as above: else a tile of 128 x 256 spills
        h_desc.store([row0, col0], activate(z.to(tl.float32), ACTIVATION).to(h_desc.dtype))
    dz = backward_epilogue(dh, z, row0, col0, dbias_partial_ptr, M, N, dtype, ACTIVATION, BLOCK_M, BLOCK_N)
    dz_desc.store([row0, col0], dz.to(dz_desc.dtype))


@triton.jit(do_not_specialize=["M", "N", "K"])
def gemm_backward_descriptor_kernel(
    a_desc,  # of (M, K), block [BLOCK_M, BLOCK_K]
    b_desc,  # of (K, N), block [BLOCK_K, BLOCK_N]
    z_desc,  # of (M, N), block [BLOCK_M, BLOCK_N / 4]
    dz_desc,  # likewise
    h_desc,  # likewise, or None
    dbias_partial_ptr,  # (rows of tiles, N) fp32, or None
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program owns every num_programs-th tile."""
    dtype: tl.constexpr = a_desc.dtype
    PIECE: tl.constexpr = BLOCK_N // 4
    rest = (z_desc, dz_desc, h_desc, dbias_partial_ptr, M, N)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row0, col0 = tile_origin(tile, N, BLOCK_M, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            acc = tl.dot(a_desc.load([row0, k]), b_desc.load([k, col0]), acc)
        pieces = quarters(acc, BLOCK_M, BLOCK_N)
        for i in tl.static_range(4):
            _finish_desc(pieces[i], row0, col0 + i * PIECE, *rest, dtype, ACTIVATION, BLOCK_M, PIECE)


def gemm_backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    activation: str,
    gemm: Gemm,
    *,
    needs_h: bool = True,
    dbias_dtype: torch.dtype | None = None,
    later: list[Table] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dz (M, N) in z's dtype, activation(z) if needed, and the column sums of dz (N,) in dbias_dtype if that is given.

    With `later` those are there once `add_partial_sums` has run on it.

    Args:
        dy, weight, z: (M, K), (K, N) and (M, N) of one dtype, which `gemm` fits; z is contiguous.
    """
    (M, K), N, tile = dy.shape, weight.shape[1], gemm.tile
    dz = torch.empty_like(z)
    h = torch.empty_like(z) if needs_h else None
    strips = cdiv(M, tile.rows)
    dbias = partial = None
    if dbias_dtype is not None:
        dbias = z.new_empty(N, dtype=dbias_dtype)
        partial = z.new_empty(strips, N, dtype=torch.float32)
    constexprs = (activation, tile.rows, tile.columns, tile.depth)
    if gemm.backend == "tma":
        piece = [tile.rows, tile.columns // 4]
        maps = (descriptor(dy, [tile.rows, tile.depth]), descriptor(weight, [tile.depth, tile.columns]))
        maps += tuple(None if t is None else descriptor(t, piece) for t in (z, dz, h))
        kernel, grid, args = gemm_backward_descriptor_kernel, persistent_grid(M, N, tile, z), (*maps, partial, M, N, K)
    else:
        kernel, grid = gemm_backward_kernel, (strips * cdiv(N, tile.columns),)
        strides = (dy.stride(0), weight.stride(0))
        args = (dy, weight, z, dz, h, partial, M, N, K, *strides)
        constexprs += (vector(N, K, *strides),)
    launch(kernel, grid, args, constexprs, tile.num_warps, tile.num_stages)
    if dbias is not None:
        sum_later(later, (partial, dbias))
    return dz, h, dbias


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Every candidate with all its outputs, for GELU in bf16."""
    for gemm in candidates(arch, "derivative"):
        tile, types = gemm.tile, dict(dbias_partial_ptr="*fp32") | dict.fromkeys(("M", "N", "K"), "i32")
        if gemm.backend == "tma":
            kernel, piece = gemm_backward_descriptor_kernel, f"tensordesc<bf16[{tile.rows}, {tile.columns // 4}]>"
            types |= dict.fromkeys(("z_desc", "dz_desc", "h_desc"), piece)
            types |= dict(
                a_desc=f"tensordesc<bf16[{tile.rows}, {tile.depth}]>",
                b_desc=f"tensordesc<bf16[{tile.depth}, {tile.columns}]>",
            )
        else:
            kernel = gemm_backward_kernel
            types |= dict.fromkeys(("a_ptr", "b_ptr", "z_ptr", "dz_ptr", "h_ptr"), "*bf16")
            types |= dict.fromkeys(("a_stride", "b_stride"), "i32")
        yield aot_config(kernel, gemm, types, "gelu", "bf16", arch)
