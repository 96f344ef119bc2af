"""The only fused forward: a fold over residual branches, each an op that also makes the addition that the one before left.

Callers have checked the block with `checklist`; nothing is checked here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit import ops
from fastdeit.backends import matmul_dtype
from fastdeit.blocks import spec
from fastdeit.blocks.call_rules import why_not_attention_call, why_not_plain_call
from fastdeit.blocks.checklist import BlockVerdict, TrunkVerdict, exported, why_called
from fastdeit.blocks.drop_path import drop_path_scale, dropped_path
from fastdeit.blocks.subsets import Subset, draw_subset, runs_on_subsets
from fastdeit.kernels.attention.config import SDPA_PREFERRED
from fastdeit.ops.skipped_samples import gathered, samples_of

_NO_ARGUMENTS: Mapping[str, Any] = {}


class PendingResidual(NamedTuple):
    """A residual stream whose last addition is still to be made: x + gamma * drop_path_scale * branch."""

    x: Tensor  # (B, N, C)
    branch: Tensor | None = None  # (B, N, C), of a subset (kept, N, C), or nothing to add
    gamma: Tensor | None = None  # (C,)
    drop_path_scale: Tensor | None = None  # (B,)
    slots: Tensor | None = None  # (B,) int64, a sample's place in the branch of a subset (`Subset`)


def run_trunk(trunk: spec.Trunk, verdict: TrunkVerdict, tokens: Tensor) -> Tensor:
    """The normalised prefix tokens (B, prefix, C) after all blocks, from tokens (B, N, C).

    The heads read the prefix alone: the last block attends to all tokens, and computes nothing else for the others.
    """
    fused = attention_fused(trunk, verdict, tokens)
    return run_final_norm(trunk, run_blocks(trunk, verdict, PendingResidual(tokens), fused, range(len(fused))))


def attention_fused(trunk: spec.Trunk, verdict: TrunkVerdict, tokens: Tensor) -> list[bool]:
    """For each block, whether its attention runs fused on these tokens."""
    found: list[bool] = []
    answers: dict[tuple[int, int], bool] = {}  # by head dimension and heads
    for block, judged in zip(blocks_of(trunk), verdict.blocks, strict=True):
        body, fused = block.branches[0].body, False
        if isinstance(body, spec.Attention) and judged.parts[0] is None:
            key = body.head_dim, body.num_heads
            if key not in answers:
                answers[key] = why_not_attention_call(body, tokens) is None
            fused = answers[key]
        found.append(fused)
    return found


def blocks_of(trunk: spec.Trunk) -> list[spec.Block]:
    """The blocks of a trunk that has nothing else in the place of one."""
    return [block for block in trunk.blocks.values() if isinstance(block, spec.Block)]


def run_blocks(
    trunk: spec.Trunk, verdict: TrunkVerdict, pending: PendingResidual, fused: list[bool], indices: range
) -> PendingResidual:
    """What enters the first of these blocks through all of them. `fused` is of all blocks, as `attention_fused` gives it."""
    blocks, last = blocks_of(trunk), len(verdict.blocks) - 1
    for index in indices:
        judged = verdict.blocks[index]
        prune = index == last and fused[index] and judged.pruned is None
        keep = trunk.prefix if prune else None
        pending = run_block(blocks[index], judged, pending, attention_fused=fused[index], defer=True, keep=keep)
    return pending


def run_final_norm(trunk: spec.Trunk, pending: PendingResidual) -> Tensor:
    """The prefix tokens (B, prefix, C) of what left the last block, normalised."""
    branch = None if pending.branch is None else pending.branch[:, : trunk.prefix]
    return add_layer_norm(pending._replace(x=pending.x[:, : trunk.prefix], branch=branch), trunk.norm)[1]


def run_block(
    block: spec.Block,
    verdict: BlockVerdict,
    pending: PendingResidual,
    *,
    attention_fused: bool,
    defer: bool,
    keep: int | None = None,
    call_arguments: Mapping[str, Any] = _NO_ARGUMENTS,
) -> PendingResidual:
    """What enters a block through it, up to the last addition, which is left to the caller.

    Args:
        block: described, and judged by verdict.
        pending: what enters the block.
        attention_fused: attention whose modules are in order runs fused for this call.
        defer: leave the last LayerScale and stochastic depth to that addition too, else compute them as the host does.
        keep: compute the first `keep` tokens alone, which attend to all as ever; attention must run fused.
        call_arguments: keyword arguments of a module that takes the block's mask, where it is called.
    """
    last = block.branches[-1]
    skips = block.drop_path == "skip" and runs_on_subsets(block)
    judged = zip(block.branches, verdict.parts, verdict.called, verdict.out_dropouts, strict=True)
    for branch, reason, called, dropout in judged:
        body = branch.body
        fused = reason is None and (attention_fused or not isinstance(body, spec.Attention))
        folds_tail, calls_tail = defer or branch is not last, branch is last and verdict.tail is not None
        reads_weights = fused and called is None
        subset = draw_subset(branch.drop_path, pending.x) if skips else None
        if reads_weights and keep is None and pending.gamma is None:
            joint = _run_joint(block, branch, pending, folds_tail, calls_tail, dropout is not None, subset)
            if joint is not None:
                pending = joint
                continue
        # Only a fused body's matmul reads the normalised tokens: it takes them in the dtype that it multiplies in.
        out_dtype = autocast_dtype(pending.x) if reads_weights else None
        if subset is None:
            x, tokens = add_layer_norm(pending, branch.norm, out_dtype)
        else:
            x = settled(pending)
            rows = PendingResidual(gathered(x, subset.slots, subset.kept))
            _, tokens = add_layer_norm(rows, branch.norm, out_dtype)
        if not fused:
            call = branch.module if branch.call is None else branch.call
            out = call(tokens, **call_arguments) if branch.takes_mask else call(tokens)
        elif isinstance(body, spec.Mlp):
            out = run_mlp(body, tokens) if called is None else run_mlp_called(body, tokens)
        elif keep is None:
            out = run_attention(body, tokens, ops.linear) if called is None else run_attention_called(body, tokens)
        else:
            x, out, keep = x[:, :keep], _run_attention_prefix(body, tokens, keep), None
        if subset is not None:
            pending = _pending_subset(branch, block.module, x, out, subset, calls_tail)
        elif not folds_tail:
            pending = PendingResidual(x, _tail(branch, block.module, out, calls_tail))
        elif (type(out) is Tensor or exported(out)) and out.shape == x.shape:
            gamma = read_gamma(branch)
            pending = PendingResidual(x, out, gamma, drop_path_scale(branch.drop_path, out, gamma))
        else:  # what a module of another library gives, which PyTorch's addition takes
            pending = PendingResidual(x + _tail(branch, block.module, out, calls_tail))
    return pending


def _run_joint(
    block: spec.Block,
    branch: spec.Branch,
    pending: PendingResidual,
    folds_tail: bool,
    calls_tail: bool,
    drops_out: bool,
    subset: Subset | None,
) -> PendingResidual | None:
    """The pending addition, LayerNorm, the body and LayerScale in one autograd node.

    None where they cannot share a node: where PyTorch's attention may run, and where gamma would be multiplied into fp16 weights,
    which a small gamma takes below the range of fp16.
    """
    x, added, _, scale, slots = pending
    norm, body = branch.norm, branch.body
    gamma = branch.layer_scale._parameters.get(branch.gamma) if folds_tail else None
    if gamma is not None and matmul_dtype(x) is torch.float16:
        return None
    norm_weight, norm_bias = _read(norm)
    given = (x, added, norm_weight, norm_bias, norm.module.eps)
    options: dict[str, Any] = {"gamma": gamma, "drop_path_scale": scale}
    if slots is not None:
        options["branch_slots"] = slots
    if subset is not None:
        options |= {"slots": subset.slots, "kept": subset.kept}
    if isinstance(body, spec.Attention):
        if SDPA_PREFERRED:
            return None
        qkv = body.qkv
        qkv = _read(qkv) if isinstance(qkv, spec.Affine) else _packed(qkv)
        weights = (*qkv, *_read(body.proj), body.num_heads)
        x, out = ops.add_layer_norm_attention(*given, *weights, **options)
    else:
        weights = (*_read(body.fc1), *_read(body.fc2))
        options |= {"activation": body.activation, "recompute": "preactivation" if block.memory == "lean" else None}
        x, out = ops.add_layer_norm_mlp(*given, *weights, **options)
    if drops_out:
        out = body.out_dropout(out)
    if subset is not None and not folds_tail:
        return _pending_subset(branch, block.module, x, out, subset, calls_tail)
    if subset is not None:
        return PendingResidual(x, out, None, subset.scale, subset.slots)
    if not folds_tail:
        return PendingResidual(x, _tail(branch, block.module, out, calls_tail))
    return PendingResidual(x, out, None, drop_path_scale(branch.drop_path, out, gamma))


def host_block_on_subsets(block: spec.Block, x: Tensor, call_arguments: Mapping[str, Any]) -> Tensor:
    """What a block computes on subsets of the samples (B, N, C) by calls of the host's modules."""
    for branch in block.branches:
        subset = draw_subset(branch.drop_path, x)
        tokens = branch.norm.module(x if subset is None else gathered(x, subset.slots, subset.kept))
        call = branch.module if branch.call is None else branch.call
        out = call(tokens, **call_arguments) if branch.takes_mask else call(tokens)
        if subset is None:
            x = x + _tail(branch, block.module, out, calls=True)
        else:
            x = settled(_pending_subset(branch, block.module, x, out, subset, calls_scale=True))
    return x


def _pending_subset(
    branch: spec.Branch, block: nn.Module, x: Tensor, out: Tensor, subset: Subset, calls_scale: bool
) -> PendingResidual:
    """The addition to x of what a branch's body made of a subset, after LayerScale."""
    return PendingResidual(x, _scaled(branch, block, out, calls_scale), None, subset.scale, subset.slots)


def added(pending: PendingResidual) -> Tensor:
    """The stream after the addition that `run_block` leaves where it defers nothing."""
    if pending.slots is not None:
        return settled(pending)
    return pending.x if pending.branch is None else pending.x + pending.branch


def settled(pending: PendingResidual) -> Tensor:
    """The stream after its addition, by PyTorch's operations."""
    x, branch, gamma, scale, slots = pending
    if branch is None:
        return x
    if gamma is not None:
        branch = branch * gamma
    dtype = torch.promote_types(x.dtype, branch.dtype)
    x, branch = x.to(dtype), branch.to(dtype)
    samples = None if slots is None else samples_of(slots, len(branch))
    if scale is not None:
        scale = scale if samples is None else scale.index_select(0, samples)
        branch = branch * scale.to(dtype).reshape(-1, 1, 1)
    return x + branch if samples is None else x.index_add(0, samples, branch)


def _tail(branch: spec.Branch, block: nn.Module, out: Tensor, calls: bool) -> Tensor:
    """LayerScale and stochastic depth as the host computes them.

    Args:
        calls: their modules are called, which may do more. Otherwise the same operations take their place.
    """
    out = _scaled(branch, block, out, calls)
    return dropped_out(branch.drop_path, out) if calls else dropped_path(branch.drop_path, out)


def _scaled(branch: spec.Branch, block: nn.Module, out: Tensor, calls: bool) -> Tensor:
    """LayerScale as the host computes it, of a parameter of the block or of a module."""
    scale, gamma = branch.layer_scale, read_gamma(branch)
    if calls and scale is not block:
        return dropped_out(scale, out)
    if gamma is None:
        return out
    return gamma * out if scale is block else out * gamma


def add_layer_norm(
    pending: PendingResidual, norm: spec.Affine, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The stream after its addition, and the norm's output on it, in one kernel."""
    weight, bias = _read(norm)
    if pending.slots is not None:
        pending = PendingResidual(settled(pending))
    x, branch, gamma, scale, _ = pending
    if branch is None:
        return x, ops.layer_norm(x, weight, bias, norm.module.eps, out_dtype=out_dtype)
    options = {"gamma": gamma, "drop_path_scale": scale, "out_dtype": out_dtype}
    return ops.add_layer_norm(x, branch, weight, bias, norm.module.eps, **options)


def run_layer_norm(norm: spec.Affine, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return ops.layer_norm(x, *_read(norm), norm.module.eps, out_dtype=out_dtype)


def run_attention(body: spec.Attention, x: Tensor, linear: Callable[..., Any] = F.linear) -> Tensor:
    """(B, N, C) -> (B, N, C_out), with projections by a function of input, weight and bias."""
    out = ops.attention(linear(x, *_packed(body.qkv)), body.num_heads)
    return dropped_out(body.out_dropout, linear(out, *_read(body.proj)))


def run_attention_called(body: spec.Attention, x: Tensor) -> Tensor:
    """`run_attention` with calls of the projections, whatever their classes, and the kernel between them.

    What a call gives that the kernel does not take, such as a tensor of another class, goes to PyTorch's attention.
    """
    heads = body.num_heads, body.head_dim
    if isinstance(body.qkv, spec.Affine):
        qkv = _called(body.qkv, x)
        if why_not_plain_call(qkv) is None and why_not_attention_call(body, qkv) is None:
            return _projected(body, ops.attention(qkv, body.num_heads))
        q, k, v = qkv.unflatten(-1, (3, *heads)).unbind(2)
    else:
        q, k, v = (_called(layer, x).unflatten(-1, heads) for layer in body.qkv)
        plain = q.dtype is k.dtype is v.dtype and not any(map(why_not_plain_call, (q, k, v)))
        if plain and why_not_attention_call(body, q.flatten(2)) is None:
            return _projected(body, ops.attention_qkv(q, k, v).flatten(2))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _projected(body, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _projected(body: spec.Attention, x: Tensor) -> Tensor:
    return dropped_out(body.out_dropout, _called(body.proj, x))


def _called(layer: spec.Affine, x: Tensor) -> Tensor:
    """The layer's product by a call of its module. PyTorch's attention holds the packed weight itself, and multiplies by it."""
    module = layer.module
    if isinstance(module, nn.MultiheadAttention):
        return F.linear(x, getattr(module, layer.weight), getattr(module, layer.bias))
    return module(x)


def run_mlp(body: spec.Mlp, x: Tensor) -> Tensor:
    """(..., C) -> (..., C_out)."""
    out = ops.mlp(x, *_read(body.fc1), *_read(body.fc2), activation=body.activation)
    return dropped_out(body.out_dropout, out)


def run_mlp_called(body: spec.Mlp, x: Tensor) -> Tensor:
    """`run_mlp` with calls of the projections and of the activation between them."""
    return dropped_out(body.out_dropout, body.fc2.module(body.act(body.fc1.module(x))))


def _run_attention_prefix(body: spec.Attention, x: Tensor, keep: int) -> Tensor:
    """As `run_attention`, for the queries of the first `keep` tokens of x, with keys and values of all tokens.

    (B, N, C) -> (B, keep, C_out). Dropout after proj must be inactive.
    """
    weight, bias = _packed(body.qkv)
    heads = (body.num_heads, body.head_dim)
    sizes = (body.num_heads * body.head_dim, 2 * body.num_heads * body.head_dim)
    query_weight, key_value_weight = weight.split(sizes)
    query_bias, key_value_bias = (None, None) if bias is None else bias.split(sizes)
    q = ops.linear(x[:, :keep], query_weight, query_bias).unflatten(-1, heads)
    k, v = ops.linear(x, key_value_weight, key_value_bias).unflatten(-1, (2, *heads)).unbind(2)
    return ops.linear(ops.attention_qkv(q, k, v).flatten(2), *_read(body.proj))


def _read(layer: spec.Affine) -> tuple[Tensor, Tensor | None]:
    parameters = layer.module._parameters
    return parameters[layer.weight], parameters[layer.bias]


def read_gamma(branch: spec.Branch) -> Tensor | None:
    return branch.layer_scale._parameters.get(branch.gamma)


def _packed(qkv: spec.Affine | tuple[spec.Affine, ...]) -> tuple[Tensor, Tensor | None]:
    """The weight (3 * H * D, C) and bias (3 * H * D,) or None; of separate projections a copy, zeros where one has no bias."""
    if isinstance(qkv, spec.Affine):
        return _read(qkv)
    weights, biases = zip(*map(_read, qkv), strict=True)
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    filled = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return torch.cat(weights), torch.cat(filled)


def dropped_out(dropout: nn.Module, x: Tensor) -> Tensor:
    """dropout(x), without the call where that would give x back."""
    return x if why_called(dropout) is None else dropout(x)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast runs matrix products in on x's device, None without autocast."""
    kind = "cuda" if x.is_cuda else x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
