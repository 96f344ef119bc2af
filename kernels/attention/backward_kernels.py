"""The kernels of backward attention over pointers: dQ, and dK and dV.

Seen as in the forward kernels, see there for the inputs. Logits and probabilities are recomputed from the kept log-sum-exp.
"""

import triton
import triton.language as tl

from fastdeit.kernels.attention.forward import FORWARD_INTEGERS
from fastdeit.kernels.attention.tiles import (
    LOG2E,
    dkv_step,
    dq_step,
    head_base,
    load_tile,
    program_tile,
    row_products,
    store_tile,
    zeros_pair,
)

DQ_INTEGERS = (*FORWARD_INTEGERS, "dq_batch_stride", "dq_token_stride", "dq_head_stride")
DKV_INTEGERS = (
    *FORWARD_INTEGERS,
    "dk_batch_stride",
    "dk_token_stride",
    "dk_head_stride",
    "dv_batch_stride",
    "dv_token_stride",
    "dv_head_stride",
)


@triton.jit(do_not_specialize=list(DQ_INTEGERS))
def attention_dq_backward_kernel(
    q_ptr,  # inputs as in the forward kernel
    k_ptr,
    v_ptr,
    out_ptr,  # (B, N_Q, H, D)
    dout_ptr,  # (B, N_Q, H, D)
    lse_ptr,  # (B, H, N_Q) fp32
    delta_ptr,  # (B, H, N_Q) fp32, written
    dq_ptr,  # (B, N_Q, heads, D), strided
    scale,
    N_Q,
    N_KV,
    H,
    k_first_head,
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
    dq_batch_stride,
    dq_token_stride,
    dq_head_stride,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    start, batch, head, row_start = program_tile(N_Q, H, BLOCK_Q)
    q = head_base(q_ptr, batch, head, q_batch_stride, q_head_stride, VECTOR)
    k = head_base(k_ptr, batch, k_first_head + head, k_batch_stride, k_head_stride, VECTOR)
    v = head_base(v_ptr, batch, v_first_head + head, v_batch_stride, v_head_stride, VECTOR)
    dq = head_base(dq_ptr, batch, head, dq_batch_stride, dq_head_stride, VECTOR)
    out_offset = (batch.to(tl.int64) * N_Q * H + head) * D
    out_stride = H * (D // VECTOR)

    do0, do1 = load_tile(dout_ptr + out_offset, start, out_stride, N_Q, BLOCK_Q, D, D0, D1, VECTOR, True)
    o0, o1 = load_tile(out_ptr + out_offset, start, out_stride, N_Q, BLOCK_Q, D, D0, D1, VECTOR, True)
    delta = row_products(o0, o1, do0, do1, D1)
    row = start + tl.arange(0, BLOCK_Q)
    tl.store(delta_ptr + row_start + row, delta, row < N_Q)
    lse = tl.load(lse_ptr + row_start + row, row < N_Q, other=0.0)
    q0, q1 = load_tile(q, start, q_token_stride, N_Q, BLOCK_Q, D, D0, D1, VECTOR, True)

    dq0, dq1 = zeros_pair(BLOCK_Q, D0, D1)
    full = (N_KV - 1) // BLOCK_KV * BLOCK_KV
    last_k0, last_k1 = load_tile(k, full, k_token_stride, N_KV, TAIL, D, D0, D1, VECTOR, True)
    last_v0, last_v1 = load_tile(v, full, v_token_stride, N_KV, TAIL, D, D0, D1, VECTOR, True)
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
        N_KV - full,
        D1,
        TAIL,
        True,
    )
    for key in tl.range(0, full, BLOCK_KV):
        k0, k1 = load_tile(k, key, k_token_stride, N_KV, BLOCK_KV, D, D0, D1, VECTOR, False)
        v0, v1 = load_tile(v, key, v_token_stride, N_KV, BLOCK_KV, D, D0, D1, VECTOR, False)
        dq0, dq1 = dq_step(
            q0, q1, do0, do1, k0, k1, v0, v1, lse, delta, dq0, dq1, scale * LOG2E, N_KV, D1, BLOCK_KV, False
        )
    store_tile(dq, start, dq_token_stride, N_Q, dq0 * scale, dq1 * scale, BLOCK_Q, D, D0, D1, VECTOR)


@triton.jit(do_not_specialize=list(DKV_INTEGERS))
def attention_dkv_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,  # (B, H, N_Q) fp32, rowsum(dO * O)
    dk_ptr,  # (B, N_KV, heads, D), strided; its heads begin where K's do
    dv_ptr,  # (B, N_KV, heads, D), strided; its heads begin where V's do
    scale,
    N_Q,
    N_KV,
    H,
    k_first_head,
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
    dk_batch_stride,
    dk_token_stride,
    dk_head_stride,
    dv_batch_stride,
    dv_token_stride,
    dv_head_stride,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Rows past N_KV of its own tile meet only themselves: they hold anything, and are not stored."""
    start, batch, head, _ = program_tile(N_KV, H, BLOCK_KV)
    row_start = (batch.to(tl.int64) * H + head) * N_Q
    q = head_base(q_ptr, batch, head, q_batch_stride, q_head_stride, VECTOR)
    k = head_base(k_ptr, batch, k_first_head + head, k_batch_stride, k_head_stride, VECTOR)
    v = head_base(v_ptr, batch, v_first_head + head, v_batch_stride, v_head_stride, VECTOR)
    dout = dout_ptr + (batch.to(tl.int64) * N_Q * H + head) * D
    dout_stride = H * (D // VECTOR)

    k0, k1 = load_tile(k, start, k_token_stride, N_KV, BLOCK_KV, D, D0, D1, VECTOR, True)
    v0, v1 = load_tile(v, start, v_token_stride, N_KV, BLOCK_KV, D, D0, D1, VECTOR, True)
    dk0, dk1 = zeros_pair(BLOCK_KV, D0, D1)
    dv0, dv1 = zeros_pair(BLOCK_KV, D0, D1)
    full = (N_Q - 1) // BLOCK_Q * BLOCK_Q
    last_q0, last_q1 = load_tile(q, full, q_token_stride, N_Q, TAIL, D, D0, D1, VECTOR, True)
    last_do0, last_do1 = load_tile(dout, full, dout_stride, N_Q, TAIL, D, D0, D1, VECTOR, True)
    last_row = full + tl.arange(0, TAIL)
    last_lse = tl.load(lse_ptr + row_start + last_row, last_row < N_Q, other=0.0)
    last_delta = tl.load(delta_ptr + row_start + last_row, last_row < N_Q, other=0.0)
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
        N_Q - full,
        D1,
        TAIL,
        True,
    )
    for query in tl.range(0, full, BLOCK_Q):
        q0, q1 = load_tile(q, query, q_token_stride, N_Q, BLOCK_Q, D, D0, D1, VECTOR, False)
        do0, do1 = load_tile(dout, query, dout_stride, N_Q, BLOCK_Q, D, D0, D1, VECTOR, False)
        row = query + tl.arange(0, BLOCK_Q)
        lse = tl.load(lse_ptr + row_start + row)
        delta = tl.load(delta_ptr + row_start + row)
        dk0, dk1, dv0, dv1 = dkv_step(
            k0, k1, v0, v1, q0, q1, do0, do1, lse, delta, dk0, dk1, dv0, dv1, scale * LOG2E, N_Q, D1, BLOCK_Q, False
        )
    dk = head_base(dk_ptr, batch, k_first_head + head, dk_batch_stride, dk_head_stride, VECTOR)
    dv = head_base(dv_ptr, batch, v_first_head + head, dv_batch_stride, dv_head_stride, VECTOR)
    store_tile(dk, start, dk_token_stride, N_KV, dk0 * scale, dk1 * scale, BLOCK_KV, D, D0, D1, VECTOR)
    store_tile(dv, start, dv_token_stride, N_KV, dv0, dv1, BLOCK_KV, D, D0, D1, VECTOR)
