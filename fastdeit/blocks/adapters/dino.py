"""Where the self-supervised models of facebookresearch keep the parts of a block: DINO and I-JEPA, whose blocks are the same text,
and DINOv2. A block of DINOv2 runs its code where its stochastic depth is active."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fastdeit.blocks.adapters.known_sources import register_known
from fastdeit.blocks.adapters.packed_attention import describe_attention
from fastdeit.blocks.checklist import acting, activation_name, register_layer_scale
from fastdeit.blocks.drop_path import register_drop_path
from fastdeit.blocks.spec import NOTHING, Affine, Block, Branch, Mlp

# Digests of methods that the fused forward takes the place of. DINO's to its last commit, 7c446df, and I-JEPA's, 52c1ae9.
KNOWN = {
    "Attention.forward": "cd198620c725dcaf",
    "Block.forward": "1a23f31d296a76d6",
    "DropPath.forward": "64ac781cbd611f8d",
    "MLP.forward": "cebb05f87b94dcd7",
    "Mlp.forward": "cebb05f87b94dcd7",
}
# DINOv2's, every commit of its main branch to b8931f7; attention is PyTorch's since June 2025.
KNOWN_V2 = {
    "Attention.forward": ("fdedc6caa61e2074", "86d0d624876bd222"),
    "Block.forward": "b687eed167f06048",
    "LayerScale.forward": "5d69e0b6ca615d72",
    "MemEffAttention.forward": "d41d477e931b0f32",
    "Mlp.forward": "22b9233763d8c220",
    "NestedTensorBlock.forward": "ddfd6c04a452b6b6",
}


def register(file: ModuleType, mlp: str) -> None:
    """Records the methods of DINO's or I-JEPA's file.

    Args:
        mlp: the file's name for the class of MLPs.

    Raises:
        ImportError: one is not there, or is not theirs.
    """
    methods = [f"{name}.forward" for name in ("Attention", "Block", "DropPath", mlp)]
    register_known(file, methods, KNOWN, "facebookresearch/dino or ijepa")
    register_drop_path(file.DropPath)


def register_v2(block: ModuleType, attention: ModuleType, mlp: ModuleType, layer_scale: ModuleType) -> None:
    """Records the methods of DINOv2's files of layers. Raises as `register`."""
    classes = (
        (block, ("Block", "NestedTensorBlock")),
        (attention, ("Attention", "MemEffAttention")),
        (mlp, ("Mlp",)),
        (layer_scale, ("LayerScale",)),
    )
    for file, names in classes:
        register_known(file, [f"{name}.forward" for name in names], KNOWN_V2, "facebookresearch/dinov2")
    register_layer_scale(layer_scale.LayerScale)


def describe_block(module: Any) -> Block:
    """A block of DINO or I-JEPA: attention also returns its weights, and both branches share a drop path.

    Args:
        module: its drop-in, which knows the file's classes of parts.
    """
    children = module._modules
    drop_path = acting(children["drop_path"], module.drop_path_class)
    attn = children["attn"]
    first, second = _branches(module, (NOTHING, NOTHING), drop_path, partial(_tokens_of, attn))
    return Block(module, module.source, (first, second), module.memory)


def describe_block_v2(module: Any) -> Block:
    """A block of DINOv2, which calls its drop paths only while it trains with a rate."""
    children = module._modules
    beyond = "its stochastic depth is active" if module.training and module.sample_drop_ratio > 0.0 else None
    branches = _branches(module, (children["ls1"], children["ls2"]), NOTHING, None)
    return Block(module, module.source, branches, module.memory, beyond=beyond)


def _branches(
    module: Any,
    scales: tuple[nn.Module, nn.Module],
    drop_path: nn.Module,
    attend: Callable[[Tensor], Tensor] | None,
) -> tuple[Branch, Branch]:
    children = module._modules
    attn, mlp = children["attn"], children["mlp"]
    attention = describe_attention(attn) if type(attn) in module.attention_classes else None
    perceptron = _describe_mlp(mlp) if type(mlp) is module.mlp_class else None
    first = Branch(Affine(children["norm1"]), attn, attention, scales[0], drop_path, call=attend)
    return first, Branch(Affine(children["norm2"]), mlp, perceptron, scales[1], drop_path)


def _tokens_of(attn: nn.Module, x: Tensor) -> Tensor:
    return attn(x)[0]


def _describe_mlp(mlp: Any) -> Mlp:
    children = mlp._modules
    act, drop = children["act"], children["drop"]  # called twice
    return Mlp(Affine(children["fc1"]), act, activation_name(act), Affine(children["fc2"]), (drop,), drop, drop)
