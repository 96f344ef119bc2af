"""The residual block of openai/CLIP's vision and text transformers, and the LayerNorm in and around it."""

import sys
from typing import Any

from torch import Tensor

from fastdeit.blocks.adapters.clip import describe_openai_block, register
from fastdeit.nn.host_block import HostBlock
from fastdeit.nn.layer_norm import FusedLayerNorm

_file: Any = sys.modules["clip.model"]
register(_file)


class ResidualAttentionBlock(HostBlock, _file.ResidualAttentionBlock, source=_file.ResidualAttentionBlock):
    """clip.model.ResidualAttentionBlock (Radford et al. 2021) with CLIP's constructor.

    `forward` takes and returns (N, B, C). With a mask, as in the text model, it runs CLIP's code.
    """

    describe_parts = describe_openai_block

    def finish(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(0, 1)

    def _tokens(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
        x, others, named = super()._tokens(args, kwargs)
        return x.transpose(0, 1) if type(x) is Tensor and x.dim() == 3 else x, others, named


class LayerNorm(FusedLayerNorm, _file.LayerNorm, source=_file.LayerNorm):
    """clip.model.LayerNorm on the fused kernel, for half-precision tokens and float32 parameters too.

    `forward` takes (..., C) and returns its shape and dtype.
    """

    keeps_dtype = True
