"""Where open_clip's transformers keep the parts of a block."""

from functools import partial
from typing import Any

from open_clip import transformer
from torch import Tensor

from fastdeit.blocks.adapters import clip
from fastdeit.blocks.checklist import register_activation, register_layer_scale
from fastdeit.blocks.snapshot import register_methods
from fastdeit.blocks.spec import Block

register_methods(transformer.ResidualAttentionBlock, "forward", "attention", host=True)
register_methods(transformer.LayerNorm, "forward", host=True)
register_methods(transformer.LayerNormFp32, "forward", host=True)
register_activation(transformer.QuickGELU, "quick_gelu")
register_layer_scale(transformer.LayerScale)


def describe_block(module: Any) -> Block:
    """The block, from its drop-in."""
    return clip.describe_block(module, partial(_attend, module))


def _attend(block: transformer.ResidualAttentionBlock, x: Tensor) -> Tensor:
    return block.attention(q_x=x)
