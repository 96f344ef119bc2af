"""Attention from the packed projection to the packed gradient, beside every SDPA backend."""

import pytest
import torch

from fastdeit import ops
from fastdeit.benchmarks.baselines import op_baselines as baselines
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.benchmarks.roofline import beside_compile
from fastdeit.cost import formulas as costs
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device

# (tokens, heads, head dim): B at 224 and 384 and with two prefix tokens, S and Ti at 224, S at 384, DeiT III's huge model
SHAPES = [(197, 12, 64), (577, 12, 64), (198, 12, 64), (197, 6, 64), (197, 3, 64), (577, 6, 64), (578, 12, 64)]
SHAPES += [(257, 16, 80)]
BATCHES = [256, 64, 1024, 1, 8]
CASES = by_importance(SHAPES, BATCHES, baselines.DIRECTIONS)
QUICK, TURNS = 2, 3


@pytest.mark.parametrize("case", CASES, ids=label)
def test_attention(compare, toy, case):
    shape, batch, direction = case
    tokens, heads, head_dim = (9, 2, 16) if toy else shape
    batch = min(batch, 2) if toy else batch
    dtype = torch.float32 if toy else torch.bfloat16

    def inputs(size=batch):
        qkv = torch.randn(size, tokens, 3 * heads * head_dim, device=kernel_device(), dtype=dtype)
        return qkv, torch.randn(size, tokens, heads * head_dim, device=kernel_device(), dtype=dtype)

    def op(qkv):
        return ops.attention(qkv, heads)

    def reference(qkv):
        return ops.attention_reference(qkv, heads)

    assert_as_accurate_as_eager(op, reference, inputs(min(batch, 2))[0], backend="auto")
    wrap = baselines.DIRECTIONS[direction]
    candidates = {"fastdeit": op, "SDPA as PyTorch chooses": baselines.sdpa(None, heads)}
    candidates |= {name: baselines.sdpa(backend, heads) for name, backend in baselines.SDPA_BACKENDS.items() if not toy}
    if not toy:
        candidates |= {
            "FlexAttention": baselines.flex_attention(heads),
            "flash-attn": baselines.flash_attn(heads),
            "xformers": baselines.xformers(heads),
        }
    cost = {"forward": costs.attention_forward, "backward": costs.attention_backward}
    work = (batch, tokens, heads, head_dim)
    both = cost["forward"](*work) + cost["backward"](*work)
    cost = cost[direction](*work) if direction in cost else both
    # Around PyTorch's gradient a compiler is left with three tensors to stack, and with its fp32 sums: 38 bytes where 16 would do.
    more = 0 if direction == "forward" else 22 * batch * tokens * heads * head_dim
    compare(
        {name: wrap(function, 1) for name, function in candidates.items()},
        inputs,
        expected=baselines.oracle(direction, reference, 1),
        cost=cost,
        matrix=True,
        floors=beside_compile(cost, more, matrix=True),
        direction=direction,
        batch=batch,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        dtype=str(dtype),
    )
