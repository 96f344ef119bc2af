"""Where attention keeps its parts in repositories that took it from timm: deit, DINO, I-JEPA and DINOv2."""

from typing import Any

from fastdeit.blocks.spec import Affine, Attention


def describe_attention(attn: Any) -> Attention:
    """Attention with one projection of q, k and v, and dropout of weights by a module or, in DINOv2, by a probability."""
    children = attn._modules
    proj, drop = children["proj"], children.get("attn_drop")
    head_dim = proj.in_features // attn.num_heads
    beyond = None if attn.scale == head_dim**-0.5 else f"its logits are scaled by {attn.scale}"
    between = () if drop is None else (drop,)
    if drop is None:
        drop = attn.attn_drop if attn.training else 0.0
    heads = attn.num_heads, head_dim
    return Attention(Affine(children["qkv"]), Affine(proj), *heads, between, drop, children["proj_drop"], beyond)
