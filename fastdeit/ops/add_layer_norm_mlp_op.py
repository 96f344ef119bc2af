"""Residual addition, LayerNorm and MLP of a pre-norm block as one autograd node; the MLP's output is left for the next to add."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastdeit import backends
from fastdeit.ops import launchers
from fastdeit.ops.arguments import check_recompute, instead_of_lean
from fastdeit.ops.branch_flops import layers_backward_flops, layers_flops, rows_of
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
    normalised_rows,
    saved_head,
    saved_weights,
    subsets_of,
    tail_parameter_gradients,
    tail_sums,
)
from fastdeit.ops.layer_norm_op import why_reference as why_no_layer_norm
from fastdeit.ops.matmul import as_dtype, lacks_elements, without_autocast
from fastdeit.ops.mlp_op import check_mlp, mlp_reference
from fastdeit.ops.passed_calls import PassedCalls
from fastdeit.ops.registration import Op
from fastdeit.ops.skipped_samples import head_reference
from fastdeit.refusals import or_reference, why_refused

if TYPE_CHECKING:
    from fastdeit.kernels.norm.subsets import Subsets
    from fastdeit.kernels.runtime.column_sums import Table

_passed = PassedCalls()


@or_reference
def add_layer_norm_mlp(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    gamma: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    branch_slots: Tensor | None = None,
    slots: Tensor | None = None,
    kept: int | None = None,
    recompute: str | None = None,
    lean: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The MLP half of a pre-norm transformer block, from the pending residual addition to an output that is not yet added.

        x_new = x + drop_path_scale * branch
        out = gamma * mlp(layer_norm(x_new))

    (Ba et al. 2016; Touvron et al. 2021, "Going deeper with image transformers", eq. 4, for gamma; Huang et al. 2016 for the
    factors per sample.) One autograd node. For backward it saves rstd, the pre-activation, and x_new, or under autocast with fp32
    parameters x_new normalised instead, in the matmul dtype.

    Args:
        x: (..., C), the residual stream, a float dtype, any strides.
        branch: the shape of x (except with branch_slots), a float dtype; None if there is nothing to add.
        norm_weight: (C,) or None.
        norm_bias: (C,) or None.
        eps: added to the variance, >= 0.
        w1: (H, C).
        b1: (H,) or None.
        w2: (O, H).
        b2: (O,) or None.
        activation: as `mlp` takes it.
        gamma: (O,) or None, LayerScale. It is folded into w2, so in fp16 it must not be far below 1.
        drop_path_scale: (x.shape[0],) float32 or None, of `branch`, without gradient.
        branch_slots: (B,) int64, a permutation of 0 to B - 1, or None. With it branch has K of the B samples, (K, ...): a sample's
            slot is its index in branch. A sample whose slot is K or more is not in branch; nothing is added to it.
        slots: (B,) int64 likewise, or None. With it out has `kept` of the B samples, each at its slot; the others are not computed.
        kept: the number of samples in out, with slots.
        recompute: None, or "preactivation": backward recomputes the pre-activation, which is then not saved. This takes one more
            GEMM and saves 2 instead of 10 bytes per token and channel, at an MLP ratio of 4 under autocast.
        lean: deprecated; True is recompute="preactivation".

    Returns:
        x_new (x itself without a branch), in the promoted dtype of x and branch; and out, (..., O), in the matmul dtype.

    Raises:
        TypeError: an argument is not a floating-point tensor, or weights differ from x in dtype outside autocast.
        ValueError: a shape or device does not fit, eps is negative or NaN, or activation or recompute is unknown.
    """
    if lean is not None:
        recompute = instead_of_lean(lean)
    of_samples = (drop_path_scale, branch_slots, slots)
    tensors = (x, branch, norm_weight, norm_bias, w1, b1, w2, b2, gamma, *of_samples)
    if not _passed.has(tensors, eps, activation, recompute, kept):
        check_head(x, branch, drop_path_scale, norm_weight, norm_bias, eps, branch_slots, slots, kept)
        check_mlp(x, w1, b1, w2, b2, activation)
        check_tail(x, gamma, w2)
        check_recompute(recompute)
        if why_reference(x, branch) is not None or lacks_elements(w1, w2):
            options: dict[str, Any] = dict(activation=activation, gamma=gamma, drop_path_scale=drop_path_scale)
            options |= dict(branch_slots=branch_slots, slots=slots, kept=kept)
            return add_layer_norm_mlp_reference(x, branch, norm_weight, norm_bias, eps, w1, b1, w2, b2, **options)
        _passed.add(tensors, eps, activation, recompute, kept)
    branch_kept = None if branch is None or branch_slots is None else branch.shape[0]
    given = (eps, activation, backends.matmul_dtype(x), recompute, branch_kept, kept)
    out, x_new = add_layer_norm_mlp_unchecked(*tensors, *given)
    return x if branch is None else x_new, out


def add_layer_norm_mlp_reference(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    gamma: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    branch_slots: Tensor | None = None,
    slots: Tensor | None = None,
    kept: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference of `add_layer_norm_mlp` in plain PyTorch. In float64 it is the oracle."""
    subsets = (branch_slots, slots, kept)
    x_new, normed = head_reference(x, branch, norm_weight, norm_bias, eps, drop_path_scale, *subsets)
    out = mlp_reference(normed, w1, b1, w2, b2, activation=activation)
    return x_new, out if gamma is None else (out * gamma).to(out.dtype)


def why_reference(x: Tensor, branch: Tensor | None = None) -> str | None:
    """None when `add_layer_norm_mlp` runs its kernels on x, else why it runs the reference."""
    return why_no_layer_norm(x, branch) or why_refused("mlp", "gemm")


# ---- the op


class Saved(NamedTuple):
    """Saved for backward: a `BranchHead`, the pre-activation, and the parameters."""

    x: Tensor | None
    mean: Tensor | None
    x_hat: Tensor | None  # (M, C)
    rstd: Tensor  # (M,) fp32
    z: Tensor | None  # (M, H), None where it is computed again
    used_w1: Tensor | None  # as `saved_weights` says
    used_w2: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    gamma: Tensor | None
    drop_path_scale: Tensor | None
    branch_slots: Tensor | None
    slots: Tensor | None


def _forward(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gamma: Tensor | None,
    drop_path_scale: Tensor | None,
    branch_slots: Tensor | None,
    slots: Tensor | None,
    eps: float,
    activation: str,
    matmul_dtype: torch.dtype,
    recompute: str | None,
    branch_kept: int | None,
    kept: int | None,
    *,
    saves,
):
    skips = branch_slots is not None or slots is not None
    if not saves and not skips and drop_path_scale is None:
        options = dict(norm=(norm_weight, norm_bias, eps), branch=branch, gamma=gamma)
        fused = launchers.fused_mlp_forward(x, w1, b1, w2, b2, activation, matmul_dtype, **options)
        if fused is not None:
            x_new, out = fused
            return (out, x_new), ()
    subsets = subsets_of(branch_slots, branch_kept, slots, kept) if skips else None
    with without_autocast():
        norm = Norm(norm_weight, norm_bias, eps)
        x_new, rows, head = head_forward(x, branch, drop_path_scale, norm, w1, matmul_dtype, saves, subsets)
        folded = fold_layers(head, norm, w1, b1, w2, b2, gamma, matmul_dtype)
        needs_z = saves and recompute is None
        h, z = launchers.linear_forward(rows, folded.weight, folded.bias, activation=activation, needs_z=needs_z)
        del rows
        out, _ = launchers.linear_forward(h, folded.tail_weight, folded.tail_bias)
    made = (head.mean, head.x_hat, head.rstd, z, *saved_weights(folded, w1, w2))
    shape = x.shape[:-1] if kept is None else (kept, *x.shape[1:-1])
    return (out.view(*shape, out.shape[-1]), x_new), made


def _save(inputs, outputs, made, needs):
    x, _, *parameters = inputs[:12]
    mean, x_hat, rstd, *others = made
    return Saved(*saved_head(x, outputs[1], mean, x_hat, rstd), *others, *parameters)


def _backward(grads, saved, options, grad_dtypes):
    (dout, dx_new), (eps, activation, matmul_dtype, _, branch_kept, kept) = grads, options
    *head, z, used_w1, used_w2, norm_weight, norm_bias, w1, b1, w2, b2, gamma, drop_path_scale, branch_slots, slots = (
        saved
    )
    head, norm = BranchHead(*head), Norm(norm_weight, norm_bias, eps)
    skips = branch_slots is not None or slots is not None
    subsets = subsets_of(branch_slots, branch_kept, slots, kept) if skips else None
    dtypes = dict(zip(GRADIENTS, grad_dtypes, strict=True))
    into_head = any(dtypes[name] is not None for name in HEAD_GRADIENTS)
    needs_h = dtypes["tail_weight"] is not None or dtypes["gamma"] is not None
    later: list[Table] = []
    with without_autocast():
        g = as_dtype(dout.reshape(-1, w2.shape[0]), matmul_dtype).contiguous()
        sum_dtype = tail_sums(gamma, dtypes)
        g_sum = None if sum_dtype is None else g.new_empty(g.shape[1], dtype=sum_dtype)
        if z is None and (into_head or needs_h):
            z = _pre_activation(head, norm, w1, b1, matmul_dtype, subsets)
        if into_head:
            needs = dict(needs_h=needs_h, dbias_dtype=head_sums(head, dtypes), dy_sum=g_sum, later=later)
            dz, h, dz_sum = launchers.activation_gradient(g, either(used_w2, w2), z, activation, **needs)
        else:
            h = launchers.activation_forward(z, activation) if needs_h else None
            if g_sum is not None:
                launchers.sum_columns((g, g_sum), later=later)
        input_grads = tail_parameter_gradients(g, g_sum, h, w2, b2, gamma, dtypes, later)
        del g, h
        if into_head:
            shape, weights = (*dout.shape[:-1], w1.shape[1]), (w1, either(used_w1, w1))
            input_grads |= head_backward(
                dz, dz_sum, dx_new, head, drop_path_scale, norm, *weights, shape, dtypes, later, subsets
            )
        launchers.add_all(later)
    return in_order(input_grads, dtypes)


def _pre_activation(
    head: BranchHead,
    norm: Norm,
    w1: Tensor,
    b1: Tensor | None,
    matmul_dtype: torch.dtype,
    subsets: "Subsets | None",
) -> Tensor:
    """The pre-activation z (M, H), recomputed for backward."""
    rows = normalised_rows(head, norm, matmul_dtype, subsets)
    if head.x_hat is not None:
        w1, b1 = launchers.fold_forward(w1, b1, matmul_dtype, column_scale=norm.weight, column_shift=norm.bias)
    return launchers.linear_forward(rows, w1, b1)[0]


def _fake(x, branch, norm_weight, norm_bias, w1, b1, w2, b2, gamma, *rest):
    *_, matmul_dtype, recompute, _, kept = rest
    x_new, *head = fake_head(x, branch, matmul_dtype, norm_weight, norm_bias, w1, kept)
    shape = x.shape[:-1] if kept is None else (kept, *x.shape[1:-1])
    z = None if recompute is not None else x.new_empty((math.prod(shape), w1.shape[0]), dtype=matmul_dtype)
    used = fake_weights(matmul_dtype, w1, w2, gamma)
    return (x.new_empty((*shape, w2.shape[0]), dtype=matmul_dtype), x_new), (*head, z, *used)


def _flops(x, branch, norm_weight, norm_bias, w1, b1, w2, *rest) -> int:
    return layers_flops(rows_of(x, rest[-1]), w1, w2)


def _backward_flops(grads, saved, options, grad_dtypes) -> int:
    (rows,), w1, w2 = saved.rstd, saved.w1, saved.w2
    flops = layers_backward_flops(rows, w1, w2, grad_dtypes, saved.x_hat is not None)
    if saved.z is None and flops:  # the pre-activation is computed again
        flops += 2 * rows * math.prod(w1)
    return flops


add_layer_norm_mlp_unchecked = Op(
    "add_layer_norm_mlp",
    outputs=("out", "x_new"),
    made=("mean", "x_hat", "rstd", "z", "used_w1", "used_w2"),
    saved=Saved,
    forward=_forward,
    save=_save,
    backward=_backward,
    fake=_fake,
    added=("drop_path_scale", "branch_slots"),
    flops=(_flops, _backward_flops),
)
