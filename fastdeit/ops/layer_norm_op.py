"""LayerNorm, alone and with the residual addition before it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit import backends
from fastdeit.ops import launchers
from fastdeit.ops.arguments import check_beside, check_drop_path_scale, check_float, check_vector
from fastdeit.ops.matmul import contiguous
from fastdeit.ops.passed_calls import PassedCalls
from fastdeit.ops.registration import Op
from fastdeit.refusals import or_reference

MAX_CHANNELS = 8192  # the longest row that the kernels hold in registers


_norm_passed, _add_passed = PassedCalls(products=False), PassedCalls(products=False)


@or_reference
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Layer normalisation over the last dimension (Ba, Kiros and Hinton 2016, eq. 4).

    Args:
        x: (..., C), a float dtype, any strides.
        weight: (C,) or None, a float dtype.
        bias: (C,) or None, a float dtype.
        eps: added to the variance, >= 0.
        out_dtype: dtype of the result; by default float32 under CUDA autocast, as PyTorch gives, else x's.

    Returns:
        (..., C). Statistics are float64 for float64 input, else float32.

    Raises:
        TypeError: x, weight or bias is not a floating-point tensor, or out_dtype is not a floating-point dtype.
        ValueError: the shape or device of weight or bias does not fit x, x has no dimension, or eps is negative or NaN.
    """
    given = ((x, weight, bias), eps, out_dtype)
    if not _norm_passed.has(*given):
        check_normalised(x, weight, bias, eps)
        _check_out_dtype(out_dtype)
        if why_reference(x) is not None:
            return layer_norm_reference(x, weight, bias, eps, out_dtype=out_dtype)
        _norm_passed.add(*given)
    (y,) = layer_norm_unchecked(x, weight, bias, eps, out_dtype or default_out_dtype(x, x.dtype))
    return y


@or_reference
def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual addition of a transformer block and the LayerNorm after it, each stream read and written once.

        x_new = x + gamma * drop_path_scale * branch
        normed = layer_norm(x_new, weight, bias, eps)

    Args:
        x: (..., C), the residual stream, a float dtype, any strides.
        branch: the shape of x, a float dtype, any strides.
        weight: as in `layer_norm`.
        bias: as in `layer_norm`.
        eps: as in `layer_norm`.
        gamma: (C,), LayerScale (Touvron et al. 2021, eq. 1), or None.
        drop_path_scale: (x.shape[0],) float32, stochastic depth's factor per sample, 0 or 1/keep, or None. It has no gradient.
        out_dtype: as in `layer_norm`.

    Returns:
        x_new in the promoted dtype of x and branch, and normed.

    Raises:
        TypeError, ValueError: as `layer_norm`, for branch, gamma and drop_path_scale too.
    """
    given = ((x, branch, weight, bias, gamma, drop_path_scale), eps, out_dtype)
    if not _add_passed.has(*given):
        check_normalised(x, weight, bias, eps)
        _check_out_dtype(out_dtype)
        check_branch(x, branch, drop_path_scale)
        check_vector("gamma", gamma, x.shape[-1], x)
        if why_reference(x, branch) is not None:
            options = dict(gamma=gamma, drop_path_scale=drop_path_scale, out_dtype=out_dtype)
            return add_layer_norm_reference(x, branch, weight, bias, eps, **options)
        _add_passed.add(*given)
    out_dtype = out_dtype or default_out_dtype(x, torch.promote_types(x.dtype, branch.dtype))
    y, x_new = add_layer_norm_unchecked(x, branch, weight, bias, gamma, drop_path_scale, eps, out_dtype)
    return x_new, y


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Reference of `layer_norm` in plain PyTorch. In float64 it is the oracle."""
    weight, bias = (p if p is None else p.to(x.dtype) for p in (weight, bias))
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y if out_dtype is None else y.to(out_dtype)


def add_layer_norm_reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference of `add_layer_norm` in plain PyTorch."""
    stream = torch.promote_types(x.dtype, branch.dtype)
    if gamma is not None:
        branch = branch * gamma
    if drop_path_scale is not None:
        branch = branch * drop_path_scale.to(branch.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    x_new = (x + branch).to(stream)
    return x_new, layer_norm_reference(x_new, weight, bias, eps, out_dtype=out_dtype)


def why_reference(x: Tensor, branch: Tensor | None = None) -> str | None:
    """None when `layer_norm` and `add_layer_norm` run their kernels on x, else why they run the reference.

    Raises:
        RuntimeError: the backend "triton" is asked for and the kernels cannot run.
    """
    channels = x.shape[-1]
    if channels > MAX_CHANNELS:
        return backends.refuse(f"{channels} channels are more than the kernel's {MAX_CHANNELS}")
    if channels == 0:
        return "no channels"
    if branch is not None and branch.dtype not in backends.KERNEL_DTYPES:
        return backends.refuse(f"{backends.dtype_name(branch.dtype)} branch")
    return backends.why_reference(x, kernels=("norm",))


def default_out_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the result for rows of this dtype on x's device: float32 under CUDA autocast, as PyTorch gives."""
    return torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else dtype


# ---- argument checks


def check_normalised(x, weight, bias, eps, prefix: str = "") -> None:
    """Checks x and LayerNorm's parameters, whose arguments' names begin with prefix."""
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., C), got a tensor without dimensions")
    check_vector(f"{prefix}weight", weight, x.shape[-1], x)
    check_vector(f"{prefix}bias", bias, x.shape[-1], x)
    if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymFloat)):  # compiled code can hold a symbol
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite value >= 0, got {eps}")


def check_branch(x, branch, drop_path_scale, subset: bool = False) -> None:
    """What is added to x; of a subset of its samples, whose number has been checked."""
    check_beside("branch", branch, x)
    if branch.shape[subset:] != x.shape[subset:] or branch.dim() != x.dim():
        raise ValueError(f"branch: expected the shape of x {tuple(x.shape)}, got {tuple(branch.shape)}")
    check_drop_path_scale(x, drop_path_scale)


def _check_out_dtype(out_dtype) -> None:
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise TypeError(f"out_dtype: expected a floating-point dtype or None, got {out_dtype}")


# ---- layer_norm


class Saved(NamedTuple):
    """Saved for backward: the normalised tensor, its statistics, and the weight."""

    normalised: Tensor  # (..., C)
    mean: Tensor  # (M,) fp32
    rstd: Tensor  # (M,) fp32
    weight: Tensor | None


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype, *, saves):
    weight, bias = contiguous(weight), contiguous(bias)
    _, y, mean, rstd = launchers.layer_norm_forward(x, weight, bias, eps, out_dtype, keep_statistics=saves)
    return (y,), (mean, rstd)


def _save(inputs, outputs, made, needs):
    x, weight, *_ = inputs
    return Saved(x, *made, weight)


def _backward(grads, saved, options, grad_dtypes):
    (dy,), (x, mean, rstd, weight) = grads, saved
    names = ("dx_dtype", "dweight_dtype", "dbias_dtype")
    dtypes = dict(zip(names, grad_dtypes, strict=True))
    dx, _, dweight, dbias, _ = launchers.layer_norm_backward(dy, x, mean, rstd, contiguous(weight), **dtypes)
    return dx, dweight, dbias


def _fake(x, weight, bias, eps, out_dtype):
    rows = x.numel() // x.shape[-1]
    statistics = tuple(x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return (x.new_empty(x.shape, dtype=out_dtype),), statistics


layer_norm_unchecked = Op(
    "layer_norm",
    outputs=("y",),
    made=("mean", "rstd"),
    saved=Saved,
    forward=_forward,
    save=_save,
    backward=_backward,
    fake=_fake,
)


# ---- add_layer_norm


class AddSaved(NamedTuple):
    """Saved for backward: `Saved`, the factors of the branch, and the branch where gamma's gradient is needed."""

    normalised: Tensor  # (..., C), x_new
    mean: Tensor  # (M,) fp32
    rstd: Tensor  # (M,) fp32
    weight: Tensor | None
    gamma: Tensor | None
    drop_path_scale: Tensor | None
    branch: Tensor | None


def _add_forward(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    drop_path_scale: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    *,
    saves,
):
    scales = dict(gamma=contiguous(gamma), drop_path_scale=contiguous(drop_path_scale))
    weight, bias = contiguous(weight), contiguous(bias)
    x_new, y, mean, rstd = launchers.layer_norm_forward(
        x, weight, bias, eps, out_dtype, branch=branch, **scales, keep_statistics=saves
    )
    return (y, x_new), (mean, rstd)


def _add_save(inputs, outputs, made, needs):
    _, branch, weight, _, gamma, drop_path_scale, *_ = inputs
    return AddSaved(outputs[1], *made, weight, gamma, drop_path_scale, branch if needs[4] else None)


def _add_backward(grads, saved, options, grad_dtypes):
    (dy, dx_new), (x_new, mean, rstd, weight, gamma, drop_path_scale, branch) = grads, saved
    names = ("dx_dtype", "dbranch_dtype", "dweight_dtype", "dbias_dtype", "dgamma_dtype")
    dtypes = dict(zip(names, grad_dtypes[:5], strict=True))
    scales = dict(gamma=contiguous(gamma), drop_path_scale=contiguous(drop_path_scale))
    given = (dy, x_new, mean, rstd, contiguous(weight))
    return *launchers.layer_norm_backward(*given, dx_new=dx_new, branch=branch, **scales, **dtypes), None


def _add_fake(x, branch, weight, bias, gamma, drop_path_scale, eps, out_dtype):
    (y,), statistics = _fake(x, weight, bias, eps, out_dtype)
    return (y, x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))), statistics


add_layer_norm_unchecked = Op(
    "add_layer_norm",
    outputs=("y", "x_new"),
    made=("mean", "rstd"),
    saved=AddSaved,
    forward=_add_forward,
    save=_add_save,
    backward=_add_backward,
    fake=_add_fake,
    added=("gamma", "drop_path_scale"),
)
