"""The residual addition with its LayerNorm: a bf16 stream, and autocast's fp32 stream with a bf16 branch."""

import pytest
import torch

from fastdeit import ops
from fastdeit.benchmarks.baselines import op_baselines as baselines
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.benchmarks.roofline import beside_compile
from fastdeit.cost import formulas as costs
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device

CASES = by_importance([198, 578], [768, 384, 192], [256, 64, 1024, 1], ["fp32", "bf16"], baselines.DIRECTIONS)
QUICK, TURNS = 2, 2


@pytest.mark.parametrize("case", CASES, ids=label)
def test_add_layer_norm(compare, toy, case):
    tokens, channels, batch, stream, direction = case
    batch, tokens = (min(batch, 2), 5) if toy else (batch, tokens)
    low = torch.float32 if toy else torch.bfloat16
    wide = torch.float32 if stream == "fp32" else low

    def inputs(size=batch):
        shape, device = (size, tokens, channels), kernel_device()
        x, branch = torch.randn(shape, device=device, dtype=wide), torch.randn(shape, device=device, dtype=low)
        weight, bias = torch.randn(2, channels, device=device, dtype=wide).unbind()
        upstream = torch.randn(shape, device=device, dtype=wide), torch.randn(shape, device=device, dtype=low)
        return x, branch, weight.clone(), bias.clone(), *upstream

    def op(*args):
        return ops.add_layer_norm(*args, out_dtype=low)

    def reference(*args):
        return ops.add_layer_norm_reference(*args, out_dtype=low)

    assert_as_accurate_as_eager(op, reference, *inputs(min(batch, 2))[:4], backend="auto")
    candidates = {"fastdeit": op, "PyTorch eager": reference}
    if not toy:
        candidates["torch.compile"] = baselines.compiled(reference)
        candidates["addition, then Liger"] = baselines.liger_add_layer_norm(low)
    sizes = dict(stream_bytes=wide.itemsize, out_bytes=low.itemsize, branch_bytes=low.itemsize)
    forward = costs.layer_norm_forward(batch * tokens, channels, **sizes)
    backward = costs.layer_norm_backward(batch * tokens, channels, **sizes)
    cost = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    # A compiler reads stream and gradient once more for weight and bias.
    more = 0 if direction == "forward" else (wide.itemsize + low.itemsize) * batch * tokens * channels
    compare(
        {name: baselines.DIRECTIONS[direction](function, 4) for name, function in candidates.items()},
        inputs,
        expected=baselines.oracle(direction, ops.add_layer_norm_reference, 4, shared=(2, 3)),
        cost=cost,
        matrix=False,
        floors=beside_compile(cost, more, matrix=False),
        direction=direction,
        batch=batch,
        tokens=tokens,
        channels=channels,
        stream=stream,
    )
