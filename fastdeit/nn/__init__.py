"""Drop-in modules: each is a subclass of the class that it replaces, with the same state and a fused forward."""

from fastdeit.blocks.fused_module import FUSED_CLASSES
from fastdeit.nn.attention import Attention
from fastdeit.nn.block import Block
from fastdeit.nn.layer_norm import LayerNorm, TorchLayerNorm
from fastdeit.nn.mlp import Mlp
from fastdeit.nn.vision_transformer import VisionTransformer, VisionTransformerDistilled

__all__ = [
    "FUSED_CLASSES",
    "Attention",
    "Block",
    "LayerNorm",
    "Mlp",
    "TorchLayerNorm",
    "VisionTransformer",
    "VisionTransformerDistilled",
]
