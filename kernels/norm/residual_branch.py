"""The pointwise ends of a residual branch, x + gamma * drop_path_scale * branch(layer_norm(x)), around its matrix products.

At its end, forward scales the branch and adds the residual. Backward scales the upstream gradient per sample, casts it for the
products and sums its columns, from which come the last bias's gradient and gamma's. At its start, backward of a LayerNorm whose
weight and bias were folded into the product after it needs the normalised rows alone, and has no parameter gradients to sum.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from fastdeit.kernels.gemm.tiles import assume_multiple_of
from fastdeit.kernels.norm.subsets import SUBSET_WIDTHS, Subsets, row_of_subset
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.column_sums import Table, row_strips, sum_later, sum_pairs, sum_rows
from fastdeit.kernels.runtime.launch import cdiv, launch, next_power_of_2


@dataclass(frozen=True)
class Config:
    rows: int  # of a program's step
    columns: int
    num_warps: int


TILE = Config(rows=4, columns=256, num_warps=4)  # of the elementwise kernels: 8 values of each stream a thread


def backward_tile(element_size: int) -> Config:
    """The tile of a step, for upstream gradients of that many bytes an element: 16 bytes a thread.

    Two copies of 16 bytes, 32 bytes apart, would each move whole sectors of 32 bytes from the L2 cache.
    """
    return Config(rows=4, columns=512 // element_size, num_warps=4)


@lru_cache
def select_row_config(channels: int) -> Config:
    """One row a program, 8 values of each stream a thread (16 at 8192)."""
    width = next_power_of_2(channels)
    return Config(rows=1, columns=width, num_warps=min(max(width // 256, 1), 16))


@triton.jit(do_not_specialize=["M", "N", "TOKENS"])
def scale_add_forward_kernel(
    branch_ptr,  # (M, N)
    residual_ptr,  # (M, N) or None
    gamma_ptr,  # (N,) or None
    drop_path_scale_ptr,  # (M / TOKENS,) fp32 or None
    out_ptr,  # (M, N)
    M,
    N,
    TOKENS,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides N: lets loads be 16 bytes wide
):
    """A program owns one BLOCK_M x BLOCK_N tile. The grid is one-dimensional: rows can pass the limit of its second."""
    N = assume_multiple_of(N, VECTOR)
    column_blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (row < M) & (col < N)
    at = row.to(tl.int64) * N + col
    out = tl.load(branch_ptr + at, inside, other=0.0).to(tl.float32)
    if gamma_ptr is not None:
        out *= tl.load(gamma_ptr + col, col < N, other=0.0).to(tl.float32)
    if drop_path_scale_ptr is not None:
        out *= tl.load(drop_path_scale_ptr + row // TOKENS, row < M, other=0.0)
    if residual_ptr is not None:
        out += tl.load(residual_ptr + at, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M", "N", "TOKENS", "rows_per_strip"])
def scale_add_backward_kernel(
    dy_ptr,  # (M, N)
    drop_path_scale_ptr,  # (M / TOKENS,) fp32 or None
    g_ptr,  # (M, N), or None where it would be dy again
    sum_partial_ptr,  # (strips, N) fp32, or None
    M,
    N,
    TOKENS,
    rows_per_strip,  # a multiple of BLOCK_M
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """g = drop_path_scale * dy and its column sums. A program owns BLOCK_N columns of one strip of rows (program id 1)."""
    N = assume_multiple_of(N, VECTOR)
    strip = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = column[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = strip * rows_per_strip
    for start in tl.range(first, tl.minimum(first + rows_per_strip, M), BLOCK_M, num_stages=4):  # no NaN: row numbers
        row = start + tl.arange(0, BLOCK_M)[:, None]
        inside = (row < M) & (col < N)
        at = row.to(tl.int64) * N + col
        g = tl.load(dy_ptr + at, inside, other=0.0).to(tl.float32)
        if drop_path_scale_ptr is not None:
            g *= tl.load(drop_path_scale_ptr + row // TOKENS, row < M, other=0.0)
        if g_ptr is not None:
            tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), inside)
        if sum_partial_ptr is not None:
            total += g
    if sum_partial_ptr is not None:
        tl.store(sum_partial_ptr + strip * N + column, sum_rows(total, BLOCK_M), column < N)


@triton.jit(do_not_specialize=["M", "TOKENS", "branch_kept", "kept"])
def folded_layer_norm_backward_kernel(
    dx_hat_ptr,  # (kept * TOKENS, C), gradient of the normalised rows
    x_hat_ptr,  # (kept * TOKENS, C)
    rstd_ptr,  # (kept * TOKENS,) fp32
    dx_new_ptr,  # (M, C), the gradient that reaches x beside the branch, or None
    drop_path_scale_ptr,  # (M / TOKENS,) fp32 or None
    dx_ptr,  # (M, C) or None
    dbranch_ptr,  # (branch_kept * TOKENS, C), of the branch that was scaled and added to give x, or None
    branch_slots_ptr,  # (M / TOKENS,) int64, the branch's of `Subsets`; None where it has all samples
    slots_ptr,  # (M / TOKENS,) int64, of the normalised rows, likewise
    M,
    TOKENS,
    branch_kept,  # without slots these two are not read
    kept,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,  # C rounded up to a power of two
    BLOCK_M: tl.constexpr,
):
    """A program owns BLOCK_M rows of the stream."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tl.arange(0, CHANNELS)[None, :]
    inside = (row < M) & (col < C)
    hat_row, normalised = row_of_subset(row, row < M, slots_ptr, kept, TOKENS)
    dx = tl.load(dx_hat_ptr + hat_row * C + col, normalised & (col < C), other=0.0).to(tl.float32)
    x_hat = tl.load(x_hat_ptr + hat_row * C + col, normalised & (col < C), other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + hat_row, normalised, other=0.0)
    along_x_hat, along_one = sum_pairs(dx * x_hat, dx, axis=1, keep_dims=True)
    dx = (dx - x_hat * (along_x_hat / C) - along_one / C) * rstd
    if dx_new_ptr is not None:
        dx += tl.load(dx_new_ptr + row * C + col, inside, other=0.0).to(tl.float32)
    if dx_ptr is not None:
        tl.store(dx_ptr + row * C + col, dx.to(dx_ptr.dtype.element_ty), inside)
    if dbranch_ptr is not None:
        if drop_path_scale_ptr is not None:
            dx *= tl.load(drop_path_scale_ptr + row // TOKENS, row < M, other=0.0)
        branch_row, added = row_of_subset(row, row < M, branch_slots_ptr, branch_kept, TOKENS)
        tl.store(dbranch_ptr + branch_row * C + col, dx.to(dbranch_ptr.dtype.element_ty), added & (col < C))


def scale_add_forward(
    branch: torch.Tensor,
    residual: torch.Tensor | None,
    gamma: torch.Tensor | None,
    drop_path_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """residual + gamma * drop_path_scale * branch (M, N), rounded once. All contiguous; drop_path_scale is fp32, and M is a
    multiple of its length."""
    M, N = branch.shape
    out = branch.new_empty(M, N, dtype=out_dtype)
    if out.numel():
        launch(
            scale_add_forward_kernel,
            (cdiv(M, TILE.rows) * cdiv(N, TILE.columns),),
            (branch, residual, gamma, drop_path_scale, out, M, N, _tokens(M, drop_path_scale)),
            (TILE.rows, TILE.columns, min(N & -N, 16)),
            TILE.num_warps,
        )
    return out


def scale_add_backward(
    dy: torch.Tensor,
    drop_path_scale: torch.Tensor | None,
    dtype: torch.dtype,
    sum_dtype: torch.dtype | None,
    later: list[Table] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """g = drop_path_scale * dy (M, N) in the given dtype, dy itself where that is the same, and its column sums (N,).

    dy is contiguous. The sums are made in fp32, in a fixed order, and rounded to sum_dtype if that is given; with `later` they are
    there once `add_partial_sums` has run on it.
    """
    M, N = dy.shape
    same = drop_path_scale is None and dy.dtype == dtype
    g = dy if same else dy.new_empty(M, N, dtype=dtype)
    total = None if sum_dtype is None else dy.new_empty(N, dtype=sum_dtype)
    if dy.numel() == 0:
        return g, total if total is None else total.zero_()
    if same and total is None:
        return g, None
    tile = backward_tile(dy.element_size())
    column_blocks = cdiv(N, tile.columns)
    strips, rows_per_strip = row_strips(M, tile.rows, column_blocks, dy)
    partial = None if total is None else dy.new_empty(strips, N, dtype=torch.float32)
    launch(
        scale_add_backward_kernel,
        (column_blocks, strips),
        (dy, drop_path_scale, None if same else g, partial, M, N, _tokens(M, drop_path_scale), rows_per_strip),
        (tile.rows, tile.columns, min(N & -N, 16)),
        tile.num_warps,
    )
    if total is not None:
        sum_later(later, (partial, total))
    return g, total


def folded_layer_norm_backward(
    dx_hat: torch.Tensor,
    x_hat: torch.Tensor,
    rstd: torch.Tensor,
    dx_new: torch.Tensor | None,
    dx_dtype: torch.dtype | None,
    *,
    drop_path_scale: torch.Tensor | None = None,
    dbranch_dtype: torch.dtype | None = None,
    subsets: Subsets | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients (M, C) of x, where x_hat = (x - mean) * rstd, and of the branch where x was something + drop_path_scale * branch.

    Each in the dtype asked for, None where none is. All contiguous; dx_new is added where there is one. With subsets dx_hat, x_hat
    and rstd are of the samples that have slots, and so is the branch's gradient by its own.
    """
    M, channels = x_hat.shape
    slots: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    dbranch_rows, tokens, kept = M, _tokens(M, drop_path_scale), (0, 0)
    if subsets is not None:
        tokens = M // subsets.kept
        M, dbranch_rows = subsets.samples * tokens, subsets.branch_kept * tokens
        slots, kept = (subsets.branch_slots, subsets.slots), (subsets.branch_kept, subsets.kept)
    dx = None if dx_dtype is None else x_hat.new_empty(M, channels, dtype=dx_dtype)
    dbranch = None if dbranch_dtype is None else x_hat.new_empty(dbranch_rows, channels, dtype=dbranch_dtype)
    if x_hat.numel():
        config = select_row_config(channels)
        launch(
            folded_layer_norm_backward_kernel,
            (cdiv(M, config.rows),),
            (dx_hat, x_hat, rstd, dx_new, drop_path_scale, dx, dbranch, *slots, M, tokens, *kept),
            (channels, config.columns, config.rows),
            config.num_warps,
        )
    return dx, dbranch


def _tokens(rows: int, drop_path_scale: torch.Tensor | None) -> int:
    return 1 if drop_path_scale is None else rows // len(drop_path_scale)


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """bf16 models, and bf16 autocast with an fp32 residual stream; the widths of DeiT and DeiT III for whole rows."""
    tile = dict(BLOCK_M=TILE.rows, BLOCK_N=TILE.columns, VECTOR=16)
    for label, wide in (("bf16", "*bf16"), ("autocast", "*fp32")):
        forward = dict(branch_ptr="*bf16", gamma_ptr=wide, residual_ptr=wide, out_ptr=wide)
        forward |= dict(drop_path_scale_ptr="*fp32", M="i32", N="i32", TOKENS="i32")
        yield AotConfig(scale_add_forward_kernel, forward, tile, TILE.num_warps, 1, label, matrix=False)
        backward = dict(dy_ptr=wide, drop_path_scale_ptr="*fp32", g_ptr="*bf16", sum_partial_ptr="*fp32")
        backward |= dict.fromkeys(("M", "N", "TOKENS", "rows_per_strip"), "i32")
        config = backward_tile(2 if wide == "*bf16" else 4)
        step = dict(BLOCK_M=config.rows, BLOCK_N=config.columns, VECTOR=16)
        yield AotConfig(scale_add_backward_kernel, backward, step, config.num_warps, 1, label, matrix=False)
    for channels in (192, 384, 768, 1024, 1280, 8192):
        config = select_row_config(channels)
        types = dict(dx_hat_ptr="*bf16", x_hat_ptr="*bf16", rstd_ptr="*fp32", dx_new_ptr="*fp32", dx_ptr="*fp32")
        types |= dict(drop_path_scale_ptr="*fp32", dbranch_ptr="*bf16")
        types |= dict.fromkeys(("M", "TOKENS", "branch_kept", "kept"), "i32")
        constexprs = dict(C=channels, CHANNELS=config.columns, BLOCK_M=config.rows)
        label = f"C={channels} autocast"
        yield AotConfig(folded_layer_norm_backward_kernel, types, constexprs, config.num_warps, 1, label, matrix=False)
        if channels in SUBSET_WIDTHS:
            types = types | dict(branch_slots_ptr="*i64", slots_ptr="*i64")
            label += ", subsets"
            yield AotConfig(
                folded_layer_norm_backward_kernel, types, constexprs, config.num_warps, 1, label, matrix=False
            )
