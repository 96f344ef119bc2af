"""Where facebookresearch/deit keeps the parts of its models: of the distilled one in `models.py`, of blocks in `models_v2.py`.

Both are files that lie beside a script, under names that other projects use too.
"""

from types import ModuleType

import timm.layers
from torch import nn

from fastdeit.blocks.adapters.known_sources import register_known
from fastdeit.blocks.adapters.packed_attention import describe_attention
from fastdeit.blocks.adapters.timm import describe_blocks, describe_mlp, why_methods_replaced
from fastdeit.blocks.fused_module import is_fused
from fastdeit.blocks.spec import NOTHING, Affine, Block, Branch, Trunk

# Digests of methods that the fused forward takes the place of: of the repository since 2022, to its last commit, 7e160fe.
KNOWN = {
    "DistilledVisionTransformer.forward": "fadccc671b1dbb07",
    "DistilledVisionTransformer.forward_features": "7bee7baa7f980962",
    "Attention.forward": "d13e2fd83592dca1",
    "Block.forward": "a2101522b68056d0",
    "Layer_scale_init_Block.forward": "164d1c1f5e01ac40",
}


def register(file: ModuleType, *methods: str) -> None:
    """Records methods ("Class.method") of deit's file.

    Raises:
        ImportError: one is not there, or is not deit's.
    """
    register_known(file, methods, KNOWN, "facebookresearch/deit")


def describe_block(module: nn.Module) -> Block:
    """A block of models_v2.py. LayerScale, where it has one, is two parameters of its own, and both branches share a drop path.

    Args:
        module: its drop-in, which knows the file's class of attention and whether the block has LayerScale.
    """
    children, drop_path = module._modules, module._modules["drop_path"]
    attn, mlp = children["attn"], children["mlp"]
    attention = describe_attention(attn) if type(attn) is module.attention else None
    perceptron = describe_mlp(mlp) if is_fused(mlp) and isinstance(mlp, timm.layers.Mlp) else None
    scale = module if module.scales else NOTHING
    first = Branch(Affine(children["norm1"]), attn, attention, scale, drop_path, gamma="gamma_1")
    second = Branch(Affine(children["norm2"]), mlp, perceptron, scale, drop_path, gamma="gamma_2")
    return Block(module, module.source, (first, second), module.memory)


def describe_distilled(model: nn.Module) -> Trunk:
    """The distilled model of models.py: its heads read the class token and the distillation token."""
    children = model._modules
    blocks, beyond = children["blocks"], why_methods_replaced(model, ("forward_features",))
    return Trunk(describe_blocks(blocks), blocks, Affine(children["norm"]), 2, beyond)
