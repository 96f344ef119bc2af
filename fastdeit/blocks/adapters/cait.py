"""Where timm's CaiT keeps the parts of a block: LayerScale is two parameters of its own, and both branches share a drop path."""

import timm.layers
from timm.models import cait

from fastdeit.blocks.adapters.timm import describe_mlp
from fastdeit.blocks.fused_module import is_fused
from fastdeit.blocks.snapshot import register_methods
from fastdeit.blocks.spec import Affine, Block, Branch

register_methods(cait.LayerScaleBlock, "forward", host=True)


def describe_block(module: cait.LayerScaleBlock) -> Block:
    """The block, around any attention: with CaiT's talking heads it is not one that a kernel computes."""
    children, drop_path = module._modules, module._modules["drop_path"]
    attn, mlp = children["attn"], children["mlp"]
    perceptron = describe_mlp(mlp) if is_fused(mlp) and isinstance(mlp, timm.layers.Mlp) else None
    first = Branch(Affine(children["norm1"]), attn, None, module, drop_path, gamma="gamma_1")
    second = Branch(Affine(children["norm2"]), mlp, perceptron, module, drop_path, gamma="gamma_2")
    return Block(module, cait.LayerScaleBlock, (first, second), module.memory)
