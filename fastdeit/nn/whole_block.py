"""One pass over blocks of the usual kind that says whether all of each runs fused.

The methods named `why_not_...` say why something does not; asked one after the other before every forward pass they take twice as
long as this, which only says that none of them would object. Where it says no, or cannot tell, they are asked.

It costs less than half of the 20 module calls of a block that it makes unnecessary. Half of that goes into those modules' hooks:
they are looked at anew each time, since a hook can come by many ways.
"""

from collections.abc import Iterable

import timm.layers
import torch
from timm.models import vision_transformer
from torch import Tensor, nn

from fastdeit.kernels.attention.config import HANDED_OVER
from fastdeit.nn.attention import Attention
from fastdeit.nn.eligibility import HOLDS_EXCLUDED, MISSING, forward_of
from fastdeit.nn.layer_norm import LayerNorm, TorchLayerNorm
from fastdeit.nn.mlp import Mlp, activation_name
from fastdeit.ops import attention_op
from fastdeit.ops.layer_norm_op import MAX_CHANNELS

_Parameter, _Linear, _Identity, _Dropout, _GELU = nn.Parameter, nn.Linear, nn.Identity, nn.Dropout, nn.GELU
_LayerScale, _DropPath = timm.layers.LayerScale, timm.layers.DropPath
_TimmBlock, _TimmAttention, _TimmMlp = vision_transformer.Block, timm.layers.Attention, timm.layers.Mlp
_TimmLayerNorm, _TorchLayerNorm = timm.layers.LayerNorm, nn.LayerNorm
_SOURCES = (
    _TimmBlock, _TimmAttention, _TimmMlp, _TimmLayerNorm, _TorchLayerNorm, _Linear, _GELU, _Dropout, _LayerScale, _DropPath,
)  # fmt: skip
_OWN_FORWARDS = tuple(map(forward_of, _SOURCES))


def run_whole(blocks: Iterable[nn.Module], kind: type[nn.Module], x: Tensor) -> bool:
    """True only if a caller may run all parts of these blocks itself, without calling any but the two last dropouts.

    Args:
        blocks: to whose call neither `why_not_plain_call` nor `why_global_hook` objects.
        kind: this package's class of blocks.
        x: (B, N, C), what enters the first.
    """
    forwards = (
        _TimmBlock.forward, _TimmAttention.forward, _TimmMlp.forward,
        _TimmLayerNorm.forward, _TorchLayerNorm.forward, _Linear.forward,
        _GELU.forward, _Dropout.forward, _LayerScale.forward, _DropPath.forward,
    )  # fmt: skip
    if x.dim() != 3 or HANDED_OVER or forwards != _OWN_FORWARDS:
        return False
    head_dim, dtype = None, x.dtype
    for block in blocks:
        if type(block) is not kind or not _is_plain(block, dtype):
            return False
        attn = block._modules["attn"]
        if attn.head_dim != head_dim:
            head_dim = attn.head_dim
            if attention_op.why_reference(x, head_dim) is not None:
                return False
    return True


def _is_plain(block: nn.Module, dtype: torch.dtype) -> bool:
    """Whether it is built of the usual parts with nothing put between. Long, so as to be one call."""
    children = block._modules
    norm1, attn, norm2, mlp = children["norm1"], children["attn"], children["norm2"], children["mlp"]
    ls1, drop_path1, ls2, drop_path2 = children["ls1"], children["drop_path1"], children["ls2"], children["drop_path2"]
    if type(attn) is not Attention or type(mlp) is not Mlp or HOLDS_EXCLUDED in block.__dict__:
        return False
    children = attn._modules
    qkv, q_norm, k_norm = children["qkv"], children["q_norm"], children["k_norm"]
    attn_drop, attn_norm, proj = children["attn_drop"], children["norm"], children["proj"]
    if children.get("gate") is not None or not attn.fused_attn:
        return False
    children = mlp._modules
    fc1, act, drop1, mlp_norm, fc2 = (
        children["fc1"],
        children["act"],
        children["drop1"],
        children["norm"],
        children["fc2"],
    )

    for module in (
        block, norm1, attn, qkv, q_norm, k_norm, attn_drop, attn_norm, proj, ls1, drop_path1,
        norm2, mlp, fc1, act, drop1, mlp_norm, fc2, ls2, drop_path2,
    ):  # fmt: skip
        state = module.__dict__
        if (
            state["_forward_pre_hooks"]
            or state["_forward_hooks"]
            or state["_backward_pre_hooks"]
            or state["_backward_hooks"]
            or "forward" in state
            or "_compiled_call_impl" in state
        ):
            return False
    if not (type(qkv) is _Linear and type(proj) is _Linear and type(fc1) is _Linear and type(fc2) is _Linear):
        return False
    for norm in (norm1, norm2):
        if type(norm) is not LayerNorm and type(norm) is not TorchLayerNorm:
            return False
        shape = norm.normalized_shape
        if norm._fast_norm or len(shape) != 1 or shape[0] > MAX_CHANNELS:
            return False
    for module in (norm1, qkv, proj, norm2, fc1, fc2):
        parameters = module._parameters
        if type(parameters.get("weight")) is not _Parameter:
            return False
        bias = parameters.get("bias", MISSING)
        if bias is not None and type(bias) is not _Parameter:
            return False
    for scale in (ls1, ls2):
        if type(scale) is not _Identity:
            gamma = scale._parameters.get("gamma") if type(scale) is _LayerScale and not scale.inplace else None
            if type(gamma) is not _Parameter or gamma.dtype is not dtype:
                return False
    return (
        type(q_norm) is _Identity and type(k_norm) is _Identity
        and type(attn_norm) is _Identity and type(mlp_norm) is _Identity
        and type(attn_drop) is _Dropout and (attn_drop.p == 0.0 or not attn_drop.training)
        and type(drop1) is _Dropout and (drop1.p == 0.0 or not drop1.training)
        and (type(drop_path1) is _Identity or type(drop_path1) is _DropPath)
        and (type(drop_path2) is _Identity or type(drop_path2) is _DropPath)
        and ((type(act) is _GELU and act.approximate == "none") or activation_name(act) is not None)
    )  # fmt: skip
