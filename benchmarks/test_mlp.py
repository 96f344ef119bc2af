"""The MLP of a block, with library products on all sides: what is compared is what happens between them, and what is kept."""

import pytest
import torch

from fastdeit import costs, ops
from fastdeit.benchmarks import peers
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device

CASES = by_importance([198, 578], [768, 384, 192], [256, 64, 1024, 1], ["both", "forward", "backward"])
QUICK, TURNS = 2, 2


@pytest.mark.parametrize("case", CASES, ids=label)
def test_mlp(compare, toy, case):
    tokens, channels, batch, direction = case
    batch, tokens, channels = (min(batch, 2), 5, channels // 12) if toy else (batch, tokens, channels)
    dtype = torch.float32 if toy else torch.bfloat16
    hidden = 4 * channels

    def inputs(size=batch):
        def randn(*shape):
            return torch.randn(shape, device=kernel_device()).to(dtype)

        x, upstream = randn(size, tokens, channels), randn(size, tokens, channels)
        w1, w2 = randn(hidden, channels) * channels**-0.5, randn(channels, hidden) * hidden**-0.5
        return x, w1, randn(hidden), w2, randn(channels), upstream

    assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, *inputs(min(batch, 2))[:5], backend="auto")
    candidates = {"fastdeit": ops.mlp, "PyTorch eager": ops.mlp_reference}
    if not toy:
        candidates["torch.compile"] = peers.compiled(ops.mlp_reference)
        candidates["torch.compile max-autotune"] = peers.autotuned(ops.mlp_reference)
    forward = costs.mlp_forward(batch * tokens, channels, hidden)
    backward = costs.mlp_backward(batch * tokens, channels, hidden)
    compare(
        {name: peers.DIRECTIONS[direction](function, 5) for name, function in candidates.items()},
        inputs,
        expected=peers.oracle(direction, ops.mlp_reference, 5, shared=(1, 2, 3, 4)),
        cost={"forward": forward, "backward": backward, "both": forward + backward}[direction],
        matrix=True,
        direction=direction,
        batch=batch,
        tokens=tokens,
        channels=channels,
    )
