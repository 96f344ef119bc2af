"""Where CLIP's blocks keep their parts: those of openai/CLIP, and open_clip's, which have the same names."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fastdeit.blocks.adapters.known_sources import register_known
from fastdeit.blocks.adapters.multihead_attention import describe_multihead_attention
from fastdeit.blocks.checklist import activation_name, register_activation
from fastdeit.blocks.snapshot import OWN_METHODS, register_methods
from fastdeit.blocks.spec import NOTHING, Affine, Block, Branch, Mlp

register_methods(nn.Sequential, "forward", host=True)
# Digests of methods that the fused forward takes the place of: of openai/CLIP, every commit to d05afc4.
KNOWN = {
    "LayerNorm.forward": "cde946223a37c28e",
    "QuickGELU.forward": "0ac6fd02e382b8d7",
    "ResidualAttentionBlock.attention": "9b37fa6d150b16ca",
    "ResidualAttentionBlock.forward": "a8c0a4a397321f2c",
}


def register(file: ModuleType) -> None:
    """Records the methods of openai/CLIP's file.

    Raises:
        ImportError: one is not there, or is not theirs.
    """
    register_known(file, tuple(KNOWN), KNOWN, "openai/CLIP")
    register_activation(file.QuickGELU, "quick_gelu")


def describe_block(module: Any, attend: Callable[[Tensor], Tensor], batch_first: bool = True) -> Block:
    """The block; its attention has the packed weight itself, and its MLP is a Sequential.

    Args:
        module: its drop-in.
        attend: calls the block's method `attention` with tokens (B, N, C).
        batch_first: whether that method takes them so.
    """
    children, kind = module._modules, module.source
    attn, mlp = children["attn"], children["mlp"]
    attention = perceptron = None
    if type(attn) is nn.MultiheadAttention:
        attention = describe_multihead_attention(attn, NOTHING, batch_first)
        if getattr(module.attention, "__func__", None) is not OWN_METHODS[kind, "attention"]:
            attention = replace(attention, beyond="the block's method `attention` was replaced")
    if type(mlp) is nn.Sequential and len(mlp) == 3:
        fc1, act, fc2 = mlp._modules.values()
        perceptron = Mlp(Affine(fc1), act, activation_name(act), Affine(fc2), (), NOTHING, NOTHING)
    scales = children.get("ls_1", NOTHING), children.get("ls_2", NOTHING)
    first = Branch(Affine(children["ln_1"]), attn, attention, scales[0], NOTHING, call=attend)
    second = Branch(Affine(children["ln_2"]), mlp, perceptron, scales[1], NOTHING)
    return Block(module, kind, (first, second), module.memory)


def describe_openai_block(module: Any) -> Block:
    """A block of openai/CLIP, whose parts take tokens (N, B, C)."""

    def attend(x: Tensor) -> Tensor:
        return module.attention(x.transpose(0, 1)).transpose(0, 1)

    beyond = None if module.attn_mask is None else "it has an attention mask"
    return replace(describe_block(module, attend, batch_first=False), all_fused=True, beyond=beyond)
