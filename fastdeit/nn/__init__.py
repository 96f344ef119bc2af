"""Drop-in modules: each is a subclass of the class that it stands in for, with the same state and another forward."""

import timm.models.deit
import timm.models.vision_transformer as timm_vision_transformer
import torch.nn

from fastdeit.nn.attention import Attention
from fastdeit.nn.block import PARTS, Block
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

# Source class -> the fused class that `fastdeit.accelerate` gives its instances.
FUSED_CLASSES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    **PARTS,
    timm_vision_transformer.Block: Block,
    timm_vision_transformer.VisionTransformer: VisionTransformer,
    timm.models.deit.VisionTransformerDistilled: VisionTransformerDistilled,
}
