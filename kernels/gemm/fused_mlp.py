"""The MLP of DeiT-Ti in one kernel, for inference: 192 channels, the hidden activation never leaves the chip.

    out = gamma * (activation(x W1^T + b1) W2^T + b2)

with x as it is, or as the residual addition and LayerNorm in front of it make it:

    x_new = x + branch,   x = (x_new - mean) * rstd * weight + bias

192 channels are 128 and 64, each a tile of its own: as one they would be padded to 256. A row of fp32 results then fits into
registers beside a block of hidden columns; 384 channels do not. Against two products and what surrounds them it saves 8 bytes of
traffic a token and hidden column, but the rate of its products has not been measured: it runs only where a table names it.

Adding the result to the stream is left to the LayerNorm after it: here an fp32 stream would spill registers up to sm_90.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from fastdeit.kernels.gemm.config import Gemm
from fastdeit.kernels.gemm.forward import fits, vector
from fastdeit.kernels.gemm.fused_mlp_kernels import (
    CHANNELS,
    LEFT,
    RIGHT,
    fused_mlp_forward_descriptor_kernel,
    fused_mlp_forward_kernel,
)
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import architecture, has_descriptors, pointer_stages
from fastdeit.kernels.runtime.launch import cdiv, descriptor, launch

FORMS = ("mlp", "add_layer_norm_mlp")  # without and with what is in front


@dataclass(frozen=True)
class Config:
    backend: str  # "triton" or "tma": weights over pointers or tensor descriptors
    rows: int  # of a program
    hidden: int  # columns in a step of the loop
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Measured:
    """MLPs of 192 channels and this many hidden ones, with rows in a range, for which this configuration was the fastest way."""

    rows: range
    hidden: int
    dtype: torch.dtype  # of the products
    form: str
    config: Config


# Architecture -> where the kernel was measured to be faster than what runs otherwise. Empty: nothing was measured.
FUSED_MLPS: dict[int, tuple[Measured, ...]] = {}

_forced: tuple[Config | None, ...] = ()


def candidates(arch: int) -> tuple[Config, ...]:
    """Every configuration that may be named in the table: what tuning tries and the compile gate holds.

    128 rows read the weights half as often as 64; of 64 rows two programs share a multiprocessor, so that one's activation runs
    under the other's products. Without wgmma the operands are in registers too, which leaves room for 32 hidden columns.
    """
    if has_descriptors(arch):
        # On sm_100 a third stage spills.
        tall = Config("tma", 128, 64, num_warps=8, num_stages=3 if arch < 100 else 2)
        return tall, Config("triton", 64, 32, num_warps=4, num_stages=pointer_stages(arch, 3))
    return (Config("triton", 128, 32, num_warps=8, num_stages=2),)


def serialises(config: Config, stream: torch.dtype, arch: int) -> bool:
    """Whether ptxas waits for each product of this configuration with a LayerNorm in front: such a one does not run.

    Behind the LayerNorm of a 16-bit stream it moves accumulators within the loop (C7515), at any tile and number of stages tried.
    """
    return config.backend == "tma" and arch == 90 and stream != torch.float32


def select_config(M: int, hidden: int, dtype: torch.dtype, form: str, arch: int) -> Config | None:
    """The configuration for M rows, `hidden` columns between the layers and one of FORMS; None for other kernels."""
    return _forced[0] if _forced else _select(M, hidden, dtype, form, arch)


@lru_cache(maxsize=1024)
def _select(M: int, hidden: int, dtype: torch.dtype, form: str, arch: int) -> Config | None:
    for entry in FUSED_MLPS.get(arch, ()):
        if (hidden, dtype, form) == (entry.hidden, entry.dtype, entry.form) and M in entry.rows:
            return entry.config
    return None


@contextlib.contextmanager
def use_fused_mlp(config: Config | None) -> Iterator[None]:
    """Takes this configuration for every MLP that it can compute, or none, in place of the table's: for tests and measurements.

    Args:
        config: one of the architecture's `candidates`, or None: no MLP runs in one kernel.
    """
    global _forced
    previous, _forced = _forced, (config,)
    try:
        yield
    finally:
        _forced = previous


def fused_mlp_in_force() -> tuple[Config | None, ...]:
    """The choices that `use_fused_mlp` sets instead of the table's; empty outside of it."""
    return _forced


def fused_mlp_forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    matmul_dtype: torch.dtype,
    *,
    norm: tuple[torch.Tensor | None, torch.Tensor | None, float] | None = None,
    branch: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor] | None:
    """x_new, None without a branch, and gamma * mlp(x) in the dtype of the products; or None where this is not to run.

    That is where the table does not name it, and where it cannot: other widths, an empty or misaligned operand, fp32 on a GPU.

    Args:
        x: (..., C). Without a norm it is in the dtype of the products.
        w1, w2: (H, C) and (O, H) of any dtype; b1, b2: (H,) and (O,) or None.
        norm: weight, bias (C,) or None, and eps: x is normalised, after `branch`, of its shape or None, was added.
        gamma: (O,) or None.
    """
    shape, hidden = x.shape, w1.shape[0]
    if shape[-1] != CHANNELS.value or w2.shape[0] != CHANNELS.value:
        return None
    arch, M = architecture(x), x.numel() // CHANNELS.value
    config = select_config(M, hidden, matmul_dtype, FORMS[norm is not None], arch)
    if config is None or hidden % config.hidden or (x.is_cuda and matmul_dtype == torch.float32):
        return None
    if x.is_cuda and norm is not None and serialises(config, x.dtype, arch):
        return None
    x, w1, w2 = x.reshape(-1, shape[-1]), w1.to(matmul_dtype), w2.to(matmul_dtype)
    branch = None if branch is None else branch.reshape(-1, shape[-1])
    streams = [t for t in (x, branch) if t is not None]
    if not (fits(Gemm("triton"), hidden, *streams) and fits(Gemm(config.backend), hidden, w1, w2)):
        return None

    x_new = None
    if branch is not None:
        x_new = x.new_empty(*shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    out = x.new_empty(*shape, dtype=matmul_dtype)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    b1, b2, norm_weight, norm_bias, gamma = (
        None if t is None else t.contiguous() for t in (b1, b2, norm_weight, norm_bias, gamma)
    )
    front, back = (x, branch, x_new, norm_weight, norm_bias), (b2, gamma, out, M, hidden)
    widths = (x.stride(0), 0 if branch is None else branch.stride(0))
    if config.backend == "tma":
        kernel = fused_mlp_forward_descriptor_kernel
        first = (descriptor(w1, [config.hidden, columns]) for columns in (LEFT.value, RIGHT.value))
        second = (descriptor(w2, [columns, config.hidden]) for columns in (LEFT.value, RIGHT.value))
        args = (*front, *first, b1, *second, *back, *widths, eps)
    else:
        kernel = fused_mlp_forward_kernel
        widths += (w1.stride(0), w2.stride(0))
        args = (*front, w1, b1, w2, *back, *widths, eps)
    constexprs = (activation, norm is not None, config.rows, config.hidden, vector(*widths))
    launch(kernel, (cdiv(M, config.rows),), args, constexprs, config.num_warps, config.num_stages)
    return x_new, out


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Every candidate for GELU in bf16: alone, and with all that there may be in front and behind, under autocast and in bf16."""
    for config in candidates(arch):
        for form, wide in (("mlp", "bf16"), ("add_layer_norm_mlp", "fp32"), ("add_layer_norm_mlp", "bf16")):
            stream = torch.float32 if wide == "fp32" else torch.bfloat16
            if form == "mlp" or not serialises(config, stream, arch):
                yield _aot_config(config, form, wide)


def _aot_config(config: Config, form: str, wide: str) -> AotConfig:
    """wide: dtype of the stream and of the parameters that are not cast."""
    norm = form == "add_layer_norm_mlp"
    types = dict.fromkeys(("x_ptr", "b1_ptr", "b2_ptr"), f"*{wide}") | dict(out_ptr="*bf16", eps="fp32")
    types |= dict.fromkeys(("M", "H", "x_stride", "branch_stride"), "i32")
    if norm:
        types |= dict.fromkeys(("x_new_ptr", "norm_weight_ptr", "norm_bias_ptr", "gamma_ptr"), f"*{wide}")
        types |= dict(branch_ptr="*bf16")
    if config.backend == "tma":
        kernel = fused_mlp_forward_descriptor_kernel
        for side, columns in (("left", LEFT.value), ("right", RIGHT.value)):
            types[f"w1_{side}_desc"] = f"tensordesc<bf16[{config.hidden}, {columns}]>"
            types[f"w2_{side}_desc"] = f"tensordesc<bf16[{columns}, {config.hidden}]>"
    else:
        kernel = fused_mlp_forward_kernel
        types |= dict(w1_ptr="*bf16", w2_ptr="*bf16", w1_stride="i32", w2_stride="i32")
    tile = dict(ACTIVATION="gelu", NORM=norm, BLOCK_M=config.rows, HIDDEN=config.hidden, VECTOR=16)
    label = f"{config.rows}x{config.hidden} {form} {'autocast' if wide == 'fp32' else wide}"
    blocks = 2 if config.rows == 64 else None
    options = (config.num_warps, config.num_stages, label)
    return AotConfig(kernel, types, tile, *options, matrix=True, min_blocks_per_sm=blocks)
