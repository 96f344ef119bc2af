"""Head and tail of a residual branch of a pre-norm block: the operations before and after its layers.

    x_new = x + drop_path_scale * previous branch,   z = layer_norm(x_new) W^T + b,   h = layers(z),   out = gamma * (h P^T + p)

Where W is an fp32 master that is rounded for the product in any case, LayerNorm's weight w and bias v are folded into it:

    layer_norm(x) W^T + b = x_hat (W w)^T + (b + W v),   x_hat = (x - mean) * rstd

so that x_hat, in the matmul dtype, is the product's input, the weight gradient's operand and all that LayerNorm's
backward needs. With G = dz^T x_hat the parameters' gradients need no further sums over rows:

    dW = G * w + db (outer) v,   dw = column sums of W * G,   dv = W^T db

LayerScale's gamma is folded into P and p likewise. Its gradient comes from g^T h, so the branch's output need not be saved.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastdeit.ops.arguments import check_vector
from fastdeit.ops.layer_norm_op import check_branch, check_normalised
from fastdeit.ops.matmul import as_dtype, contiguous, parameter_gradients, weight_gradient
from fastdeit.ops.skipped_samples import check_slots, samples_of

if TYPE_CHECKING:
    from fastdeit.kernels.norm.subsets import Subsets
    from fastdeit.kernels.runtime.column_sums import Table

Dtypes = dict[str, torch.dtype | None]  # of the gradients that are needed, by name; None for one that is not

# The gradients of a branch op in the order of its tensors. Weight and bias are of the layer after the norm.
HEAD_GRADIENTS = ("x", "branch", "norm_weight", "norm_bias", "weight", "bias")
GRADIENTS = (*HEAD_GRADIENTS, "tail_weight", "tail_bias", "gamma", "drop_path_scale", "branch_slots", "slots")


class Norm(NamedTuple):
    """A LayerNorm's parameters."""

    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    eps: float


class Folded(NamedTuple):
    """A branch's first and last layer as forward multiplies by them: in the matmul dtype, with norm and gamma folded in."""

    weight: Tensor
    bias: Tensor | None
    tail_weight: Tensor
    tail_bias: Tensor | None


class BranchHead(NamedTuple):
    """What backward needs of a branch's head. Of x, mean and x_hat it is x_hat alone in the folded form, else the other two."""

    x: Tensor | None  # (..., C), what was normalised
    mean: Tensor | None  # (M,) fp32
    x_hat: Tensor | None  # (M, C)
    rstd: Tensor | None  # (M,) fp32, None if nothing is saved


def folds(matmul_dtype: torch.dtype, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor) -> bool:
    """Whether LayerNorm's parameters are folded into weight: where the product's is a rounded copy of an fp32 master anyway."""
    for master in (norm_weight, norm_bias, weight):
        if master is not None and master.dtype is not torch.float32:
            return False
    return matmul_dtype is not torch.float32


def check_head(
    x, branch, drop_path_scale, norm_weight, norm_bias, eps, branch_slots=None, slots=None, kept=None
) -> None:
    """Raises for what of a branch op's arguments comes before its own layers'."""
    check_normalised(x, norm_weight, norm_bias, eps, "norm_")
    check_slots(x, branch, branch_slots, slots, kept)
    if branch is not None:
        check_branch(x, branch, drop_path_scale, subset=branch_slots is not None)
    elif drop_path_scale is not None:
        raise ValueError("drop_path_scale: expected None without a branch to scale, got a tensor")


def check_tail(x, gamma, tail_weight) -> None:
    """Raises for what comes after its own layers', the last of which has been found right."""
    check_vector("gamma", gamma, tail_weight.shape[0], x)


def subsets_of(
    branch_slots: Tensor | None, branch_kept: int | None, slots: Tensor | None, kept: int | None
) -> "Subsets":
    """What the launchers take for a branch op's arguments, at least one of which is slots."""
    from fastdeit.kernels.norm.subsets import Subsets

    found = Subsets(branch_slots, branch_kept or 0, slots, kept or 0)
    return found._replace(branch_kept=branch_kept or found.samples, kept=kept or found.samples)


def head_forward(
    x: Tensor,
    branch: Tensor | None,
    drop_path_scale: Tensor | None,
    norm: Norm,
    weight: Tensor,
    matmul_dtype: torch.dtype,
    saves: bool = True,
    subsets: "Subsets | None" = None,
) -> tuple[Tensor | None, Tensor, BranchHead]:
    """x_new (..., C), None without a branch; the rows (M, C) that weight is to multiply, in that dtype; and what to save.

    Without `saves` they are computed only where `fold_layers` needs them. With subsets the rows are of the samples that have slots.
    """
    from fastdeit.kernels.norm.layer_norm import layer_norm_forward

    folded = folds(matmul_dtype, norm.weight, norm.bias, weight)
    affine = (None, None) if folded else (contiguous(norm.weight), contiguous(norm.bias))
    if drop_path_scale is not None:
        drop_path_scale = drop_path_scale.contiguous()
    options = dict(branch=branch, drop_path_scale=drop_path_scale, keep_statistics=saves, subsets=subsets)
    x_new, normed, mean, rstd = layer_norm_forward(x, *affine, norm.eps, matmul_dtype, **options)
    normed = normed.view(-1, x.shape[-1])
    normalised = x if x_new is None else x_new
    head = BranchHead(None, None, normed, rstd) if folded else BranchHead(normalised, mean, None, rstd)
    return x_new, normed, head


def fold_layers(
    head: BranchHead,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    tail_weight: Tensor,
    tail_bias: Tensor | None,
    gamma: Tensor | None,
    matmul_dtype: torch.dtype,
) -> Folded:
    """What forward multiplies by. A tensor that nothing changes is returned as it is."""
    from fastdeit.kernels.gemm.folded_weights import fold_both_forward

    scale, shift = (norm.weight, norm.bias) if head.x_hat is not None else (None, None)
    options = dict(column_scale=scale, column_shift=shift, row_scale=gamma)
    first, last = fold_both_forward((weight, bias), (tail_weight, tail_bias), matmul_dtype, **options)
    return Folded(*first, *last)


def saved_weights(folded: Folded, weight: Tensor, tail_weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """For backward, the weights of both layers as forward multiplied by them; None for one that is the parameter itself."""
    pairs = ((folded.weight, weight), (folded.tail_weight, tail_weight))
    return tuple(None if used is parameter else used for used, parameter in pairs)


def normalised_rows(
    head: BranchHead, norm: Norm, matmul_dtype: torch.dtype, subsets: "Subsets | None" = None
) -> Tensor:
    """The product's input (M, C): saved in the folded form, else computed again."""
    from fastdeit.kernels.norm.layer_norm import layer_norm_forward

    if head.x_hat is not None:
        return head.x_hat
    affine = (contiguous(norm.weight), contiguous(norm.bias))
    options = dict(keep_statistics=False, subsets=None if subsets is None else subsets._replace(branch_slots=None))
    normed = layer_norm_forward(head.x, *affine, norm.eps, matmul_dtype, **options)[1]
    return normed.view(-1, normed.shape[-1])


def head_sums(head: BranchHead, dtypes: Dtypes) -> torch.dtype | None:
    """The dtype in which `head_backward` needs the column sums of dz, if it needs them."""
    if head.x_hat is None:
        return dtypes["bias"]
    return torch.float32 if any(dtypes[name] is not None for name in ("bias", "norm_bias", "weight")) else None


def tail_sums(gamma: Tensor | None, dtypes: Dtypes) -> torch.dtype | None:
    """The dtype in which `tail_parameter_gradients` needs the column sums of g, if it needs them."""
    if gamma is None:
        return dtypes["tail_bias"]
    return torch.float32 if any(dtypes[name] is not None for name in ("tail_bias", "gamma")) else None


def head_backward(
    dz: Tensor,
    dz_sum: Tensor | None,
    dx_new: Tensor | None,
    head: BranchHead,
    drop_path_scale: Tensor | None,
    norm: Norm,
    weight: Tensor,
    used_weight: Tensor,
    shape: tuple[int, ...],
    dtypes: Dtypes,
    later: "list[Table]",
    subsets: "Subsets | None" = None,
) -> dict[str, Tensor | None]:
    """Gradients by the names of `dtypes`: x, branch, norm_weight, norm_bias, weight, bias.

    Args:
        dz: (M, O), contiguous, in the matmul dtype.
        dz_sum: its column sums (O,), as `head_sums` says.
        dx_new: of x's shape, what else the residual stream's gradient is, or None.
        used_weight: (O, C) in the matmul dtype, what forward multiplied by.
        shape: of the normalised tokens, x's but for subsets.
        later: tables of `add_partial_sums`, dz_sum's and others. Sums over rows are there once they and those that join them
            are added.
        subsets: as forward had them.
    """
    from fastdeit.kernels.gemm.folded_weights import fold_columns_backward
    from fastdeit.kernels.norm.residual_branch import folded_layer_norm_backward

    needs_any = lambda *names: any(dtypes[name] is not None for name in names)  # noqa: E731
    matmul_dtype = dz.dtype
    grads: dict[str, Tensor | None] = {"bias": dz_sum}
    if head.x_hat is not None:
        product = weight_gradient(dz, head.x_hat, torch.float32) if needs_any("norm_weight", "weight") else None
        needs = dict(
            needs_weight=needs_any("weight"), needs_scale=needs_any("norm_weight"), needs_shift=needs_any("norm_bias")
        )
        gradients = fold_columns_backward(product, dz_sum, weight, norm.weight, norm.bias, **needs, later=later)
        grads |= dict(zip(("weight", "norm_weight", "norm_bias"), gradients, strict=True))
        if needs_any("x", "branch"):
            dx_hat = torch.mm(dz, used_weight)
            rows = None if dx_new is None else dx_new.reshape(-1, dx_hat.shape[1]).contiguous()
            options = dict(drop_path_scale=contiguous(drop_path_scale), dbranch_dtype=dtypes["branch"], subsets=subsets)
            given = (dx_hat, head.x_hat, head.rstd, rows)
            dx, dbranch = folded_layer_norm_backward(*given, dtypes["x"], **options)
            samples = (shape[0], shape[0]) if subsets is None else (subsets.samples, subsets.branch_kept)
            grads["x"], grads["branch"] = (
                None if t is None else t.view(count, *shape[1:])
                for t, count in zip((dx, dbranch), samples, strict=True)
            )
        return grads
    if needs_any("weight"):
        grads["weight"] = weight_gradient(dz, normalised_rows(head, norm, matmul_dtype, subsets), dtypes["weight"])
    if needs_any("x", "branch", "norm_weight", "norm_bias"):
        upstream = (torch.mm(dz, used_weight).view(shape), dx_new, head, drop_path_scale, norm, dtypes, later)
        grads |= _norm_backward(*upstream) if subsets is None else _norm_backward_of_subset(*upstream, subsets)
    return grads


def _norm_backward(
    dnormed: Tensor,
    dx_new: Tensor | None,
    head: BranchHead,
    drop_path_scale: Tensor | None,
    norm: Norm,
    dtypes: Dtypes,
    later: "list[Table]",
) -> dict[str, Tensor | None]:
    """Gradients x, branch, norm_weight and norm_bias from that of the normalised tokens, which are of x's shape."""
    from fastdeit.kernels.norm.layer_norm import layer_norm_backward

    gradients = layer_norm_backward(
        dnormed,
        head.x,
        head.mean,
        head.rstd,
        contiguous(norm.weight),
        dx_new=dx_new,
        drop_path_scale=contiguous(drop_path_scale),
        dx_dtype=dtypes["x"],
        dbranch_dtype=dtypes["branch"],
        dweight_dtype=dtypes["norm_weight"],
        dbias_dtype=dtypes["norm_bias"],
        later=later,
    )
    return dict(zip(("x", "branch", "norm_weight", "norm_bias"), gradients[:4], strict=True))


def _norm_backward_of_subset(
    dnormed: Tensor,
    dx_new: Tensor | None,
    head: BranchHead,
    drop_path_scale: Tensor | None,
    norm: Norm,
    dtypes: Dtypes,
    later: "list[Table]",
    subsets: "Subsets",
) -> dict[str, Tensor | None]:
    """`_norm_backward` of tokens that are normalised for a subset of x's samples, which PyTorch gathers and puts back."""
    x, samples = head.x, None
    assert x is not None
    wanted = dtypes | {"x": None if dtypes["x"] is dtypes["branch"] is None else x.dtype, "branch": None}
    rows, rows_dx_new = head, dx_new
    if subsets.slots is not None:
        samples = samples_of(subsets.slots, subsets.kept)
        rows = head._replace(x=x.index_select(0, samples))
        rows_dx_new = None if dx_new is None else dx_new.index_select(0, samples)
    grads = _norm_backward(dnormed, rows_dx_new, rows, None, norm, wanted, later)
    dx = grads["x"]
    if dx is None:
        return grads
    if samples is not None:
        dx = (x.new_zeros(x.shape) if dx_new is None else dx_new).index_copy(0, samples, dx)
    grads["x"] = dx
    if dtypes["branch"] is not None:
        samples = None if subsets.branch_slots is None else samples_of(subsets.branch_slots, subsets.branch_kept)
        dbranch = dx.clone() if samples is None else dx.index_select(0, samples)
        if drop_path_scale is not None:
            scale = drop_path_scale if samples is None else drop_path_scale.index_select(0, samples)
            dbranch.mul_(scale.reshape(-1, *(1,) * (dx.dim() - 1)))
        grads["branch"] = dbranch
    return grads


def tail_parameter_gradients(
    g: Tensor,
    g_sum: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    dtypes: Dtypes,
    later: "list[Table]",
) -> dict[str, Tensor | None]:
    """Gradients by the names of `dtypes`: tail_weight, tail_bias, gamma.

    Args:
        g: (M, O), contiguous.
        g_sum: its column sums (O,), as `tail_sums` says.
        h: (M, H), where those of the weight or gamma are.
        later: tables of `add_partial_sums`, g_sum's and others. LayerScale's gradients are made of sums that have been added.
    """
    from fastdeit.kernels.runtime.column_sums import add_all

    if gamma is not None:
        add_all(later)
    names = ("tail_weight", "tail_bias", "gamma")
    gradients = parameter_gradients(g, g_sum, h, weight, bias, gamma, *(dtypes[name] for name in names))
    return dict(zip(names, gradients, strict=True))


def in_order(grads: dict[str, Tensor | None], dtypes: Dtypes) -> list[Tensor | None]:
    """The gradients that are needed in the order of `dtypes`, each in its dtype; None for the others."""
    return [None if dtype is None else as_dtype(grads[name], dtype) for name, dtype in dtypes.items()]


def saved_head(
    x: Tensor, x_new: Tensor | None, mean: Tensor | None, x_hat: Tensor | None, rstd: Tensor
) -> tuple[Tensor | None, ...]:
    """A `BranchHead`'s fields, of what its op was given and made."""
    normalised = x if x_new is None else x_new
    return normalised if x_hat is None else None, mean, x_hat, rstd


def either(used: Tensor | None, parameter: Tensor) -> Tensor:
    """What forward multiplied by, of `saved_weights`."""
    return parameter if used is None else used


def fake_weights(
    matmul_dtype: torch.dtype, weight: Tensor, tail_weight: Tensor, gamma: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """`saved_weights` without data."""
    changes = (weight.dtype != matmul_dtype, tail_weight.dtype != matmul_dtype or gamma is not None)
    pairs = zip((weight, tail_weight), changes, strict=True)
    return tuple(w.new_empty(w.shape, dtype=matmul_dtype) if change else None for w, change in pairs)


def fake_head(
    x: Tensor,
    branch: Tensor | None,
    matmul_dtype: torch.dtype,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    kept: int | None = None,
) -> tuple[Tensor | None, ...]:
    """x_new, mean, x_hat and rstd as `head_forward` makes them, without data."""
    rows = x.numel() // x.shape[-1]
    if kept is not None:
        rows = rows // x.shape[0] * kept
    x_new = mean = x_hat = None
    if branch is not None:
        x_new = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    if folds(matmul_dtype, norm_weight, norm_bias, weight):
        x_hat = x.new_empty((rows, x.shape[-1]), dtype=matmul_dtype)
    else:
        mean = x.new_empty(rows, dtype=torch.float32)
    return x_new, mean, x_hat, x.new_empty(rows, dtype=torch.float32)
