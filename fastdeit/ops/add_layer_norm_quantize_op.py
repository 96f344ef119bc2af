"""LayerNorm to 8 bits with a scale for each token, and the residual addition before it. There is no gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import backends
from fastdeit.ops import launchers
from fastdeit.ops.arguments import check_vector
from fastdeit.ops.layer_norm_op import MAX_CHANNELS, check_branch, check_normalised
from fastdeit.ops.matmul import contiguous
from fastdeit.ops.quantized_formats import check_format, quantize_rows_reference, why_no_format
from fastdeit.refusals import or_reference


@or_reference
def add_layer_norm_quantize(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_layer_norm` with an 8-bit result and a scale per token: the token's largest magnitude over the format's.

        x_new = x + gamma * branch
        q, scale = quantized(layer_norm(x_new, weight, bias, eps))

    Args:
        x: (..., C), the residual stream, a float dtype, any strides.
        branch: the shape of x, or None.
        weight: (C,) or None. It may contain SmoothQuant's factors (Xiao et al. 2023, eq. 3).
        bias: (C,) or None.
        eps: added to the variance, >= 0.
        gamma: (C,), LayerScale, or None.
        dtype: torch.float8_e4m3fn, or torch.int8 from -127 to 127.

    Returns:
        x_new in the promoted dtype of x and branch (x itself without a branch), q (..., C), and scale (...) float32, so that
        q * scale is the normalised token. A token with a NaN or an infinity has a NaN for its scale.

    Raises:
        TypeError: x, branch, weight, bias or gamma is not a floating-point tensor, or dtype is another.
        ValueError: a shape or device does not fit x, or eps is negative or not finite.
    """
    check_normalised(x, weight, bias, eps)
    check_vector("gamma", gamma, x.shape[-1], x)
    check_format("dtype", dtype)
    if branch is not None:
        check_branch(x, branch, None)
    if why_reference(x, dtype) is not None:
        return add_layer_norm_quantize_reference(x, branch, weight, bias, eps, gamma=gamma, dtype=dtype)
    made = (_registered if backends.registered_path(x, branch) else _launched)(
        x, branch, weight, bias, gamma, eps, dtype
    )
    return (x if branch is None else made[0], *made[1:])


def add_layer_norm_quantize_reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `add_layer_norm_quantize` in plain PyTorch. In float64 it is the oracle."""
    if branch is not None:
        stream = torch.promote_types(x.dtype, branch.dtype)
        wide = torch.promote_types(stream, torch.float32)
        added = branch.to(wide) if gamma is None else branch.to(wide) * gamma.to(wide)
        x = (x.to(wide) + added).to(stream)
    rows = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = (p if p is None else p.to(rows.dtype) for p in (weight, bias))
    q, scale = quantize_rows_reference(F.layer_norm(rows, rows.shape[-1:], weight, bias, eps), dtype)
    return x, q, scale


def why_reference(x: Tensor, dtype: torch.dtype) -> str | None:
    """None when `add_layer_norm_quantize` runs its kernel on x, else why it runs the reference."""
    if not 0 < x.shape[-1] <= MAX_CHANNELS:
        return backends.refuse(f"{x.shape[-1]} channels, of which the kernel takes 1 to {MAX_CHANNELS}")
    return why_no_format(x, dtype) or backends.why_reference(x, kernels=("quantization",))


def _launched(x, branch, weight, bias, gamma, eps, dtype):
    given = map(contiguous, (x, branch, gamma, weight, bias))
    return launchers.layer_norm_quantize(*given, eps, dtype)


@torch.library.custom_op("fastdeit::add_layer_norm_quantize", mutates_args=())
def _registered(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    x_new, q, scale = _launched(x, branch, weight, bias, gamma, eps, dtype)
    return x.new_empty(0) if x_new is None else x_new, q, scale


@_registered.register_fake
def _(x, branch, weight, bias, gamma, eps, dtype):
    stream = (
        x.new_empty(0) if branch is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    )
    return stream, x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
