"""A linear layer and what follows it in a transformer block, by the fastest backend that is known."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import backends
from fastdeit.ops.arguments import check_beside, check_drop_path_scale, check_residual, check_vector
from fastdeit.ops.first_derivative import first_derivative_only
from fastdeit.ops.layer_norm_op import _dense
from fastdeit.ops.mlp_op import ACTIVATIONS, _weight_gradient, lacks_elements

_GRADIENTS = ("x", "weight", "bias", "gamma")


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
        weight: (O, C); bias: (O,) or None.
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
    _check(x, weight, bias, activation, residual, gamma, drop_path_scale)
    options = dict(activation=activation, residual=residual, gamma=gamma, drop_path_scale=drop_path_scale)
    if why_reference(x) is not None or lacks_elements(weight):
        return linear_reference(x, weight, bias, **options, save_preactivation=save_preactivation)
    tensors = (x, weight, bias, gamma, drop_path_scale, residual)
    keeps = backends.wants_gradient(*tensors)
    rest = (activation, backends.product_dtype(x), save_preactivation or (keeps and activation is not None))
    if backends.registered_path(*tensors):
        out, z = linear_forward(*tensors, *rest)
    else:
        out, z = _LinearFunction.apply(*tensors, *rest) if keeps else _forward(*tensors, *rest)
    return (out, z.view(out.shape)) if save_preactivation else out


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
    """What `linear` means, in plain PyTorch. Run in float64 it is the oracle."""
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
    return backends.why_reference(x)


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


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """In it products run in the dtypes they are given, the fp32 ones of parameters too."""
    # A fifth of what torch.autocast(..., enabled=False) costs.
    return torch._C._DisableAutocast() if torch.is_autocast_enabled(x.device.type) else contextlib.nullcontext()


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), without the call where that does nothing."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def promoted(products: torch.dtype, *others: Tensor | None) -> torch.dtype:
    """The dtype of a product's result after arithmetic with the tensors there are."""
    for tensor in others:
        products = products if tensor is None else torch.promote_types(products, tensor.dtype)
    return products


# ---- the work, shared by both paths


def _forward(x, weight, bias, gamma, drop_path_scale, residual, activation, products, save) -> tuple[Tensor, Tensor]:
    """(..., O) and the pre-activation (M, O), or in its place an empty tensor where neither backward nor the caller reads it."""
    from fastdeit.kernels.gemm.linear import linear_forward as forward

    with without_autocast(x):
        out, z = forward(
            x.reshape(-1, x.shape[-1]).to(products),
            weight,
            bias,
            activation=activation,
            gamma=_dense(gamma),
            drop_path_scale=_dense(drop_path_scale),
            residual=None if residual is None else residual.reshape(-1, weight.shape[0]).contiguous(),
            out_dtype=promoted(products, gamma, residual),
            needs_z=save,
        )
    if z is None:
        z = out.new_empty(0, dtype=products)
    elif out is z:
        z = z.clone()
    return out.view(*x.shape[:-1], out.shape[-1]), z


def _backward(
    dy, x, z, weight, bias, gamma, drop_path_scale, activation, products, dtypes
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of _GRADIENTS: each in its dtype of `dtypes`, None where that is None."""
    from fastdeit.kernels.gemm.folded_weights import fold_forward
    from fastdeit.kernels.mlp.activation import activation_backward
    from fastdeit.kernels.norm.residual_branch import scale_add_backward

    to = dict(zip(_GRADIENTS, dtypes, strict=True))
    needs = {name for name, dtype in to.items() if dtype is not None}
    found: dict[str, Tensor] = {}
    shape = (*dy.shape[:-1], weight.shape[1])
    rows = None if x is None else x.reshape(-1, shape[-1]).to(products)
    dy = dy.reshape(-1, weight.shape[0]).contiguous()
    with without_autocast(dy):
        sums = None
        if activation is None:
            sums = to["bias"] if gamma is None else torch.float32 if needs & {"bias", "gamma"} else None
        g, g_sum = scale_add_backward(dy, _dense(drop_path_scale), products, sums)
        if activation is not None:
            dh = g if gamma is None else fold_forward(g, None, products, column_scale=gamma)[0]
            options = dict(needs_h="gamma" in needs, dbias_dtype=to["bias"])
            dz, h, found["bias"] = activation_backward(dh, z, activation, **options)
            if "gamma" in needs:
                found["gamma"] = (g.float() * h.float()).sum(0)
            if "weight" in needs:
                found["weight"] = _weight_gradient(dz, rows, to["weight"])
            if "x" in needs:
                found["x"] = torch.mm(dz, as_dtype(weight, products))
        else:
            if "x" in needs:
                found["x"] = torch.mm(g, fold_forward(weight, None, products, row_scale=gamma)[0])
            given = (g, g_sum, rows, weight, bias, gamma)
            wanted = [to[name] for name in ("weight", "bias", "gamma")]
            found["weight"], found["bias"], found["gamma"] = parameter_gradients(*given, *wanted)
        if "x" in needs:
            found["x"] = found["x"].view(shape)
    return tuple(as_dtype(found[name], to[name]) if name in needs else None for name in _GRADIENTS)


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

    Gamma's comes from the weight's, so that out need not be kept. Without gamma the weight's is rounded to its dtype, from the
    product's sums; the bias's is g_sum, and otherwise they are in fp32.

    Args:
        g: (M, O), contiguous, the gradient of out.
        g_sum: its column sums (O,), where the gradient of the bias or of gamma is wanted: in fp32 with gamma.
        rows: (M, K), where those of the weight or gamma are.
    """
    from fastdeit.kernels.gemm.folded_weights import fold_rows_backward

    needs_weight, needs_bias, needs_gamma = (dtype is not None for dtype in (weight_dtype, bias_dtype, gamma_dtype))
    if gamma is None:
        return _weight_gradient(g, rows, weight_dtype) if needs_weight else None, g_sum, None
    product = _weight_gradient(g, rows, torch.float32) if needs_weight or needs_gamma else None
    needs = dict(needs_weight=needs_weight, needs_bias=needs_bias, needs_scale=needs_gamma)
    return fold_rows_backward(product, g_sum, weight, bias, gamma, **needs)


# ---- eager


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gamma, drop_path_scale, residual, activation, products, save):
        dtypes = tuple(None if t is None else t.dtype for t in (x, weight, bias, gamma))
        keep_x = ctx.needs_input_grad[1] or (activation is None and ctx.needs_input_grad[3])
        x = x.to(products)  # kept in the dtype of the product
        out, z = _forward(x, weight, bias, gamma, drop_path_scale, residual, activation, products, save)
        kept = z if activation is not None else None
        ctx.save_for_backward(x if keep_x else None, kept, weight, bias, gamma, drop_path_scale)
        ctx.mark_non_differentiable(z)
        ctx.options, ctx.dtypes = (activation, products), dtypes
        ctx.residual_dtype = None if residual is None else residual.dtype
        return out, z

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy, _):
        wanted = [dtype if need else None for dtype, need in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)]
        gradients = _backward(dy, *ctx.saved_tensors, *ctx.options, wanted)
        dresidual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None
        return *gradients, None, dresidual, None, None, None


# ---- compiled and exported: the registered ops


@torch.library.custom_op("fastdeit::linear_forward", mutates_args=())
def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    drop_path_scale: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    products: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, bias, gamma, drop_path_scale, residual, activation, products, save)


@linear_forward.register_fake
def _(x, weight, bias, gamma, drop_path_scale, residual, activation, products, save):
    out = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=promoted(products, gamma, residual))
    rows = x.numel() // x.shape[-1]
    return out, x.new_empty((rows, weight.shape[0]) if save else 0, dtype=products)


@torch.library.custom_op("fastdeit::linear_backward", mutates_args=())
def linear_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    drop_path_scale: Tensor | None,
    activation: str | None,
    products: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    wanted = [
        t.dtype if need and t is not None else None for t, need in zip((x, weight, bias, gamma), needs, strict=True)
    ]
    gradients = _backward(dy, x, z, weight, bias, gamma, drop_path_scale, activation, products, wanted)
    return [dy.new_empty(0) if g is None else g for g in gradients]


@linear_backward.register_fake
def _(dy, x, z, weight, bias, gamma, drop_path_scale, activation, products, needs):
    given = zip((x, weight, bias, gamma), needs, strict=True)
    return [dy.new_empty(t.shape, dtype=t.dtype) if need and t is not None else dy.new_empty(0) for t, need in given]


def _keep(ctx, inputs, output):
    x, weight, bias, gamma, drop_path_scale, residual, activation, products, _ = inputs
    z = output[1]
    ctx.mark_non_differentiable(z)
    ctx.save_for_backward(x, z if activation is not None else None, weight, bias, gamma, drop_path_scale)
    ctx.options = (activation, products)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _registered_backward(ctx, dy, _):
    needs = list(ctx.needs_input_grad[:4])
    gradients = linear_backward(dy, *ctx.saved_tensors, *ctx.options, needs)
    present = (g if need else None for g, need in zip(gradients, needs, strict=True))
    dresidual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None
    return *present, None, dresidual, None, None, None


linear_forward.register_autograd(_registered_backward, setup_context=_keep)
