"""The two-layer perceptron of a transformer block: matrix products with what surrounds them, by the fastest known backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import backends
from fastdeit.ops.arguments import check_beside
from fastdeit.ops.first_derivative import first_derivative_only

# What timm's activation modules compute.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}


def mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu") -> Tensor:
    """activation(x W1^T + b1) W2^T + b2 (Vaswani et al. 2017, eq. 2, with Hendrycks and Gimpel 2016 for GELU).

    One autograd node. It keeps x and the pre-activation for backward, in the dtype of the products, and computes the activation
    again there, in the kernel that also gives its gradient and b1's. Without gradients it keeps nothing, and 192 channels may run
    in one kernel.

    Args:
        x: (..., C), a float dtype, any strides.
        w1: (H, C); b1: (H,) or None.
        w2: (O, H); b2: (O,) or None.
        activation: "gelu" (by erf), "gelu_tanh", "quick_gelu" (x * sigmoid(1.702 x)), "silu" or "relu".

    Returns:
        (..., O), of x's dtype, or of autocast's where that is on, as PyTorch's linear layers give.

    Raises:
        TypeError: x or a weight is not a floating-point tensor, or they differ in dtype outside autocast.
        ValueError: activation is another, or the shape or device of a weight does not fit.
    """
    _check(x, w1, b1, w2, b2, activation)
    if why_reference(x) is not None or lacks_elements(w1, w2):
        return mlp_reference(x, w1, b1, w2, b2, activation=activation)
    tensors, options = (x, w1, b1, w2, b2), (activation, backends.product_dtype(x))
    keeps = backends.wants_gradient(*tensors)
    if backends.registered_path(*tensors):
        return mlp_forward(*tensors, *options, keeps)[0]
    return _Mlp.apply(*tensors, *options) if keeps else _forward(*tensors, *options, keeps)[0]


def mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu"
) -> Tensor:
    """What `mlp` means, in plain PyTorch. Run in float64 it is the oracle."""
    return F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)


def why_reference(x: Tensor, activation: str = "gelu") -> str | None:
    """None when `mlp` runs its kernels on x, else why it runs the reference. Any known activation has a kernel."""
    return backends.why_reference(x)


def lacks_elements(*weights: Tensor) -> bool:
    """Whether a layer has no inputs or no outputs: there is nothing to multiply, and rows of nothing cannot be counted."""
    return any(weight.numel() == 0 for weight in weights)


def _check(x, w1, b1, w2, b2, activation) -> None:
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


# ---- the work, shared by both paths


def _forward(x, w1, b1, w2, b2, activation, products, keeps):
    """(..., O) and, if it is to be kept for backward, the pre-activation (M, H)."""
    from fastdeit.kernels.gemm.fused_mlp import whole_mlp_forward
    from fastdeit.kernels.gemm.linear import linear_forward

    rows = x.reshape(-1, x.shape[-1]).to(products)
    whole = None if keeps else whole_mlp_forward(rows, w1, b1, w2, b2, activation, products)
    if whole is not None:
        return whole[1].view(x.shape), None
    h, z = linear_forward(rows, w1, b1, activation=activation, needs_z=keeps)
    y, _ = linear_forward(h, w2, b2)
    return y.view(*x.shape[:-1], w2.shape[0]), z


def _backward(dy, x, z, w1, w2, activation, needs, dtypes, shape):
    """Gradients of x, w1, b1, w2 and b2: None where `needs` says so, else in the given dtypes. Only w1's reads x (`shape`)."""
    from fastdeit.kernels.gemm.linear import activation_gradient

    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    x_dtype, w1_dtype, b1_dtype, w2_dtype, b2_dtype = dtypes
    dy = dy.reshape(-1, dy.shape[-1]).to(z.dtype)
    dx = dw1 = db1 = dw2 = None
    db2 = dy.sum(0, dtype=torch.float32).to(b2_dtype) if need_b2 else None
    if need_x or need_w1 or need_b1:
        sums = b1_dtype if need_b1 else None
        dz, h, db1 = activation_gradient(dy, w2.to(z.dtype), z, activation, needs_h=need_w2, dbias_dtype=sums)
        dw1 = _weight_gradient(dz, x.reshape(-1, shape[-1]).to(z.dtype), w1_dtype) if need_w1 else None
        dx = (dz @ w1.to(z.dtype)).view(shape).to(x_dtype) if need_x else None
    elif need_w2:
        from fastdeit.kernels.mlp.activation import activation_forward

        h = activation_forward(z, activation)
    if need_w2:
        dw2 = _weight_gradient(dy, h, w2_dtype)
    return dx, dw1, db1, dw2, db2


def _weight_gradient(d_out: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """d_out^T rows, summed in fp32 and rounded once, to the weight's dtype."""
    if d_out.dtype == dtype:
        return torch.mm(d_out.t(), rows)
    return _product_in_float32(d_out.t(), rows).to(dtype)


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b of lower precision with an fp32 result: of one kernel on a GPU, by way of fp32 copies on a CPU."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


# ---- eager


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, activation, products):
        x_dtype, x = x.dtype, x.to(products)  # kept in the dtype of the products
        y, z = _forward(x, w1, b1, w2, b2, activation, products, keeps=True)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, z, w1, w2)
        ctx.activation, ctx.shape = activation, x.shape
        ctx.dtypes = (x_dtype, *(None if t is None else t.dtype for t in (w1, b1, w2, b2)))
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[:5]
        gradients = _backward(dy, *ctx.saved_tensors, ctx.activation, needs, ctx.dtypes, ctx.shape)
        return *gradients, None, None


# ---- compiled and exported: the registered ops


@torch.library.custom_op("fastdeit::mlp_forward", mutates_args=())
def mlp_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    products: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    y, z = _forward(x, w1, b1, w2, b2, activation, products, keeps)
    return y, y.new_empty(0) if z is None else z


@mlp_forward.register_fake
def _(x, w1, b1, w2, b2, activation, products, keeps):
    rows = x.numel() // x.shape[-1]
    y = x.new_empty((*x.shape[:-1], w2.shape[0]), dtype=products)
    return y, x.new_empty((rows, w1.shape[0]) if keeps else 0, dtype=products)


@torch.library.custom_op("fastdeit::mlp_backward", mutates_args=())
def mlp_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    activation: str,
    needs: list[bool],
    b1_dtype: torch.dtype,
    b2_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtypes = (x.dtype, w1.dtype, b1_dtype, w2.dtype, b2_dtype)
    gradients = _backward(dy, x, z, w1, w2, activation, needs, dtypes, x.shape)
    return tuple(z.new_empty(0) if g is None else g for g in gradients)


@mlp_backward.register_fake
def _(dy, x, z, w1, w2, activation, needs, b1_dtype, b2_dtype):
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    dtypes = (x.dtype, w1.dtype, b1_dtype, w2.dtype, b2_dtype)
    return tuple(
        x.new_empty(shape, dtype=dtype) if need else z.new_empty(0)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


def _keep(ctx, inputs, output):
    *tensors, activation, products, keeps = inputs
    ctx.save_for_backward(*tensors, output[1] if keeps else None)
    ctx.mark_non_differentiable(output[1])
    ctx.options = (activation, products)


def _registered_backward(ctx, dy, _):
    needs = list(ctx.needs_input_grad[:5])
    x, w1, b1, w2, b2, z = ctx.saved_tensors
    if z is None:  # exported without gradients, and trained nevertheless
        _, z = mlp_forward(x, w1, b1, w2, b2, *ctx.options, keeps=True)
    dtypes = (w.dtype if b is None else b.dtype for w, b in ((w1, b1), (w2, b2)))
    gradients = mlp_backward(dy, x, z, w1, w2, ctx.options[0], needs, *dtypes)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


mlp_forward.register_autograd(_registered_backward, setup_context=_keep)
