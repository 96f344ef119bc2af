"""Shared by the ops with GEMMs: dtypes of products, and gradients of weights."""

import torch
from torch import Tensor

from fastdeit.ops import launchers


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """tensor.contiguous(), or None."""
    return tensor if tensor is None else tensor.contiguous()


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), without the call where that does nothing."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def promoted(matmul_dtype: torch.dtype, *others: Tensor | None) -> torch.dtype:
    """The dtype of a product's result after arithmetic with the tensors there are."""
    for tensor in others:
        matmul_dtype = matmul_dtype if tensor is None else torch.promote_types(matmul_dtype, tensor.dtype)
    return matmul_dtype


def lacks_elements(*weights: Tensor) -> bool:
    """Whether a layer has no inputs or no outputs: there is nothing to multiply, and rows of nothing cannot be counted."""
    return any(weight.numel() == 0 for weight in weights)


# A context: in it products run in the dtypes they are given, the fp32 ones of parameters too. It costs a fifth of what
# torch.autocast(..., enabled=False) does.
without_autocast = torch._C._DisableAutocast


def weight_gradient(d_out: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """d_out^T rows, summed in fp32 and rounded once, to the weight's dtype."""
    if d_out.dtype == dtype:
        return torch.mm(d_out.t(), rows)
    return product_in_float32(d_out.t(), rows).to(dtype)


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b of lower precision with an fp32 result: of one kernel on a GPU, by way of fp32 copies on a CPU."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def parameter_gradients(
    g: Tensor,
    g_sum: Tensor | None,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    gamma_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, bias and gamma in out = gamma * (rows weight^T + bias), for those whose dtype is given.

    Gamma's comes from the weight's, so that out need not be saved. Without gamma the weight's is rounded to its dtype, from the
    product's sums; the bias's is g_sum, and otherwise they are in fp32.

    Args:
        g: (M, O), contiguous, the gradient of out.
        g_sum: its column sums (O,), where the gradient of the bias or of gamma is needed: in fp32 with gamma.
        rows: (M, K), where those of the weight or gamma are.
    """
    needs_weight, needs_bias, needs_gamma = (dtype is not None for dtype in (weight_dtype, bias_dtype, gamma_dtype))
    if gamma is None:
        return weight_gradient(g, rows, weight_dtype) if needs_weight else None, g_sum, None
    product = weight_gradient(g, rows, torch.float32) if needs_weight or needs_gamma else None
    needs = dict(needs_weight=needs_weight, needs_bias=needs_bias, needs_scale=needs_gamma)
    return launchers.fold_rows_backward(product, g_sum, weight, bias, gamma, **needs)
