"""The MLP of DeiT-Ti in one kernel, for inference: 192 channels, the hidden activation never leaves the chip.

    out = gamma * (activation(x W1^T + b1) W2^T + b2)

with x as it is, or as the residual addition and LayerNorm in front of it make it:

    x_new = x + branch,   x = (x_new - mean) * rstd * weight + bias

192 channels are 128 and 64, each a tile of its own: as one they would be padded to 256. A row of fp32 results then fits into
registers beside a block of hidden columns; 384 channels do not. Against two products and what surrounds them it saves 8 bytes of
traffic a token and hidden column, but multiplies at a rate that nobody has measured: it runs only where a table names it.

Adding the result to the stream is left to the LayerNorm after it: here an fp32 stream would spill registers up to sm_90.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from fastdeit.kernels.gemm.config import Gemm
from fastdeit.kernels.gemm.forward import fits, vector
from fastdeit.kernels.gemm.tiles import in_range_of, multiple
from fastdeit.kernels.mlp.activation_functions import activate
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import architecture, has_descriptors, pointer_stages
from fastdeit.kernels.runtime.launch import cdiv, descriptor, launch

CHANNELS = tl.constexpr(192)
LEFT = tl.constexpr(128)  # of the channels
RIGHT = tl.constexpr(64)

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
WHOLE_MLPS: dict[int, tuple[Measured, ...]] = {}

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
    for entry in WHOLE_MLPS.get(arch, ()):
        if (hidden, dtype, form) == (entry.hidden, entry.dtype, entry.form) and M in entry.rows:
            return entry.config
    return None


@contextlib.contextmanager
def use_whole_mlp(config: Config | None) -> Iterator[None]:
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


def whole_mlp_in_force() -> tuple[Config | None, ...]:
    """What `use_whole_mlp` put in the place of the table's choices; empty outside of it."""
    return _forced


# ---- pieces of the kernels. A piece is ROWS rows from row0 on, and COLUMNS of the channels from COL0 on.


@triton.jit
def _load(ptr, row_stride, row0, M, COL0: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros past M."""
    row, col = tl.arange(0, ROWS), tl.arange(0, COLUMNS) + COL0
    at = row[:, None] * row_stride + col[None, :]
    return tl.load(ptr + row0.to(tl.int64) * row_stride + at, (row < M - row0)[:, None], other=0.0)


@triton.jit
def _add(
    x, branch_ptr, branch_stride, x_new_ptr, row0, M, COL0: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """x + branch, fp32, and stored. Rounded to the stream's dtype first, as all others see it."""
    if branch_ptr is not None:
        x = x.to(tl.float32) + _load(branch_ptr, branch_stride, row0, M, COL0, ROWS, COLUMNS).to(tl.float32)
        x = x.to(x_new_ptr.dtype.element_ty)
        row, col = tl.arange(0, ROWS), tl.arange(0, COLUMNS) + COL0
        at = row[:, None] * CHANNELS + col[None, :]
        tl.store(x_new_ptr + row0.to(tl.int64) * CHANNELS + at, x, (row < M - row0)[:, None])
    return x.to(tl.float32)


@triton.jit
def _affine(x_hat, weight_ptr, bias_ptr, COL0: tl.constexpr, COLUMNS: tl.constexpr):
    col = tl.arange(0, COLUMNS) + COL0
    if weight_ptr is not None:
        x_hat *= tl.load(weight_ptr + col).to(tl.float32)[None, :]
    if bias_ptr is not None:
        x_hat += tl.load(bias_ptr + col).to(tl.float32)[None, :]
    return x_hat


@triton.jit
def _front(
    x_ptr, branch_ptr, x_new_ptr, norm_weight_ptr, norm_bias_ptr, x_stride, branch_stride, eps, row0, M,
    dtype: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The first product's input, left and right."""
    x_stride, branch_stride = multiple(x_stride, VECTOR), multiple(branch_stride, VECTOR)
    left = _load(x_ptr, x_stride, row0, M, 0, ROWS, LEFT)
    right = _load(x_ptr, x_stride, row0, M, LEFT, ROWS, RIGHT)
    if NORM:
        left = _add(left, branch_ptr, branch_stride, x_new_ptr, row0, M, 0, ROWS, LEFT)
        right = _add(right, branch_ptr, branch_stride, x_new_ptr, row0, M, LEFT, ROWS, RIGHT)
        mean = (tl.sum(left, axis=1) + tl.sum(right, axis=1)) / CHANNELS
        left -= mean[:, None]
        right -= mean[:, None]
        rstd = tl.rsqrt((tl.sum(left * left, axis=1) + tl.sum(right * right, axis=1)) / CHANNELS + eps)
        left = _affine(left * rstd[:, None], norm_weight_ptr, norm_bias_ptr, 0, LEFT)
        right = _affine(right * rstd[:, None], norm_weight_ptr, norm_bias_ptr, LEFT, RIGHT)
    return left.to(dtype), right.to(dtype)


@triton.jit
def _hidden(z, b1_ptr, start, dtype: tl.constexpr, ACTIVATION: tl.constexpr, HIDDEN: tl.constexpr):
    """Of the first product's columns from `start` on, the second product's input."""
    if b1_ptr is not None:
        z += tl.load(b1_ptr + start + tl.arange(0, HIDDEN)).to(tl.float32)[None, :]
    return activate(in_range_of(z, dtype), ACTIVATION).to(dtype)


@triton.jit
def _finish(
    acc, b2_ptr, gamma_ptr, out_ptr, row0, M,
    dtype: tl.constexpr, COL0: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, col = row0 + tl.arange(0, ROWS), tl.arange(0, COLUMNS) + COL0
    if b2_ptr is not None:
        acc += tl.load(b2_ptr + col).to(tl.float32)[None, :]
    if gamma_ptr is not None:
        acc = in_range_of(acc, dtype) * tl.load(gamma_ptr + col).to(tl.float32)[None, :]
    # Offsets unlike those of the loads: the compiler would keep shared ones in registers through the loop, and spill.
    at = row.to(tl.int64)[:, None] * CHANNELS + col[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), (row < M)[:, None])


@triton.jit(do_not_specialize=["M", "H", "x_stride", "branch_stride", "w1_stride", "w2_stride"])
def whole_mlp_forward_kernel(
    x_ptr,  # (M, CHANNELS), row stride x_stride
    branch_ptr,  # (M, CHANNELS), row stride branch_stride, or None
    x_new_ptr,  # (M, CHANNELS), None without a branch
    norm_weight_ptr,  # (CHANNELS,) or None
    norm_bias_ptr,  # (CHANNELS,) or None
    w1_ptr,  # (H, CHANNELS), row stride w1_stride, in the dtype of the products
    b1_ptr,  # (H,) or None
    w2_ptr,  # (CHANNELS, H), row stride w2_stride, likewise
    b2_ptr,  # (CHANNELS,) or None
    gamma_ptr,  # (CHANNELS,) or None
    out_ptr,  # (M, CHANNELS)
    M,
    H,  # a multiple of HIDDEN
    x_stride,
    branch_stride,
    w1_stride,
    w2_stride,
    eps,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,  # whether there is a LayerNorm in front, and before it a branch to add
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides H and all strides: lets loads be 16 bytes wide
):
    """A program owns ROWS rows."""
    dtype: tl.constexpr = w1_ptr.dtype.element_ty
    row0 = tl.program_id(0) * ROWS
    x_left, x_right = _front(
        x_ptr, branch_ptr, x_new_ptr, norm_weight_ptr, norm_bias_ptr, x_stride, branch_stride, eps, row0, M,
        dtype, NORM, ROWS, VECTOR,
    )  # fmt: skip
    w1_stride, w2_stride = multiple(w1_stride, VECTOR), multiple(w2_stride, VECTOR)
    left_col, right_col, hidden = tl.arange(0, LEFT), tl.arange(0, RIGHT) + LEFT, tl.arange(0, HIDDEN)
    w1 = w1_ptr + hidden[None, :] * w1_stride
    w2 = w2_ptr + hidden[:, None]
    left = tl.zeros([ROWS, LEFT], tl.float32)
    right = tl.zeros([ROWS, RIGHT], tl.float32)
    for start in tl.range(0, multiple(H, HIDDEN), HIDDEN):
        z = tl.dot(x_left, tl.load(w1 + left_col[:, None]), input_precision="ieee")
        z = tl.dot(x_right, tl.load(w1 + right_col[:, None]), z, input_precision="ieee")
        h = _hidden(z, b1_ptr, start, dtype, ACTIVATION, HIDDEN)
        left = tl.dot(h, tl.load(w2 + left_col[None, :] * w2_stride), left, input_precision="ieee")
        right = tl.dot(h, tl.load(w2 + right_col[None, :] * w2_stride), right, input_precision="ieee")
        w1 += HIDDEN * w1_stride
        w2 += HIDDEN
    _finish(left, b2_ptr, gamma_ptr, out_ptr, row0, M, dtype, 0, ROWS, LEFT)
    _finish(right, b2_ptr, gamma_ptr, out_ptr, row0, M, dtype, LEFT, ROWS, RIGHT)


@triton.jit(do_not_specialize=["M", "H", "x_stride", "branch_stride"])
def whole_mlp_forward_descriptor_kernel(
    x_ptr,  # as above; read once, so that only weights come by descriptors
    branch_ptr,
    x_new_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    w1_left_desc,  # of w1 (H, CHANNELS), block [HIDDEN, LEFT]
    w1_right_desc,  # block [HIDDEN, RIGHT]
    b1_ptr,
    w2_left_desc,  # of w2 (CHANNELS, H), block [LEFT, HIDDEN]
    w2_right_desc,  # block [RIGHT, HIDDEN]
    b2_ptr,
    gamma_ptr,
    out_ptr,
    M,
    H,
    x_stride,
    branch_stride,
    eps,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program owns ROWS rows."""
    dtype: tl.constexpr = w1_left_desc.dtype
    row0 = tl.program_id(0) * ROWS
    x_left, x_right = _front(
        x_ptr, branch_ptr, x_new_ptr, norm_weight_ptr, norm_bias_ptr, x_stride, branch_stride, eps, row0, M,
        dtype, NORM, ROWS, VECTOR,
    )  # fmt: skip
    left = tl.zeros([ROWS, LEFT], tl.float32)
    right = tl.zeros([ROWS, RIGHT], tl.float32)
    for start in tl.range(0, H, HIDDEN):
        z = tl.dot(x_left, w1_left_desc.load([start, 0]).T)
        z = tl.dot(x_right, w1_right_desc.load([start, LEFT]).T, z)
        h = _hidden(z, b1_ptr, start, dtype, ACTIVATION, HIDDEN)
        left = tl.dot(h, w2_left_desc.load([0, start]).T, left)
        right = tl.dot(h, w2_right_desc.load([LEFT, start]).T, right)
    _finish(left, b2_ptr, gamma_ptr, out_ptr, row0, M, dtype, 0, ROWS, LEFT)
    _finish(right, b2_ptr, gamma_ptr, out_ptr, row0, M, dtype, LEFT, ROWS, RIGHT)


def whole_mlp_forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    products: torch.dtype,
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
    config = select_config(M, hidden, products, FORMS[norm is not None], arch)
    if config is None or hidden % config.hidden or (x.is_cuda and products == torch.float32):
        return None
    if x.is_cuda and norm is not None and serialises(config, x.dtype, arch):
        return None
    x, w1, w2 = x.reshape(-1, shape[-1]), w1.to(products), w2.to(products)
    branch = None if branch is None else branch.reshape(-1, shape[-1])
    streams = [t for t in (x, branch) if t is not None]
    if not (fits(Gemm("triton"), hidden, *streams) and fits(Gemm(config.backend), hidden, w1, w2)):
        return None

    x_new = None
    if branch is not None:
        x_new = x.new_empty(shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    out = x.new_empty(shape, dtype=products)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    b1, b2, norm_weight, norm_bias, gamma = (
        None if t is None else t.contiguous() for t in (b1, b2, norm_weight, norm_bias, gamma)
    )
    front, back = (x, branch, x_new, norm_weight, norm_bias), (b2, gamma, out, M, hidden)
    widths = (x.stride(0), 0 if branch is None else branch.stride(0))
    if config.backend == "tma":
        kernel = whole_mlp_forward_descriptor_kernel
        first = (descriptor(w1, [config.hidden, columns]) for columns in (LEFT.value, RIGHT.value))
        second = (descriptor(w2, [columns, config.hidden]) for columns in (LEFT.value, RIGHT.value))
        args = (*front, *first, b1, *second, *back, *widths, eps)
    else:
        kernel = whole_mlp_forward_kernel
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
        kernel = whole_mlp_forward_descriptor_kernel
        for side, columns in (("left", LEFT.value), ("right", RIGHT.value)):
            types[f"w1_{side}_desc"] = f"tensordesc<bf16[{config.hidden}, {columns}]>"
            types[f"w2_{side}_desc"] = f"tensordesc<bf16[{columns}, {config.hidden}]>"
    else:
        kernel = whole_mlp_forward_kernel
        types |= dict(w1_ptr="*bf16", w2_ptr="*bf16", w1_stride="i32", w2_stride="i32")
    tile = dict(ACTIVATION="gelu", NORM=norm, ROWS=config.rows, HIDDEN=config.hidden, VECTOR=16)
    label = f"{config.rows}x{config.hidden} {form} {'autocast' if wide == 'fp32' else wide}"
    blocks = 2 if config.rows == 64 else None
    options = (config.num_warps, config.num_stages, label)
    return AotConfig(kernel, types, tile, *options, matrix=True, min_blocks_per_sm=blocks)
