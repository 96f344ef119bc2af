"""Residual addition, LayerNorm and attention of a pre-norm block as one autograd node; its output is left for the next to add."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import backends
from fastdeit.ops import attention_op, launchers
from fastdeit.ops.arguments import check_beside
from fastdeit.ops.branch_flops import goes_into_head, layers_backward_flops, layers_flops
from fastdeit.ops.branches import (
    GRADIENTS,
    HEAD_GRADIENTS,
    BranchHead,
    Norm,
    check_head,
    check_tail,
    either,
    fake_head,
    fake_weights,
    fold_layers,
    head_backward,
    head_forward,
    head_sums,
    in_order,
    saved_head,
    saved_weights,
    subsets_of,
    tail_parameter_gradients,
    tail_sums,
)
from fastdeit.ops.layer_norm_op import why_reference as why_no_layer_norm
from fastdeit.ops.matmul import as_dtype, lacks_elements, without_autocast
from fastdeit.ops.passed_calls import PassedCalls
from fastdeit.ops.registration import Op
from fastdeit.ops.skipped_samples import head_reference
from fastdeit.refusals import or_reference, why_refused

_passed = PassedCalls()


@or_reference
def add_layer_norm_attention(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    *,
    gamma: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    branch_slots: Tensor | None = None,
    slots: Tensor | None = None,
    kept: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention half of a pre-norm transformer block, from the pending residual addition to an output that is not yet added.

        x_new = x + drop_path_scale * branch
        out = gamma * proj(attention(qkv(layer_norm(x_new))))

    (Vaswani et al. 2017, section 3.2.2; gamma and the factors per sample as in `add_layer_norm_mlp`.) One autograd node. For
    backward it saves the packed qkv, the attention's output and log-sum-exp, rstd, and x_new, or under autocast with fp32
    parameters x_new normalised instead, in the matmul dtype.

    Args:
        x: (B, N, C), the residual stream, a float dtype, any strides.
        branch: the shape of x (except with branch_slots), a float dtype; None if there is nothing to add.
        norm_weight: (C,) or None.
        norm_bias: (C,) or None.
        eps: added to the variance, >= 0.
        qkv_weight: (3 * H * D, C).
        qkv_bias: (3 * H * D,) or None.
        proj_weight: (O, H * D).
        proj_bias: (O,) or None.
        num_heads: H.
        gamma: (O,) or None, LayerScale. It is folded into proj_weight, so in fp16 it must not be far below 1.
        drop_path_scale: (B,) float32 or None, of `branch`, without gradient.
        branch_slots: (B,) int64, a permutation of 0 to B - 1, or None. With it branch has K of the B samples, (K, ...): a sample's
            slot is its index in branch. A sample whose slot is K or more is not in branch; nothing is added to it.
        slots: (B,) int64 likewise, or None. With it out has `kept` of the B samples, each at its slot; the others are not computed.
        kept: the number of samples in out, with slots.

    Returns:
        x_new (x itself without a branch), in the promoted dtype of x and branch; and out, (B, N, O), in the matmul dtype.

    Raises:
        TypeError: an argument is not a floating-point tensor, weights differ from x in dtype outside autocast, or num_heads is
            no int.
        ValueError: a shape or device does not fit, or eps is negative or NaN.
    """
    of_samples = (drop_path_scale, branch_slots, slots)
    tensors = (x, branch, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma, *of_samples)
    if not _passed.has(tensors, eps, num_heads, kept):
        check_head(x, branch, drop_path_scale, norm_weight, norm_bias, eps, branch_slots, slots, kept)
        _check(x, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads)
        check_tail(x, gamma, proj_weight)
        head_dim = qkv_weight.shape[0] // (3 * num_heads)
        if why_reference(x, head_dim, branch) is not None or lacks_elements(proj_weight):
            weights = (qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads)
            options: dict[str, Any] = dict(gamma=gamma, drop_path_scale=drop_path_scale)
            options |= dict(branch_slots=branch_slots, slots=slots, kept=kept)
            return add_layer_norm_attention_reference(x, branch, norm_weight, norm_bias, eps, *weights, **options)
        _passed.add(tensors, eps, num_heads, kept)
    branch_kept = None if branch is None or branch_slots is None else branch.shape[0]
    given = (eps, num_heads, backends.matmul_dtype(x), branch_kept, kept)
    out, x_new = add_layer_norm_attention_unchecked(*tensors, *given)
    return x if branch is None else x_new, out


def add_layer_norm_attention_reference(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    *,
    gamma: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    branch_slots: Tensor | None = None,
    slots: Tensor | None = None,
    kept: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference of `add_layer_norm_attention` in plain PyTorch. In float64 it is the oracle."""
    subsets = (branch_slots, slots, kept)
    x_new, normed = head_reference(x, branch, norm_weight, norm_bias, eps, drop_path_scale, *subsets)
    out = attention_op.attention_reference(F.linear(normed, qkv_weight, qkv_bias), num_heads)
    out = F.linear(out, proj_weight, proj_bias)
    return x_new, out if gamma is None else (out * gamma).to(out.dtype)


def why_reference(x: Tensor, head_dim: int, branch: Tensor | None = None) -> str | None:
    """None when `add_layer_norm_attention` runs its kernels on x, else why it runs the reference."""
    return why_no_layer_norm(x, branch) or attention_op.why_reference(x, head_dim) or why_refused("gemm")


def _check(x, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads) -> None:
    if x.dim() != 3:
        raise ValueError(f"x: expected rank 3, (B, N, C), got shape {tuple(x.shape)}")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an int, got {type(num_heads).__name__}")
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    named = dict(qkv_weight=qkv_weight, qkv_bias=qkv_bias, proj_weight=proj_weight, proj_bias=proj_bias)
    for name, tensor in named.items():
        if tensor is None and name.endswith("bias"):
            continue
        check_beside(name, tensor, x)
        backends.check_multiplied(x, name, tensor)
    rows = qkv_weight.shape[0] if qkv_weight.dim() == 2 else 0
    if rows == 0 or rows % (3 * num_heads) or qkv_weight.shape[1] != x.shape[-1]:
        given = tuple(qkv_weight.shape)
        raise ValueError(f"qkv_weight: expected shape (3 * {num_heads} * D, {x.shape[-1]}), got {given}")
    if proj_weight.dim() != 2 or proj_weight.shape[1] != rows // 3:
        raise ValueError(f"proj_weight: expected shape (rows, {rows // 3}), got {tuple(proj_weight.shape)}")
    for name, bias, weight in (("qkv_bias", qkv_bias, qkv_weight), ("proj_bias", proj_bias, proj_weight)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


# ---- the op


class Saved(NamedTuple):
    """Saved for backward: a `BranchHead`, the attention's input, output and log-sum-exp, and the parameters that gradients read."""

    x: Tensor | None
    mean: Tensor | None
    x_hat: Tensor | None  # (B * N, C)
    rstd: Tensor  # (B * N,) fp32
    qkv: Tensor  # (B, N, 3 * H * D)
    attended: Tensor  # (B, N, H * D)
    lse: Tensor  # (B, H, N) fp32
    used_qkv_weight: Tensor | None  # as `saved_weights` says
    used_proj_weight: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    qkv_weight: Tensor
    proj_weight: Tensor
    proj_bias: Tensor | None
    gamma: Tensor | None
    drop_path_scale: Tensor | None
    branch_slots: Tensor | None
    slots: Tensor | None


def _forward(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma: Tensor | None,
    drop_path_scale: Tensor | None,
    branch_slots: Tensor | None,
    slots: Tensor | None,
    eps: float,
    num_heads: int,
    matmul_dtype: torch.dtype,
    branch_kept: int | None,
    kept: int | None,
    *,
    saves,
):
    skips = branch_slots is not None or slots is not None
    subsets = subsets_of(branch_slots, branch_kept, slots, kept) if skips else None
    with without_autocast():
        norm, scale = Norm(norm_weight, norm_bias, eps), (qkv_weight.shape[0] // (3 * num_heads)) ** -0.5
        x_new, rows, head = head_forward(x, branch, drop_path_scale, norm, qkv_weight, matmul_dtype, saves, subsets)
        folded = fold_layers(head, norm, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma, matmul_dtype)
        qkv, _ = launchers.linear_forward(rows, folded.weight, folded.bias)
        del rows
        qkv = qkv.view(kept or x.shape[0], x.shape[1], qkv.shape[-1])
        attended, lse = launchers.attention_forward(qkv, num_heads, scale)
        out, _ = launchers.linear_forward(attended.view(-1, attended.shape[-1]), folded.tail_weight, folded.tail_bias)
    made = (head.mean, head.x_hat, head.rstd, qkv, attended, lse, *saved_weights(folded, qkv_weight, proj_weight))
    return (out.view(*qkv.shape[:-1], out.shape[-1]), x_new), made


def _save(inputs, outputs, made, needs):
    x, _, norm_weight, norm_bias, qkv_weight, _, *parameters = inputs[:12]
    mean, x_hat, rstd, *attention = made
    return Saved(
        *saved_head(x, outputs[1], mean, x_hat, rstd), *attention, norm_weight, norm_bias, qkv_weight, *parameters
    )


def _backward(grads, saved, options, grad_dtypes):
    (dout, dx_new), (eps, num_heads, _, branch_kept, kept) = grads, options
    head, norm = BranchHead(*saved[:4]), Norm(saved.norm_weight, saved.norm_bias, eps)
    qkv, attended, gamma = saved.qkv, saved.attended, saved.gamma
    qkv_weight, proj_weight = saved.qkv_weight, saved.proj_weight
    dtypes = dict(zip(GRADIENTS, grad_dtypes, strict=True))
    with without_autocast():
        g = as_dtype(dout.reshape(-1, proj_weight.shape[0]), qkv.dtype).contiguous()
        summed, later = [(g, tail_sums(gamma, dtypes))], []
        into_head = any(dtypes[name] is not None for name in HEAD_GRADIENTS)
        if into_head:
            dattended = torch.mm(g, either(saved.used_proj_weight, proj_weight)).view(attended.shape)
            scale = (qkv_weight.shape[0] // (3 * num_heads)) ** -0.5
            dqkv = launchers.attention_backward(dattended, qkv, attended, saved.lse, num_heads, scale).view(
                -1, qkv.shape[-1]
            )
            del dattended
            summed.append((dqkv, head_sums(head, dtypes)))
        g_sum, *dqkv_sum = launchers.column_sums(*summed, later=later)
        rows = attended.view(-1, attended.shape[-1])
        input_grads = tail_parameter_gradients(g, g_sum, rows, proj_weight, saved.proj_bias, gamma, dtypes, later)
        del g, summed
        if into_head:
            shape = (*dout.shape[:-1], qkv_weight.shape[1])
            weights = (qkv_weight, either(saved.used_qkv_weight, qkv_weight))
            skips = saved.branch_slots is not None or saved.slots is not None
            subsets = subsets_of(saved.branch_slots, branch_kept, saved.slots, kept) if skips else None
            input_grads |= head_backward(
                dqkv, *dqkv_sum, dx_new, head, saved.drop_path_scale, norm, *weights, shape, dtypes, later, subsets
            )
        launchers.add_all(later)
    return in_order(input_grads, dtypes)


def _fake(x, branch, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma, *rest):
    *_, num_heads, matmul_dtype, _, kept = rest
    (batch, tokens, _), width = x.shape, qkv_weight.shape[0]
    batch = batch if kept is None else kept
    x_new, *head = fake_head(x, branch, matmul_dtype, norm_weight, norm_bias, qkv_weight, kept)
    attention = (
        x.new_empty((batch, tokens, width), dtype=matmul_dtype),
        x.new_empty((batch, tokens, width // 3), dtype=matmul_dtype),
        x.new_empty((batch, num_heads, tokens), dtype=torch.float32),
    )
    used = fake_weights(matmul_dtype, qkv_weight, proj_weight, gamma)
    return (x.new_empty((batch, tokens, proj_weight.shape[0]), dtype=matmul_dtype), x_new), (*head, *attention, *used)


def _flops(x, branch, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, *rest) -> int:
    batch, tokens = x[0] if rest[-1] is None else rest[-1], x[1]
    attention = attention_op.packed_flops((batch, tokens, qkv_weight[0]))
    return layers_flops(batch * tokens, qkv_weight, proj_weight) + attention


def _backward_flops(grads, saved, options, grad_dtypes) -> int:
    batch, tokens, _ = saved.qkv
    attention = attention_op.packed_flops(saved.qkv, products=5) if goes_into_head(grad_dtypes) else 0
    weights = saved.qkv_weight, saved.proj_weight
    return layers_backward_flops(batch * tokens, *weights, grad_dtypes, saved.x_hat is not None) + attention


add_layer_norm_attention_unchecked = Op(
    "add_layer_norm_attention",
    outputs=("out", "x_new"),
    made=("mean", "x_hat", "rstd", "qkv", "attended", "lse", "used_qkv_weight", "used_proj_weight"),
    saved=Saved,
    forward=_forward,
    save=_save,
    backward=_backward,
    fake=_fake,
    added=("drop_path_scale", "branch_slots"),
    flops=(_flops, _backward_flops),
)
