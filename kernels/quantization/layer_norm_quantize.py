"""The residual addition, LayerNorm, a scale for each token, and the cast to 8 bits, in one pass.

    x_new = x + gamma * branch
    y     = (x_new - mean) * rstd * weight + bias
    scale = max |y| / largest,  q = y / scale

The normalised tokens are never in memory in more than 8 bits. A row stays in registers.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from fastdeit.kernels.norm.layer_norm import select_config
from fastdeit.kernels.quantization.bounds import LARGEST, SMALLEST
from fastdeit.kernels.quantization.formats import quantized
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import architecture
from fastdeit.kernels.runtime.launch import launch, next_power_of_2


@triton.jit
def layer_norm_quantize_kernel(
    x_ptr,  # (M, C)
    branch_ptr,  # (M, C) or None
    gamma_ptr,  # (C,) or None
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    x_new_ptr,  # (M, C), None without a branch
    q_ptr,  # (M, C), 8 bits
    scale_ptr,  # (M,) fp32
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,  # C rounded up to a power of two
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """A program owns one row."""
    row = tl.program_id(0)
    col = tl.arange(0, CHANNELS)
    inside = col < C
    at = row.to(tl.int64) * C + col
    x = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + at, inside, other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            branch *= tl.load(gamma_ptr + col, inside, other=0.0).to(tl.float32)
        x_new = (x + branch).to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + at, x_new, inside)
        x = x_new.to(tl.float32)
    mean = tl.sum(x, axis=0) / C
    centred = tl.where(inside, x - mean, 0.0)  # padding must not count in the variance
    y = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / C + eps)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + col, inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, inside, other=0.0).to(tl.float32)
    # A row with a NaN or an infinity has no mean: all of it is NaN, and so is its largest magnitude.
    largest = tl.maximum(tl.max(tl.abs(y), axis=0), SMALLEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scale_ptr + row, tl.div_rn(largest, LARGEST))
    tl.store(q_ptr + at, quantized(y * tl.div_rn(LARGEST, largest), q_ptr.dtype.element_ty), inside)


def layer_norm_quantize(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gamma: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """x and branch (..., C), contiguous -> x_new in their promoted dtype (None without a branch), q (..., C), scale (...) fp32."""
    channels, rows = x.shape[-1], x.numel() // x.shape[-1]
    q = x.new_empty(*x.shape, dtype=dtype)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    x_new = None if branch is None else x.new_empty(*x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    if rows:
        constexprs = (channels, next_power_of_2(channels), LARGEST[dtype], SMALLEST)
        config = select_config(channels, architecture(x))
        args = (x, branch, gamma, weight, bias, x_new, q, scale, eps)
        launch(layer_norm_quantize_kernel, (rows,), args, constexprs, config.num_warps)
    return x_new, q, scale


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """DeiT-Ti's and B's widths with a bf16 stream: float8 without parameters, which are folded, int8 with SmoothQuant's factors."""
    for dtype, name in ((torch.float8_e4m3fn, "fp8e4nv"), (torch.int8, "i8")):
        if dtype.is_floating_point and arch < 89:
            continue
        for channels in (192, 768):
            types = dict.fromkeys(("x_ptr", "branch_ptr", "x_new_ptr"), "*bf16")
            types |= dict(q_ptr=f"*{name}", scale_ptr="*fp32", eps="fp32")
            if not dtype.is_floating_point:
                types["weight_ptr"] = "*bf16"
            constexprs: dict[str, Any] = dict(C=channels, CHANNELS=next_power_of_2(channels))
            constexprs |= dict(LARGEST=LARGEST[dtype], SMALLEST=SMALLEST)
            warps, label = select_config(channels, arch).num_warps, f"C={channels} {name}"
            yield AotConfig(layer_norm_quantize_kernel, types, constexprs, warps, 1, label, matrix=False)
