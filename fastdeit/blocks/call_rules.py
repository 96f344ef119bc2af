"""Whether a call of modules that `checklist` accepts may run fused: rules on its tensors and its context, checked at every call.

As in `checklist`, a rule returns None or the reason, and each rule is written once.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from fastdeit.blocks import spec
from fastdeit.blocks.checklist import BlockVerdict, Gamma, TrunkVerdict, exported
from fastdeit.kernels.attention.config import SDPA_PREFERRED
from fastdeit.ops.attention_op import why_handed_over
from fastdeit.ops.attention_op import why_reference as why_no_attention_kernel
from fastdeit.ops.layer_norm_op import why_reference as why_no_layer_norm_kernel
from fastdeit.ops.mlp_op import why_reference as why_no_mlp_kernel

_tracing_state = torch._C._get_tracing_state


def why_not_plain_call(x: object) -> str | None:
    """Proxies of torch.fx, tensor subclasses and recorders are to see the host's operations. Transforms are the ops' to notice."""
    if type(x) is not Tensor and not exported(x):
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if _tracing_state() is not None:
        return "torch.jit.trace is recording"
    if forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    return None


def why_global_hook() -> str | None:
    if (
        module_hooks._global_forward_pre_hooks
        or module_hooks._global_forward_hooks
        or module_hooks._global_backward_pre_hooks
        or module_hooks._global_backward_hooks
    ):
        return "a hook is registered on all modules"
    return None


def why_not_attention_call(body: spec.Attention, x: Tensor) -> str | None:
    """Why attention on x (B, N, C) runs the host's code."""
    if x.dim() != 3:
        return "the input is not (B, N, C)"
    reason = why_no_attention_kernel(x, body.head_dim)
    if reason is None and SDPA_PREFERRED:
        batch, tokens, _ = x.shape
        reason = why_handed_over(x, body.head_dim, tokens, batch * body.num_heads)
    return reason


def why_not_mlp_call(x: Tensor) -> str | None:
    """Why an MLP on x (..., C) runs the host's code."""
    return why_no_mlp_kernel(x)


def why_not_norm_call(x: Tensor) -> str | None:
    """Why a LayerNorm on x (..., C), and a residual addition before it, run the host's code."""
    return why_no_layer_norm_kernel(x)


def why_not_block_call(verdict: BlockVerdict, x: Tensor) -> str | None:
    """Why the host's code runs around the parts of a block whose modules are in order."""
    reason = why_not_norm_call(x)
    return _why_not_gammas(verdict.gammas, x) if reason is None and verdict.gammas else reason


def why_not_all_fused_call(block: spec.Block, verdict: BlockVerdict, x: Tensor) -> str | None:
    """Why a block whose parts are not called alone runs the host's code for x (B, N, C)."""
    reason = why_not_plain_call(x) or why_global_hook() or verdict.block or why_not_block_call(verdict, x)
    asked = set()
    for branch in block.branches if reason is None else ():
        body = branch.body
        if isinstance(body, spec.Attention) and (body.head_dim, body.num_heads) not in asked:
            asked.add((body.head_dim, body.num_heads))
            reason = reason or why_not_attention_call(body, x)
    return reason


def why_not_trunk_call(verdict: TrunkVerdict, tokens: Tensor) -> str | None:
    """Why the blocks run one by one for these tokens, in a model whose modules are in order."""
    reason = why_not_norm_call(tokens)
    if reason is not None:
        return f"block 0: {reason}"
    return _why_not_gammas(verdict.gammas, tokens)


def _why_not_gammas(gammas: Iterable[Gamma], x: Tensor) -> str | None:
    """LayerScale in another dtype than the residual stream would change the stream's."""
    for parameters, name in gammas:
        if parameters[name].dtype is not x.dtype:
            return f"a LayerScale is in {parameters[name].dtype}, the input in {x.dtype}"
    return None
