"""The run from images to prefix tokens or logits, cut between blocks into spans, each one autograd node.

Between two spans flows a `PendingResidual`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from fastdeit.blocks import spec
from fastdeit.blocks.call_rules import why_not_plain_call, why_not_trunk_call
from fastdeit.blocks.checklist import TrunkVerdict
from fastdeit.blocks.run import PendingResidual, attention_fused, blocks_of, read_gamma, run_blocks, run_final_norm

# Bytes of gradients that a span of several blocks has at most. Autograd hands a span's gradients over together, so that this is
# what adding to gradients that are there already takes beyond the ops' memory.
MOST_GRADIENTS = 64 << 20
# The same in a process group, where several spans fill a bucket of DDP, which has 25 MiB, and are reduced while others run.
MOST_REDUCED_GRADIENTS = 12 << 20


class Span(NamedTuple):
    """A part of a model's run.

    Attributes:
        run: (*tensors) -> tensors, x, branch, drop_path_scale and slots of a `PendingResidual`, None for what it has not. The first
            span takes the images, the last gives the prefix tokens alone, or logits. None where timm's code is to run around
            everything.
        parameters: all that it may read.
    """

    run: Callable[..., tuple[Tensor | None, ...] | None]
    parameters: list[Tensor]


def most_gradients() -> int:
    """Bytes of gradients that a span of several blocks has at most in this process, as it is now."""
    return MOST_REDUCED_GRADIENTS if dist.is_available() and dist.is_initialized() else MOST_GRADIENTS


def trunk_spans(trunk: spec.Trunk, verdict: TrunkVerdict, before: Span, after: Span | None = None) -> list[Span]:
    """The spans of one call, to be run in their order; as a whole they do what `run_trunk` does between `before` and `after`.

    Args:
        before: images -> (tokens,).
        after: prefix tokens -> (logits, ...); without it the last span gives the tokens.
    """
    call: dict[str, Any] = {}  # what one span leaves to the next beside tensors

    def run(indices: range, *given: Any) -> tuple[Tensor | None, ...] | None:
        if indices.start == 0:
            (images,) = given
            (tokens,) = before.run(images) or (None,)
            if tokens is None or (why_not_plain_call(tokens) or why_not_trunk_call(verdict, tokens)) is not None:
                return None
            call["fused"], pending = attention_fused(trunk, verdict, tokens), PendingResidual(tokens)
        else:
            x, branch, drop_path_scale, slots = given
            pending = PendingResidual(x, branch, call["gamma"], drop_path_scale, slots)
        pending = run_blocks(trunk, verdict, pending, call["fused"], indices)
        call["gamma"] = pending.gamma
        if indices.stop == len(verdict.blocks):
            tokens = run_final_norm(trunk, pending)
            return (tokens,) if after is None else after.run(tokens)
        return pending.x, pending.branch, pending.drop_path_scale, pending.slots

    blocks = blocks_of(trunk)
    spans = []
    for indices in _cut([list(block.module.parameters()) for block in blocks], before.parameters):
        parameters: list[Tensor] = [p for index in indices for p in blocks[index].module.parameters()]
        if indices.start == 0:
            parameters += before.parameters
        else:
            gamma = read_gamma(blocks[indices.start - 1].branches[-1])
            parameters += [] if gamma is None else [gamma]
        if indices.stop == len(blocks):
            parameters += [*trunk.norm.module.parameters(), *(after.parameters if after is not None else ())]
        spans.append(Span(lambda *given, indices=indices: run(indices, *given), parameters))
    return spans


def _cut(blocks: Sequence[list[nn.Parameter]], embedding: Sequence[Tensor]) -> list[range]:
    """Neighbouring blocks whose gradients fit the limit together, or one."""
    cut, start, total, most = [], 0, _gradient_bytes(embedding), most_gradients()
    for index, parameters in enumerate(blocks):
        size = _gradient_bytes(parameters)
        if index > start and total + size > most:
            cut.append(range(start, index))
            start, total = index, 0
        total += size
    return [*cut, range(start, len(blocks))]


def _gradient_bytes(parameters: Sequence[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
