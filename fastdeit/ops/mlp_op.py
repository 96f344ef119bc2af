"""The two-layer perceptron of a transformer block: GEMMs with what surrounds them, by the fastest backend on record."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import backends
from fastdeit.ops import launchers
from fastdeit.ops.arguments import check_beside
from fastdeit.ops.matmul import lacks_elements, weight_gradient
from fastdeit.ops.passed_calls import PassedCalls
from fastdeit.ops.registration import Op
from fastdeit.refusals import or_reference

# What timm's activation modules compute.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}


_passed = PassedCalls()


@or_reference
def mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu") -> Tensor:
    """activation(x W1^T + b1) W2^T + b2 (Vaswani et al. 2017, eq. 2, with Hendrycks and Gimpel 2016 for GELU).

    One autograd node. It saves x and the pre-activation for backward, in the matmul dtype, and computes the activation again
    there, in the kernel that also gives its gradient and b1's. Without gradients it saves nothing, and 192 channels may run in one
    kernel.

    Args:
        x: (..., C), a float dtype, any strides.
        w1: (H, C).
        b1: (H,) or None.
        w2: (O, H).
        b2: (O,) or None.
        activation: "gelu" (by erf), "gelu_tanh", "quick_gelu" (x * sigmoid(1.702 x)), "silu" or "relu".

    Returns:
        (..., O), of x's dtype, or of autocast's where that is on, as PyTorch's linear layers give.

    Raises:
        TypeError: x or a weight is not a floating-point tensor, or they differ in dtype outside autocast.
        ValueError: activation is another, or the shape or device of a weight does not fit.
    """
    tensors = (x, w1, b1, w2, b2)
    if not _passed.has(tensors, activation):
        check_mlp(*tensors, activation)
        if why_reference(x) is not None or lacks_elements(w1, w2):
            return mlp_reference(*tensors, activation=activation)
        _passed.add(tensors, activation)
    (y,) = mlp_unchecked(*tensors, activation, backends.matmul_dtype(x))
    return y


def mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu"
) -> Tensor:
    """Reference of `mlp` in plain PyTorch. In float64 it is the oracle."""
    return F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)


def why_reference(x: Tensor, activation: str = "gelu") -> str | None:
    """None when `mlp` runs its kernels on x, else why it runs the reference. Any known activation has a kernel."""
    return backends.why_reference(x, kernels=("mlp", "gemm"))


def check_mlp(x, w1, b1, w2, b2, activation) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for name, tensor in (("x", x), ("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tensor is None and name in ("b1", "b2"):
            continue
        check_beside(name, tensor, x)
        backends.check_multiplied(x, name, tensor)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., C), got a tensor without dimensions")
    columns = x.shape[-1]
    for name, weight in (("w1", w1), ("w2", w2)):
        if weight.dim() != 2 or weight.shape[1] != columns:
            raise ValueError(f"{name}: expected shape (rows, {columns}), got {tuple(weight.shape)}")
        columns = weight.shape[0]
    for name, bias, weight in (("b1", b1, w1), ("b2", b2, w2)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


# ---- the op


class Saved(NamedTuple):
    """Saved for backward: x where w1's gradient reads it and the pre-activation, in the matmul dtype, and the weights."""

    x: Tensor | None  # (..., C)
    z: Tensor  # (M, H)
    w1: Tensor
    w2: Tensor


def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    matmul_dtype: torch.dtype,
    *,
    saves,
):
    low = x.to(matmul_dtype)
    rows = low.reshape(-1, x.shape[-1])
    fused = None if saves else launchers.fused_mlp_forward(rows, w1, b1, w2, b2, activation, matmul_dtype)
    if fused is not None:
        return (fused[1].view(*x.shape),), ()
    h, z = launchers.linear_forward(rows, w1, b1, activation=activation, needs_z=saves)
    y, _ = launchers.linear_forward(h, w2, b2)
    return (y.view(*x.shape[:-1], w2.shape[0]),), (None if low is x else low, z)


def _save(inputs, outputs, made, needs):
    x, w1, _, w2, *_ = inputs
    low, z = made
    return Saved((x if low is None else low) if needs[1] else None, z, w1, w2)


def _backward(grads, saved, options, grad_dtypes):
    (dy,), (x, z, w1, w2), (activation, matmul_dtype) = grads, saved, options
    dx_dtype, dw1_dtype, db1_dtype, dw2_dtype, db2_dtype = grad_dtypes
    shape = (*dy.shape[:-1], w1.shape[1])
    dy = dy.reshape(-1, dy.shape[-1]).to(matmul_dtype)
    needs_h = dw2_dtype is not None
    dx = dw1 = db1 = dw2 = db2 = None
    if db2_dtype is not None:
        db2 = dy.sum(0, dtype=torch.float32).to(db2_dtype)
    if any(dtype is not None for dtype in (dx_dtype, dw1_dtype, db1_dtype)):
        needs = dict(needs_h=needs_h, dbias_dtype=db1_dtype)
        dz, h, db1 = launchers.activation_gradient(dy, w2.to(matmul_dtype), z, activation, **needs)
        if dw1_dtype is not None:
            dw1 = weight_gradient(dz, x.reshape(-1, shape[-1]), dw1_dtype)
        if dx_dtype is not None:
            dx = (dz @ w1.to(matmul_dtype)).view(*shape).to(dx_dtype)
    elif needs_h:
        h = launchers.activation_forward(z, activation)
    if needs_h:
        dw2 = weight_gradient(dy, h, dw2_dtype)
    return dx, dw1, db1, dw2, db2


def _fake(x, w1, b1, w2, b2, activation, matmul_dtype):
    low = None if x.dtype == matmul_dtype else torch.empty_like(x, dtype=matmul_dtype)
    z = x.new_empty((x.numel() // x.shape[-1], w1.shape[0]), dtype=matmul_dtype)
    return (x.new_empty((*x.shape[:-1], w2.shape[0]), dtype=matmul_dtype),), (low, z)


def _flops(x, w1, b1, w2, *_) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(w1) + math.prod(w2))


def _backward_flops(grads, saved, options, grad_dtypes) -> int:
    dx, dw1, db1, dw2, _ = (dtype is not None for dtype in grad_dtypes)
    of_w1, of_w2 = dx + dw1, (dx or dw1 or db1) + dw2
    return 2 * saved.z[0] * (of_w1 * math.prod(saved.w1) + of_w2 * math.prod(saved.w2))


mlp_unchecked = Op(
    "mlp",
    outputs=("y",),
    made=("low", "z"),
    saved=Saved,
    forward=_forward,
    save=_save,
    backward=_backward,
    fake=_fake,
    flops=(_flops, _backward_flops),
)
