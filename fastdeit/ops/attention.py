"""Multi-head attention of vision transformers: short sequences, no mask, no dropout."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_DIMS = (
    32,
    48,
    64,
    72,
    80,
    88,
    96,
    104,
    128,
)  # what timm's vision transformers have, and what the kernels are shaped for


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
    _check_packed(qkv, num_heads, scale)
    return attention_reference(qkv, num_heads, scale=scale)


def attention_qkv(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """`attention` on separate queries, keys and values, for models that normalise or rotate them in between.

    Args:
        q: (B, N, H, D), any strides: a view of (B, H, N, D) memory is as good as one of a packed projection.
        k, v: (B, M, H, D), of q's dtype and device; M is N in self-attention.
        scale: factor on the logits, D**-0.5 by default.

    Returns:
        (B, N, H, D), contiguous, so that `.flatten(2)` is the projection's input. Gradients have the strides of q, k and v.

    Raises:
        TypeError: q, k or v is not a floating-point tensor, k's or v's dtype differs from q's, or scale is not a number.
        ValueError: q, k or v is not of rank 4, their shapes or devices do not fit, D is 0, or scale is not finite.
    """
    _check_separate(q, k, v, scale)
    return attention_qkv_reference(q, k, v, scale=scale)


def attention_reference(qkv: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """What `attention` means, in plain PyTorch. Run in float64 it is the oracle."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return attention_qkv_reference(q, k, v, scale=scale).flatten(2)


def attention_qkv_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """What `attention_qkv` means, in plain PyTorch."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def why_reference(x: Tensor, head_dim: int, scale: float | None = None) -> str | None:
    """None when attention runs its kernels on tensors like x, else why it runs the reference.

    Args:
        x: any tensor of the inputs' device and dtype.
        head_dim: D.
        scale: as given to the op.
    """
    return "no kernel yet"


# ---- argument checks


def _check_packed(qkv, num_heads, scale) -> None:
    _check_float("qkv", qkv)
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


def _check_separate(q, k, v, scale) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_float(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected rank 4, (B, N, H, D), got shape {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} as q has, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q has, got {tensor.device}")
    if q.shape[-1] == 0:
        raise ValueError(f"q: expected a head dimension of at least 1, got shape {tuple(q.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"k: expected (B, M, H, D) to match q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    _check_scale(scale)


def _check_float(name, tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}"
        )


def _check_scale(scale) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
