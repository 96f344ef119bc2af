"""The MLP branch of a transformer block as one autograd node: LayerNorm, MLP, LayerScale, stochastic depth, residual addition.

Under autocast LayerNorm's weight and bias are folded into the first layer (`branch_ends` has the formulas).
"""

import torch
from torch import Tensor

from fastdeit import backends
from fastdeit.ops.add_layer_norm_mlp_op import GRADIENTS, Kept, end_backward
from fastdeit.ops.arguments import check_drop_path_scale, check_residual, check_vector
from fastdeit.ops.branch_ends import (
    Norm,
    end_sums,
    fake_gradients,
    fake_start,
    folds,
    in_order,
    kept_start,
    start_backward,
    start_forward,
    start_product,
    wanted_dtypes,
)
from fastdeit.ops.first_derivative import first_derivative_only
from fastdeit.ops.layer_norm_op import _dense, check_normalised, layer_norm_reference
from fastdeit.ops.layer_norm_op import why_reference as why_no_layer_norm
from fastdeit.ops.linear_op import promoted, without_autocast
from fastdeit.ops.mlp_op import _check as _check_mlp
from fastdeit.ops.mlp_op import lacks_elements, mlp_reference
from fastdeit.ops.mlp_op import why_reference as why_no_mlp


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
    lean: bool = False,
) -> Tensor:
    """residual + gamma * drop_path_scale * mlp(layer_norm(x)): the second half of a pre-norm transformer block.

    (Ba et al. 2016; Touvron et al. 2021, "Going deeper with image transformers", eq. 4, for gamma; Huang et al. 2016 for the
    factors per sample.) For backward it keeps rstd, the pre-activation, and x, or under autocast x normalised instead, in the
    dtype of the products: 10 bytes a token and channel at an MLP ratio of 4, of PyTorch's 22.

    Args:
        x: (..., C), a float dtype, any strides.
        norm_weight, norm_bias: (C,) or None.
        eps: added to the variance, >= 0.
        w1: (H, C); b1: (H,) or None; w2: (O, H); b2: (O,) or None.
        activation: as `mlp` takes it.
        gamma: (O,) or None, LayerScale.
        drop_path_scale: (x.shape[0],) float32 or None, without gradient.
        residual: (..., O) or None. Given x itself, its two gradients are added where the first is made.
        lean: compute the pre-activation again in backward rather than keep it: one more product, and of the 10 bytes 2 are left.

    Returns:
        (..., O), of the dtype that PyTorch's promotion gives the formula.

    Raises:
        TypeError: an argument is not a floating-point tensor, or weights differ from x in dtype outside autocast.
        ValueError: a shape or device does not fit, eps is negative or NaN, or activation is unknown.
    """
    check_normalised(x, norm_weight, norm_bias, eps, "norm_")
    _check_mlp(x, w1, b1, w2, b2, activation)
    _check(x, w2, gamma, drop_path_scale, residual)
    if why_reference(x) is not None or lacks_elements(w1, w2):
        options = dict(gamma=gamma, drop_path_scale=drop_path_scale, residual=residual)
        return layer_norm_mlp_reference(
            x, norm_weight, norm_bias, eps, w1, b1, w2, b2, activation=activation, **options
        )
    products = backends.product_dtype(x)
    adds_x = residual is x
    tensors = (x, norm_weight, norm_bias, w1, b1, w2, b2, gamma, drop_path_scale, None if adds_x else residual)
    differentiated = backends.wants_gradient(*tensors)
    options = (eps, activation, products, adds_x, lean or not differentiated)
    if backends.registered_path(*tensors):
        return layer_norm_mlp_forward(*tensors, *options)[0]
    return _LayerNormMlp.apply(*tensors, *options) if differentiated else _forward(*tensors, *options)[0]


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
    """What `layer_norm_mlp` means, in plain PyTorch. Run in float64 it is the oracle."""
    normed = layer_norm_reference(x, norm_weight, norm_bias, eps)
    out = mlp_reference(normed, w1, b1, w2, b2, activation=activation)
    if gamma is not None:
        out = out * gamma
    if drop_path_scale is not None:
        out = out * drop_path_scale.to(out.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    return out if residual is None else residual + out


def why_reference(x: Tensor, activation: str = "gelu") -> str | None:
    """None when `layer_norm_mlp` runs its kernels on x, else why it runs the reference."""
    return why_no_layer_norm(x) or why_no_mlp(x, activation)


def _check(x, w2, gamma, drop_path_scale, residual) -> None:
    check_vector("gamma", gamma, w2.shape[0], x)
    check_residual(residual, w2.shape[0], x)
    check_drop_path_scale(x, drop_path_scale)


# ---- the work, shared by both paths


def _forward(
    x,
    norm_weight,
    norm_bias,
    w1,
    b1,
    w2,
    b2,
    gamma,
    drop_path_scale,
    residual,
    eps,
    activation,
    products,
    adds_x,
    lean,
) -> tuple[Tensor, Kept]:
    from fastdeit.kernels.gemm.linear import linear_forward

    with without_autocast(x):
        norm = Norm(norm_weight, norm_bias, eps)
        _, rows, start = start_forward(x, None, None, norm, w1, products)
        h, z = start_product(start, rows, norm, w1, b1, activation, needs_z=not lean)
        del rows
        residual = x if adds_x else residual
        out, _ = linear_forward(
            h,
            w2,
            b2,
            gamma=_dense(gamma),
            drop_path_scale=_dense(drop_path_scale),
            residual=None if residual is None else residual.reshape(-1, w2.shape[0]).contiguous(),
            out_dtype=promoted(products, gamma, residual),
        )
    return out.view(*x.shape[:-1], out.shape[-1]), Kept(*start, z)


def _backward(
    dy,
    kept,
    norm_weight,
    norm_bias,
    w1,
    b1,
    w2,
    b2,
    gamma,
    drop_path_scale,
    eps,
    activation,
    products,
    adds_x,
    dtypes,
) -> list[Tensor | None]:
    """Gradients in the order of GRADIENTS, of which there is no branch: each in its dtype of `dtypes`, None where that is None."""
    from fastdeit.kernels.norm.residual_branch import scale_add_backward

    to = dict(zip(GRADIENTS, dtypes, strict=True))
    norm = Norm(norm_weight, norm_bias, eps)
    rows = dy.reshape(-1, w2.shape[0]).contiguous()
    with without_autocast(dy):
        g, g_sum = scale_add_backward(rows, _dense(drop_path_scale), products, end_sums(gamma, to))
        dz, dz_sum, found = end_backward(g, g_sum, kept, norm, w1, b1, w2, b2, gamma, activation, to)
        del g
        if dz is not None:
            shape = (*dy.shape[:-1], w1.shape[1])
            upstream = dy.reshape(shape) if adds_x else None
            found |= start_backward(dz, dz_sum, upstream, kept.start, None, norm, w1, shape, to)
    return in_order(found, to)


# ---- eager


class _LayerNormMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        norm_weight,
        norm_bias,
        w1,
        b1,
        w2,
        b2,
        gamma,
        drop_path_scale,
        residual,
        eps,
        activation,
        products,
        adds_x,
        lean,
    ):
        parameters = (norm_weight, norm_bias, w1, b1, w2, b2, gamma)
        out, kept = _forward(x, *parameters, drop_path_scale, residual, eps, activation, products, adds_x, lean)
        ctx.save_for_backward(*kept, *parameters, drop_path_scale)
        ctx.options = (eps, activation, products, adds_x)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, *parameters))
        ctx.residual_dtype = None if residual is None else residual.dtype
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        wanted = [dtype if need else None for dtype, need in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)]
        wanted.insert(1, None)  # the branch's
        saved = ctx.saved_tensors
        dx, _, *parameters = _backward(dy, Kept(*saved[:5]), *saved[5:], *ctx.options, wanted)
        dresidual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[9] else None
        return dx, *parameters, None, dresidual, *(None,) * 5


# ---- compiled and exported: the registered ops. An op's outputs may be neither None nor its inputs, hence the empty tensors.


@torch.library.custom_op("fastdeit::layer_norm_mlp_forward", mutates_args=())
def layer_norm_mlp_forward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gamma: Tensor | None,
    drop_path_scale: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    products: torch.dtype,
    adds_x: bool,
    lean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = (norm_weight, norm_bias, w1, b1, w2, b2, gamma)
    out, kept = _forward(x, *parameters, drop_path_scale, residual, eps, activation, products, adds_x, lean)
    return out, *(kept.rstd.new_empty(0) if t is None else t for t in kept[1:])


@layer_norm_mlp_forward.register_fake
def _(x, norm_weight, norm_bias, w1, b1, w2, b2, gamma, drop_path_scale, residual, *options):
    _, _, products, adds_x, lean = options
    rows = x.numel() // x.shape[-1]
    dtype = promoted(products, gamma, x if adds_x else residual)
    _, *start = fake_start(x, None, products, folds(products, norm_weight, norm_bias, w1))
    z = x.new_empty(0, dtype=torch.float32) if lean else x.new_empty((rows, w1.shape[0]), dtype=products)
    return x.new_empty((*x.shape[:-1], w2.shape[0]), dtype=dtype), *start, z


@torch.library.custom_op("fastdeit::layer_norm_mlp_backward", mutates_args=())
def layer_norm_mlp_backward(
    dy: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    x_hat: Tensor | None,
    rstd: Tensor,
    z: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gamma: Tensor | None,
    drop_path_scale: Tensor | None,
    eps: float,
    activation: str,
    products: torch.dtype,
    adds_x: bool,
    needs: list[bool],
    x_dtype: torch.dtype,
) -> list[Tensor]:
    parameters = (norm_weight, norm_bias, w1, b1, w2, b2, gamma)
    wanted = wanted_dtypes(needs, x_dtype, x_dtype, parameters)
    kept = Kept(x, mean, x_hat, rstd, z)
    gradients = _backward(dy, kept, *parameters, drop_path_scale, eps, activation, products, adds_x, wanted)
    return [rstd.new_empty(0) if g is None else g for g in gradients]


@layer_norm_mlp_backward.register_fake
def _(dy, x, mean, x_hat, rstd, z, norm_weight, norm_bias, w1, b1, w2, b2, gamma, *rest):
    *_, needs, x_dtype = rest
    parameters = (norm_weight, norm_bias, w1, b1, w2, b2, gamma)
    return fake_gradients(dy, (*dy.shape[:-1], w1.shape[1]), parameters, needs, x_dtype, x_dtype)


def _keep(ctx, inputs, output):
    x, *parameters, drop_path_scale, residual, eps, activation, products, adds_x, _ = inputs
    _, mean, x_hat, rstd, z = output
    ctx.mark_non_differentiable(mean, x_hat, rstd, z)
    start = kept_start(x, None, x, mean, x_hat, rstd)
    ctx.save_for_backward(*start, z if z.dim() == 2 else None, *parameters, drop_path_scale)
    ctx.options = (eps, activation, products, adds_x)
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _registered_backward(ctx, dy, *_):
    need_x, *need_parameters = ctx.needs_input_grad[:8]
    needs = [need_x, False, *need_parameters]
    gradients = layer_norm_mlp_backward(dy, *ctx.saved_tensors, *ctx.options, needs, ctx.x_dtype)
    dx, _, *parameters = (g if need else None for g, need in zip(gradients, needs, strict=True))
    dresidual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[9] else None
    return dx, *parameters, None, dresidual, *(None,) * 5


layer_norm_mlp_forward.register_autograd(_registered_backward, setup_context=_keep)
