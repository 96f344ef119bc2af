"""A linear layer's matrix product with what follows it in one kernel: bias, activation, LayerScale, drop-path factor, residual.

The kernel over pointers owns one tile a program. The kernel over tensor descriptors is persistent where a grid is smaller than the
number of tiles: the loads of a program's next tile then run under the epilogue of its present one.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastdeit.kernels.gemm.config import Gemm, Tile, candidates
from fastdeit.kernels.gemm.tiles import forward_epilogue, product, quarters, store_piece, tile_origin
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import multiprocessors
from fastdeit.kernels.runtime.launch import cdiv, descriptor, launch

LONGEST_STRIDE = 2**22  # elements from row to row, so that offsets within a tile fit 32 bits


@triton.jit
def _finish(
    acc,
    row0,
    col0,
    out_ptr,
    z_ptr,
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
    z, out = forward_epilogue(
        acc,
        row0,
        col0,
        bias_ptr,
        gamma_ptr,
        drop_path_scale_ptr,
        residual_ptr,
        M,
        N,
        TOKENS,
        dtype,
        ACTIVATION,
        BLOCK_M,
        BLOCK_N,
        VECTOR,
    )
    if z_ptr is not None:
        store_piece(z_ptr, z, row0, col0, M, N, BLOCK_M, BLOCK_N, VECTOR)
    store_piece(out_ptr, out, row0, col0, M, N, BLOCK_M, BLOCK_N, VECTOR)


@triton.jit(do_not_specialize=["M", "N", "K", "a_stride", "b_stride", "TOKENS"])
def gemm_forward_kernel(
    a_ptr,  # (M, K), row stride a_stride
    b_ptr,  # (N, K), row stride b_stride
    out_ptr,  # (M, N)
    z_ptr,  # (M, N), the pre-activation, or None
    bias_ptr,  # (N,) or None
    gamma_ptr,  # (N,) or None
    drop_path_scale_ptr,  # (M / TOKENS,) fp32 or None
    residual_ptr,  # (M, N) or None
    M,
    N,
    K,
    a_stride,
    b_stride,
    TOKENS,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides N, K and both strides: lets loads be 16 bytes wide
):
    """A program owns one tile."""
    row0, col0 = tile_origin(tl.program_id(0), N, BLOCK_M, BLOCK_N)
    acc = product(a_ptr, b_ptr, row0, col0, M, N, K, a_stride, b_stride, True, BLOCK_M, BLOCK_N, BLOCK_K, VECTOR)
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    PIECE: tl.constexpr = BLOCK_N // 4
    rest = (out_ptr, z_ptr, bias_ptr, gamma_ptr, drop_path_scale_ptr, residual_ptr, M, N, TOKENS)
    pieces = quarters(acc, BLOCK_M, BLOCK_N)
    for i in tl.static_range(4):
        _finish(pieces[i], row0, col0 + i * PIECE, *rest, dtype, ACTIVATION, BLOCK_M, PIECE, VECTOR)


@triton.jit
def _finish_desc(
    acc,
    row0,
    col0,
    out_desc,
    z_desc,
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
    z, out = forward_epilogue(
        acc,
        row0,
        col0,
        bias_ptr,
        gamma_ptr,
        drop_path_scale_ptr,
        residual_ptr,
        M,
        N,
        TOKENS,
        dtype,
        ACTIVATION,
        BLOCK_M,
        BLOCK_N,
        VECTOR,
    )
    if z_desc is not None:
        z_desc.store([row0, col0], z.to(z_desc.dtype))
    out_desc.store([row0, col0], out.to(out_desc.dtype))


@triton.jit(do_not_specialize=["M", "N", "K", "TOKENS"])
def gemm_forward_descriptor_kernel(
    a_desc,  # of (M, K), block [BLOCK_M, BLOCK_K]
    b_desc,  # of (N, K), block [BLOCK_N, BLOCK_K]
    out_desc,  # of (M, N), block [BLOCK_M, BLOCK_N / 4]
    z_desc,  # likewise, or None
    bias_ptr,  # the rest as above
    gamma_ptr,
    drop_path_scale_ptr,
    residual_ptr,
    M,
    N,
    K,
    TOKENS,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides N
):
    """A program owns every num_programs-th tile."""
    dtype: tl.constexpr = a_desc.dtype
    PIECE: tl.constexpr = BLOCK_N // 4
    rest = (out_desc, z_desc, bias_ptr, gamma_ptr, drop_path_scale_ptr, residual_ptr, M, N, TOKENS)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row0, col0 = tile_origin(tile, N, BLOCK_M, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            acc = tl.dot(a_desc.load([row0, k]), b_desc.load([col0, k]).T, acc)
        pieces = quarters(acc, BLOCK_M, BLOCK_N)
        for i in tl.static_range(4):
            _finish_desc(pieces[i], row0, col0 + i * PIECE, *rest, dtype, ACTIVATION, BLOCK_M, PIECE, VECTOR)


def fits(gemm: Gemm, N: int, *operands: torch.Tensor) -> bool:
    """Whether a backend of ours can multiply these matrices, none empty and all of unit stride along a row, to N columns.

    Descriptors need a 16-byte aligned base and rows that are a multiple of 16 bytes apart; results are allocated dense.
    """
    for x in operands:
        if x.numel() == 0 or x.stride(1) != 1 or not x.shape[1] <= x.stride(0) <= LONGEST_STRIDE:
            return False
    if gemm.backend != "tma":
        return True
    unaligned = N * operands[0].element_size() | sum(x.data_ptr() % 16 for x in operands)
    for x in operands:
        unaligned |= x.stride(0) * x.element_size()
    return unaligned % 16 == 0


def gemm_forward(
    a: torch.Tensor,
    b: torch.Tensor,
    gemm: Gemm,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    gamma: torch.Tensor | None = None,
    drop_path_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    needs_z: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """residual + drop_path_scale * gamma * activation(a b^T + bias) (M, N) in out_dtype, and a b^T + bias in a's dtype if needed.

    Args:
        a, b: (M, K) and (N, K) of one dtype, which `gemm` fits.
        bias, gamma: (N,), contiguous; residual: (M, N), contiguous.
        drop_path_scale: fp32; M is a multiple of its length.
        out_dtype: a's by default.
    """
    (M, K), N, tile = a.shape, b.shape[0], gemm.tile
    out = a.new_empty(M, N, dtype=out_dtype or a.dtype)
    z = a.new_empty(M, N) if needs_z else None
    tokens = 1 if drop_path_scale is None else M // len(drop_path_scale)
    rest = (bias, gamma, drop_path_scale, residual, M, N, K)
    if gemm.backend == "tma":
        piece = [tile.rows, tile.columns // 4]
        maps = (descriptor(a, [tile.rows, tile.depth]), descriptor(b, [tile.columns, tile.depth]))
        maps += (descriptor(out, piece), None if z is None else descriptor(z, piece))
        kernel, grid, args = gemm_forward_descriptor_kernel, persistent_grid(M, N, tile, a), (*maps, *rest, tokens)
        widths = (N,)
    else:
        kernel, grid = gemm_forward_kernel, (cdiv(M, tile.rows) * cdiv(N, tile.columns),)
        widths = (N, K, a.stride(0), b.stride(0))
        args = (a, b, out, z, *rest, *widths[2:], tokens)
    constexprs = (activation, tile.rows, tile.columns, tile.depth, vector(*widths))
    launch(kernel, grid, args, constexprs, tile.num_warps, tile.num_stages)
    return out, z


def persistent_grid(M: int, N: int, tile: Tile, x: torch.Tensor) -> tuple[int]:
    """As many programs as fit x's device at once, or one a tile."""
    return (min(cdiv(M, tile.rows) * cdiv(N, tile.columns), tile.programs_per_sm * multiprocessors(x)),)


def vector(*widths: int) -> int:
    """The largest power of two up to 16 that divides all of them."""
    bits = 16
    for width in widths:
        bits |= width
    return bits & -bits


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Every candidate with each epilogue that modules use: GELU, with and without the pre-activation, and the end of a residual
    branch under autocast, all in bf16; and GELU in fp16 on one architecture of either kind."""
    for epilogue in ("activation", "activation_z", "residual"):
        for gemm in candidates(arch, epilogue):
            yield _aot_config(gemm, epilogue, "bf16", arch)
    if arch in (80, 90):
        yield _aot_config(candidates(arch, "activation")[0], "activation", "fp16", arch)


def _aot_config(gemm: Gemm, epilogue: str, dtype: str, arch: int) -> AotConfig:
    tile, residual = gemm.tile, epilogue == "residual"
    wide = "fp32" if residual else dtype
    types = dict(bias_ptr=f"*{dtype}") | dict.fromkeys(("M", "N", "K", "TOKENS"), "i32")
    if residual:
        types |= dict(gamma_ptr="*fp32", drop_path_scale_ptr="*fp32", residual_ptr="*fp32")
    if gemm.backend == "tma":
        kernel, piece = gemm_forward_descriptor_kernel, f"[{tile.rows}, {tile.columns // 4}]"
        types |= dict(
            a_desc=f"tensordesc<{dtype}[{tile.rows}, {tile.depth}]>",
            b_desc=f"tensordesc<{dtype}[{tile.columns}, {tile.depth}]>",
            out_desc=f"tensordesc<{wide}{piece}>",
        )
        types |= dict(z_desc=f"tensordesc<{dtype}{piece}>") if epilogue == "activation_z" else {}
    else:
        kernel = gemm_forward_kernel
        types |= dict(a_ptr=f"*{dtype}", b_ptr=f"*{dtype}", out_ptr=f"*{wide}", a_stride="i32", b_stride="i32")
        types |= dict(z_ptr=f"*{dtype}") if epilogue == "activation_z" else {}
    return aot_config(kernel, gemm, types, None if residual else "gelu", f"{epilogue} {dtype}", arch)


def aot_config(kernel, gemm: Gemm, types: dict[str, str], activation: str | None, label: str, arch: int) -> AotConfig:
    """Both directions' rows. Those that are to share a multiprocessor are held to it."""
    tile = gemm.tile
    names = dict(ACTIVATION=activation, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, VECTOR=16)
    constexprs = {name: value for name, value in names.items() if name in kernel.arg_names}
    blocks = tile.programs_per_sm if gemm.backend == "tma" else None
    label = f"{tile.rows}x{tile.columns} {label}"
    return AotConfig(
        kernel, types, constexprs, tile.num_warps, tile.num_stages, label, matrix=True, min_blocks_per_sm=blocks
    )
