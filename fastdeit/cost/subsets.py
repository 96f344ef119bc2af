"""What a training step costs whose residual branches run on subsets of the samples (`drop_path="skip"`), as implemented.

A branch's arithmetic and traffic are those of the samples that it keeps. The LayerNorm kernels read and write the stream of all
samples, and with bf16 parameters PyTorch gathers and puts back rows in backward. Bytes are per element of one (batch, tokens,
channels) activation.
"""

from collections.abc import Sequence
from dataclasses import replace

from fastdeit.cost.formulas import Cost
from fastdeit.cost.models import LAST_BLOCK, Part, Shape, parts

SKIPPED_SAMPLES = "stream of skipped samples"
_OUTSIDE = ("patch embedding", "heads and loss")
# By precision: (bytes per kept element, bytes per element of the batch), forward and backward, of one branch, beyond what the
# fused LayerNorm moves of kept samples.
#   forward         reads and writes the stream of the others too
#   backward, amp   reads and writes its gradient
#   backward, bf16  gathers the stream (4), the norm's input, and the stream's gradient (4), copies that gradient (4 of the batch),
#                   puts rows back (4), gathers the branch's gradient (4) and scales it (4), less the branch's gradient (2), which
#                   the fused kernel would write
_BYTES = {"amp": ((-8, 8), (-8, 8)), "bf16": ((-4, 4), (18, 4))}
_LAUNCHES = {"amp": (5, 0), "bf16": (5, 11)}  # forward: random numbers, their sort, the factors
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
            found.append(_skipped_samples(shape, samples, batch, precision))
    return found


def _skipped_samples(shape: Shape, kept: int, batch: int, precision: str) -> Part:
    element = shape.tokens * shape.channels
    forward, backward = (
        Cost(0, _BRANCHES * element * (of_kept * kept + of_all * batch), _BRANCHES * launches)
        for (of_kept, of_all), launches in zip(_BYTES[precision], _LAUNCHES[precision], strict=True)
    )
    return Part(SKIPPED_SAMPLES, forward, backward)
