"""A linear layer and what follows it in a transformer block, by the fastest backend on record."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import backends
from fastdeit.ops import launchers
from fastdeit.ops.arguments import check_beside, check_drop_path_scale, check_residual, check_vector
from fastdeit.ops.matmul import (
    as_dtype,
    contiguous,
    lacks_elements,
    parameter_gradients,
    promoted,
    weight_gradient,
    without_autocast,
)
from fastdeit.ops.mlp_op import ACTIVATIONS
from fastdeit.ops.passed_calls import PassedCalls
from fastdeit.ops.registration import Op
from fastdeit.refusals import or_reference

_passed = PassedCalls()


@or_reference
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    save_preactivation: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """residual + drop_path_scale * gamma * activation(x weight^T + bias), as one autograd node.

    Args:
        x: (..., C), a float dtype, any strides.
        weight: (O, C).
        bias: (O,) or None.
        activation: None, or as `mlp` takes it.
        residual: (..., O) or None.
        gamma: (O,) or None, LayerScale (Touvron et al. 2021, "Going deeper with image transformers", eq. 4).
        drop_path_scale: (x.shape[0],) float32 or None, stochastic depth's factor per sample, without gradient.
        save_preactivation: return x weight^T + bias too, in the dtype of the product and without gradient.

    Returns:
        (..., O), of the dtype that PyTorch's promotion gives the formula; with `save_preactivation` a pair.

    Raises:
        TypeError: an argument is not a floating-point tensor, or weight and bias differ from x in dtype outside autocast.
        ValueError: activation is another, or a shape or device does not fit.
    """
    tensors = (x, weight, bias, gamma, drop_path_scale, residual)
    if not _passed.has(tensors, activation):
        _check(x, weight, bias, activation, residual, gamma, drop_path_scale)
        options = dict(activation=activation, residual=residual, gamma=gamma, drop_path_scale=drop_path_scale)
        if why_reference(x) is not None or lacks_elements(weight):
            return linear_reference(x, weight, bias, **options, save_preactivation=save_preactivation)
        _passed.add(tensors, activation)
    out, z = linear_unchecked(*tensors, activation, backends.matmul_dtype(x), save_preactivation)
    return (out, z.view(*out.shape)) if save_preactivation else out


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    save_preactivation: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of `linear` in plain PyTorch. In float64 it is the oracle."""
    z = F.linear(x, weight, bias)
    out = z if activation is None else ACTIVATIONS[activation](z)
    if gamma is not None:
        out = out * gamma
    if drop_path_scale is not None:
        out = out * drop_path_scale.to(out.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    out = out if residual is None else residual + out
    return (out, z.detach()) if save_preactivation else out


def why_reference(x: Tensor) -> str | None:
    """None when `linear` runs its kernels on x, else why it runs the reference."""
    return backends.why_reference(x, kernels=("mlp", "gemm"))


def _check(x, weight, bias, activation, residual, gamma, drop_path_scale) -> None:
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise ValueError(f"activation: expected None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None or name != "bias":
            check_beside(name, tensor, x)
            backends.check_multiplied(x, name, tensor)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., C), got a tensor without dimensions")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected shape (rows, {x.shape[-1]}), got {tuple(weight.shape)}")
    outputs = weight.shape[0]
    check_vector("bias", bias, outputs, x)
    check_vector("gamma", gamma, outputs, x)
    check_residual(residual, outputs, x)
    check_drop_path_scale(x, drop_path_scale)


# ---- the op


class Saved(NamedTuple):
    """Saved for backward: x where a gradient reads it and the pre-activation, in the matmul dtype, and the parameters."""

    x: Tensor | None  # (..., C)
    z: Tensor | None  # (M, O), with an activation
    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    drop_path_scale: Tensor | None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    drop_path_scale: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    matmul_dtype: torch.dtype,
    save_preactivation: bool,
    *,
    saves,
):
    low = x.to(matmul_dtype)
    needs_z = save_preactivation or (saves and activation is not None)
    with without_autocast():
        out, z = launchers.linear_forward(
            low.reshape(-1, x.shape[-1]),
            weight,
            bias,
            activation=activation,
            gamma=contiguous(gamma),
            drop_path_scale=contiguous(drop_path_scale),
            residual=None if residual is None else residual.reshape(-1, weight.shape[0]).contiguous(),
            out_dtype=promoted(matmul_dtype, gamma, residual),
            needs_z=needs_z,
        )
    z = z.clone() if out is z else z
    shown, hidden = (z, None) if save_preactivation else (None, z)
    return (out.view(*x.shape[:-1], out.shape[-1]), shown), (None if low is x else low, hidden)


def _save(inputs, outputs, made, needs):
    x, weight, bias, gamma, drop_path_scale, _, activation, *_ = inputs
    low, z = made
    z = outputs[1] if z is None else z
    needs_x = needs[1] or (activation is None and needs[3])
    x = (x if low is None else low) if needs_x else None
    return Saved(x, None if activation is None else z, weight, bias, gamma, drop_path_scale)


def _backward(grads, saved, options, grad_dtypes):
    (dy, _), (x, z, weight, bias, gamma, drop_path_scale), (activation, matmul_dtype, _) = grads, saved, options
    dx_dtype, dweight_dtype, dbias_dtype, dgamma_dtype, *_ = grad_dtypes
    shape = (*dy.shape[:-1], weight.shape[1])
    rows = None if x is None else x.reshape(-1, shape[-1])
    dy = dy.reshape(-1, weight.shape[0]).contiguous()
    dx = dweight = dbias = dgamma = None
    with without_autocast():
        sum_dtype = None
        if activation is None:
            needs_sum = dbias_dtype is not None or dgamma_dtype is not None
            sum_dtype = dbias_dtype if gamma is None else torch.float32 if needs_sum else None
        g, g_sum = launchers.scale_add_backward(dy, contiguous(drop_path_scale), matmul_dtype, sum_dtype)
        if activation is not None:
            dh = g if gamma is None else launchers.fold_forward(g, None, matmul_dtype, column_scale=gamma)[0]
            needs = dict(needs_h=dgamma_dtype is not None, dbias_dtype=dbias_dtype)
            dz, h, dbias = launchers.activation_backward(dh, z, activation, **needs)
            if dgamma_dtype is not None:
                dgamma = (g.float() * h.float()).sum(0)
            if dweight_dtype is not None:
                dweight = weight_gradient(dz, rows, dweight_dtype)
            if dx_dtype is not None:
                dx = torch.mm(dz, as_dtype(weight, matmul_dtype)).view(*shape)
        else:
            if dx_dtype is not None:
                dx = torch.mm(g, launchers.fold_forward(weight, None, matmul_dtype, row_scale=gamma)[0]).view(*shape)
            dweight, dbias, dgamma = parameter_gradients(g, g_sum, rows, weight, bias, gamma, *grad_dtypes[1:4])
    input_grads = zip((dx, dweight, dbias, dgamma), grad_dtypes, strict=False)
    return *(None if dtype is None else as_dtype(grad, dtype) for grad, dtype in input_grads), None, None


def _fake(x, weight, bias, gamma, drop_path_scale, residual, activation, matmul_dtype, save_preactivation):
    out = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=promoted(matmul_dtype, gamma, residual))
    z = low = None
    if save_preactivation or activation is not None:
        z = x.new_empty((x.numel() // x.shape[-1], weight.shape[0]), dtype=matmul_dtype)
    if x.dtype != matmul_dtype:
        low = torch.empty_like(x, dtype=matmul_dtype)
    shown, hidden = (z, None) if save_preactivation else (None, z)
    return (out, shown), (low, hidden)


def _flops(x, weight, *_) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def _backward_flops(grads, saved, options, grad_dtypes) -> int:
    dx, dweight, _, dgamma, *_ = (dtype is not None for dtype in grad_dtypes)
    of_weight = dweight or (dgamma and saved.z is None)  # LayerScale's comes from the weight's without an activation
    return 2 * math.prod(grads[0][:-1]) * (dx + of_weight) * math.prod(saved.weight)


linear_unchecked = Op(
    "linear",
    outputs=("out", "z"),
    made=("low", "z"),
    saved=Saved,
    forward=_forward,
    save=_save,
    backward=_backward,
    fake=_fake,
    passed_on="residual",
    constant=("z",),
    flops=(_flops, _backward_flops),
)
