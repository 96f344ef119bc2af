"""Where timm's vision transformers keep the parts of a block, and of a model around its blocks."""

from collections.abc import Iterable
from typing import cast

import timm.layers
from timm.models import deit, vision_transformer
from torch import nn

from fastdeit.blocks.checklist import activation_name
from fastdeit.blocks.fused_module import is_fused
from fastdeit.blocks.snapshot import OWN_METHODS, register_methods
from fastdeit.blocks.spec import Affine, Attention, Block, Branch, Mlp, Trunk

# What a model does between images and heads. Each must be timm's for the residual to be carried through the blocks.
_METHODS = ("forward_features", "forward_head", "_pos_embed", "pool")

for _kind in (vision_transformer.Block, timm.layers.Attention, timm.layers.Mlp):
    register_methods(_kind, "forward")
for _kind in (vision_transformer.VisionTransformer, deit.VisionTransformerDistilled):
    register_methods(_kind, "forward", *_METHODS)


def describe_attention(module: timm.layers.Attention) -> Attention:
    children = module._modules
    q_norm, k_norm, drop, norm = (children[name] for name in ("q_norm", "k_norm", "attn_drop", "norm"))
    beyond = None
    if not module.fused_attn:
        beyond = "fused_attn is off"
    elif not type(q_norm) is type(k_norm) is type(norm) is nn.Identity:
        beyond = "queries and keys, or the output, are normalised"
    elif children.get("gate") is not None:
        beyond = "its output is gated"
    qkv, proj = Affine(children["qkv"]), Affine(children["proj"])
    heads = module.num_heads, module.head_dim
    return Attention(qkv, proj, *heads, (q_norm, k_norm, drop, norm), drop, children["proj_drop"], beyond)


def describe_mlp(module: timm.layers.Mlp) -> Mlp:
    children = module._modules
    act, drop, norm = children["act"], children["drop1"], children["norm"]
    beyond = None if type(norm) is nn.Identity else f"norm is a {type(norm).__name__}"
    fc1, fc2 = Affine(children["fc1"]), Affine(children["fc2"])
    return Mlp(fc1, act, activation_name(act), fc2, (drop, norm), drop, children["drop2"], beyond)


def describe_block(module: vision_transformer.Block) -> Block:
    children = module._modules
    attn, mlp = children["attn"], children["mlp"]
    attention = describe_attention(attn) if is_fused(attn) and isinstance(attn, timm.layers.Attention) else None
    perceptron = describe_mlp(mlp) if is_fused(mlp) and isinstance(mlp, timm.layers.Mlp) else None
    first = Branch(Affine(children["norm1"]), attn, attention, children["ls1"], children["drop_path1"], takes_mask=True)
    second = Branch(Affine(children["norm2"]), mlp, perceptron, children["ls2"], children["drop_path2"])
    memory, mode = getattr(module, "memory", "usual"), getattr(module, "drop_path_mode", "mask")
    return Block(module, vision_transformer.Block, (first, second), memory, drop_path=mode)


def describe_trunk(model: vision_transformer.VisionTransformer) -> Trunk:
    children, prefix = model._modules, model.num_prefix_tokens
    blocks = children["blocks"]
    return Trunk(describe_blocks(blocks), blocks, Affine(children["norm"]), prefix, _beyond(model))


def describe_blocks(container: nn.Module) -> dict[str, Block | str]:
    """timm's blocks by their names in a model's container, or what is in a block's place."""
    blocks: dict[str, Block | str] = {}
    for name, block in container._modules.items():
        if is_fused(block) and isinstance(block, vision_transformer.Block):
            blocks[name] = describe_block(block)
        elif type(block) is vision_transformer.Block:
            blocks[name] = "is not accelerated"
        else:
            blocks[name] = f"is a {type(block).__name__}"
    return blocks


def _beyond(model: vision_transformer.VisionTransformer) -> str | None:
    """What the model does with its tokens other than run them through its blocks and read the prefix."""
    if model.grad_checkpointing:
        return "gradients are checkpointed"
    if model.global_pool != "token" or model.attn_pool is not None or model.num_prefix_tokens < 1:
        return "the pooling reads every token"
    return why_methods_replaced(model, _METHODS)


def why_methods_replaced(model: nn.Module, methods: Iterable[str]) -> str | None:
    """None if the model's forward calls these methods of its source class as they were, on an instance that has none of its own.

    A forward of its own that ends in the class's, as Accelerate's wrapper does, is not in the way.
    """
    source = cast(type, model.source)
    if any(name in model.__dict__ for name in methods):
        return "a method was replaced on the model"
    if any(getattr(source, name) is not OWN_METHODS[source, name] for name in ("forward", *methods)):
        return f"a method of {source.__module__.partition('.')[0]}'s {source.__name__} was replaced"
    return None
