"""Where timm's CaiT keeps the parts of a block: LayerScale is two parameters of its own, and both branches share a drop path."""

from typing import Any

import timm.layers
from timm.models import cait

from fastdeit.blocks.adapters.timm import describe_mlp
from fastdeit.blocks.fused_module import is_fused
from fastdeit.blocks.snapshot import register_methods
from fastdeit.blocks.spec import Affine, Attention, Block, Branch

for _kind in (cait.LayerScaleBlock, cait.LayerScaleBlockClassAttn, cait.ClassAttn):
    register_methods(_kind, "forward", host=True)


def describe_block(module: cait.LayerScaleBlock) -> Block:
    """The block, around any attention: with CaiT's talking heads it is not one that a kernel computes."""
    return Block(module, cait.LayerScaleBlock, _branches(module, None), module.memory)


def describe_class_block(module: cait.LayerScaleBlockClassAttn) -> Block:
    """The block of the class token. It joins the token to the others, so that its attention is fused or all is timm's."""
    attn = module._modules["attn"]
    attention = _describe_class_attention(attn) if type(attn) is cait.ClassAttn else None
    return Block(module, cait.LayerScaleBlockClassAttn, _branches(module, attention), module.memory, all_fused=True)


def _branches(module: Any, attention: Attention | None) -> tuple[Branch, Branch]:
    children = module._modules
    drop_path = children["drop_path"]
    attn, mlp = children["attn"], children["mlp"]
    perceptron = describe_mlp(mlp) if is_fused(mlp) and isinstance(mlp, timm.layers.Mlp) else None
    first = Branch(Affine(children["norm1"]), attn, attention, module, drop_path, gamma="gamma_1")
    return first, Branch(Affine(children["norm2"]), mlp, perceptron, module, drop_path, gamma="gamma_2")


def _describe_class_attention(attn: cait.ClassAttn) -> Attention:
    children: Any = attn._modules
    drop, proj = children["attn_drop"], children["proj"]
    head_dim = proj.in_features // attn.num_heads
    beyond = None if attn.fused_attn else "fused_attn is off"
    q, k, v = (Affine(children[name]) for name in ("q", "k", "v"))
    return Attention((q, k, v), Affine(proj), attn.num_heads, head_dim, (drop,), drop, children["proj_drop"], beyond)
