"""LayerNorm, alone and with the residual addition before it."""

import math

import torch
from torch import Tensor

from fastdeit import backends
from fastdeit.ops.arguments import check_beside, check_drop_path_scale, check_float, check_vector
from fastdeit.ops.first_derivative import first_derivative_only

MAX_CHANNELS = 8192  # the longest row that the kernels hold in registers


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Layer normalisation over the last dimension (Ba, Kiros and Hinton 2016, eq. 4).

    Args:
        x: (..., C), a float dtype, any strides.
        weight, bias: (C,) or None, a float dtype.
        eps: added to the variance, >= 0.
        out_dtype: dtype of the result; by default float32 under CUDA autocast, as PyTorch gives, else x's.

    Returns:
        (..., C). Statistics are float32 (float64 for float64 input) whatever the dtypes.

    Raises:
        TypeError: x, weight or bias is not a floating-point tensor, or out_dtype is not a floating-point dtype.
        ValueError: the shape or device of weight or bias does not fit x, x has no dimension, or eps is negative or NaN.
    """
    check_normalised(x, weight, bias, eps)
    _check_out_dtype(out_dtype)
    if why_reference(x) is not None:
        return layer_norm_reference(x, weight, bias, eps, out_dtype=out_dtype)
    out_dtype = out_dtype or _default_out_dtype(x)
    if backends.registered_path(x, weight, bias):
        return layer_norm_forward(x, weight, bias, eps, out_dtype)[0]
    if backends.wants_gradient(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, eps, out_dtype)
    return _launch_forward(x, weight, bias, eps, out_dtype, keep_statistics=False)[1]


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
        weight, bias, eps, out_dtype: as in `layer_norm`.
        gamma: (C,), LayerScale (Touvron et al. 2021, eq. 1), or None.
        drop_path_scale: (x.shape[0],) float32, stochastic depth's factor per sample, 0 or 1/keep, or None. It has no gradient.

    Returns:
        x_new in the promoted dtype of x and branch, and normed.

    Raises:
        TypeError, ValueError: as `layer_norm`, for branch, gamma and drop_path_scale too.
    """
    check_normalised(x, weight, bias, eps)
    _check_out_dtype(out_dtype)
    check_branch(x, branch, drop_path_scale)
    check_vector("gamma", gamma, x.shape[-1], x)
    if why_reference(x) is not None or not _kernel_dtype(branch):
        return add_layer_norm_reference(
            x, branch, weight, bias, eps, gamma=gamma, drop_path_scale=drop_path_scale, out_dtype=out_dtype
        )
    out_dtype = out_dtype or _default_out_dtype(torch.promote_types(x.dtype, branch.dtype), x)
    args = (x, branch, weight, bias, gamma, drop_path_scale, eps, out_dtype)
    if backends.registered_path(x, branch, weight, bias, gamma, drop_path_scale):
        return add_layer_norm_forward(*args)[:2]
    if backends.wants_gradient(x, branch, weight, bias, gamma):
        return _AddLayerNorm.apply(*args)
    return _launch_add_forward(*args, keep_statistics=False)[:2]


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """What `layer_norm` means, in plain PyTorch. Run in float64 it is the oracle."""
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
    """What `add_layer_norm` means, in plain PyTorch."""
    stream = torch.promote_types(x.dtype, branch.dtype)
    if gamma is not None:
        branch = branch * gamma
    if drop_path_scale is not None:
        branch = branch * drop_path_scale.to(branch.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    x_new = (x + branch).to(stream)
    return x_new, layer_norm_reference(x_new, weight, bias, eps, out_dtype=out_dtype)


def why_reference(x: Tensor) -> str | None:
    """None when `layer_norm` and `add_layer_norm` run their kernels on x, else why they run the reference."""
    channels = x.shape[-1]
    if channels > MAX_CHANNELS:
        return f"{channels} channels are more than the kernel's {MAX_CHANNELS}"
    if channels == 0:
        return "no channels"
    return backends.why_reference(x)


def _kernel_dtype(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _default_out_dtype(x: Tensor | torch.dtype, device_of: Tensor | None = None) -> torch.dtype:
    dtype, tensor = (x.dtype, x) if device_of is None else (x, device_of)
    return torch.float32 if tensor.is_cuda and torch.is_autocast_enabled("cuda") else dtype


# ---- argument checks


def check_normalised(x, weight, bias, eps, prefix: str = "") -> None:
    """What LayerNorm asks of x and of its parameters, whose arguments' names begin with prefix."""
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., C), got a tensor without dimensions")
    check_vector(f"{prefix}weight", weight, x.shape[-1], x)
    check_vector(f"{prefix}bias", bias, x.shape[-1], x)
    if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymFloat)):  # compiled code can hold a symbol
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite value >= 0, got {eps}")


def check_branch(x, branch, drop_path_scale) -> None:
    """What is added to x."""
    check_beside("branch", branch, x)
    if branch.shape != x.shape:
        raise ValueError(f"branch: expected the shape of x {tuple(x.shape)}, got {tuple(branch.shape)}")
    check_drop_path_scale(x, drop_path_scale)


def _check_out_dtype(out_dtype) -> None:
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise TypeError(f"out_dtype: expected a floating-point dtype or None, got {out_dtype}")


# ---- the launches, shared by both paths; the kernels are imported here so that importing fastdeit does not import Triton


def _launch_forward(x, weight, bias, eps, out_dtype, **kwargs):
    from fastdeit.kernels.norm.layer_norm import layer_norm_forward

    return layer_norm_forward(x, _dense(weight), _dense(bias), eps, out_dtype, **kwargs)


def _launch_add_forward(x, branch, weight, bias, gamma, drop_path_scale, eps, out_dtype, **kwargs):
    kwargs |= dict(branch=branch, gamma=_dense(gamma), drop_path_scale=_dense(drop_path_scale))
    return _launch_forward(x, weight, bias, eps, out_dtype, **kwargs)


def _launch_backward(*args, **kwargs):
    from fastdeit.kernels.norm.layer_norm import layer_norm_backward

    return layer_norm_backward(*args, **kwargs)


def _dense(parameter):
    return parameter if parameter is None else parameter.contiguous()


def _wanted(tensor: Tensor | None, needed: bool) -> torch.dtype | None:
    """The dtype of a tensor's gradient where one is needed, as the launcher takes it."""
    return tensor.dtype if needed and tensor is not None else None


# ---- eager: autograd straight onto the launchers


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, out_dtype):
        _, y, mean, rstd = _launch_forward(x, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        x, mean, rstd, weight = ctx.saved_tensors
        dx, _, dweight, dbias, _ = _launch_backward(
            *(dy, x, mean, rstd, _dense(weight)),
            dx_dtype=_wanted(x, ctx.needs_input_grad[0]),
            dweight_dtype=_wanted(weight, ctx.needs_input_grad[1]),
            dbias_dtype=ctx.bias_dtype if ctx.needs_input_grad[2] else None,
        )
        return dx, dweight, dbias, None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, weight, bias, gamma, drop_path_scale, eps, out_dtype):
        x_new, y, mean, rstd = _launch_add_forward(x, branch, weight, bias, gamma, drop_path_scale, eps, out_dtype)
        keep_branch = gamma is not None and ctx.needs_input_grad[4]
        ctx.save_for_backward(x_new, mean, rstd, weight, gamma, drop_path_scale, branch if keep_branch else None)
        ctx.set_materialize_grads(False)
        ctx.dtypes = (x.dtype, branch.dtype, *(None if p is None else p.dtype for p in (weight, bias, gamma)))
        ctx.out_dtype = out_dtype
        return x_new, y

    @staticmethod
    @first_derivative_only
    def backward(ctx, dx_new, dy):
        x_new, mean, rstd, weight, gamma, drop_path_scale, branch = ctx.saved_tensors
        wanted = [dtype if need else None for dtype, need in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)]
        if dy is None:
            dy = torch.zeros_like(x_new, dtype=ctx.out_dtype)
        gradients = _add_backward(dx_new, dy, x_new, mean, rstd, weight, gamma, drop_path_scale, branch, wanted)
        return *gradients, None, None, None


def _add_backward(dx_new, dy, x_new, mean, rstd, weight, gamma, drop_path_scale, branch, wanted):
    """Gradients of x, branch, weight, bias and gamma. Unscaled and of one dtype, those of x and branch are one tensor."""
    dx_dtype, dbranch_dtype, *parameter_dtypes = wanted
    shared = dx_dtype == dbranch_dtype and gamma is None and drop_path_scale is None
    dx, dbranch, *parameters = _launch_backward(
        *(dy, x_new, mean, rstd, _dense(weight)),
        dx_new=dx_new,
        branch=branch,
        gamma=_dense(gamma),
        drop_path_scale=_dense(drop_path_scale),
        dx_dtype=dx_dtype,
        dbranch_dtype=None if shared else dbranch_dtype,
        **dict(zip(("dweight_dtype", "dbias_dtype", "dgamma_dtype"), parameter_dtypes, strict=True)),
    )
    return dx, dx if shared else dbranch, *parameters


# ---- compiled and exported: the registered ops. An op's outputs may be neither None nor each other, hence the empty tensors.


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op("fastdeit::layer_norm_forward", mutates_args=())
def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_forward(x, weight, bias, eps, out_dtype)[1:]


@layer_norm_forward.register_fake
def _(x, weight, bias, eps, out_dtype):
    rows = x.numel() // x.shape[-1]
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    return y, x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("fastdeit::add_layer_norm_forward", mutates_args=())
def add_layer_norm_forward(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    drop_path_scale: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch_add_forward(x, branch, weight, bias, gamma, drop_path_scale, eps, out_dtype)


@add_layer_norm_forward.register_fake
def _(x, branch, weight, bias, gamma, drop_path_scale, eps, out_dtype):
    x_new = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device)
    return x_new, *torch.ops.fastdeit.layer_norm_forward(x, weight, bias, eps, out_dtype)


@torch.library.custom_op("fastdeit::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    dy: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    gamma: Tensor | None,
    drop_path_scale: Tensor | None,
    branch: Tensor | None,
    dx_dtype: torch.dtype | None,
    dbranch_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    dgamma_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _launch_backward(
        *(dy, x, mean, rstd, _dense(weight)),
        dx_new=dx_new,
        branch=branch,
        gamma=_dense(gamma),
        drop_path_scale=_dense(drop_path_scale),
        dx_dtype=dx_dtype,
        dbranch_dtype=dbranch_dtype,
        dweight_dtype=dweight_dtype,
        dbias_dtype=dbias_dtype,
        dgamma_dtype=dgamma_dtype,
    )
    return tuple(_or_empty(gradient, mean) for gradient in gradients)


@layer_norm_backward.register_fake
def _(dy, dx_new, x, mean, rstd, weight, gamma, drop_path_scale, branch, *dtypes):
    sizes = (x.shape, x.shape, *(x.shape[-1:],) * 3)
    return tuple(
        mean.new_empty(0) if dtype is None else torch.empty(size, dtype=dtype, device=x.device)
        for size, dtype in zip(sizes, dtypes, strict=True)
    )


def _keep_for_layer_norm(ctx, inputs, output):
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _registered_layer_norm_backward(ctx, dy, *_):
    x, mean, rstd, weight = ctx.saved_tensors
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    wanted = (
        *(_wanted(x, need_x), None, _wanted(weight, need_weight)),
        *(ctx.bias_dtype if need_bias else None, None),
    )
    gradients = layer_norm_backward(dy, None, x, mean, rstd, weight, None, None, None, *wanted)
    dx, _, dweight, dbias, _ = _present(gradients, wanted)
    return dx, dweight, dbias, None, None


def _keep_for_add_layer_norm(ctx, inputs, output):
    x, branch, weight, bias, gamma, drop_path_scale, _, _ = inputs
    x_new, _, mean, rstd = output
    keep_branch = gamma is not None and ctx.needs_input_grad[4]
    ctx.save_for_backward(x_new, mean, rstd, weight, gamma, drop_path_scale, branch if keep_branch else None)
    ctx.dtypes = (x.dtype, branch.dtype, *(None if p is None else p.dtype for p in (weight, bias, gamma)))
    ctx.mark_non_differentiable(mean, rstd)


def _registered_add_layer_norm_backward(ctx, dx_new, dy, *_):
    x_new, mean, rstd, weight, gamma, drop_path_scale, branch = ctx.saved_tensors
    wanted = [dtype if need else None for dtype, need in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)]
    gradients = layer_norm_backward(dy, dx_new, x_new, mean, rstd, weight, gamma, drop_path_scale, branch, *wanted)
    return *_present(gradients, wanted), None, None, None


def _present(gradients, wanted):
    return (g if dtype is not None else None for g, dtype in zip(gradients, wanted, strict=True))


layer_norm_forward.register_autograd(_registered_layer_norm_backward, setup_context=_keep_for_layer_norm)
add_layer_norm_forward.register_autograd(_registered_add_layer_norm_backward, setup_context=_keep_for_add_layer_norm)
