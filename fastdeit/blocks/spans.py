"""The run from images to prefix tokens, cut between blocks into spans, each one autograd node.

Between two spans flows a `PendingResidual`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdeit.blocks import spec
from fastdeit.blocks.call_rules import why_not_plain_call, why_not_trunk_call
from fastdeit.blocks.checklist import TrunkVerdict
from fastdeit.blocks.run import PendingResidual, attention_fused, blocks_of, read_gamma, run_blocks, run_final_norm

# Bytes of gradients that a span of several blocks has at most: several spans fill a bucket of DDP, which has 25 MiB.
MOST_GRADIENTS = 12 << 20


class Span(NamedTuple):
    """A part of a model's run.

    Attributes:
        run: (*tensors) -> tensors, x, branch and drop_path_scale of a `PendingResidual` with None for what it has not. The first
            span takes the images, the last gives the prefix tokens alone. None where timm's code is to run around everything.
        parameters: all that it may read.
    """

    run: Callable[..., tuple[Tensor | None, ...] | None]
    parameters: list[Tensor]


def trunk_spans(
    trunk: spec.Trunk, verdict: TrunkVerdict, make_tokens: Callable[[Tensor], Tensor], embedding: Sequence[Tensor]
) -> list[Span]:
    """The spans of one call, to be run in their order; as a whole they do what `run_trunk` does on make_tokens(images).

    Args:
        embedding: parameters that make_tokens reads.
    """
    call: dict[str, Any] = {}  # what one span leaves to the next beside tensors

    def run(indices: range, *given: Any) -> tuple[Tensor | None, ...] | None:
        if indices.start == 0:
            (images,) = given
            tokens = make_tokens(images)
            if (why_not_plain_call(tokens) or why_not_trunk_call(verdict, tokens)) is not None:
                return None
            call["fused"], pending = attention_fused(trunk, verdict, tokens), PendingResidual(tokens)
        else:
            x, branch, drop_path_scale = given
            pending = PendingResidual(x, branch, call["gamma"], drop_path_scale)
        pending = run_blocks(trunk, verdict, pending, call["fused"], indices)
        call["gamma"] = pending.gamma
        if indices.stop == len(verdict.blocks):
            return (run_final_norm(trunk, pending),)
        return pending.x, pending.branch, pending.drop_path_scale

    blocks = blocks_of(trunk)
    spans = []
    for indices in _cut([list(block.module.parameters()) for block in blocks], list(embedding)):
        parameters: list[Tensor] = [p for index in indices for p in blocks[index].module.parameters()]
        if indices.start == 0:
            parameters += embedding
        else:
            gamma = read_gamma(blocks[indices.start - 1].branches[-1])
            parameters += [] if gamma is None else [gamma]
        if indices.stop == len(blocks):
            parameters += trunk.norm.module.parameters()
        spans.append(Span(lambda *given, indices=indices: run(indices, *given), parameters))
    return spans


def _cut(blocks: Sequence[list[nn.Parameter]], embedding: Sequence[Tensor]) -> list[range]:
    """Neighbouring blocks whose gradients fit the limit together, or one."""
    cut, start, total = [], 0, _gradient_bytes(embedding)
    for index, parameters in enumerate(blocks):
        size = _gradient_bytes(parameters)
        if index > start and total + size > MOST_GRADIENTS:
            cut.append(range(start, index))
            start, total = index, 0
        total += size
    return [*cut, range(start, len(blocks))]


def _gradient_bytes(parameters: Sequence[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
