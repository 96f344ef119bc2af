"""Residual addition, LayerNorm and attention of a pre-norm block as one autograd node; its output is left for the next to add."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import backends
from fastdeit.ops import attention_op
from fastdeit.ops.arguments import check_beside
from fastdeit.ops.branch_ends import (
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
from fastdeit.ops.mlp_op import lacks_elements

# In the order of the ops' arguments: x, branch, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma.
_GRADIENTS = ("x", "branch", "norm_weight", "norm_bias", "weight", "bias", "end_weight", "end_bias", "gamma")


def add_layer_norm_attention(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    *,
    gamma: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention's half of a pre-norm transformer block, from the addition before it to the output that is still to be added.

        x_new = x + drop_path_scale * branch
        out = gamma * proj(attention(qkv(layer_norm(x_new))))

    (Vaswani et al. 2017, section 3.2.2; gamma and the factors per sample as in `add_layer_norm_mlp`.) One autograd node. For
    backward it keeps the packed qkv, the attention's output and log-sum-exp, rstd, and x_new, or under autocast with fp32
    parameters x_new normalised instead, in the dtype of the products.

    Args:
        x: (B, N, C), the residual stream, a float dtype, any strides.
        branch: the shape of x, a float dtype; None where nothing is to be added.
        norm_weight, norm_bias: (C,) or None.
        eps: added to the variance, >= 0.
        qkv_weight: (3 * H * D, C); qkv_bias: (3 * H * D,) or None.
        proj_weight: (O, H * D); proj_bias: (O,) or None.
        num_heads: H.
        gamma: (O,) or None, LayerScale. It is folded into proj_weight, so in fp16 it must not be far below 1.
        drop_path_scale: (B,) float32 or None, of `branch`, without gradient.

    Returns:
        x_new (x itself without a branch), in the promoted dtype of x and branch; and out, (B, N, O), in the dtype of the products.

    Raises:
        TypeError: an argument is not a floating-point tensor, weights differ from x in dtype outside autocast, or num_heads is
            no int.
        ValueError: a shape or device does not fit, or eps is negative or NaN.
    """
    check_start(x, branch, drop_path_scale, norm_weight, norm_bias, eps)
    _check(x, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads)
    check_end(x, gamma, proj_weight)
    head_dim = qkv_weight.shape[0] // (3 * num_heads)
    kernels = why_reference(x, head_dim) is None and (branch is None or _kernel_dtype(branch))
    if not kernels or lacks_elements(proj_weight):
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads)
        options = dict(gamma=gamma, drop_path_scale=drop_path_scale)
        return add_layer_norm_attention_reference(x, branch, norm_weight, norm_bias, eps, *weights, **options)
    tensors = (x, branch, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma, drop_path_scale)
    options = (eps, num_heads, backends.product_dtype(x))
    if backends.registered_path(*tensors):
        out, x_new, *_ = add_layer_norm_attention_forward(*tensors, *options)
    elif backends.wants_gradient(*tensors):
        out, x_new = _AddLayerNormAttention.apply(*tensors, *options)
    else:
        out, x_new, _ = _forward(*tensors, *options, keeps=False)
    return x if branch is None else x_new, out


def add_layer_norm_attention_reference(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    *,
    gamma: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `add_layer_norm_attention` means, in plain PyTorch. Run in float64 it is the oracle."""
    if branch is None:
        x_new, normed = x, layer_norm_reference(x, norm_weight, norm_bias, eps)
    else:
        x_new, normed = add_layer_norm_reference(
            x, branch, norm_weight, norm_bias, eps, drop_path_scale=drop_path_scale
        )
    out = attention_op.attention_reference(F.linear(normed, qkv_weight, qkv_bias), num_heads)
    out = F.linear(out, proj_weight, proj_bias)
    return x_new, out if gamma is None else (out * gamma).to(out.dtype)


def why_reference(x: Tensor, head_dim: int) -> str | None:
    """None when `add_layer_norm_attention` runs its kernels on x, else why it runs the reference."""
    return why_no_layer_norm(x) or attention_op.why_reference(x, head_dim)


def _check(x, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads) -> None:
    if x.dim() != 3:
        raise ValueError(f"x: expected rank 3, (B, N, C), got shape {tuple(x.shape)}")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an int, got {type(num_heads).__name__}")
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    named = dict(qkv_weight=qkv_weight, qkv_bias=qkv_bias, proj_weight=proj_weight, proj_bias=proj_bias)
    for name, tensor in named.items():
        if tensor is None and name.endswith("bias"):
            continue
        check_beside(name, tensor, x)
        backends.check_multiplied(x, name, tensor)
    rows = qkv_weight.shape[0] if qkv_weight.dim() == 2 else 0
    if rows == 0 or rows % (3 * num_heads) or qkv_weight.shape[1] != x.shape[-1]:
        given = tuple(qkv_weight.shape)
        raise ValueError(f"qkv_weight: expected shape (3 * {num_heads} * D, {x.shape[-1]}), got {given}")
    if proj_weight.dim() != 2 or proj_weight.shape[1] != rows // 3:
        raise ValueError(f"proj_weight: expected shape (rows, {rows // 3}), got {tuple(proj_weight.shape)}")
    for name, bias, weight in (("qkv_bias", qkv_bias, qkv_weight), ("proj_bias", proj_bias, proj_weight)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


# ---- the work, shared by both paths


class _Kept(NamedTuple):
    """What backward needs of forward: a `Start` and the attention's input, output and log-sum-exp."""

    x: Tensor | None
    mean: Tensor | None
    x_hat: Tensor | None  # (B * N, C)
    rstd: Tensor  # (B * N,) fp32
    qkv: Tensor  # (B, N, 3 * H * D)
    attended: Tensor  # (B, N, H * D)
    lse: Tensor  # (B, H, N) fp32


def _forward(
    x, branch, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma, drop_path_scale, eps,
    num_heads, products, keeps=True,
) -> tuple[Tensor, Tensor | None, _Kept]:  # fmt: skip
    """out, x_new and what backward needs, in part without `keeps`."""
    from fastdeit.kernels.attention.forward import attention_forward

    with without_autocast(x):
        norm = Norm(norm_weight, norm_bias, eps)
        x_new, rows, start = start_forward(x, branch, drop_path_scale, norm, qkv_weight, products, keeps)
        qkv, _ = start_product(start, rows, norm, qkv_weight, qkv_bias)
        del rows
        qkv = qkv.view(*x.shape[:-1], qkv.shape[-1])
        attended, lse = attention_forward(qkv, num_heads, _scale(qkv_weight, num_heads))
        out = end_forward(attended.view(-1, attended.shape[-1]), proj_weight, proj_bias, gamma)
    return out.view(*x.shape[:-1], out.shape[-1]), x_new, _Kept(*start, qkv, attended, lse)


def _backward(
    dout, dx_new, kept, norm_weight, norm_bias, qkv_weight, proj_weight, proj_bias, gamma, drop_path_scale, eps,
    num_heads, dtypes,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients in the order of _GRADIENTS: each in its dtype of `dtypes`, None where that is None."""
    from fastdeit.kernels.attention.backward import attention_backward
    from fastdeit.kernels.norm.residual_branch import column_sums

    to = dict(zip(_GRADIENTS, dtypes, strict=True))
    wants = lambda *names: any(to[name] is not None for name in names)  # noqa: E731
    *start, qkv, attended, lse = kept
    start, norm = Start(*start), Norm(norm_weight, norm_bias, eps)
    with without_autocast(dout):
        g = as_dtype(dout.reshape(-1, proj_weight.shape[0]), qkv.dtype).contiguous()
        g_sum = column_sums(g, end_sums(gamma, to))
        rows = attended.view(-1, attended.shape[-1])
        found = end_parameter_gradients(g, g_sum, rows, proj_weight, proj_bias, gamma, to)
        if wants(*_GRADIENTS[:6]):
            dattended = torch.mm(g, end_weight(proj_weight, gamma, g.dtype)).view(attended.shape)
            scale = _scale(qkv_weight, num_heads)
            dqkv = attention_backward(dattended, qkv, attended, lse, num_heads, scale).view(-1, qkv.shape[-1])
            del dattended
            dqkv_sum = column_sums(dqkv, start_sums(start, to))
            shape = (*dout.shape[:-1], qkv_weight.shape[1])
            found |= start_backward(dqkv, dqkv_sum, dx_new, start, drop_path_scale, norm, qkv_weight, shape, to)
    return in_order(found, to)


def _scale(qkv_weight: Tensor, num_heads: int) -> float:
    return (qkv_weight.shape[0] // (3 * num_heads)) ** -0.5


# ---- eager


class _AddLayerNormAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, branch, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma, drop_path_scale,
        eps, num_heads, products,
    ):  # fmt: skip
        tensors = (x, branch, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma)
        out, x_new, kept = _forward(*tensors, drop_path_scale, eps, num_heads, products)
        ctx.save_for_backward(*kept, norm_weight, norm_bias, qkv_weight, proj_weight, proj_bias, gamma, drop_path_scale)
        ctx.set_materialize_grads(False)
        ctx.options = (eps, num_heads)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in tensors)
        ctx.out = out.shape, out.dtype
        return out, x_new

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout, dx_new):
        saved = ctx.saved_tensors
        if dout is None:
            shape, dtype = ctx.out
            dout = saved[3].new_zeros(shape, dtype=dtype)
        wanted = [dtype if need else None for dtype, need in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)]
        wanted, shared = share_gradient(wanted, saved[-1])
        gradients = _backward(dout, dx_new, _Kept(*saved[:7]), *saved[7:], *ctx.options, wanted)
        return gradients[0], gradients[0] if shared else gradients[1], *gradients[2:], *(None,) * 4


# ---- compiled and exported: the registered ops. An op's outputs may be neither None nor its inputs, hence the empty tensors.


@torch.library.custom_op("fastdeit::add_layer_norm_attention_forward", mutates_args=())
def add_layer_norm_attention_forward(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma: Tensor | None,
    drop_path_scale: Tensor | None,
    eps: float,
    num_heads: int,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (x, branch, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma)
    out, x_new, kept = _forward(*tensors, drop_path_scale, eps, num_heads, products)
    return out, *(kept.rstd.new_empty(0) if t is None else t for t in (x_new, *kept[1:]))


@add_layer_norm_attention_forward.register_fake
def _(x, branch, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, *rest):
    *_, num_heads, products = rest
    batch, tokens, _ = x.shape
    width = qkv_weight.shape[0]
    return (
        x.new_empty((batch, tokens, proj_weight.shape[0]), dtype=products),
        *fake_start(x, branch, products, folds(products, norm_weight, norm_bias, qkv_weight)),
        x.new_empty((batch, tokens, width), dtype=products),
        x.new_empty((batch, tokens, width // 3), dtype=products),
        x.new_empty((batch, num_heads, tokens), dtype=torch.float32),
    )


@torch.library.custom_op("fastdeit::add_layer_norm_attention_backward", mutates_args=())
def add_layer_norm_attention_backward(
    dout: Tensor,
    dx_new: Tensor | None,
    x: Tensor | None,
    mean: Tensor | None,
    x_hat: Tensor | None,
    rstd: Tensor,
    qkv: Tensor,
    attended: Tensor,
    lse: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma: Tensor | None,
    drop_path_scale: Tensor | None,
    eps: float,
    num_heads: int,
    needs: list[bool],
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> list[Tensor]:
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma)
    wanted = wanted_dtypes(needs, x_dtype, branch_dtype, parameters)
    kept = _Kept(x, mean, x_hat, rstd, qkv, attended, lse)
    given = (norm_weight, norm_bias, qkv_weight, proj_weight, proj_bias, gamma, drop_path_scale)
    gradients = _backward(dout, dx_new, kept, *given, eps, num_heads, wanted)
    return [rstd.new_empty(0) if g is None else g for g in gradients]


@add_layer_norm_attention_backward.register_fake
def _(dout, dx_new, x, mean, x_hat, rstd, qkv, attended, lse, *rest):
    *parameters, _, _, _, needs, x_dtype, branch_dtype = rest
    shape = (*dout.shape[:-1], parameters[2].shape[1])
    return fake_gradients(dout, shape, parameters, needs, x_dtype, branch_dtype)


def _keep(ctx, inputs, output):
    x, branch, *parameters, drop_path_scale, eps, num_heads, _ = inputs
    _, x_new, mean, x_hat, rstd, qkv, attended, lse = output
    ctx.mark_non_differentiable(mean, x_hat, rstd, qkv, attended, lse)
    start = kept_start(x, branch, x_new, mean, x_hat, rstd)
    ctx.save_for_backward(*start, qkv, attended, lse, *parameters, drop_path_scale)
    ctx.options = (eps, num_heads)
    ctx.added = branch is not None
    ctx.dtypes = (x.dtype, branch.dtype if ctx.added else x.dtype)


def _registered_backward(ctx, dout, dx_new, *_):
    needs = list(ctx.needs_input_grad[:9])
    dx_new = dx_new if ctx.added else None
    gradients = add_layer_norm_attention_backward(dout, dx_new, *ctx.saved_tensors, *ctx.options, needs, *ctx.dtypes)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 4


add_layer_norm_attention_forward.register_autograd(_registered_backward, setup_context=_keep)
