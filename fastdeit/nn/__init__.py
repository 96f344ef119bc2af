"""Drop-in modules: each is a subclass of the class that it stands in for, with the same state and another forward."""

import torch.nn
from timm.models import vision_transformer

from fastdeit.nn.attention import Attention
from fastdeit.nn.block import PARTS, Block
from fastdeit.nn.layer_norm import LayerNorm, TorchLayerNorm
from fastdeit.nn.mlp import Mlp

__all__ = ["FUSED_CLASSES", "Attention", "Block", "LayerNorm", "Mlp", "TorchLayerNorm"]

# Source class -> the fused class that `fastdeit.accelerate` gives its instances.
FUSED_CLASSES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {**PARTS, vision_transformer.Block: Block}
