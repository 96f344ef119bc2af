"""A block that its host calls by itself, from a plan of its own."""

import functools
from typing import cast

import torch
from torch import Tensor, nn

from fastdeit.blocks import spec
from fastdeit.blocks.checklist import BlockVerdict
from fastdeit.blocks.run import PendingResidual, added, run_block
from fastdeit.blocks.spans import Span
from fastdeit.plan.planned import planned
from fastdeit.plan.surroundings import why_parts_of_block_called

_Answer = tuple[spec.Block, BlockVerdict]  # what `looked_at` gives for a block


def planned_block(module: nn.Module, answer: _Answer, tokens: Tensor, keep: int | None = None) -> Tensor:
    """The block's output (B, N, C) for tokens (B, N, C) that it runs fused for; (B, keep, C) where `keep` is given.

    No graph is captured: it would copy the tokens of each block twice.
    """

    run = functools.partial(_run, answer, keep)
    if torch.compiler.is_compiling() or not tokens.is_cuda:
        return run(tokens)

    def spans(_: Tensor) -> list[Span]:
        return [Span(lambda given, *gathered: (run(given),), list(module.parameters()))]  # run reads those itself

    called = functools.partial(why_parts_of_block_called, answer[1])
    return cast(Tensor, planned(module, answer, run, tokens, called, spans, captured=False))


def _run(answer: _Answer, keep: int | None, tokens: Tensor) -> Tensor:
    return added(run_block(*answer, PendingResidual(tokens), attention_fused=True, defer=False, keep=keep))
