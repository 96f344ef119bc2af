"""Attention in front of an 8-bit product: its kernel casts the output. There is no gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdeit import backends
from fastdeit.ops import attention_op, launchers
from fastdeit.ops.attention_op import (
    as_autocast,
    attention,
    attention_qkv,
    attention_qkv_reference,
    attention_reference,
    check_packed,
    check_separate,
    packed_flops,
    separate_flops,
)
from fastdeit.ops.flop_counting import add_to_counters
from fastdeit.ops.quantized_formats import check_format, check_scale, why_no_format
from fastdeit.ops.rescale_op import rescale, rescale_reference
from fastdeit.refusals import or_reference


@or_reference
def attention_quantize(
    qkv: Tensor, num_heads: int, out_scale: Tensor, *, scale: float | None = None, dtype: torch.dtype
) -> Tensor:
    """`attention` with a result quantized to 8 bits by a given scale, in one pass.

    Args:
        qkv: (B, N, 3 * H * D), as `attention` takes it.
        num_heads: H, at least 1.
        out_scale: (1,) float32, the value of one step of the result.
        scale: factor on the logits, D**-0.5 by default.
        dtype: of the result, torch.float8_e4m3fn or torch.int8. What does not fit becomes its largest value; int8 has no NaN.

    Returns:
        (B, N, H * D), contiguous.

    Raises:
        TypeError: as `attention`, or out_scale is not a float32 tensor, or dtype is another.
        ValueError: as `attention`, or out_scale has another shape or device.
    """
    check_packed(qkv, num_heads, scale)
    _check_result(out_scale, dtype, qkv)
    (low,) = as_autocast(qkv)
    batch, tokens, width = low.shape
    head_dim = width // (3 * num_heads)
    if _leaves_to_attention(low, head_dim, tokens, batch * num_heads, scale, dtype):
        return rescale(attention(qkv, num_heads, scale=scale), scale=out_scale, out_dtype=dtype)
    given = low, num_heads, out_scale, head_dim**-0.5 if scale is None else float(scale), dtype
    if not backends.registered_path(low, out_scale):
        return _launched(*given)
    add_to_counters(_FLOPS)
    return _registered(*given)


@or_reference
def attention_qkv_quantize(
    q: Tensor, k: Tensor, v: Tensor, out_scale: Tensor, *, scale: float | None = None, dtype: torch.dtype
) -> Tensor:
    """`attention_qkv` with a result quantized to 8 bits by a given scale, in one pass.

    Args:
        q: (B, N, H, D), any strides.
        k: (B, M, H, D), of q's dtype and device.
        v: (B, M, H, D), of q's dtype and device.
        out_scale: (1,) float32, the value of one step of the result.
        scale: factor on the logits, D**-0.5 by default.
        dtype: as in `attention_quantize`.

    Returns:
        (B, N, H, D), contiguous.

    Raises:
        TypeError: as `attention_qkv`, or out_scale is not a float32 tensor, or dtype is another.
        ValueError: as `attention_qkv`, or out_scale has another shape or device.
    """
    check_separate(q, k, v, scale)
    _check_result(out_scale, dtype, q)
    low = as_autocast(q, k, v)
    batch, queries, heads, head_dim = q.shape
    if k.shape[1] == 0 or _leaves_to_attention(low[0], head_dim, queries, batch * heads, scale, dtype):
        return rescale(attention_qkv(q, k, v, scale=scale), scale=out_scale, out_dtype=dtype)
    given = *low, out_scale, head_dim**-0.5 if scale is None else float(scale), dtype
    if not backends.registered_path(*low, out_scale):
        return _launched_separate(*given)
    add_to_counters(_FLOPS)
    return _registered_separate(*given)


def attention_quantize_reference(
    qkv: Tensor, num_heads: int, out_scale: Tensor, *, scale: float | None = None, dtype: torch.dtype
) -> Tensor:
    """Reference of `attention_quantize` in plain PyTorch. With float64 tensors it is the oracle."""
    return rescale_reference(attention_reference(qkv, num_heads, scale=scale), scale=out_scale, out_dtype=dtype)


def attention_qkv_quantize_reference(
    q: Tensor, k: Tensor, v: Tensor, out_scale: Tensor, *, scale: float | None = None, dtype: torch.dtype
) -> Tensor:
    """Reference of `attention_qkv_quantize` in plain PyTorch."""
    return rescale_reference(attention_qkv_reference(q, k, v, scale=scale), scale=out_scale, out_dtype=dtype)


def why_reference(x: Tensor, head_dim: int, scale: float | None, dtype: torch.dtype) -> str | None:
    """None when the ops here run their kernel on tensors like x, else why they run `attention` and `rescale`.

    Args:
        x: any tensor of the inputs' device and of their dtype, under autocast of autocast's.
        head_dim: D.
        scale: as given to the op.
        dtype: of the result.

    Raises:
        RuntimeError: the backend "triton" is asked for and the kernels cannot run.
    """
    return why_no_format(x, dtype) or attention_op.why_reference(x, head_dim, scale)


def _leaves_to_attention(x, head_dim, tokens, batch_heads, scale, dtype) -> bool:
    """Whether `attention` and `rescale` run, each as it can."""
    reason = why_reference(x, head_dim, scale, dtype)
    return (reason or attention_op.why_handed_over(x, head_dim, tokens, batch_heads)) is not None


def _check_result(out_scale, dtype, x) -> None:
    check_format("dtype", dtype)
    check_scale("out_scale", out_scale, (1,), x, optional=False)


def _launched(qkv, num_heads, out_scale, scale, dtype):
    return launchers.attention_quantize(qkv, num_heads, scale, out_scale, dtype)


def _launched_separate(q, k, v, out_scale, scale, dtype):
    return launchers.attention_qkv_quantize(q, k, v, scale, out_scale, dtype)


@torch.library.custom_op("fastdeit::attention_quantize", mutates_args=())
def _registered(qkv: Tensor, num_heads: int, out_scale: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return _launched(qkv, num_heads, out_scale, scale, dtype)


@_registered.register_fake
def _(qkv, num_heads, out_scale, scale, dtype):
    batch, tokens, width = qkv.shape
    return qkv.new_empty((batch, tokens, width // 3), dtype=dtype)


@torch.library.custom_op("fastdeit::attention_qkv_quantize", mutates_args=())
def _registered_separate(
    q: Tensor, k: Tensor, v: Tensor, out_scale: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    return _launched_separate(q, k, v, out_scale, scale, dtype)


@_registered_separate.register_fake
def _(q, k, v, out_scale, scale, dtype):
    return q.new_empty(q.shape, dtype=dtype)


_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.fastdeit.attention_quantize: packed_flops,
    torch.ops.fastdeit.attention_qkv_quantize: separate_flops,
}
