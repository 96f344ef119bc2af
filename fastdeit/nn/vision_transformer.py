"""Whole models: no residual addition of their own, and no work on tokens that nobody reads."""

import functools

from timm.models import deit, vision_transformer
from torch import Tensor, nn

from fastdeit.nn.attention import Attention
from fastdeit.nn.block import PARTS, Block, Carried, inlines
from fastdeit.nn.eligibility import (
    FusedModule,
    why_global_hook,
    why_not_bypassed,
    why_not_inactive_dropout,
    why_not_plain_call,
)
from fastdeit.nn.embedding import blank_image, embed, why_not_embedded
from fastdeit.nn.layer_norm import LayerNorm, TorchLayerNorm
from fastdeit.nn.mlp import Mlp
from fastdeit.nn.whole_block import run_whole

_METHODS = ("forward", "forward_features", "forward_head", "_pos_embed", "pool")


class _CarriesResidual(FusedModule):
    """The forward of both models. `forward_features` and `forward_intermediates` stay timm's."""

    def why_not_fused(self, tokens: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        """Why `forward` would run the blocks one by one, None if it would carry the residual through them.

        Args:
            tokens: (B, N, C), what enters the first block.
        """
        return (
            why_not_plain_call(tokens)
            or self._why_not_itself(attn_mask, is_causal)
            or self._why_not_norm()
            or self._why_not_blocks(tokens)
        )

    def why_not_embedded(self, images: Tensor | None = None) -> str | None:
        """Why timm's code would make the tokens, None if one op would.

        Args:
            images: (B, 3, H, W); by default of the size that the model was made for.
        """
        images = blank_image(self) if images is None else images
        if images is None:
            return f"patch_embed is a {type(self.patch_embed).__name__}"
        return why_not_plain_call(images) or self._why_not_itself(None, False) or why_not_embedded(self, images)

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

    def _why_not_norm(self) -> str | None:
        children = self._modules
        blocks, norm = children["blocks"], children["norm"]
        if type(blocks) is not nn.Sequential or not blocks._modules:
            return f"blocks is a {type(blocks).__name__}"
        if type(norm) is not LayerNorm and type(norm) is not TorchLayerNorm:
            return f"norm is a {type(norm).__name__} that is not accelerated"
        return why_not_bypassed((blocks, norm)) or norm.why_not_inlined()

    def _why_not_blocks(self, tokens: Tensor) -> str | None:
        for name, block in self._modules["blocks"]._modules.items():
            if type(block) is vision_transformer.Block:
                return f"block {name} is not accelerated"
            if type(block) is not Block:
                return f"block {name} is a {type(block).__name__}"
            reason = block.why_not_carried(tokens)
            if reason is not None:
                return f"block {name}: {reason}"
        return None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if why_not_plain_call(x) is not None or self._why_not_itself(attn_mask, is_causal) is not None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        if why_not_embedded(self, x) is None:
            tokens = embed(self, x)
        else:
            tokens = self._pos_embed(self.patch_embed(x))
        tokens = self.norm_pre(self.patch_drop(tokens))
        if why_not_plain_call(tokens) is not None or self._why_not_norm() is not None:
            return self.forward_head(self.norm(self.blocks(tokens)))
        whole = run_whole(self._modules["blocks"]._modules.values(), Block, tokens)
        if not whole and self._why_not_blocks(tokens) is not None:
            return self.forward_head(self.norm(self.blocks(tokens)))
        carried = Carried(tokens)
        *blocks, last = self.blocks
        for block in blocks:
            carried = block.through(carried, carry=True, whole=whole)
        # The head reads the prefix tokens alone: the last block attends to all, and computes nothing else for the others.
        prefix = self.num_prefix_tokens
        prune = _why_not_pruned(last, tokens) is None
        carried = last.through(carried, carry=True, whole=whole, keep=prefix if prune else None)
        carried = carried._replace(x=carried.x[:, :prefix], branch=carried.branch[:, :prefix])
        return self.forward_head(carried.add_layer_norm(self.norm)[1])


def _methods(cls: type) -> tuple:
    return tuple(getattr(cls, name) for name in _METHODS)


def _init_with_fused_parts(source: type[nn.Module]):
    @functools.wraps(source.__init__)
    def __init__(self, *args, **kwargs):
        source.__init__(self, *args, **kwargs)
        classes = {**PARTS, vision_transformer.Block: Block}
        for part in self.modules():
            part.__class__ = classes.get(type(part), type(part))

    return __init__


class VisionTransformer(_CarriesResidual, vision_transformer.VisionTransformer):
    """timm's VisionTransformer (Dosovitskiy et al. 2021; DeiT, Touvron et al. 2021) with timm's constructor.

    `forward` takes (B, 3, H, W) and returns (B, num_classes). One op makes the tokens. Each residual addition is made in the
    LayerNorm kernel after it, also from block to block. With token pooling the last block computes the prefix tokens alone, since
    the head reads no others.
    """

    __init__ = _init_with_fused_parts(vision_transformer.VisionTransformer)
    _timm_class = vision_transformer.VisionTransformer
    _timm_methods = _methods(_timm_class)


class VisionTransformerDistilled(_CarriesResidual, deit.VisionTransformerDistilled):
    """timm's VisionTransformerDistilled (Touvron et al. 2021, section 4), class and distillation token; as `VisionTransformer`."""

    __init__ = _init_with_fused_parts(deit.VisionTransformerDistilled)
    _timm_class = deit.VisionTransformerDistilled
    _timm_methods = _methods(_timm_class)


def _why_not_pruned(block: Block, x: Tensor) -> str | None:
    """None if nothing in the block would notice that the other tokens' outputs are missing."""
    children = block._modules
    attn, mlp = children["attn"], children["mlp"]
    if not inlines(attn, Attention, x):
        return "attention does not run fused"
    if type(mlp) is not Mlp:
        return f"mlp is a {type(mlp).__name__}"
    # A hook would see fewer tokens, and dropout would draw fewer random numbers than timm's.
    return (
        why_not_bypassed((attn._modules["proj_drop"], mlp, *mlp._modules.values()))
        or why_not_inactive_dropout(attn._modules["proj_drop"])
        or why_not_inactive_dropout(mlp._modules["drop1"])
        or why_not_inactive_dropout(mlp._modules["drop2"])
    )
