"""The kernels of backward attention over tensor descriptors: dQ, and dK and dV; and all three in one.

Seen as in the forward kernels, see there for the inputs.
"""

import triton
import triton.language as tl

from fastdeit.kernels.attention.tiles import (
    LOG2E,
    dkv_step,
    dq_step,
    load_tile_desc,
    program_tile,
    row_products,
    store_tile_desc,
    zeros_pair,
)


@triton.jit(do_not_specialize=["N", "H"])
def attention_dq_backward_descriptor_kernel(
    q0_desc,  # of (B, 3H, N, D), block [1, 1, BLOCK_Q, D0]
    q1_desc,  # block [1, 1, BLOCK_Q, D1], None where D1 is 0, as all of the second pieces
    kv0_desc,  # BLOCK_KV rows
    kv1_desc,
    tail0_desc,  # TAIL rows
    tail1_desc,
    out0_desc,  # of (B, H, N, D), BLOCK_Q rows
    out1_desc,
    dout0_desc,
    dout1_desc,
    dq0_desc,  # of (B, 3H, N, D), BLOCK_Q rows
    dq1_desc,
    lse_ptr,  # (B, H, N) fp32
    delta_ptr,  # (B, H, N) fp32, written
    scale,
    N,
    H,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TAIL: tl.constexpr,
):
    start, batch, head, row_start = program_tile(N, H, BLOCK_Q)
    do0, do1 = load_tile_desc(dout0_desc, dout1_desc, batch, head, start, BLOCK_Q, D0, D1)
    o0, o1 = load_tile_desc(out0_desc, out1_desc, batch, head, start, BLOCK_Q, D0, D1)
    delta = row_products(o0, o1, do0, do1, D1)
    row = start + tl.arange(0, BLOCK_Q)
    tl.store(delta_ptr + row_start + row, delta, row < N)
    lse = tl.load(lse_ptr + row_start + row, row < N, other=0.0)
    q0, q1 = load_tile_desc(q0_desc, q1_desc, batch, head, start, BLOCK_Q, D0, D1)

    dq0, dq1 = zeros_pair(BLOCK_Q, D0, D1)
    full = (N - 1) // BLOCK_KV * BLOCK_KV
    last_k0, last_k1 = load_tile_desc(tail0_desc, tail1_desc, batch, H + head, full, TAIL, D0, D1)
    last_v0, last_v1 = load_tile_desc(tail0_desc, tail1_desc, batch, 2 * H + head, full, TAIL, D0, D1)
    dq0, dq1 = dq_step(
        q0,
        q1,
        do0,
        do1,
        last_k0,
        last_k1,
        last_v0,
        last_v1,
        lse,
        delta,
        dq0,
        dq1,
        scale * LOG2E,
        N - full,
        D1,
        TAIL,
        True,
    )
    for key in tl.range(0, full, BLOCK_KV):
        k0, k1 = load_tile_desc(kv0_desc, kv1_desc, batch, H + head, key, BLOCK_KV, D0, D1)
        v0, v1 = load_tile_desc(kv0_desc, kv1_desc, batch, 2 * H + head, key, BLOCK_KV, D0, D1)
        dq0, dq1 = dq_step(
            q0, q1, do0, do1, k0, k1, v0, v1, lse, delta, dq0, dq1, scale * LOG2E, N, D1, BLOCK_KV, False
        )
    store_tile_desc(dq0_desc, dq1_desc, batch, head, start, dq0 * scale, dq1 * scale, BLOCK_Q, D0, D1)


@triton.jit(do_not_specialize=["N", "H"])
def attention_dkv_backward_descriptor_kernel(
    q0_desc,  # of (B, 3H, N, D), block [1, 1, BLOCK_Q, D0]
    q1_desc,
    q_tail0_desc,  # TAIL rows
    q_tail1_desc,
    dout0_desc,  # of (B, H, N, D), BLOCK_Q rows
    dout1_desc,
    dout_tail0_desc,  # TAIL rows
    dout_tail1_desc,
    kv0_desc,  # of (B, 3H, N, D), BLOCK_KV rows
    kv1_desc,
    dkv0_desc,  # BLOCK_KV rows
    dkv1_desc,
    lse_ptr,  # (B, H, N) fp32
    delta_ptr,  # (B, H, N) fp32
    scale,
    N,
    H,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TAIL: tl.constexpr,
):
    start, batch, head, row_start = program_tile(N, H, BLOCK_KV)
    k0, k1 = load_tile_desc(kv0_desc, kv1_desc, batch, H + head, start, BLOCK_KV, D0, D1)
    v0, v1 = load_tile_desc(kv0_desc, kv1_desc, batch, 2 * H + head, start, BLOCK_KV, D0, D1)
    dk0, dk1 = zeros_pair(BLOCK_KV, D0, D1)
    dv0, dv1 = zeros_pair(BLOCK_KV, D0, D1)
    full = (N - 1) // BLOCK_Q * BLOCK_Q
    last_q0, last_q1 = load_tile_desc(q_tail0_desc, q_tail1_desc, batch, head, full, TAIL, D0, D1)
    last_do0, last_do1 = load_tile_desc(dout_tail0_desc, dout_tail1_desc, batch, head, full, TAIL, D0, D1)
    last_row = full + tl.arange(0, TAIL)
    last_lse = tl.load(lse_ptr + row_start + last_row, last_row < N, other=0.0)
    last_delta = tl.load(delta_ptr + row_start + last_row, last_row < N, other=0.0)
    dk0, dk1, dv0, dv1 = dkv_step(
        k0,
        k1,
        v0,
        v1,
        last_q0,
        last_q1,
        last_do0,
        last_do1,
        last_lse,
        last_delta,
        dk0,
        dk1,
        dv0,
        dv1,
        scale * LOG2E,
        N - full,
        D1,
        TAIL,
        True,
    )
    for query in tl.range(0, full, BLOCK_Q):
        q0, q1 = load_tile_desc(q0_desc, q1_desc, batch, head, query, BLOCK_Q, D0, D1)
        do0, do1 = load_tile_desc(dout0_desc, dout1_desc, batch, head, query, BLOCK_Q, D0, D1)
        row = query + tl.arange(0, BLOCK_Q)
        lse = tl.load(lse_ptr + row_start + row)
        delta = tl.load(delta_ptr + row_start + row)
        dk0, dk1, dv0, dv1 = dkv_step(
            k0, k1, v0, v1, q0, q1, do0, do1, lse, delta, dk0, dk1, dv0, dv1, scale * LOG2E, N, D1, BLOCK_Q, False
        )
    store_tile_desc(dkv0_desc, dkv1_desc, batch, H + head, start, dk0 * scale, dk1 * scale, BLOCK_KV, D0, D1)
    store_tile_desc(dkv0_desc, dkv1_desc, batch, 2 * H + head, start, dv0, dv1, BLOCK_KV, D0, D1)


@triton.jit(do_not_specialize=["N", "H"])
def attention_one_program_backward_kernel(
    kv_desc,  # of the packed (B, 3H, N, D), block [1, 1, KEYS, D]
    q_desc,  # BLOCK_Q rows
    out_desc,  # of (B, H, N, D), BLOCK_Q rows
    dout_desc,
    dkv_desc,  # of the packed gradient, KEYS rows
    dq_desc,  # BLOCK_Q rows
    lse_ptr,  # (B, H, N) fp32
    scale,
    N,
    H,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    KEYS: tl.constexpr,  # at least N
):
    """A program owns a head: all its keys stay, and five products instead of seven give the three gradients.

    S is transposed, the only orientation in which dK and dV of 256 keys fit the registers; dQ is (K^T dS^T)^T.

    Padded keys are zeros, which add nothing to dQ as long as their P is finite: the exponent, a probability's, is clamped at 0. In
    fp16 their dS may overflow all the same, and is masked. Padded queries are zeros too, but NaN times a key at -Inf: their
    logits are selected away."""
    batch = tl.program_id(0) // H
    head = tl.program_id(0) % H
    row_start = tl.program_id(0).to(tl.int64) * N
    k = kv_desc.load([batch, H + head, 0, 0]).reshape(KEYS, D)
    v = kv_desc.load([batch, 2 * H + head, 0, 0]).reshape(KEYS, D)
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    for query in tl.range(0, N, BLOCK_Q):
        q = q_desc.load([batch, head, query, 0]).reshape(BLOCK_Q, D)
        do = dout_desc.load([batch, head, query, 0]).reshape(BLOCK_Q, D)
        o = out_desc.load([batch, head, query, 0]).reshape(BLOCK_Q, D)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        row = query + tl.arange(0, BLOCK_Q)
        lse = tl.load(lse_ptr + row_start + row, row < N, other=0.0)
        logits = tl.dot(k, q.T, input_precision="tf32") * (scale * LOG2E) - lse[None, :]
        logits = tl.where(row[None, :] < N, logits, float("-inf"))
        p = tl.exp2(tl.minimum(logits, 0.0, propagate_nan=tl.PropagateNan.ALL))
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="tf32")
        ds = p * (tl.dot(v, do.T, input_precision="tf32") - delta[None, :])
        if q.dtype == tl.float16:
            ds = tl.where((tl.arange(0, KEYS)[:, None] < N) & (row[None, :] < N), ds, 0.0)
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="tf32")
        dq = tl.dot(k.T, ds, input_precision="tf32").T * scale
        dq_desc.store([batch, head, query, 0], dq.to(dq_desc.dtype).reshape(1, 1, BLOCK_Q, D))
    dkv_desc.store([batch, H + head, 0, 0], (dk * scale).to(dkv_desc.dtype).reshape(1, 1, KEYS, D))
    dkv_desc.store([batch, 2 * H + head, 0, 0], dv.to(dkv_desc.dtype).reshape(1, 1, KEYS, D))
