"""Where open_clip's transformers keep the parts of a block."""

from dataclasses import replace
from functools import partial
from typing import Any

from open_clip import transformer
from torch import Tensor, nn

from fastdeit.blocks.adapters.multihead_attention import describe_multihead_attention
from fastdeit.blocks.checklist import activation_name, register_activation, register_layer_scale
from fastdeit.blocks.snapshot import OWN_METHODS, register_methods
from fastdeit.blocks.spec import NOTHING, Affine, Block, Branch, Mlp

_BLOCK = transformer.ResidualAttentionBlock
register_methods(_BLOCK, "forward", "attention", host=True)
register_methods(transformer.LayerNorm, "forward", host=True)
register_methods(transformer.LayerNormFp32, "forward", host=True)
register_methods(nn.Sequential, "forward", host=True)
register_activation(transformer.QuickGELU, "quick_gelu")
register_layer_scale(transformer.LayerScale)


def describe_block(module: transformer.ResidualAttentionBlock) -> Block:
    """The block; its attention has the packed weight itself, and its MLP is a Sequential."""
    children = module._modules
    attn, mlp = children["attn"], children["mlp"]
    attention = describe_multihead_attention(attn, NOTHING) if type(attn) is nn.MultiheadAttention else None
    if attention is not None and getattr(module.attention, "__func__", None) is not OWN_METHODS[_BLOCK, "attention"]:
        attention = replace(attention, beyond="the block's method `attention` was replaced")
    perceptron = _describe_mlp(mlp) if type(mlp) is nn.Sequential and len(mlp) == 3 else None
    first = Branch(Affine(children["ln_1"]), attn, attention, children["ls_1"], NOTHING, call=partial(_attend, module))
    second = Branch(Affine(children["ln_2"]), mlp, perceptron, children["ls_2"], NOTHING)
    return Block(module, _BLOCK, (first, second), module.memory)


def _attend(block: Any, x: Tensor) -> Tensor:
    return block.attention(q_x=x)


def _describe_mlp(mlp: nn.Sequential) -> Mlp:
    fc1, act, fc2 = mlp._modules.values()
    return Mlp(Affine(fc1), act, activation_name(act), Affine(fc2), (), NOTHING, NOTHING)
