"""What a training step costs whose residual branches run on subsets of the samples (`drop_path="skip"`), as implemented.

A branch's arithmetic and traffic are those of the samples that it keeps. To this come the passes that gather them and add the
result, PyTorch operations that are not fused with the LayerNorm. Bytes are per element of one (batch, tokens, channels)
activation.
"""

from collections.abc import Sequence
from dataclasses import replace

from fastdeit.cost.formulas import Cost
from fastdeit.cost.models import LAST_BLOCK, Part, Shape, parts

GATHER_AND_ADD = "gather and add"
_OUTSIDE = ("patch embedding", "heads and loss")
# By precision: (bytes per kept element, bytes per element of the batch), forward and backward, of one branch.
#   forward    gathers the stream (read, write); casts the branch ("amp"); copies the stream; adds (two reads, a write), less what
#              the fused addition would read and write of stream and branch
#   backward   gathers the gradient, scales it, casts it ("amp"); fills zeros, adds the branch's gradient to them, adds both
#              gradients, less the stream's gradient, which the fused LayerNorm would read
_BYTES = {"amp": ((20, 8), (30, 16)), "bf16": ((6, 4), (12, 8))}
_LAUNCHES = (8, 6)  # the draw (random numbers, a sort) included
_BRANCHES = 2


def block_rates(rate: float, depth: int, uniform: bool) -> list[float]:
    """Rates of stochastic depth by block: the same in all, or rising from 0 as in timm."""
    return [rate if uniform else rate * index / max(depth - 1, 1) for index in range(depth)]


def parts_on_subsets(
    shape: Shape, batch: int, execution: str, precision: str = "amp", *, rates: Sequence[float]
) -> list[Part]:
    """The work of a training step's forward and backward.

    Args:
        shape, batch, execution, precision: as `cost.models.parts` has them.
        rates: of stochastic depth, by block.

    Raises:
        ValueError: an execution or precision that is not there, or not one rate for each block.
    """
    if len(rates) != shape.depth:
        raise ValueError(f"rates: expected {shape.depth}, one for each block, got {len(rates)}")
    found = [p for p in parts(shape, batch, execution, precision, training=True) if p.name in _OUTSIDE]
    kept = [max(1, round(batch * (1 - rate))) for rate in rates]
    for index, samples in enumerate(kept):
        last = index == shape.depth - 1
        work = parts(shape, samples, execution, precision, training=True)
        blocks = [p for p in work if p.name not in _OUTSIDE]
        pruned = [p for p in blocks if p.name.startswith(LAST_BLOCK)]
        found += pruned if last and pruned else [replace(p, count=1) for p in blocks if p not in pruned]
        if samples < batch:
            found.append(_gather_and_add(shape, samples, batch, precision))
    return found


def _gather_and_add(shape: Shape, kept: int, batch: int, precision: str) -> Part:
    element = shape.tokens * shape.channels
    forward, backward = (
        Cost(0, _BRANCHES * element * (of_kept * kept + of_all * batch), _BRANCHES * launches)
        for (of_kept, of_all), launches in zip(_BYTES[precision], _LAUNCHES, strict=True)
    )
    return Part(GATHER_AND_ADD, forward, backward)
