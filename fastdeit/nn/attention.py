"""Multi-head self-attention on the packed projection."""

import timm.layers
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit import ops
from fastdeit.kernels.attention.config import HANDED_OVER
from fastdeit.nn.eligibility import (
    FusedModule,
    dropped_out,
    forward_of,
    why_global_hook,
    why_not_bypassed,
    why_not_inactive_dropout,
    why_not_linear,
    why_not_plain_call,
)
from fastdeit.ops.attention_op import why_handed_over, why_reference

_Timms, _Identity = timm.layers.Attention, nn.Identity
_TIMM_FORWARD = forward_of(_Timms)


class Attention(FusedModule, timm.layers.Attention):
    """timm.layers.Attention (Vaswani et al. 2017, section 3.2) on the fused kernel, with timm's constructor.

    The kernel reads queries, keys and values where the qkv projection wrote them and writes their gradient in the same form.
    `forward` takes (B, N, C) and returns (B, N, dim_out). Masks, causal attention, active attention dropout, query-key
    normalisation, gates and `fused_attn = False` run timm's code.
    """

    def why_not_fused(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        """Why `forward` would run timm's code, None if it would run the kernel."""
        return why_not_plain_call(x) or why_global_hook() or self.why_not_inlined(x, attn_mask, is_causal)

    def why_not_inlined(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        """The same for a caller that has already looked at x, at global hooks and at this module's own hooks."""
        if _Timms.forward is not _TIMM_FORWARD:
            return "the forward of timm's Attention was replaced"
        if attn_mask is not None:
            return "an attention mask"
        if is_causal:
            return "causal attention"
        if not self.fused_attn:
            return "fused_attn is off"
        if x.dim() != 3:
            return "the input is not (B, N, C)"
        reason = why_reference(x, self.head_dim)
        if reason is None and HANDED_OVER:
            batch, tokens, _ = x.shape
            reason = why_handed_over(x, self.head_dim, tokens, batch * self.num_heads)
        if reason is not None:
            return reason
        children = self._modules
        q_norm, k_norm, norm = children["q_norm"], children["k_norm"], children["norm"]
        if type(q_norm) is not _Identity or type(k_norm) is not _Identity or type(norm) is not _Identity:
            return "queries and keys, or the output, are normalised"
        if children.get("gate") is not None:
            return "its output is gated"
        qkv, proj, attn_drop = children["qkv"], children["proj"], children["attn_drop"]
        return (
            why_not_bypassed((qkv, q_norm, k_norm, attn_drop, norm, proj))
            or why_not_linear(qkv)
            or why_not_linear(proj)
            or why_not_inactive_dropout(attn_drop)
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.why_not_fused(x, attn_mask, is_causal) is not None:
            return super().forward(x, attn_mask, is_causal)
        return self.forward_inlined(x)

    def forward_inlined(self, x: Tensor) -> Tensor:
        """The fused forward, for a caller that has asked `why_not_inlined`."""
        children = self._modules
        qkv, proj = children["qkv"]._parameters, children["proj"]._parameters
        out = ops.attention(F.linear(x, qkv["weight"], qkv["bias"]), self.num_heads)
        out = F.linear(out, proj["weight"], proj["bias"])
        return dropped_out(children["proj_drop"], out)

    def forward_branch(
        self,
        x: Tensor,
        branch: Tensor | None,
        norm: nn.Module,
        *,
        gamma: Tensor | None = None,
        drop_path_scale: Tensor | None = None,
        lean: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """x + drop_path_scale * branch, and gamma * what `forward_inlined` makes of its LayerNorm, in one autograd node.

        For a caller that has asked `why_not_inlined` of this module and of norm. Lean or not, it keeps the same.
        """
        children, affine = self._modules, norm._parameters
        qkv, proj = children["qkv"]._parameters, children["proj"]._parameters
        weights = (qkv["weight"], qkv["bias"], proj["weight"], proj["bias"], self.num_heads)
        options = {"gamma": gamma, "drop_path_scale": drop_path_scale}
        x, out = ops.add_layer_norm_attention(
            x, branch, affine["weight"], affine["bias"], norm.eps, *weights, **options
        )
        return x, dropped_out(children["proj_drop"], out)

    def forward_prefix(self, x: Tensor, keep: int) -> Tensor:
        """What `forward_inlined` gives for the first `keep` of x's tokens: their queries alone, keys and values of all.

        (B, N, C) -> (B, keep, dim_out). Dropout after proj must be inactive.
        """
        children = self._modules
        qkv, proj = children["qkv"]._parameters, children["proj"]._parameters
        heads = (self.num_heads, self.head_dim)
        sizes = (self.attn_dim, 2 * self.attn_dim)
        query_weight, key_value_weight = qkv["weight"].split(sizes)
        query_bias, key_value_bias = (None, None) if qkv["bias"] is None else qkv["bias"].split(sizes)
        q = F.linear(x[:, :keep], query_weight, query_bias).unflatten(-1, heads)
        k, v = F.linear(x, key_value_weight, key_value_bias).unflatten(-1, (2, *heads)).unbind(2)
        return F.linear(ops.attention_qkv(q, k, v).flatten(2), proj["weight"], proj["bias"])
