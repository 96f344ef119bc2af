"""The blocks of facebookresearch/dinov2, which `torch.hub` also loads."""

import sys
from typing import Any

from fastdeit.blocks.adapters.dino import register_v2
from fastdeit.nn.dino_block import DinoV2Block

_block: Any
_block, _attention, _mlp, _layer_scale = (
    sys.modules[f"dinov2.layers.{name}"] for name in ("block", "attention", "mlp", "layer_scale")
)
register_v2(_block, _attention, _mlp, _layer_scale)
_ATTENTIONS = (_attention.Attention, _attention.MemEffAttention)


class Block(DinoV2Block, _block.Block, source=_block.Block):
    """dinov2.layers.block.Block (Oquab et al. 2023) with DINOv2's constructor."""

    attention_classes = _ATTENTIONS
    mlp_class = _mlp.Mlp


class NestedTensorBlock(DinoV2Block, _block.NestedTensorBlock, source=_block.NestedTensorBlock):
    """dinov2.layers.block.NestedTensorBlock, of which the models are made, with DINOv2's constructor."""

    attention_classes = _ATTENTIONS
    mlp_class = _mlp.Mlp
