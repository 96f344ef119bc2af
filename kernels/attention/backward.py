"""Backward attention in two kernels without atomics, or in one where a head's keys fit one program; and their launcher.

With P = softmax(scale * Q K^T) recomputed from the kept log-sum-exp, and delta = rowsum(dO * O):

    dV = P^T dO     dS = P * (dO V^T - delta)     dQ = scale * dS K     dK = scale * dS^T Q

The dQ kernel owns tiles of queries and leaves delta for the dK/dV kernel, which owns tiles of keys. Gradients are written where
they belong, in the packed layout of qkv or in the strides of q, k and v.
"""

from collections.abc import Iterator

import torch

from fastdeit.kernels.attention.backward_descriptor_kernels import (
    attention_dkv_backward_descriptor_kernel,
    attention_dq_backward_descriptor_kernel,
    attention_one_program_backward_kernel,
)
from fastdeit.kernels.attention.backward_kernels import (
    DKV_INTEGERS,
    DQ_INTEGERS,
    attention_dkv_backward_kernel,
    attention_dq_backward_kernel,
)
from fastdeit.kernels.attention.config import (
    HEAD_DIM_SPLITS,
    Case,
    Config,
    aot_cases,
    one_program_tiles,
    tail,
    takes_descriptors,
)
from fastdeit.kernels.attention.forward import config_for
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
from fastdeit.kernels.runtime.launch import cdiv, launch


def attention_backward(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    num_heads: int,
    scale: float,
    config: Config | None = None,
) -> torch.Tensor:
    """The packed gradient (B, N, 3 * H * D), contiguous, from what `attention_forward` was given and returned."""
    qkv, dout = strided(qkv), dout.contiguous()
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    dqkv = qkv.new_empty(*qkv.shape)
    if dqkv.numel() == 0:
        return dqkv
    if config is None:
        config = config_for(
            qkv, batch, num_heads, tokens, tokens, head_dim, describable(qkv) and describable(dout) and describable(out)
        )
    if config.one_program is not None:
        _launch_one_program(dout, qkv, out, lse, dqkv, num_heads, head_dim, scale, config.one_program)
    elif config.descriptors:
        _launch_descriptors(dout, qkv, out, lse, dqkv, num_heads, head_dim, scale, config)
    else:
        strides, d_strides = packed_strides(qkv, head_dim) * 3, packed_strides(dqkv, head_dim)
        _launch_pointers(
            dout,
            (qkv, qkv, qkv),
            out,
            lse,
            (dqkv, dqkv, dqkv),
            (num_heads, num_heads, 2 * num_heads),
            strides,
            d_strides * 3,
            tokens,
            tokens,
            head_dim,
            scale,
            config,
        )
    return dqkv


def attention_qkv_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    *,
    key_value_grads: bool = True,
    config: Config | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k and v, each in its tensor's strides where those leave no gaps; None for k and v if not wanted."""
    gradients = [strided(torch.empty_like(t)) for t in ((q, k, v) if key_value_grads else (q,))]
    absent = () if key_value_grads else (None, None)
    q, k, v, dout = strided(q), strided(k), strided(v), dout.contiguous()
    batch, queries, num_heads, head_dim = q.shape
    keys = k.shape[1]
    if out.numel() == 0:
        return *(g.zero_() for g in gradients), *absent
    config = config or config_for(q, batch, num_heads, queries, keys, head_dim, False)
    strides = tuple(s for t in (q, k, v) for s in head_strides(t))
    d_strides = tuple(s for t in gradients for s in head_strides(t))
    heads = (num_heads, 0, 0)
    _launch_pointers(
        dout, (q, k, v), out, lse, gradients, heads, strides, d_strides, queries, keys, head_dim, scale, config
    )
    return *gradients, *absent


def _launch_pointers(
    dout, inputs, out, lse, gradients, heads, strides, d_strides, queries, keys, head_dim, scale, config
):
    """heads: H, and the heads of k and v that belong to q's first. gradients: of q, or of q, k and v."""
    batch_heads = out.shape[0] * heads[0]
    delta = torch.empty_like(lse)
    vector, units = vector_units(dout.element_size(), head_dim, (*strides, *d_strides))
    strides, d_strides = units[:9], units[9:]
    tiles = config.dq
    launch(
        attention_dq_backward_kernel,
        (cdiv(queries, tiles.owned) * batch_heads,),
        (*inputs, out, dout, lse, delta, gradients[0], scale, queries, keys, *heads, *strides, *d_strides[:3]),
        (head_dim, *HEAD_DIM_SPLITS[head_dim], tiles.owned, tiles.streamed, tail(keys, tiles.streamed), vector),
        tiles.num_warps,
        tiles.num_stages,
    )
    if len(gradients) == 1:
        return
    tiles = config.dkv
    launch(
        attention_dkv_backward_kernel,
        (cdiv(keys, tiles.owned) * batch_heads,),
        (*inputs, dout, lse, delta, *gradients[1:], scale, queries, keys, *heads, *strides, *d_strides[3:]),
        (head_dim, *HEAD_DIM_SPLITS[head_dim], tiles.owned, tiles.streamed, tail(queries, tiles.streamed), vector),
        tiles.num_warps,
        tiles.num_stages,
    )


def _launch_descriptors(dout, qkv, out, lse, dqkv, num_heads, head_dim, scale, config):
    batch, tokens, _ = qkv.shape
    split, delta = HEAD_DIM_SPLITS[head_dim], torch.empty_like(lse)
    qkv, out, dout, dqkv = (by_head(x, head_dim) for x in (qkv, out, dout, dqkv))
    made = {}

    def blocks(x, rows):
        if (id(x), rows) not in made:
            made[id(x), rows] = descriptors(x, split, rows)
        return made[id(x), rows]

    tiles = config.dq
    block_q, block_kv, last = tiles.owned, tiles.streamed, tail(tokens, tiles.streamed)
    launch(
        attention_dq_backward_descriptor_kernel,
        (cdiv(tokens, block_q) * batch * num_heads,),
        (
            *blocks(qkv, block_q),
            *blocks(qkv, block_kv),
            *blocks(qkv, last),
            *blocks(out, block_q),
            *blocks(dout, block_q),
            *blocks(dqkv, block_q),
            lse,
            delta,
            scale,
            tokens,
            num_heads,
        ),
        (*split, block_q, block_kv, last),
        tiles.num_warps,
        tiles.num_stages,
    )
    tiles = config.dkv
    block_kv, block_q, last = tiles.owned, tiles.streamed, tail(tokens, tiles.streamed)
    launch(
        attention_dkv_backward_descriptor_kernel,
        (cdiv(tokens, block_kv) * batch * num_heads,),
        (
            *blocks(qkv, block_q),
            *blocks(qkv, last),
            *blocks(dout, block_q),
            *blocks(dout, last),
            *blocks(qkv, block_kv),
            *blocks(dqkv, block_kv),
            lse,
            delta,
            scale,
            tokens,
            num_heads,
        ),
        (*split, block_kv, block_q, last),
        tiles.num_warps,
        tiles.num_stages,
        maxnreg=tiles.maxnreg,
    )


def _launch_one_program(dout, qkv, out, lse, dqkv, num_heads, head_dim, scale, tiles):
    batch, tokens, _ = qkv.shape
    qkv, out, dout, dqkv = (by_head(x, head_dim) for x in (qkv, out, dout, dqkv))
    blocks = [(qkv, tiles.owned), (qkv, tiles.streamed), (out, tiles.streamed), (dout, tiles.streamed)]
    blocks += [(dqkv, tiles.owned), (dqkv, tiles.streamed)]
    launch(
        attention_one_program_backward_kernel,
        (batch * num_heads,),
        (
            *(descriptors(x, (head_dim, 0), rows)[0] for x, rows in blocks),
            lse,
            scale,
            tokens,
            num_heads,
        ),
        (head_dim, tiles.streamed, tiles.owned),
        tiles.num_warps,
        tiles.num_stages,
    )


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """The cases of `aot_cases`, and backward in one kernel for half and for all of the tokens that it can hold."""
    for case in aot_cases(arch):
        yield _aot_dq(case)
        yield _aot_dkv(case)
    if takes_descriptors(arch):
        yield from (_aot_one_program(keys) for keys in (128, 256))


def _aot_dq(case: Case) -> AotConfig:
    tiles, split = case.config.dq, HEAD_DIM_SPLITS[case.head_dim]
    tile = dict(
        D0=split[0], D1=split[1], BLOCK_Q=tiles.owned, BLOCK_KV=tiles.streamed, TAIL=min(case.tail, tiles.streamed)
    )
    types = dict(lse_ptr="*fp32", delta_ptr="*fp32", scale="fp32")
    if case.config.descriptors:
        kernel, block_q = attention_dq_backward_descriptor_kernel, tiles.owned
        rows = dict(q=block_q, kv=tiles.streamed, tail=tile["TAIL"], out=block_q, dout=block_q, dq=block_q)
        types |= descriptor_types(rows, case.dtype, split) | dict(N="i32", H="i32")
    else:
        kernel = attention_dq_backward_kernel
        names = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "dq_ptr")
        types |= dict.fromkeys(names, f"*{case.dtype}") | dict.fromkeys(DQ_INTEGERS, "i32")
        tile = dict(D=case.head_dim, **tile, VECTOR=4 if case.dtype == "fp32" else 8)
    return AotConfig(kernel, types, tile, tiles.num_warps, tiles.num_stages, case.label, case.matrix)


def _aot_dkv(case: Case) -> AotConfig:
    tiles, split = case.config.dkv, HEAD_DIM_SPLITS[case.head_dim]
    tile = dict(
        D0=split[0], D1=split[1], BLOCK_KV=tiles.owned, BLOCK_Q=tiles.streamed, TAIL=min(case.tail, tiles.streamed)
    )
    types = dict(lse_ptr="*fp32", delta_ptr="*fp32", scale="fp32")
    if case.config.descriptors:
        kernel, last = attention_dkv_backward_descriptor_kernel, tile["TAIL"]
        rows = dict(q=tiles.streamed, q_tail=last, dout=tiles.streamed, dout_tail=last, kv=tiles.owned, dkv=tiles.owned)
        types |= descriptor_types(rows, case.dtype, split) | dict(N="i32", H="i32")
    else:
        kernel = attention_dkv_backward_kernel
        names = ("q_ptr", "k_ptr", "v_ptr", "dout_ptr", "dk_ptr", "dv_ptr")
        types |= dict.fromkeys(names, f"*{case.dtype}") | dict.fromkeys(DKV_INTEGERS, "i32")
        tile = dict(D=case.head_dim, **tile, VECTOR=4 if case.dtype == "fp32" else 8)
    options = (tiles.num_warps, tiles.num_stages, case.label, case.matrix)
    blocks = None if tiles.maxnreg is None else 3
    return AotConfig(kernel, types, tile, *options, min_blocks_per_sm=blocks, maxnreg=tiles.maxnreg)


def _aot_one_program(keys: int) -> AotConfig:
    tiles = one_program_tiles(keys)
    rows = dict(
        kv=tiles.owned, q=tiles.streamed, out=tiles.streamed, dout=tiles.streamed, dkv=tiles.owned, dq=tiles.streamed
    )
    types = {f"{name}_desc": f"tensordesc<bf16[1, 1, {count}, 64]>" for name, count in rows.items()}
    types |= dict(lse_ptr="*fp32", scale="fp32", N="i32", H="i32")
    tile = dict(D=64, BLOCK_Q=tiles.streamed, KEYS=tiles.owned)
    kernel, label = attention_one_program_backward_kernel, f"D=64 bf16 {keys} keys"
    return AotConfig(kernel, types, tile, tiles.num_warps, tiles.num_stages, label, matrix=True)
