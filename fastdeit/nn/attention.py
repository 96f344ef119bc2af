"""Multi-head self-attention on the packed projection."""

import timm.layers
from torch import Tensor

from fastdeit.blocks.adapters.timm import describe_attention
from fastdeit.blocks.call_rules import why_global_hook, why_not_attention_call, why_not_plain_call
from fastdeit.blocks.checklist import why_not_between_projections, why_projections_called, why_replaced
from fastdeit.blocks.fused_module import FusedModule
from fastdeit.blocks.run import run_attention, run_attention_called
from fastdeit.blocks.snapshot import looked_at
from fastdeit.blocks.spec import Attention as Description


class Attention(FusedModule, timm.layers.Attention, source=timm.layers.Attention):
    """timm.layers.Attention (Vaswani et al. 2017, section 3.2) on the fused kernel, with timm's constructor.

    The kernel reads queries, keys and values where the qkv projection wrote them and writes their gradient in the same form.
    `forward` takes (B, N, C) and returns (B, N, dim_out). Masks, causal attention, active attention dropout, query-key
    normalisation, gates and `fused_attn = False` run timm's code. Projections other than plain `nn.Linear`, such as LoRA
    layers or quantized ones, are called, and the kernel runs on their results.
    """

    covers_parts = True
    describe = describe_attention

    def judge(self, description: Description) -> tuple[str | None, str | None]:
        """Why timm's code runs, and why the projections are called where it does not."""
        reason = why_replaced(timm.layers.Attention) or why_not_between_projections(description)
        return reason, why_projections_called(description)

    def why_not_fused(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        """Why `forward` would run timm's code, None if it would run the kernel."""
        if attn_mask is not None or is_causal:
            return "causal attention" if attn_mask is None else "an attention mask"
        description, (reason, _) = looked_at(self)
        return reason or _why_not_call(description, x)

    def note(self) -> str | None:
        """What of it is called where the kernel runs, None if nothing is."""
        called = looked_at(self)[1][1]
        return None if called is None else f"its projections are called: {called}"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not isinstance(self, Attention):  # a bound method that someone kept from before `restore`
            return type(self).forward(self, x, attn_mask, is_causal)
        description, (reason, called) = looked_at(self)
        if attn_mask is not None or is_causal or reason is not None or _why_not_call(description, x) is not None:
            return super().forward(x, attn_mask, is_causal)
        return run_attention(description, x) if called is None else run_attention_called(description, x)


def _why_not_call(description: Description, x: Tensor) -> str | None:
    return why_not_plain_call(x) or why_global_hook() or why_not_attention_call(description, x)
