"""The MLP branch of a transformer block: LayerNorm, MLP, LayerScale, stochastic depth, residual addition."""

from torch import Tensor

from fastdeit import backends
from fastdeit.ops.add_layer_norm_mlp_op import add_layer_norm_mlp_unchecked, why_reference
from fastdeit.ops.arguments import (
    check_drop_path_scale,
    check_recompute,
    check_residual,
    check_vector,
    instead_of_lean,
)
from fastdeit.ops.layer_norm_op import check_normalised, layer_norm_reference
from fastdeit.ops.matmul import as_dtype, lacks_elements, promoted
from fastdeit.ops.mlp_op import check_mlp, mlp_reference
from fastdeit.ops.passed_calls import PassedCalls
from fastdeit.refusals import or_reference

_passed = PassedCalls()


@or_reference
def layer_norm_mlp(
    x: Tensor,
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
    residual: Tensor | None = None,
    recompute: str | None = None,
    lean: bool | None = None,
) -> Tensor:
    """residual + gamma * drop_path_scale * mlp(layer_norm(x)): the second half of a pre-norm transformer block.

    (Ba et al. 2016; Touvron et al. 2021, "Going deeper with image transformers", eq. 4, for gamma; Huang et al. 2016 for the
    factors per sample.) It calls `add_layer_norm_mlp` without a branch. For backward it saves rstd, the pre-activation, and x, or
    under autocast x normalised instead, in the matmul dtype: 10 bytes per token and channel at an MLP ratio of 4, of PyTorch's 22.

    Args:
        x: (..., C), a float dtype, any strides.
        norm_weight: (C,) or None.
        norm_bias: (C,) or None.
        eps: added to the variance, >= 0.
        w1: (H, C).
        b1: (H,) or None.
        w2: (O, H).
        b2: (O,) or None.
        activation: as `mlp` takes it.
        gamma: (O,) or None, LayerScale. It is folded into w2, so in fp16 it must not be far below 1.
        drop_path_scale: (x.shape[0],) float32 or None, without gradient.
        residual: (..., O) or None.
        recompute: None, or "preactivation": backward recomputes the pre-activation, which is then not saved. This takes one more
            GEMM and saves 2 of the 10 bytes.
        lean: deprecated; True is recompute="preactivation".

    Returns:
        (..., O), of the dtype that PyTorch's promotion gives the formula.

    Raises:
        TypeError: an argument is not a floating-point tensor, or weights differ from x in dtype outside autocast.
        ValueError: a shape or device does not fit, eps is negative or NaN, or activation or recompute is unknown.
    """
    if lean is not None:
        recompute = instead_of_lean(lean)
    tensors = (x, None, norm_weight, norm_bias, w1, b1, w2, b2, gamma, *(None,) * 3)
    given = ((*tensors, drop_path_scale, residual), eps, activation, recompute)
    if not _passed.has(*given):
        check_normalised(x, norm_weight, norm_bias, eps, "norm_")
        check_mlp(x, w1, b1, w2, b2, activation)
        _check(x, w2, gamma, drop_path_scale, residual)
        check_recompute(recompute)
        if why_reference(x) is not None or lacks_elements(w1, w2):
            options = dict(activation=activation, gamma=gamma, drop_path_scale=drop_path_scale, residual=residual)
            return layer_norm_mlp_reference(x, norm_weight, norm_bias, eps, w1, b1, w2, b2, **options)
        _passed.add(*given)
    matmul_dtype = backends.matmul_dtype(x)
    out, _ = add_layer_norm_mlp_unchecked(*tensors, eps, activation, matmul_dtype, recompute, None, None)
    return _added(as_dtype(out, promoted(out.dtype, gamma)), drop_path_scale, residual)


def layer_norm_mlp_reference(
    x: Tensor,
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
    residual: Tensor | None = None,
) -> Tensor:
    """Reference of `layer_norm_mlp` in plain PyTorch. In float64 it is the oracle."""
    normed = layer_norm_reference(x, norm_weight, norm_bias, eps)
    out = mlp_reference(normed, w1, b1, w2, b2, activation=activation)
    if gamma is not None:
        out = out * gamma
    return _added(out, drop_path_scale, residual)


def _added(out: Tensor, drop_path_scale: Tensor | None, residual: Tensor | None) -> Tensor:
    if drop_path_scale is not None:
        out = out * drop_path_scale.to(out.dtype).reshape(-1, *(1,) * (out.dim() - 1))
    return out if residual is None else residual + out


def _check(x, w2, gamma, drop_path_scale, residual) -> None:
    check_vector("gamma", gamma, w2.shape[0], x)
    check_residual(residual, w2.shape[0], x)
    check_drop_path_scale(x, drop_path_scale)
