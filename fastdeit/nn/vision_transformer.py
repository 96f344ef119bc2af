"""Whole models: no residual addition of their own, and no work on tokens that nobody reads."""

from typing import NamedTuple

import torch.nn.functional as F
from timm.models import deit, vision_transformer
from torch import Tensor, nn

from fastdeit import ops
from fastdeit.nn.attention import Attention
from fastdeit.nn.block import Block, drop_path_scale
from fastdeit.nn.eligibility import (
    FusedModule,
    autocast_dtype,
    why_global_hook,
    why_not_bypassed,
    why_not_inactive_dropout,
    why_not_plain_call,
)
from fastdeit.nn.layer_norm import LayerNorm, TorchLayerNorm
from fastdeit.nn.mlp import Mlp

_METHODS = ("forward", "forward_features", "forward_head", "_pos_embed", "pool")


class Carried(NamedTuple):
    """A residual stream whose last addition is still to be made: x + gamma * scale * branch."""

    x: Tensor  # (B, N, C)
    branch: Tensor | None = None  # (B, N, C), or nothing to add
    gamma: Tensor | None = None  # (C,)
    scale: Tensor | None = None  # (B,)


class _CarriesResidual(FusedModule):
    """The forward of both models. `forward_features` and `forward_intermediates` stay timm's."""

    def why_not_fused(self, tokens: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        """Why `forward` would run the blocks one by one, None if it would carry the residual through them.

        Args:
            tokens: (B, N, C), what enters the first block.
        """
        return why_not_plain_call(tokens) or self._why_not_itself(attn_mask, is_causal) or self._why_not_parts(tokens)

    def _why_not_itself(self, attn_mask: Tensor | None, is_causal: bool) -> str | None:
        if attn_mask is not None or is_causal:
            return "an attention mask"
        if self.grad_checkpointing:
            return "gradients are checkpointed"
        if self.global_pool != "token" or self.attn_pool is not None or self.num_prefix_tokens < 1:
            return "the pooling reads every token"
        state = self.__dict__
        if any(name in state for name in _METHODS):
            return "a method was replaced on the model"
        if self._timm_methods != _methods(self._timm_class):
            return f"a method of timm's {self._timm_class.__name__} was replaced"
        return why_global_hook()

    def _why_not_parts(self, tokens: Tensor) -> str | None:
        children = self._modules
        blocks, norm = children["blocks"], children["norm"]
        if type(blocks) is not nn.Sequential or not blocks._modules:
            return f"blocks is a {type(blocks).__name__}"
        if type(norm) is not LayerNorm and type(norm) is not TorchLayerNorm:
            return f"norm is a {type(norm).__name__} that is not accelerated"
        reason = why_not_bypassed((blocks, norm)) or norm.why_not_inlined()
        if reason is not None:
            return reason
        for name, block in blocks._modules.items():
            if type(block) is not Block:
                return f"block {name} is a {type(block).__name__}"
            reason = block.why_not_carried(tokens)
            if reason is not None:
                return f"block {name}: {reason}"
        return None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if why_not_plain_call(x) is not None or self._why_not_itself(attn_mask, is_causal) is not None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        if why_not_plain_call(tokens) is not None or self._why_not_parts(tokens) is not None:
            return self.forward_head(self.norm(self.blocks(tokens)))
        carried = Carried(tokens)
        *blocks, last = self.blocks
        for block in blocks:
            carried = _through_block(block, carried)
        # Only the prefix tokens are read from here on: the last block attends to all tokens, and computes theirs alone.
        prefix = self.num_prefix_tokens
        prune = _why_not_pruned(last, tokens) is None
        carried = _through_block(last, carried, keep=prefix if prune else None)
        x, branch = carried.x[:, :prefix], carried.branch[:, :prefix]
        _, tokens = _add_layer_norm(Carried(x, branch, carried.gamma, carried.scale), self.norm, None)
        return self.forward_head(tokens)


def _methods(cls: type) -> tuple:
    return tuple(getattr(cls, name) for name in _METHODS)


class VisionTransformer(_CarriesResidual, vision_transformer.VisionTransformer):
    """timm's VisionTransformer (Dosovitskiy et al. 2021; DeiT, Touvron et al. 2021) with timm's constructor.

    `forward` takes (B, 3, H, W) and returns (B, num_classes). Each residual addition is made in the LayerNorm kernel after it, also
    from block to block, and with token pooling the last block computes the prefix tokens alone, since the head reads no others.
    """

    _timm_class = vision_transformer.VisionTransformer
    _timm_methods = _methods(_timm_class)


class VisionTransformerDistilled(_CarriesResidual, deit.VisionTransformerDistilled):
    """timm's VisionTransformerDistilled (Touvron et al. 2021, section 4), class and distillation token; as `VisionTransformer`."""

    _timm_class = deit.VisionTransformerDistilled
    _timm_methods = _methods(_timm_class)


def _through_block(block: Block, carried: Carried, keep: int | None = None) -> Carried:
    """One block, its last addition left open; with `keep` for the first tokens alone, which still attend to all."""
    children = block._modules
    attn, mlp = children["attn"], children["mlp"]
    products = autocast_dtype(carried.x)

    inline = _inlines(attn, Attention, carried.x)
    x, tokens = _add_layer_norm(carried, children["norm1"], products if inline else None)
    if keep is not None:
        x = x[:, :keep]
        branch = _prefix_attention(attn, tokens, keep)
    else:
        branch = attn.forward_inlined(tokens) if inline else attn(tokens)
    gamma = children["ls1"]._parameters.get("gamma")
    scale = drop_path_scale(children["drop_path1"], branch, gamma)

    inline = _inlines(mlp, Mlp, x)
    x, tokens = _add_layer_norm(Carried(x, branch, gamma, scale), children["norm2"], products if inline else None)
    branch = mlp.forward_inlined(tokens) if inline else mlp(tokens)
    gamma = children["ls2"]._parameters.get("gamma")
    return Carried(x, branch, gamma, drop_path_scale(children["drop_path2"], branch, gamma))


def _add_layer_norm(carried: Carried, norm: nn.Module, out_dtype) -> tuple[Tensor, Tensor]:
    parameters = norm._parameters
    affine = parameters["weight"], parameters["bias"], norm.eps
    if carried.branch is None:
        return carried.x, ops.layer_norm(carried.x, *affine, out_dtype=out_dtype)
    return ops.add_layer_norm(
        *(carried.x, carried.branch, *affine),
        gamma=carried.gamma,
        drop_path_scale=carried.scale,
        out_dtype=out_dtype,
    )


def _inlines(module: nn.Module, fused: type, x: Tensor) -> bool:
    return type(module) is fused and not (why_not_bypassed((module,)) or module.why_not_inlined(x))


def _why_not_pruned(block: Block, x: Tensor) -> str | None:
    """None if nothing in the block would notice that the other tokens' outputs are missing."""
    children = block._modules
    attn, mlp = children["attn"], children["mlp"]
    if not _inlines(attn, Attention, x):
        return "attention does not run fused"
    if type(mlp) is not Mlp:
        return f"mlp is a {type(mlp).__name__}"
    # A hook would see fewer tokens, and dropout would draw fewer random numbers than timm's.
    return (
        why_not_bypassed((mlp, *mlp._modules.values()))
        or why_not_inactive_dropout(attn._modules["proj_drop"])
        or why_not_inactive_dropout(mlp._modules["drop1"])
        or why_not_inactive_dropout(mlp._modules["drop2"])
    )


def _prefix_attention(attn: Attention, tokens: Tensor, keep: int) -> Tensor:
    """attn's output (B, keep, C) for the first tokens, as queries to all of tokens (B, N, C)."""
    qkv, proj = attn._modules["qkv"]._parameters, attn._modules["proj"]._parameters
    channels = attn.num_heads * attn.head_dim
    sizes = (channels, 2 * channels)
    query_weight, key_value_weight = qkv["weight"].split(sizes)
    query_bias, key_value_bias = (None, None) if qkv["bias"] is None else qkv["bias"].split(sizes)
    heads = (attn.num_heads, attn.head_dim)
    q = F.linear(tokens[:, :keep], query_weight, query_bias).unflatten(-1, heads)
    k, v = F.linear(tokens, key_value_weight, key_value_bias).unflatten(-1, (2, *heads)).unbind(2)
    return F.linear(ops.attention_qkv(q, k, v).flatten(2), proj["weight"], proj["bias"])
