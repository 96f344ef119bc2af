"""Multi-head attention of vision transformers: short sequences, no mask, no dropout."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import backends
from fastdeit.kernels.attention import config as attention_config
from fastdeit.kernels.runtime.architecture import architecture
from fastdeit.ops import launchers
from fastdeit.ops.arguments import check_beside, check_float
from fastdeit.ops.passed_calls import PassedCalls
from fastdeit.ops.registration import Op
from fastdeit.refusals import or_reference

HEAD_DIMS = (32, 48, 64, 72, 80, 88, 96, 104, 128)  # of timm's vision transformers
_LARGEST_TF32_HEAD_DIM = 64  # in twice the bytes, the backward of larger heads spills registers


_packed_passed, _separate_passed = PassedCalls(), PassedCalls()


@or_reference
def attention(qkv: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """softmax(scale * Q K^T) V per head (Vaswani et al. 2017, eq. 1), from the qkv projection's output to proj's input.

    Args:
        qkv: (B, N, 3 * H * D), Q, K and V side by side, each with its H heads side by side; a float dtype, any strides.
        num_heads: H, at least 1.
        scale: factor on the logits, D**-0.5 by default.

    Returns:
        (B, N, H * D), of qkv's dtype, or of autocast's where that is on, as PyTorch's attention gives.

    Raises:
        TypeError: qkv is not a floating-point tensor, num_heads is not an int or scale not a number.
        ValueError: qkv is not of rank 3, its last dimension is not a positive multiple of 3 * num_heads, num_heads is below 1, or
            scale is not finite.
    """
    passed = _packed_passed.has((qkv,), num_heads, scale)
    if not passed:
        check_packed(qkv, num_heads, scale)
    (low,) = as_autocast(qkv)
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    if not passed:
        if why_reference(low, head_dim, scale) is not None:
            return attention_reference(qkv, num_heads, scale=scale)
        _packed_passed.add((qkv,), num_heads, scale)
    if attention_config.SDPA_PREFERRED and why_handed_over(low, head_dim, tokens, batch * num_heads) is not None:
        return attention_reference(qkv, num_heads, scale=scale)
    (out,) = attention_unchecked(low, num_heads, head_dim**-0.5 if scale is None else float(scale))
    return out


@or_reference
def attention_qkv(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """`attention` on separate queries, keys and values, for models that normalise or rotate them in between.

    Args:
        q: (B, N, H, D), any strides: a view of (B, H, N, D) memory is as good as one of a packed projection.
        k: (B, M, H, D), of q's dtype and device; M is N in self-attention.
        v: (B, M, H, D), of q's dtype and device.
        scale: factor on the logits, D**-0.5 by default.

    Returns:
        (B, N, H, D), contiguous, so that `.flatten(2)` is the projection's input. Gradients have the strides of q, k and v.

    Raises:
        TypeError: q, k or v is not a floating-point tensor, k's or v's dtype differs from q's, or scale is not a number.
        ValueError: q, k or v is not of rank 4, their shapes or devices do not fit, H or D is 0, or scale is not finite.
    """
    passed = _separate_passed.has((q, k, v), scale)
    if not passed:
        check_separate(q, k, v, scale)
    low = as_autocast(q, k, v)
    if not passed:
        if k.shape[1] == 0 or why_reference(low[0], q.shape[-1], scale) is not None:
            return attention_qkv_reference(q, k, v, scale=scale)
        _separate_passed.add((q, k, v), scale)
    low = tuple(t if t.stride(-1) == 1 else t.contiguous() for t in low)
    (out,) = attention_qkv_unchecked(*low, q.shape[-1] ** -0.5 if scale is None else float(scale))
    return out


def attention_reference(qkv: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """Reference of `attention` in plain PyTorch. In float64 it is the oracle."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return attention_qkv_reference(q, k, v, scale=scale).flatten(2)


def attention_qkv_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Reference of `attention_qkv` in plain PyTorch."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def why_reference(x: Tensor, head_dim: int, scale: float | None = None) -> str | None:
    """None when attention runs its kernels on tensors like x, else why it runs the reference, PyTorch's own attention.

    Args:
        x: any tensor of the inputs' device and of their dtype, under autocast of autocast's.
        head_dim: D.
        scale: as given to the op.

    Raises:
        RuntimeError: the backend "triton" is asked for and the kernels cannot run.
    """
    if head_dim not in HEAD_DIMS:
        return backends.refuse(f"head dimension {head_dim} is none of {', '.join(map(str, HEAD_DIMS))}")
    if scale is not None and scale <= 0:
        return backends.refuse(f"scale {scale} is not positive")
    if head_dim > _LARGEST_TF32_HEAD_DIM and backends.on_gpu(x) and backends.matmul_dtype(x) == torch.float32:
        return backends.refuse(f"head dimension {head_dim} in TF32 is over the kernel's {_LARGEST_TF32_HEAD_DIM}")
    return backends.why_reference(x, products=True, kernels=("attention",))


def why_handed_over(x: Tensor, head_dim: int, tokens: int, batch_heads: int) -> str | None:
    """None, or that calls like this one are left to PyTorch's own attention, which was measured faster on x's GPU.

    Args:
        x: any tensor of the inputs' device.
        head_dim: D.
        tokens: N.
        batch_heads: B * H.
    """
    if not attention_config.SDPA_PREFERRED or backends.get_backend() != "auto":
        return None
    arch, gradients = architecture(x), torch.is_grad_enabled()
    if attention_config.handed_over(arch, head_dim, tokens, batch_heads, gradients):
        return f"PyTorch's attention was measured faster at {tokens} tokens and batch times heads {batch_heads}"
    return None


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The inputs, cast as autocast casts those of scaled_dot_product_attention."""
    device = tensors[0].device.type
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


# ---- argument checks


def check_packed(qkv, num_heads, scale) -> None:
    check_float("qkv", qkv)
    if qkv.dim() != 3:
        raise ValueError(f"qkv: expected rank 3, (B, N, 3 * H * D), got shape {tuple(qkv.shape)}")
    if isinstance(num_heads, bool) or not isinstance(num_heads, (int, torch.SymInt)):
        raise TypeError(f"num_heads: expected an int, got {type(num_heads).__name__}")
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    if qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv: expected a last dimension 3 * H * D, a multiple of {3 * num_heads} for {num_heads} heads, "
            f"got {qkv.shape[-1]}"
        )
    _check_scale(scale)


def check_separate(q, k, v, scale) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_beside(name, tensor, q, "q")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected rank 4, (B, N, H, D), got shape {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} as q has, got {tensor.dtype}")
    if q.shape[2] == 0 or q.shape[3] == 0:  # without heads PyTorch's attention on a CPU ends the process
        raise ValueError(
            f"q: expected at least one head and a head dimension of at least 1, got shape {tuple(q.shape)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"k: expected (B, M, H, D) to match q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    _check_scale(scale)


def _check_scale(scale) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")


# ---- attention


class Saved(NamedTuple):
    """Saved for backward: input, output and log-sum-exp."""

    qkv: Tensor  # (B, N, 3 * H * D)
    out: Tensor  # (B, N, H * D)
    lse: Tensor  # (B, H, N) fp32


def _forward(qkv: Tensor, num_heads: int, scale: float, *, saves):
    out, lse = launchers.attention_forward(qkv, num_heads, scale)
    return (out,), (lse,)


def _save(inputs, outputs, made, needs):
    return Saved(inputs[0], *outputs, *made)


def _backward(grads, saved, options, grad_dtypes):
    return (launchers.attention_backward(*grads, *saved, *options),)


def _fake(qkv, num_heads, scale):
    batch, tokens, width = qkv.shape
    lse = qkv.new_empty((batch, num_heads, tokens), dtype=torch.float32)
    return (qkv.new_empty((batch, tokens, width // 3)),), (lse,)


def packed_flops(qkv, *_, products: int = 2, **__) -> int:
    """Of that many products, multiply-adds counted twice, as PyTorch counts its own attention; shapes stand for tensors."""
    batch, tokens, width = qkv
    return 2 * products * batch * tokens * tokens * (width // 3)


def _backward_flops(grads, saved, options, grad_dtypes) -> int:
    return packed_flops(saved.qkv, products=5)


attention_unchecked = Op(
    "attention",
    outputs=("out",),
    made=("lse",),
    saved=Saved,
    forward=_forward,
    save=_save,
    backward=_backward,
    fake=_fake,
    flops=(packed_flops, _backward_flops),
)


# ---- attention_qkv


class SeparateSaved(NamedTuple):
    """Saved for backward: inputs, output and log-sum-exp."""

    q: Tensor  # (B, N, H, D)
    k: Tensor  # (B, M, H, D)
    v: Tensor  # (B, M, H, D)
    out: Tensor  # (B, N, H, D)
    lse: Tensor  # (B, H, N) fp32


def _separate_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, *, saves):
    out, lse = launchers.attention_qkv_forward(q, k, v, scale)
    return (out,), (lse,)


def _separate_save(inputs, outputs, made, needs):
    return SeparateSaved(*inputs[:3], *outputs, *made)


def _separate_backward(grads, saved, options, grad_dtypes):
    key_value_grads = grad_dtypes[1] is not None or grad_dtypes[2] is not None
    input_grads = launchers.attention_qkv_backward(*grads, *saved, *options, key_value_grads=key_value_grads)
    return tuple(None if dtype is None else grad for grad, dtype in zip(input_grads, grad_dtypes, strict=True))


def _separate_fake(q, k, v, scale):
    batch, queries, heads, _ = q.shape
    return (q.new_empty(q.shape),), (q.new_empty((batch, heads, queries), dtype=torch.float32),)


def _separate_fake_backward(saved, grad_dtypes):
    inputs = zip(saved[:3], grad_dtypes, strict=True)
    return tuple(None if dtype is None else torch.empty_like(t) for t, dtype in inputs)


def separate_flops(q, k, *_, products: int = 2, **__) -> int:
    """`packed_flops` of separate q and k."""
    batch, queries, heads, head_dim = q
    return 2 * products * batch * heads * queries * k[1] * head_dim


def _separate_backward_flops(grads, saved, options, grad_dtypes) -> int:
    return separate_flops(saved.q, saved.k, products=5)


attention_qkv_unchecked = Op(
    "attention_qkv",
    outputs=("out",),
    made=("lse",),
    saved=SeparateSaved,
    forward=_separate_forward,
    save=_separate_save,
    backward=_separate_backward,
    fake=_separate_fake,
    fake_backward=_separate_fake_backward,
    flops=(separate_flops, _separate_backward_flops),
)
