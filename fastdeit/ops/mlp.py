"""The two-layer perceptron of a transformer block."""

import torch
import torch.nn.functional as F
from torch import Tensor

# What timm's activation modules compute.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu") -> Tensor:
    """activation(x W1^T + b1) W2^T + b2 (Vaswani et al. 2017, eq. 2, with Hendrycks and Gimpel 2016 for GELU).

    Args:
        x: (..., C), a float dtype, any strides.
        w1: (H, C); b1: (H,) or None.
        w2: (O, H); b2: (O,) or None.
        activation: "gelu" (by erf), "gelu_tanh" or "quick_gelu" (x * sigmoid(1.702 x)).

    Returns:
        (..., O), of x's dtype, or of autocast's where that is on, as PyTorch's linear layers give.

    Raises:
        TypeError: x or a weight is not a floating-point tensor.
        ValueError: activation is another, or the shape or device of a weight does not fit.
    """
    _check(x, w1, b1, w2, b2, activation)
    return mlp_reference(x, w1, b1, w2, b2, activation=activation)


def mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu"
) -> Tensor:
    """What `mlp` means, in plain PyTorch. Run in float64 it is the oracle."""
    return F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)


def why_reference(x: Tensor, activation: str = "gelu") -> str | None:
    """None when `mlp` runs its kernels on x, else why it runs the reference."""
    return "no kernel yet"


def _check(x, w1, b1, w2, b2, activation) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for name, tensor in (("x", x), ("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tensor is None and name in ("b1", "b2"):
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"{name}: expected a floating-point tensor, got {given}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x has, got {tensor.device}")
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., C), got a tensor without dimensions")
    for name, weight, columns in (("w1", w1, x.shape[-1]), ("w2", w2, w1.shape[0])):
        if weight.dim() != 2 or weight.shape[1] != columns:
            raise ValueError(f"{name}: expected shape (rows, {columns}), got {tuple(weight.shape)}")
    for name, bias, weight in (("b1", b1, w1), ("b2", b2, w2)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
