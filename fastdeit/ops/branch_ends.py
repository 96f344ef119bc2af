"""What every residual branch of a pre-norm block begins and ends with, around what is its own.

    x_new = x + drop_path_scale * previous branch,   z = layer_norm(x_new) W^T + b,   h = its own,   out = gamma * (h P^T + p)

Where W is an fp32 master that the product sees rounded anyway, the weight w and bias v of the LayerNorm are folded into it:

    layer_norm(x) W^T + b = x_hat (W w)^T + (b + W v),   x_hat = (x - mean) * rstd

so that x_hat, in the dtype of the products, is the product's input, the weight gradient's operand and all that LayerNorm's
backward needs. With G = dz^T x_hat the parameters' gradients take no sums over rows of their own:

    dW = G * w + db (outer) v,   dw = column sums of W * G,   dv = W^T db

LayerScale's gamma is folded into P and p likewise. Its gradient comes from g^T h, so the branch's output need not be kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit.ops.arguments import check_vector
from fastdeit.ops.layer_norm_op import _dense, check_branch, check_normalised
from fastdeit.ops.linear_op import as_dtype, parameter_gradients
from fastdeit.ops.mlp_op import _weight_gradient

Dtypes = dict[str, torch.dtype | None]  # of the gradients that are wanted, by name; None for one that is not


class Norm(NamedTuple):
    """A LayerNorm's parameters."""

    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    eps: float


class Start(NamedTuple):
    """What backward needs of a branch's start. Of x, mean and x_hat it is x_hat alone in the folded form, else the other two."""

    x: Tensor | None  # (..., C), what was normalised
    mean: Tensor | None  # (M,) fp32
    x_hat: Tensor | None  # (M, C)
    rstd: Tensor | None  # (M,) fp32, None if nothing is kept


def folds(products: torch.dtype, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor) -> bool:
    """Whether LayerNorm's parameters are folded into weight: where the product's is a rounded copy of an fp32 master anyway."""
    masters = [t for t in (norm_weight, norm_bias, weight) if t is not None]
    return products != torch.float32 and all(t.dtype == torch.float32 for t in masters)


def check_start(x, branch, drop_path_scale, norm_weight, norm_bias, eps) -> None:
    """Raises for what of a branch op's arguments comes before its own layers'."""
    check_normalised(x, norm_weight, norm_bias, eps, "norm_")
    if branch is not None:
        check_branch(x, branch, drop_path_scale)
    elif drop_path_scale is not None:
        raise ValueError("drop_path_scale: expected None without a branch to scale, got a tensor")


def check_end(x, gamma, end_weight) -> None:
    """Raises for what comes after its own layers', the last of which has been found right."""
    check_vector("gamma", gamma, end_weight.shape[0], x)


def start_forward(
    x: Tensor,
    branch: Tensor | None,
    drop_path_scale: Tensor | None,
    norm: Norm,
    weight: Tensor,
    products: torch.dtype,
    keeps: bool = True,
) -> tuple[Tensor | None, Tensor, Start]:
    """x_new (..., C), None without a branch; the rows (M, C) that weight is to multiply, in that dtype; and what to keep.

    Without `keeps` that is only what `start_product` asks of it.
    """
    from fastdeit.kernels.norm.layer_norm import layer_norm_forward

    folded = folds(products, norm.weight, norm.bias, weight)
    affine = (None, None) if folded else (_dense(norm.weight), _dense(norm.bias))
    options = dict(branch=branch, drop_path_scale=_dense(drop_path_scale), keep_statistics=keeps)
    x_new, normed, mean, rstd = layer_norm_forward(x, *affine, norm.eps, products, **options)
    normed = normed.view(-1, x.shape[-1])
    normalised = x if x_new is None else x_new
    start = Start(None, None, normed, rstd) if folded else Start(normalised, mean, None, rstd)
    return x_new, normed, start


def start_product(
    start: Start,
    rows: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    needs_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """activation(z) (M, O), z itself without one, of the rows that `start_forward` or `normalised_rows` gives; z too if needed."""
    from fastdeit.kernels.gemm.folded_weights import fold_forward
    from fastdeit.kernels.gemm.linear import linear_forward

    if start.x_hat is not None:
        weight, bias = fold_forward(weight, bias, rows.dtype, column_scale=norm.weight, column_shift=norm.bias)
    return linear_forward(rows, weight, bias, activation=activation, needs_z=needs_z)


def normalised_rows(start: Start, norm: Norm, products: torch.dtype) -> Tensor:
    """The product's input (M, C): kept in the folded form, else computed again."""
    from fastdeit.kernels.norm.layer_norm import layer_norm_forward

    if start.x_hat is not None:
        return start.x_hat
    affine = (_dense(norm.weight), _dense(norm.bias))
    normed = layer_norm_forward(start.x, *affine, norm.eps, products, keep_statistics=False)[1]
    return normed.view(-1, normed.shape[-1])


def start_sums(start: Start, to: Dtypes) -> torch.dtype | None:
    """The dtype in which `start_backward` wants the column sums of dz, if it wants them."""
    if start.x_hat is None:
        return to["bias"]
    return torch.float32 if any(to[name] is not None for name in ("bias", "norm_bias", "weight")) else None


def end_sums(gamma: Tensor | None, to: Dtypes) -> torch.dtype | None:
    """The dtype in which `end_parameter_gradients` wants the column sums of g, if it wants them."""
    if gamma is None:
        return to["end_bias"]
    return torch.float32 if any(to[name] is not None for name in ("end_bias", "gamma")) else None


def start_backward(
    dz: Tensor,
    dz_sum: Tensor | None,
    dx_new: Tensor | None,
    start: Start,
    drop_path_scale: Tensor | None,
    norm: Norm,
    weight: Tensor,
    shape: tuple[int, ...],
    to: Dtypes,
) -> dict[str, Tensor | None]:
    """Gradients by the names of `to`: x, branch, norm_weight, norm_bias, weight, bias.

    Args:
        dz: (M, O), contiguous, in the dtype of the products.
        dz_sum: its column sums (O,), as `start_sums` says.
        dx_new: of x's shape, what else the residual stream's gradient is, or None.
        shape: x's.
    """
    from fastdeit.kernels.gemm.folded_weights import fold_columns_backward, fold_forward
    from fastdeit.kernels.norm.layer_norm import layer_norm_backward
    from fastdeit.kernels.norm.residual_branch import folded_layer_norm_backward

    wants = lambda *names: any(to[name] is not None for name in names)  # noqa: E731
    products = dz.dtype
    found: dict[str, Tensor | None] = {"bias": dz_sum}
    if start.x_hat is not None:
        product = _weight_gradient(dz, start.x_hat, torch.float32) if wants("norm_weight", "weight") else None
        needs = dict(needs_weight=wants("weight"), needs_scale=wants("norm_weight"), needs_shift=wants("norm_bias"))
        gradients = fold_columns_backward(product, dz_sum, weight, norm.weight, norm.bias, **needs)
        found |= dict(zip(("weight", "norm_weight", "norm_bias"), gradients, strict=True))
        if wants("x", "branch"):
            dx_hat = torch.mm(dz, fold_forward(weight, None, products, column_scale=norm.weight)[0])
            rows = None if dx_new is None else dx_new.reshape(dx_hat.shape).contiguous()
            options = dict(drop_path_scale=_dense(drop_path_scale), dbranch_dtype=to["branch"])
            given = (dx_hat, start.x_hat, start.rstd, rows)
            dx, dbranch = folded_layer_norm_backward(*given, to["x"], **options)
            found["x"], found["branch"] = (None if t is None else t.view(shape) for t in (dx, dbranch))
        return found
    if wants("weight"):
        found["weight"] = _weight_gradient(dz, normalised_rows(start, norm, products), to["weight"])
    if wants("x", "branch", "norm_weight", "norm_bias"):
        found["x"], found["branch"], found["norm_weight"], found["norm_bias"], _ = layer_norm_backward(
            torch.mm(dz, as_dtype(weight, products)).view(shape),
            *(start.x, start.mean, start.rstd, _dense(norm.weight)),
            dx_new=dx_new,
            drop_path_scale=_dense(drop_path_scale),
            dx_dtype=to["x"],
            dbranch_dtype=to["branch"],
            dweight_dtype=to["norm_weight"],
            dbias_dtype=to["norm_bias"],
        )
    return found


def end_forward(h: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None) -> Tensor:
    """gamma * (h P^T + p) for h (M, H), in h's dtype."""
    from fastdeit.kernels.gemm.folded_weights import fold_forward
    from fastdeit.kernels.gemm.linear import linear_forward

    return linear_forward(h, *fold_forward(weight, bias, h.dtype, row_scale=gamma))[0]


def end_weight(weight: Tensor, gamma: Tensor | None, products: torch.dtype) -> Tensor:
    """gamma * P, as forward multiplies h by and backward the gradient."""
    from fastdeit.kernels.gemm.folded_weights import fold_forward

    return fold_forward(weight, None, products, row_scale=gamma)[0]


def end_parameter_gradients(
    g: Tensor,
    g_sum: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    to: Dtypes,
) -> dict[str, Tensor | None]:
    """Gradients by the names of `to`: end_weight, end_bias, gamma.

    Args:
        g: (M, O), contiguous.
        g_sum: its column sums (O,), as `end_sums` says.
        h: (M, H), where those of the weight or gamma are.
    """
    names = ("end_weight", "end_bias", "gamma")
    gradients = parameter_gradients(g, g_sum, h, weight, bias, gamma, *(to[name] for name in names))
    return dict(zip(names, gradients, strict=True))


def in_order(found: dict[str, Tensor | None], to: Dtypes) -> list[Tensor | None]:
    """The gradients that are wanted in the order of `to`, each in its dtype; None for the others."""
    return [None if dtype is None else as_dtype(found[name], dtype) for name, dtype in to.items()]


def share_gradient(wanted: list[torch.dtype | None], drop_path_scale: Tensor | None) -> tuple[list, bool]:
    """Unscaled and of one dtype, the gradients of x and branch, the first two, are one tensor: then only x's is asked for."""
    shared = wanted[0] is not None and wanted[0] == wanted[1] and drop_path_scale is None
    return ([wanted[0], None, *wanted[2:]] if shared else wanted), shared


# ---- of the registered ops, whose outputs may be neither None nor their inputs


def fake_start(x: Tensor, branch: Tensor | None, products: torch.dtype, folded: bool) -> tuple[Tensor, ...]:
    """The shapes of x_new, mean, x_hat and rstd, empty where they are not there."""
    rows = x.numel() // x.shape[-1]
    single = dict(dtype=torch.float32, device=x.device)
    x_new = torch.empty(0, **single)
    if branch is not None:
        x_new = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device)
    return (
        x_new,
        torch.empty(0 if folded else rows, **single),
        torch.empty((rows, x.shape[-1]), dtype=products, device=x.device) if folded else torch.empty(0, **single),
        torch.empty(rows, **single),
    )


def kept_start(
    x: Tensor, branch: Tensor | None, x_new: Tensor, mean: Tensor, x_hat: Tensor, rstd: Tensor
) -> tuple[Tensor | None, ...]:
    """A `Start` of what a registered op was given and returned."""
    if x_hat.dim() == 2:
        return None, None, x_hat, rstd
    return x if branch is None else x_new, mean, None, rstd


def wanted_dtypes(
    needs: list[bool], x_dtype: torch.dtype, branch_dtype: torch.dtype, parameters: tuple[Tensor | None, ...]
) -> list[torch.dtype | None]:
    """Those of the gradients of x, branch and the parameters, None for what needs none."""
    dtypes = (x_dtype, branch_dtype, *(None if p is None else p.dtype for p in parameters))
    return [dtype if need else None for dtype, need in zip(dtypes, needs, strict=True)]


def fake_gradients(
    like: Tensor,
    shape: tuple[int, ...],
    parameters: tuple[Tensor | None, ...],
    needs: list[bool],
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> list[Tensor]:
    """The gradients' shapes, empty for what needs none."""
    shapes = (shape, shape, *(None if p is None else p.shape for p in parameters))
    wanted = wanted_dtypes(needs, x_dtype, branch_dtype, parameters)
    return [
        like.new_empty(0, dtype=torch.float32) if dtype is None else like.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, wanted, strict=True)
    ]
