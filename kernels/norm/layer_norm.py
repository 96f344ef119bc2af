"""LayerNorm over the last dimension, with the residual addition before it folded in where there is one.

    x_new = x + gamma * drop_path_scale * branch
    y     = (x_new - mean) * rstd * weight + bias

A row stays in registers, so each stream is read once and written once. Statistics and sums are fp32.
Parameter gradients are summed in two steps (`column_sums`): first, each program's rows. Plain loads, no descriptors: Triton 3.6
lost speed on a TMA load that feeds a reduction.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from fastdeit.kernels.norm.layer_norm_kernels import layer_norm_backward_kernel, layer_norm_forward_kernel
from fastdeit.kernels.norm.subsets import SUBSET_WIDTHS, Subsets
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import architecture, multiprocessors
from fastdeit.kernels.runtime.column_sums import Table, sum_later
from fastdeit.kernels.runtime.launch import cdiv, launch, next_power_of_2

MAX_CHANNELS = 8192
_promoted = cache(torch.promote_types)  # which is a call of an operator
_IN_FLIGHT = 32768  # bytes that loads should keep in flight on a multiprocessor: HBM's bandwidth times its latency


@dataclass(frozen=True)
class Config:
    num_warps: int
    backward_programs_per_sm: int  # each writes one row of partial sums

    def backward_stages(self, channels: int, element_bytes: int) -> int:
        """How deep backward's loop over rows is pipelined: rows ahead come to `_IN_FLIGHT` bytes on a multiprocessor.

        Args:
            channels: of a row. 1, no pipeline, for rows that leave no registers to it; a few of those are enough in flight.
            element_bytes: of all streams that the loop reads, for one channel.
        """
        if channels > 4096:
            return 1
        return min(1 + cdiv(_IN_FLIGHT, self.backward_programs_per_sm * channels * element_bytes), 5)


# Architecture -> channels -> what was measured to be the fastest, as `fastdeit tune layer_norm` prints it. Empty: nothing was yet.
CONFIGS: dict[int, dict[int, Config]] = {}


@lru_cache
def select_config(channels: int, arch: int) -> Config:
    """What CONFIGS has, else 8 values of each stream a thread: the fewest registers and no spill in every dtype (16 at 8192).

    Backward runs as many programs as keep `_IN_FLIGHT` bytes in flight with two bf16 streams read three rows ahead, and no more:
    each costs a partial row. From sm_100 on half as many again: more bandwidth waits for what one program does in order.
    """
    if channels in CONFIGS.get(arch, {}):
        return CONFIGS[arch][channels]
    num_warps = min(max(next_power_of_2(channels) // 256, 1), 16)
    in_flight = _IN_FLIGHT * 3 // 2 if 100 <= arch < 120 else _IN_FLIGHT
    programs = max(round(in_flight / (3 * 4 * channels)), 1)
    return Config(num_warps=num_warps, backward_programs_per_sm=programs)


def _as_tokens(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as (B, TOKENS, C) with unit stride along C: a view unless its layout has none."""
    channels = x.shape[-1]
    if x.dim() != 3:
        x = x.reshape(x.shape[0] if x.dim() > 1 else 1, -1, channels)
    return x if x.stride(-1) == 1 or channels == 1 else x.contiguous()


def _vector(channels: int, *tensors: torch.Tensor | None) -> int:
    """The largest power of two up to 16 that divides C and every stride. Dimensions of size 1 are ignored."""
    bits = channels | 16
    for x in tensors:
        if x is not None:
            (samples, tokens, _), (sample_stride, token_stride, _) = x.shape, x.stride()
            bits |= (sample_stride if samples > 1 else 0) | (token_stride if tokens > 1 else 0)
    return bits & -bits


def _dense(*tensors: torch.Tensor | None) -> bool:
    for x in tensors:  # noqa: SIM110, a generator costs a call for each tensor
        if x is not None and not x.is_contiguous():
            return False
    return True


def layer_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    *,
    branch: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    drop_path_scale: torch.Tensor | None = None,
    keep_statistics: bool = True,
    subsets: Subsets | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x (..., C) of any strides, branch like x, drop_path_scale (x.shape[0],) fp32.

    Returns x_new (None without a branch) in the promoted dtype of x and branch, y in out_dtype, mean and rstd (M,) in fp32,
    None without keep_statistics. With subsets branch, and y, mean and rstd, are of the samples that these keep.
    """
    shape, channels = x.shape, x.shape[-1]
    rows = x.numel() // channels
    slots: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    y_shape: tuple[int, ...] = shape
    y_rows, kept = rows, (0, 0)
    if subsets is not None:
        y_shape = (subsets.kept, *shape[1:])
        y_rows = rows // shape[0] * subsets.kept
        slots, kept = (subsets.branch_slots, subsets.slots), (subsets.branch_kept, subsets.kept)
    y = x.new_empty(*y_shape, dtype=out_dtype)
    x_new = mean = rstd = None
    if branch is not None:
        x_new = x.new_empty(*shape, dtype=_promoted(x.dtype, branch.dtype))
    if keep_statistics:
        mean, rstd = x.new_empty(y_rows, dtype=torch.float32), x.new_empty(y_rows, dtype=torch.float32)
    if rows == 0:
        return x_new, y, mean, rstd
    x = _as_tokens(x)
    strides = x_strides = x.stride()[:2]
    if branch is not None:
        branch = _as_tokens(branch)
        strides = branch.stride()[:2]
    config = config or select_config(channels, architecture(x))
    launch(
        layer_norm_forward_kernel,
        (rows,),
        (
            x,
            branch,
            gamma,
            drop_path_scale,
            weight,
            bias,
            x_new,
            y,
            mean,
            rstd,
            *slots,
            x.shape[1],
            *kept,
            *x_strides,
            *strides,
            eps,
        ),
        (channels, next_power_of_2(channels), _vector(channels, x, branch), _dense(x, branch)),
        config.num_warps,
    )
    return x_new, y, mean, rstd


def layer_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    dx_new: torch.Tensor | None = None,
    branch: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    drop_path_scale: torch.Tensor | None = None,
    dx_dtype: torch.dtype | None = None,
    dbranch_dtype: torch.dtype | None = None,
    dweight_dtype: torch.dtype | None = None,
    dbias_dtype: torch.dtype | None = None,
    dgamma_dtype: torch.dtype | None = None,
    later: list[Table] | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, branch, weight, bias and gamma, each in the dtype asked for and None where none is.

    x is what was normalised (x_new where there was a branch); branch is needed for gamma's gradient only. With `later` those of
    the parameters are there once `add_partial_sums` has run on it.
    """
    shape, channels = x.shape, x.shape[-1]
    rows = x.numel() // channels

    def empty(dtype, *sizes):
        return None if dtype is None else x.new_empty(*sizes, dtype=dtype)

    dx, dbranch = empty(dx_dtype, *shape), empty(dbranch_dtype, *shape)
    sums = [empty(dtype, channels) for dtype in (dweight_dtype, dbias_dtype, dgamma_dtype)]
    if rows == 0:
        return dx, dbranch, *(s if s is None else s.zero_() for s in sums)
    wanted = [s for s in sums if s is not None]
    config = config or select_config(channels, architecture(x))
    programs = min(rows, config.backward_programs_per_sm * multiprocessors(x))
    partial = x.new_empty(len(wanted), programs, channels, dtype=torch.float32) if wanted else None
    tables = () if partial is None else partial.unbind(0)
    next_table = iter(tables)
    dy, x = _as_tokens(dy), _as_tokens(x)
    dx_new = None if dx_new is None else _as_tokens(dx_new)
    branch = None if branch is None or dgamma_dtype is None else _as_tokens(branch)
    strided = [t if t is not None else x for t in (dy, dx_new, x, branch)]
    element_bytes = sum(t.element_size() for t in (dy, dx_new, x, branch) if t is not None)
    launch(
        layer_norm_backward_kernel,
        (programs,),
        (
            dy,
            dx_new,
            x,
            mean,
            rstd,
            weight,
            branch,
            gamma,
            drop_path_scale,
            dx,
            dbranch,
            *(None if s is None else next(next_table) for s in sums),
            rows,
            x.shape[1],
            *(stride for t in strided for stride in t.stride()[:2]),
        ),
        (
            channels,
            next_power_of_2(channels),
            _vector(channels, dy, dx_new, x, branch),
            _dense(dy, dx_new, x, branch),
            config.backward_stages(channels, element_bytes),
        ),
        config.num_warps,
    )
    sum_later(later, *zip(tables, wanted, strict=True))
    return dx, dbranch, *sums


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """The widths of DeiT and DeiT III, bf16 models and bf16 autocast with everything folded in, and the widest row there is.

    Under autocast a model's backward is `folded_layer_norm_backward_kernel`: this one, of `ops.add_layer_norm`, at one width and
    the widest. `SUBSET_WIDTHS` have the branches on subsets of samples of a model under autocast, in front of folded weights.
    """
    strides = ("x_sample_stride", "x_token_stride", "branch_sample_stride", "branch_token_stride")
    backward_strides = ("dy_sample_stride", "dy_token_stride", "dx_new_sample_stride", "dx_new_token_stride", *strides)
    for channels in (192, 384, 768, 1024, 1280, MAX_CHANNELS):
        config = select_config(channels, arch)
        tile = dict(C=channels, CHANNELS=next_power_of_2(channels), VECTOR=16, DENSE=True)
        for label, x, low, residual in (("bf16", "*bf16", "*bf16", False), ("autocast", "*fp32", "*bf16", True)):
            if channels == MAX_CHANNELS and not residual:
                continue
            forward = dict(x_ptr=x, weight_ptr=x, bias_ptr=x, y_ptr=low, mean_ptr="*fp32", rstd_ptr="*fp32")
            backward = dict(dy_ptr=low, x_ptr=x, mean_ptr="*fp32", rstd_ptr="*fp32", weight_ptr=x, dx_ptr=x)
            backward |= dict(dweight_partial_ptr="*fp32", dbias_partial_ptr="*fp32")
            if residual:
                forward |= dict(branch_ptr=low, gamma_ptr=x, drop_path_scale_ptr="*fp32", x_new_ptr=x)
                backward |= dict(dx_new_ptr=x, branch_ptr=low, gamma_ptr=x, drop_path_scale_ptr="*fp32")
                backward |= dict(dbranch_ptr=low, dgamma_partial_ptr="*fp32")
            forward |= dict(eps="fp32") | dict.fromkeys(("TOKENS", "branch_kept", "kept", *strides), "i32")
            backward |= dict(M="i32", TOKENS="i32") | dict.fromkeys(backward_strides, "i32")
            label = f"C={channels} {label}"
            yield AotConfig(layer_norm_forward_kernel, forward, tile, config.num_warps, 1, label, matrix=False)
            if residual and channels not in (768, MAX_CHANNELS):
                continue
            element_bytes = 2 + 4 + 4 + 2 if residual else 2 + 2
            tile_backward = tile | dict(STAGES=config.backward_stages(channels, element_bytes))
            yield AotConfig(
                layer_norm_backward_kernel, backward, tile_backward, config.num_warps, 1, label, matrix=False
            )
    for channels in SUBSET_WIDTHS:
        types = dict(x_ptr="*fp32", branch_ptr="*bf16", drop_path_scale_ptr="*fp32", x_new_ptr="*fp32", y_ptr="*bf16")
        types |= dict(mean_ptr="*fp32", rstd_ptr="*fp32", branch_slots_ptr="*i64", slots_ptr="*i64", eps="fp32")
        types |= dict.fromkeys(("TOKENS", "branch_kept", "kept", *strides), "i32")
        tile = dict(C=channels, CHANNELS=next_power_of_2(channels), VECTOR=16, DENSE=True)
        config, label = select_config(channels, arch), f"C={channels} autocast, subsets"
        yield AotConfig(layer_norm_forward_kernel, types, tile, config.num_warps, 1, label, matrix=False)
