"""Where vit-pytorch keeps the parts of its layers: norms inside attention and MLP, and no class for a block."""

from typing import NamedTuple

from torch import nn
from vit_pytorch import simple_vit, vit

from fastdeit.blocks.checklist import activation_name, why_replaced
from fastdeit.blocks.snapshot import register_methods
from fastdeit.blocks.spec import NOTHING, Affine, Attention, Block, Branch, Mlp


class _Kinds(NamedTuple):
    """The classes of the parts of a transformer."""

    attention: type[nn.Module]
    feed_forward: type[nn.Module]


_KINDS = {file.Transformer: _Kinds(file.Attention, file.FeedForward) for file in (vit, simple_vit)}
for _kind in (nn.Softmax, *_KINDS, *(part for kinds in _KINDS.values() for part in kinds)):
    register_methods(_kind, "forward", host=True)


def describe_transformer(module: vit.Transformer | simple_vit.Transformer) -> Block:
    """All layers as one block of 2 * depth branches; the norm after them is not among these."""
    kinds, branches = _KINDS[module.source], []
    for layer in module._modules["layers"]._modules.values():
        attn, feed_forward = layer._modules.values()
        attention = _describe_attention(attn) if type(attn) is kinds.attention else None
        perceptron = _describe_mlp(feed_forward) if type(feed_forward) is kinds.feed_forward else None
        if attention is None or perceptron is None:
            parts = f"{type(attn).__name__} and {type(feed_forward).__name__}"
            return Block(module, module.source, (), beyond=f"its layers are not of the usual kind: {parts}")
        branches.append(Branch(Affine(attn._modules["norm"]), attn, attention, NOTHING, NOTHING))
        branches.append(Branch(Affine(_net(feed_forward)[0]), feed_forward, perceptron, NOTHING, NOTHING))
    beyond = None if branches else "it has no layers"
    return Block(module, module.source, tuple(branches), module.memory, all_fused=True, beyond=beyond)


def _describe_attention(attn: nn.Module) -> Attention:
    children = attn._modules
    to_qkv, attend, to_out = (children[name] for name in ("to_qkv", "attend", "to_out"))
    drop = children.get("dropout", NOTHING)
    between, proj, out_drop = (attend, drop), to_out, NOTHING
    if type(to_out) is nn.Sequential and len(to_out) == 2:
        proj, out_drop = to_out._modules.values()
        between = (attend, drop, to_out)
    head_dim = to_qkv.out_features // (3 * attn.heads)
    beyond = why_replaced(nn.Softmax)
    if attn.scale != head_dim**-0.5:
        beyond = f"its logits are scaled by {attn.scale}"
    elif type(attend) is not nn.Softmax or attend.dim != -1:
        beyond = f"its weights are made by a {type(attend).__name__}"
    return Attention(Affine(to_qkv), Affine(proj), attn.heads, head_dim, between, drop, out_drop, beyond)


def _describe_mlp(feed_forward: nn.Module) -> Mlp:
    parts = _net(feed_forward)
    if len(parts) == 4:  # SimpleViT's has no dropout
        _, fc1, act, fc2 = parts
        drop1 = drop2 = NOTHING
    else:
        _, fc1, act, drop1, fc2, drop2 = parts
    between = (feed_forward._modules["net"], drop1)
    return Mlp(Affine(fc1), act, activation_name(act), Affine(fc2), between, drop1, drop2)


def _net(feed_forward: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(feed_forward._modules["net"]._modules.values())
