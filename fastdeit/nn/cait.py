"""CaiT's blocks, whose LayerScale is a parameter of their own."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models import cait
from torch import Tensor

from fastdeit.blocks.adapters.cait import describe_block, describe_class_block
from fastdeit.blocks.call_rules import why_not_plain_call
from fastdeit.blocks.checklist import BlockVerdict, judge_block
from fastdeit.blocks.spec import Block
from fastdeit.nn.host_block import HostBlock


class LayerScaleBlock(HostBlock, cait.LayerScaleBlock, source=cait.LayerScaleBlock):
    """timm.models.cait.LayerScaleBlock (Touvron et al. 2021, "Going deeper with image transformers", eq. 4), timm's constructor.

    LayerScale, stochastic depth and the additions are fused with the norms, and the MLP with its norm. Attention of any class is
    called: CaiT's talking heads stay timm's. `forward` takes and returns (B, N, C).
    """

    covers_parts = False
    describe_parts = describe_block


class LayerScaleBlockClassAttn(HostBlock, cait.LayerScaleBlockClassAttn, source=cait.LayerScaleBlockClassAttn):
    """timm.models.cait.LayerScaleBlockClassAttn (Touvron et al. 2021, "Going deeper", eqs. 5-8) with timm's constructor.

    `forward` takes patch tokens (B, N, C) and the class token (B, 1, C), whose query alone attends to all, and returns (B, 1, C).
    Where attention is not timm's `ClassAttn`, or a part of the block may not be skipped, timm's code runs.
    """

    keep = 1
    describe_parts = describe_class_block

    def judge(self, description: Block) -> BlockVerdict:
        return judge_block(description, for_first=True)

    def why_not_arguments(self, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
        token = _class_token(args, kwargs)
        return None if token is None else why_not_plain_call(token)

    def enter(self, x: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        token = _class_token(args, kwargs)
        return x if token is None else torch.cat((token, x), 1)


def _class_token(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The class token, None where the call has none: `explain` assumes a call with tokens alone."""
    return args[0] if args else kwargs.get("x_cls")
