"""Forward attention: kernels over pointers and over tensor descriptors, and their launcher.

A program owns BLOCK_Q queries of one head and walks over the keys: one masked tail of 16, 32 or 64, then a run-time number of
full, unmasked blocks of BLOCK_KV. The 197 tokens of DeiT at 224 pixels thus cost 16 + 3 x 64 = 208 columns, 577 cost 592.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from fastdeit.kernels.attention.config import (
    HEAD_DIM_SPLITS,
    Case,
    Config,
    aot_cases,
    eight_bit_cases,
    eight_bit_label,
    select_config,
    tail,
)
from fastdeit.kernels.attention.tiles import (
    LOG2E,
    LOWEST,
    head_base,
    load_tile,
    load_tile_desc,
    normalised,
    program_tile,
    softmax_step,
    store_tile,
    store_tile_desc,
    zeros_pair,
)
from fastdeit.kernels.attention.views import (
    by_head,
    describable,
    descriptor_types,
    descriptors,
    head_strides,
    packed_strides,
    strided,
    vector_units,
)
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import architecture, multiprocessors
from fastdeit.kernels.runtime.launch import cdiv, launch

FORWARD_INTEGERS = (
    "N_Q",
    "N_KV",
    "H",
    "k_first_head",
    "v_first_head",
    "q_batch_stride",
    "q_token_stride",
    "q_head_stride",
    "k_batch_stride",
    "k_token_stride",
    "k_head_stride",
    "v_batch_stride",
    "v_token_stride",
    "v_head_stride",
)


@triton.jit(do_not_specialize=list(FORWARD_INTEGERS))
def attention_forward_kernel(
    q_ptr,  # (B, N_Q, heads, D), strided
    k_ptr,  # (B, N_KV, heads, D), strided
    v_ptr,  # (B, N_KV, heads, D), strided
    out_ptr,  # (B, N_Q, H, D)
    lse_ptr,  # (B, H, N_Q) fp32: log2 of the sum of 2**(scale * log2(e) * logit); or None
    out_scale_ptr,  # (1,) fp32, what one step of an 8-bit out is worth, or None
    scale,
    N_Q,
    N_KV,
    H,
    k_first_head,  # in k's view, the head that belongs to q's head 0
    v_first_head,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides every stride: lets loads be 16 bytes wide
):
    start, batch, head, lse_start = program_tile(N_Q, H, BLOCK_Q)
    scale *= LOG2E
    q = head_base(q_ptr, batch, head, q_batch_stride, q_head_stride, VECTOR)
    k = head_base(k_ptr, batch, k_first_head + head, k_batch_stride, k_head_stride, VECTOR)
    v = head_base(v_ptr, batch, v_first_head + head, v_batch_stride, v_head_stride, VECTOR)

    q0, q1 = load_tile(q, start, q_token_stride, N_Q, BLOCK_Q, D, D0, D1, VECTOR, True)
    highest = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc0, acc1 = zeros_pair(BLOCK_Q, D0, D1)
    full = (N_KV - 1) // BLOCK_KV * BLOCK_KV
    last_k0, last_k1 = load_tile(k, full, k_token_stride, N_KV, TAIL, D, D0, D1, VECTOR, True)
    last_v0, last_v1 = load_tile(v, full, v_token_stride, N_KV, TAIL, D, D0, D1, VECTOR, True)
    highest, total, acc0, acc1 = softmax_step(
        q0, q1, last_k0, last_k1, last_v0, last_v1, highest, total, acc0, acc1, scale, N_KV - full, D1, TAIL, True
    )
    for key in tl.range(0, full, BLOCK_KV):
        k0, k1 = load_tile(k, key, k_token_stride, N_KV, BLOCK_KV, D, D0, D1, VECTOR, False)
        v0, v1 = load_tile(v, key, v_token_stride, N_KV, BLOCK_KV, D, D0, D1, VECTOR, False)
        highest, total, acc0, acc1 = softmax_step(
            q0, q1, k0, k1, v0, v1, highest, total, acc0, acc1, scale, N_KV, D1, BLOCK_KV, False
        )
    acc0, acc1 = normalised(acc0, acc1, total, out_scale_ptr, out_ptr.dtype.element_ty, D1)
    out = out_ptr + (batch.to(tl.int64) * N_Q * H + head) * D
    store_tile(out, start, H * (D // VECTOR), N_Q, acc0, acc1, BLOCK_Q, D, D0, D1, VECTOR)
    if lse_ptr is not None:
        row = start + tl.arange(0, BLOCK_Q)
        tl.store(lse_ptr + lse_start + row, highest + tl.log2(total), row < N_Q)


@triton.jit(do_not_specialize=["N", "H"])
def attention_forward_descriptor_kernel(
    q0_desc,  # of (B, 3H, N, D), block [1, 1, BLOCK_Q, D0]
    q1_desc,  # block [1, 1, BLOCK_Q, D1], None where D1 is 0, as all of the second split
    kv0_desc,  # BLOCK_KV rows
    kv1_desc,
    tail0_desc,  # TAIL rows
    tail1_desc,
    out0_desc,  # of (B, H, N, D), BLOCK_Q rows
    out1_desc,
    lse_ptr,  # (B, H, N) fp32 or None, as above
    out_scale_ptr,  # as above
    scale,
    N,
    H,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TAIL: tl.constexpr,
):
    start, batch, head, lse_start = program_tile(N, H, BLOCK_Q)
    scale *= LOG2E
    q0, q1 = load_tile_desc(q0_desc, q1_desc, batch, head, start, BLOCK_Q, D0, D1)
    highest = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc0, acc1 = zeros_pair(BLOCK_Q, D0, D1)
    full = (N - 1) // BLOCK_KV * BLOCK_KV
    last_k0, last_k1 = load_tile_desc(tail0_desc, tail1_desc, batch, H + head, full, TAIL, D0, D1)
    last_v0, last_v1 = load_tile_desc(tail0_desc, tail1_desc, batch, 2 * H + head, full, TAIL, D0, D1)
    highest, total, acc0, acc1 = softmax_step(
        q0, q1, last_k0, last_k1, last_v0, last_v1, highest, total, acc0, acc1, scale, N - full, D1, TAIL, True
    )
    for key in tl.range(0, full, BLOCK_KV):
        k0, k1 = load_tile_desc(kv0_desc, kv1_desc, batch, H + head, key, BLOCK_KV, D0, D1)
        v0, v1 = load_tile_desc(kv0_desc, kv1_desc, batch, 2 * H + head, key, BLOCK_KV, D0, D1)
        highest, total, acc0, acc1 = softmax_step(
            q0, q1, k0, k1, v0, v1, highest, total, acc0, acc1, scale, N, D1, BLOCK_KV, False
        )
    acc0, acc1 = normalised(acc0, acc1, total, out_scale_ptr, out0_desc.dtype, D1)
    store_tile_desc(out0_desc, out1_desc, batch, head, start, acc0, acc1, BLOCK_Q, D0, D1)
    if lse_ptr is not None:
        row = start + tl.arange(0, BLOCK_Q)
        tl.store(lse_ptr + lse_start + row, highest + tl.log2(total), row < N)


def attention_forward(
    qkv: torch.Tensor, num_heads: int, scale: float, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv (B, N, 3 * H * D) -> out (B, N, H * D) in qkv's dtype, and lse (B, H, N) fp32, base 2."""
    batch, tokens, width = qkv.shape
    out = qkv.new_empty(batch, tokens, width // 3)
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32)
    _launch(qkv, out, lse, None, num_heads, scale, config)
    return out, lse


def attention_quantize(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    out_scale: torch.Tensor,
    dtype: torch.dtype,
    config: Config | None = None,
) -> torch.Tensor:
    """qkv (B, N, 3 * H * D), out_scale (1,) fp32 -> out (B, N, H * D) in dtype, an 8-bit format."""
    batch, tokens, width = qkv.shape
    out = qkv.new_empty(batch, tokens, width // 3, dtype=dtype)
    _launch(qkv, out, None, out_scale, num_heads, scale, config)
    return out


def attention_qkv_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, N, H, D), k and v (B, M, H, D), M > 0 -> out (B, N, H, D) contiguous, and lse (B, H, N) fp32, base 2."""
    batch, queries, num_heads, _ = q.shape
    out = q.new_empty(*q.shape)
    lse = q.new_empty(batch, num_heads, queries, dtype=torch.float32)
    _launch_separate(q, k, v, out, lse, None, scale, config)
    return out, lse


def attention_qkv_quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    out_scale: torch.Tensor,
    dtype: torch.dtype,
    config: Config | None = None,
) -> torch.Tensor:
    """q (B, N, H, D), k and v (B, M, H, D), M > 0, out_scale (1,) fp32 -> out (B, N, H, D) contiguous in dtype, an 8-bit format."""
    out = q.new_empty(*q.shape, dtype=dtype)
    _launch_separate(q, k, v, out, None, out_scale, scale, config)
    return out


def config_for(
    x: torch.Tensor, batch: int, heads: int, queries: int, keys: int, head_dim: int, describable: bool
) -> Config:
    """`select_config` with what it needs to know of x's device."""
    return select_config(
        batch, heads, queries, keys, head_dim, x.element_size(), architecture(x), multiprocessors(x), describable
    )


def _launch(qkv, out, lse, out_scale, num_heads, scale, config):
    """The launch for packed inputs. lse may be None; out_scale is None unless out is in 8 bits."""
    if out.numel() == 0:
        return
    qkv = strided(qkv)
    batch, tokens, width = out.shape
    head_dim = width // num_heads
    if config is None:
        fits = describable(qkv) and head_dim * out.element_size() % 16 == 0
        config = config_for(qkv, batch, num_heads, tokens, tokens, head_dim, fits)
    if config.descriptors:
        _launch_descriptors(qkv, out, lse, out_scale, num_heads, head_dim, scale, config.forward)
    else:
        strides = packed_strides(qkv, head_dim) * 3
        heads = (num_heads, num_heads, 2 * num_heads)
        _launch_pointers(
            qkv, qkv, qkv, out, lse, out_scale, heads, strides, tokens, tokens, head_dim, scale, config.forward
        )


def _launch_separate(q, k, v, out, lse, out_scale, scale, config):
    """The launch for separate inputs; arguments as in `_launch`."""
    if out.numel() == 0:
        return
    q, k, v = strided(q), strided(k), strided(v)
    batch, queries, num_heads, head_dim = q.shape
    keys = k.shape[1]
    config = config or config_for(q, batch, num_heads, queries, keys, head_dim, False)
    strides = (*head_strides(q), *head_strides(k), *head_strides(v))
    heads = (num_heads, 0, 0)
    _launch_pointers(q, k, v, out, lse, out_scale, heads, strides, queries, keys, head_dim, scale, config.forward)


def _launch_pointers(q, k, v, out, lse, out_scale, heads, strides, queries, keys, head_dim, scale, tiles):
    """heads: H, and the heads of k and v that belong to q's first."""
    vector, strides = vector_units(q.element_size(), head_dim, strides)
    launch(
        attention_forward_kernel,
        (cdiv(queries, tiles.owned) * out.shape[0] * heads[0],),
        (q, k, v, out, lse, out_scale, scale, queries, keys, *heads, *strides),
        (head_dim, *HEAD_DIM_SPLITS[head_dim], tiles.owned, tiles.streamed, tail(keys, tiles.streamed), vector),
        tiles.num_warps,
        tiles.num_stages,
    )


def _launch_descriptors(qkv, out, lse, out_scale, num_heads, head_dim, scale, tiles):
    batch, tokens, _ = qkv.shape
    split, last = HEAD_DIM_SPLITS[head_dim], tail(tokens, tiles.streamed)
    qkv = by_head(qkv, head_dim)
    q = descriptors(qkv, split, tiles.owned)
    kv = q if tiles.streamed == tiles.owned else descriptors(qkv, split, tiles.streamed)
    launch(
        attention_forward_descriptor_kernel,
        (cdiv(tokens, tiles.owned) * batch * num_heads,),
        (
            *q,
            *kv,
            *descriptors(qkv, split, last),
            *descriptors(by_head(out, head_dim), split, tiles.owned),
            lse,
            out_scale,
            scale,
            tokens,
            num_heads,
        ),
        (*split, tiles.owned, tiles.streamed, last),
        tiles.num_warps,
        tiles.num_stages,
    )


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """The cases of `aot_cases` and of `eight_bit_cases`. sm_90 at D = 64 is held to what keeps twelve warps and more on a
    multiprocessor."""
    for each, out in (*((case, None) for case in aot_cases(arch)), *eight_bit_cases(arch)):
        limits = {}
        if (arch, each.head_dim) == (90, 64) and each.config.descriptors:
            limits = dict(max_registers=128, min_blocks_per_sm=cdiv(12, each.config.forward.num_warps))
        yield replace(_aot_config(each, out), **limits)


def _aot_config(case: Case, out: str | None) -> AotConfig:
    """out: the 8-bit format of the output, if it has one."""
    tiles, split = case.config.forward, HEAD_DIM_SPLITS[case.head_dim]
    tile = dict(
        D0=split[0], D1=split[1], BLOCK_Q=tiles.owned, BLOCK_KV=tiles.streamed, TAIL=min(case.tail, tiles.streamed)
    )
    types = dict(scale="fp32")
    types["lse_ptr" if out is None else "out_scale_ptr"] = "*fp32"
    if case.config.descriptors:
        kernel = attention_forward_descriptor_kernel
        rows = dict(q=tiles.owned, kv=tiles.streamed, tail=tile["TAIL"], out=tiles.owned)
        out_rows = dict(out=rows.pop("out"))
        types |= descriptor_types(rows, case.dtype, split) | descriptor_types(out_rows, out or case.dtype, split)
        types |= dict(N="i32", H="i32")
    else:
        kernel = attention_forward_kernel
        types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{case.dtype}") | dict(out_ptr=f"*{out or case.dtype}")
        types |= dict.fromkeys(FORWARD_INTEGERS, "i32")
        tile = dict(D=case.head_dim, **tile, VECTOR=4 if case.dtype == "fp32" else 8)
    label = case.label if out is None else eight_bit_label(case, out)
    return AotConfig(kernel, types, tile, tiles.num_warps, tiles.num_stages, label, case.matrix)
