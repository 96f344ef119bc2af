"""Residual addition, LayerNorm and MLP of a pre-norm block as one autograd node; the MLP's output is left for the next to add."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit import backends
from fastdeit.ops.branch_ends import (
    Dtypes,
    Norm,
    Start,
    check_end,
    check_start,
    end_forward,
    end_parameter_gradients,
    end_sums,
    end_weight,
    fake_gradients,
    fake_start,
    folds,
    in_order,
    kept_start,
    normalised_rows,
    share_gradient,
    start_backward,
    start_forward,
    start_product,
    start_sums,
    wanted_dtypes,
)
from fastdeit.ops.first_derivative import first_derivative_only
from fastdeit.ops.layer_norm_op import _kernel_dtype, add_layer_norm_reference, layer_norm_reference
from fastdeit.ops.layer_norm_op import why_reference as why_no_layer_norm
from fastdeit.ops.linear_op import as_dtype, without_autocast
from fastdeit.ops.mlp_op import _check as _check_mlp
from fastdeit.ops.mlp_op import lacks_elements, mlp_reference

# In the order of the ops' arguments: x, branch, norm_weight, norm_bias, w1, b1, w2, b2, gamma.
GRADIENTS = ("x", "branch", "norm_weight", "norm_bias", "weight", "bias", "end_weight", "end_bias", "gamma")


def add_layer_norm_mlp(
    x: Tensor,
    branch: Tensor | None,
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
    lean: bool = False,
) -> tuple[Tensor, Tensor]:
    """The MLP's half of a pre-norm transformer block, from the addition before it to the output that is still to be added.

        x_new = x + drop_path_scale * branch
        out = gamma * mlp(layer_norm(x_new))

    (Ba et al. 2016; Touvron et al. 2021, "Going deeper with image transformers", eq. 4, for gamma; Huang et al. 2016 for the
    factors per sample.) One autograd node. For backward it keeps rstd, the pre-activation, and x_new, or under autocast with fp32
    parameters x_new normalised instead, in the dtype of the products.

    Args:
        x: (..., C), the residual stream, a float dtype, any strides.
        branch: the shape of x, a float dtype; None where nothing is to be added.
        norm_weight, norm_bias: (C,) or None.
        eps: added to the variance, >= 0.
        w1: (H, C); b1: (H,) or None; w2: (O, H); b2: (O,) or None.
        activation: as `mlp` takes it.
        gamma: (O,) or None, LayerScale. It is folded into w2, so in fp16 it must not be far below 1.
        drop_path_scale: (x.shape[0],) float32 or None, of `branch`, without gradient.
        lean: compute the pre-activation again in backward rather than keep it: one more product, and of 10 bytes a token and
            channel 2 are left at an MLP ratio of 4 under autocast.

    Returns:
        x_new (x itself without a branch), in the promoted dtype of x and branch; and out, (..., O), in the dtype of the products.

    Raises:
        TypeError: an argument is not a floating-point tensor, or weights differ from x in dtype outside autocast.
        ValueError: a shape or device does not fit, eps is negative or NaN, or activation is unknown.
    """
    check_start(x, branch, drop_path_scale, norm_weight, norm_bias, eps)
    _check_mlp(x, w1, b1, w2, b2, activation)
    check_end(x, gamma, w2)
    kernels = why_reference(x) is None and (branch is None or _kernel_dtype(branch)) and not lacks_elements(w1, w2)
    if not kernels:
        options = dict(activation=activation, gamma=gamma, drop_path_scale=drop_path_scale)
        return add_layer_norm_mlp_reference(x, branch, norm_weight, norm_bias, eps, w1, b1, w2, b2, **options)
    tensors = (x, branch, norm_weight, norm_bias, w1, b1, w2, b2, gamma, drop_path_scale)
    options, keeps = (eps, activation, backends.product_dtype(x), lean), backends.wants_gradient(*tensors)
    if backends.registered_path(*tensors):
        out, x_new, *_ = add_layer_norm_mlp_forward(*tensors, *options, keeps)
    elif keeps:
        out, x_new = _AddLayerNormMlp.apply(*tensors, *options)
    else:
        out, x_new, _ = _forward(*tensors, *options, keeps)
    return x if branch is None else x_new, out


def add_layer_norm_mlp_reference(
    x: Tensor,
    branch: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    """What `add_layer_norm_mlp` means, in plain PyTorch. Run in float64 it is the oracle."""
    if branch is None:
        x_new, normed = x, layer_norm_reference(x, norm_weight, norm_bias, eps)
    else:
        x_new, normed = add_layer_norm_reference(
            x, branch, norm_weight, norm_bias, eps, drop_path_scale=drop_path_scale
        )
    out = mlp_reference(normed, w1, b1, w2, b2, activation=activation)
    return x_new, out if gamma is None else (out * gamma).to(out.dtype)


def why_reference(x: Tensor) -> str | None:
    """None when `add_layer_norm_mlp` runs its kernels on x, else why it runs the reference."""
    return why_no_layer_norm(x)


# ---- the work, shared by both paths


class Kept(NamedTuple):
    """What backward needs of forward: a `Start` and the pre-activation."""

    x: Tensor | None
    mean: Tensor | None
    x_hat: Tensor | None  # (M, C)
    rstd: Tensor  # (M,) fp32
    z: Tensor | None  # (M, H), None where it is computed again

    @property
    def start(self) -> Start:
        return Start(*self[:4])


def _forward(
    x, branch, norm_weight, norm_bias, w1, b1, w2, b2, gamma, drop_path_scale, eps, activation, products, lean, keeps
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """out, x_new and what is to be kept for backward, if anything is."""
    from fastdeit.kernels.gemm.fused_mlp import whole_mlp_forward

    if not keeps and drop_path_scale is None:
        options = dict(norm=(norm_weight, norm_bias, eps), branch=branch, gamma=gamma)
        whole = whole_mlp_forward(x, w1, b1, w2, b2, activation, products, **options)
        if whole is not None:
            return whole[1], whole[0], None
    with without_autocast(x):
        norm = Norm(norm_weight, norm_bias, eps)
        x_new, rows, start = start_forward(x, branch, drop_path_scale, norm, w1, products, keeps)
        h, z = start_product(start, rows, norm, w1, b1, activation, needs_z=keeps and not lean)
        del rows
        out = end_forward(h, w2, b2, gamma)
    return out.view(*x.shape[:-1], out.shape[-1]), x_new, Kept(*start, z) if keeps else None


def _backward(
    dout,
    dx_new,
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
    dtypes,
) -> list[Tensor | None]:
    """Gradients in the order of GRADIENTS: each in its dtype of `dtypes`, None where that is None."""
    from fastdeit.kernels.norm.residual_branch import column_sums

    to = dict(zip(GRADIENTS, dtypes, strict=True))
    norm = Norm(norm_weight, norm_bias, eps)
    with without_autocast(dout):
        g = as_dtype(dout.reshape(-1, w2.shape[0]), products).contiguous()
        g_sum = column_sums(g, end_sums(gamma, to))
        dz, dz_sum, found = end_backward(g, g_sum, kept, norm, w1, b1, w2, b2, gamma, activation, to)
        del g
        if dz is not None:
            shape = (*dout.shape[:-1], w1.shape[1])
            found |= start_backward(dz, dz_sum, dx_new, kept.start, drop_path_scale, norm, w1, shape, to)
    return in_order(found, to)


def end_backward(
    g: Tensor,
    g_sum: Tensor | None,
    kept: Kept,
    norm: Norm,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gamma: Tensor | None,
    activation: str,
    to: Dtypes,
) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor | None]]:
    """From the gradient g (M, O) of an MLP's output, and its column sums, back to the pre-activation.

    Returns:
        dz (M, H) and its column sums (H,), each None where `start_backward` has no use for it; and the gradients by the
        names of `to`: end_weight, end_bias, gamma.
    """
    from fastdeit.kernels.gemm.linear import activation_gradient
    from fastdeit.kernels.mlp.activation import activation_forward

    start, z = kept.start, kept.z
    into_start = any(to[name] is not None for name in to.keys() - {"end_weight", "end_bias", "gamma"})
    needs_h = to["end_weight"] is not None or to["gamma"] is not None
    h = dz = dz_sum = None
    if z is None and (into_start or needs_h):
        z, _ = start_product(start, normalised_rows(start, norm, g.dtype), norm, w1, b1)
    if into_start:
        options = dict(needs_h=needs_h, dbias_dtype=start_sums(start, to))
        dz, h, dz_sum = activation_gradient(g, end_weight(w2, gamma, g.dtype), z, activation, **options)
    elif needs_h:
        h = activation_forward(z, activation)
    return dz, dz_sum, end_parameter_gradients(g, g_sum, h, w2, b2, gamma, to)


# ---- eager


class _AddLayerNormMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, branch, norm_weight, norm_bias, w1, b1, w2, b2, gamma, drop_path_scale, eps, activation, products, lean
    ):
        tensors = (x, branch, norm_weight, norm_bias, w1, b1, w2, b2, gamma)
        out, x_new, kept = _forward(*tensors, drop_path_scale, eps, activation, products, lean, keeps=True)
        ctx.save_for_backward(*kept, norm_weight, norm_bias, w1, b1, w2, b2, gamma, drop_path_scale)
        ctx.set_materialize_grads(False)
        ctx.options = (eps, activation, products)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in tensors)
        ctx.out = out.shape
        return out, x_new

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout, dx_new):
        saved, (*_, products) = ctx.saved_tensors, ctx.options
        if dout is None:
            dout = saved[3].new_zeros(ctx.out, dtype=products)
        wanted = [dtype if need else None for dtype, need in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)]
        wanted, shared = share_gradient(wanted, saved[-1])
        gradients = _backward(dout, dx_new, Kept(*saved[:5]), *saved[5:], *ctx.options, wanted)
        return gradients[0], gradients[0] if shared else gradients[1], *gradients[2:], *(None,) * 5


# ---- compiled and exported: the registered ops. An op's outputs may be neither None nor its inputs, hence the empty tensors.


@torch.library.custom_op("fastdeit::add_layer_norm_mlp_forward", mutates_args=())
def add_layer_norm_mlp_forward(
    x: Tensor,
    branch: Tensor | None,
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
    lean: bool,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (x, branch, norm_weight, norm_bias, w1, b1, w2, b2, gamma)
    out, x_new, kept = _forward(*tensors, drop_path_scale, eps, activation, products, lean, keeps)
    kept = (None,) * 4 if kept is None else kept[1:]
    return out, *(out.new_empty(0, dtype=torch.float32) if t is None else t for t in (x_new, *kept))


@add_layer_norm_mlp_forward.register_fake
def _(
    x, branch, norm_weight, norm_bias, w1, b1, w2, b2, gamma, drop_path_scale, eps, activation, products, lean, keeps
):
    out = x.new_empty((*x.shape[:-1], w2.shape[0]), dtype=products)
    x_new, *statistics = fake_start(x, branch, products, folds(products, norm_weight, norm_bias, w1))
    if not keeps:
        return out, x_new, *(x.new_empty(0, dtype=torch.float32) for _ in range(4))
    rows = x.numel() // x.shape[-1]
    z = x.new_empty(0, dtype=torch.float32) if lean else x.new_empty((rows, w1.shape[0]), dtype=products)
    return out, x_new, *statistics, z


@torch.library.custom_op("fastdeit::add_layer_norm_mlp_backward", mutates_args=())
def add_layer_norm_mlp_backward(
    dout: Tensor,
    dx_new: Tensor | None,
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
    needs: list[bool],
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> list[Tensor]:
    parameters = (norm_weight, norm_bias, w1, b1, w2, b2, gamma)
    wanted = wanted_dtypes(needs, x_dtype, branch_dtype, parameters)
    kept = Kept(x, mean, x_hat, rstd, z)
    gradients = _backward(dout, dx_new, kept, *parameters, drop_path_scale, eps, activation, products, wanted)
    return [rstd.new_empty(0) if g is None else g for g in gradients]


@add_layer_norm_mlp_backward.register_fake
def _(dout, dx_new, x, mean, x_hat, rstd, z, norm_weight, norm_bias, w1, b1, w2, b2, gamma, *rest):
    *_, needs, x_dtype, branch_dtype = rest
    parameters = (norm_weight, norm_bias, w1, b1, w2, b2, gamma)
    return fake_gradients(dout, (*dout.shape[:-1], w1.shape[1]), parameters, needs, x_dtype, branch_dtype)


def _keep(ctx, inputs, output):
    x, branch, *parameters, drop_path_scale, eps, activation, products, _, keeps = inputs
    _, x_new, mean, x_hat, rstd, z = output
    ctx.mark_non_differentiable(mean, x_hat, rstd, z)
    start = kept_start(x, branch, x_new, mean, x_hat, rstd)
    ctx.save_for_backward(*start, z if z.dim() == 2 else None, *parameters, drop_path_scale)
    ctx.options = (eps, activation, products)
    ctx.added, ctx.kept = branch is not None, keeps
    ctx.dtypes = (x.dtype, branch.dtype if ctx.added else x.dtype)


def _registered_backward(ctx, dout, dx_new, *_):
    needs, saved = list(ctx.needs_input_grad[:9]), ctx.saved_tensors
    if not ctx.kept:  # exported without gradients, and trained nevertheless
        x, *parameters = saved[0], *saved[5:12]
        again = add_layer_norm_mlp_forward(x, None, *parameters, None, *ctx.options, lean=True, keeps=True)
        saved = (*kept_start(x, None, None, *again[2:5]), *saved[4:])
    dx_new = dx_new if ctx.added else None
    gradients = add_layer_norm_mlp_backward(dout, dx_new, *saved, *ctx.options, needs, *ctx.dtypes)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 6


add_layer_norm_mlp_forward.register_autograd(_registered_backward, setup_context=_keep)
