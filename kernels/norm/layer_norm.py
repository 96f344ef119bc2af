"""LayerNorm over the last dimension, with the residual addition before it folded in where there is one.

    x_new = x + gamma * drop_path_scale * branch
    y     = (x_new - mean) * rstd * weight + bias

A row stays in registers, so each stream is read once and written once. Statistics and sums are fp32.
Parameter gradients are summed in two steps (`column_sums`): first, each program's rows. Plain loads, no descriptors: Triton 3.6
lost speed on a TMA load that feeds a reduction.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import architecture, multiprocessors
from fastdeit.kernels.runtime.column_sums import add_partial_sums, sum_pairs
from fastdeit.kernels.runtime.launch import cdiv, launch, next_power_of_2

MAX_CHANNELS = 8192
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


@triton.jit
def _row_offset(row, TOKENS, sample_stride, token_stride, C: tl.constexpr, VECTOR: tl.constexpr, DENSE: tl.constexpr):
    # The division by TOKENS alone is a fifth of the instructions of a bf16 row: contiguous streams do without.
    if DENSE:
        return row.to(tl.int64) * C
    # int64: B * N * C passes 2^31 at batch sizes people use. Rows themselves fit 32 bits, as a grid does, and dividing in 64 is a
    # function call, across which the compiler spills registers. The hint stands on the scalar that is added to the columns: on
    # the strides it is lost, and loads are one element wide.
    sample = row // TOKENS
    token = row - sample * TOKENS
    offset = sample.to(tl.int64) * sample_stride + token.to(tl.int64) * token_stride
    return tl.multiple_of(offset, VECTOR)


@triton.jit(
    do_not_specialize=["TOKENS", "x_sample_stride", "x_token_stride", "branch_sample_stride", "branch_token_stride"]
)
def layer_norm_forward_kernel(
    x_ptr,  # (B, TOKENS, C), strides (x_sample_stride, x_token_stride, 1)
    branch_ptr,  # (B, TOKENS, C) strided likewise, or None
    gamma_ptr,  # (C,) or None
    drop_path_scale_ptr,  # (B,) fp32 or None
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    x_new_ptr,  # (B * TOKENS, C), None without a branch
    y_ptr,  # (B * TOKENS, C)
    mean_ptr,  # (B * TOKENS,) fp32, None when no gradient will be asked for
    rstd_ptr,  # (B * TOKENS,) fp32, likewise
    TOKENS,
    x_sample_stride,
    x_token_stride,
    branch_sample_stride,
    branch_token_stride,
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,  # C rounded up to a power of two
    VECTOR: tl.constexpr,  # a power of two that divides every stride and C: lets loads be 16 bytes wide
    DENSE: tl.constexpr,  # x and branch are contiguous
):
    """A program owns one row."""
    row = tl.program_id(0)
    col = tl.arange(0, CHANNELS)
    inside = col < C
    dense = row.to(tl.int64) * C + col

    x_row = _row_offset(row, TOKENS, x_sample_stride, x_token_stride, C, VECTOR, DENSE)
    x = tl.load(x_ptr + x_row + col, inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch_row = _row_offset(row, TOKENS, branch_sample_stride, branch_token_stride, C, VECTOR, DENSE)
        branch = tl.load(branch_ptr + branch_row + col, inside, other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            branch *= tl.load(gamma_ptr + col, inside, other=0.0).to(tl.float32)
        if drop_path_scale_ptr is not None:
            branch *= tl.load(drop_path_scale_ptr + row // TOKENS)
        # Rounded to the residual stream's dtype first, so that backward, which reads x_new, sees what the statistics saw.
        x_new = (x + branch).to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + dense, x_new, inside)
        x = x_new.to(tl.float32)

    mean = tl.sum(x, axis=0) / C
    centred = tl.where(inside, x - mean, 0.0)  # padding must not count in the variance
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / C + eps)
    y = centred * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + col, inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + dense, y.to(y_ptr.dtype.element_ty), inside)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit(
    do_not_specialize=[
        *("M", "TOKENS", "x_sample_stride", "x_token_stride", "branch_sample_stride", "branch_token_stride"),
        *("dy_sample_stride", "dy_token_stride", "dx_new_sample_stride", "dx_new_token_stride"),
    ]
)
def layer_norm_backward_kernel(
    dy_ptr,  # (B, TOKENS, C), strided as x
    dx_new_ptr,  # (B, TOKENS, C), the gradient of the residual stream after this layer, or None
    x_ptr,  # (B, TOKENS, C), what was normalised
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    weight_ptr,  # (C,) or None
    branch_ptr,  # (B, TOKENS, C), only where gamma's gradient is wanted
    gamma_ptr,  # (C,) or None
    drop_path_scale_ptr,  # (B,) fp32 or None
    dx_ptr,  # (M, C) or None
    dbranch_ptr,  # (M, C) or None
    dweight_partial_ptr,  # (programs, C) fp32 or None
    dbias_partial_ptr,  # (programs, C) fp32 or None
    dgamma_partial_ptr,  # (programs, C) fp32 or None
    M,  # B * TOKENS
    TOKENS,
    dy_sample_stride,
    dy_token_stride,
    dx_new_sample_stride,
    dx_new_token_stride,
    x_sample_stride,
    x_token_stride,
    branch_sample_stride,
    branch_token_stride,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
    DENSE: tl.constexpr,  # all inputs of rows are contiguous
    STAGES: tl.constexpr,  # of the loop's pipeline; 1 for rows too wide to keep weight and gamma in registers
):
    """A program owns every num_programs-th row, and one row of each table of partial sums."""
    col = tl.arange(0, CHANNELS)
    inside = col < C
    dweight = tl.zeros([CHANNELS], tl.float32)
    dbias = tl.zeros([CHANNELS], tl.float32)
    dgamma = tl.zeros([CHANNELS], tl.float32)
    if STAGES > 1:
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + col, inside, other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            gamma = tl.load(gamma_ptr + col, inside, other=0.0).to(tl.float32)
    for index in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=STAGES):
        row = tl.full([], 0, tl.int32) + index  # a tensor under the interpreter too
        dense = row.to(tl.int64) * C + col
        dy_row = _row_offset(row, TOKENS, dy_sample_stride, dy_token_stride, C, VECTOR, DENSE)
        x_row = _row_offset(row, TOKENS, x_sample_stride, x_token_stride, C, VECTOR, DENSE)
        dy = tl.load(dy_ptr + dy_row + col, inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + x_row + col, inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        x_hat = (x - mean) * rstd  # past C anything finite, or NaN as in all of the row: dy is zero there
        if dbias_partial_ptr is not None:
            dbias += dy
        if dweight_partial_ptr is not None:
            dweight += dy * x_hat
        if weight_ptr is not None:
            if STAGES == 1:
                weight = tl.load(weight_ptr + col, inside, other=0.0).to(tl.float32)
            dy *= weight
        if STAGES == 1:  # with both sums at once the widest rows would spill more
            along_x_hat, along_one = tl.sum(dy * x_hat, axis=0), tl.sum(dy, axis=0)
        else:
            along_x_hat, along_one = sum_pairs(dy * x_hat, dy, axis=0)
        dx = (dy - x_hat * (along_x_hat / C) - along_one / C) * rstd
        if dx_new_ptr is not None:
            dx_new_row = _row_offset(row, TOKENS, dx_new_sample_stride, dx_new_token_stride, C, VECTOR, DENSE)
            dx += tl.load(dx_new_ptr + dx_new_row + col, inside, other=0.0).to(tl.float32)
        if dx_ptr is not None:
            tl.store(dx_ptr + dense, dx.to(dx_ptr.dtype.element_ty), inside)
        if drop_path_scale_ptr is not None:
            dx *= tl.load(drop_path_scale_ptr + row // TOKENS)
        if dgamma_partial_ptr is not None:
            branch_row = _row_offset(row, TOKENS, branch_sample_stride, branch_token_stride, C, VECTOR, DENSE)
            branch = tl.load(branch_ptr + branch_row + col, inside, other=0.0).to(tl.float32)
            dgamma += tl.where(inside, dx * branch, 0.0)
        if dbranch_ptr is not None:
            if gamma_ptr is not None:
                if STAGES == 1:
                    gamma = tl.load(gamma_ptr + col, inside, other=0.0).to(tl.float32)
                dx *= gamma
            tl.store(dbranch_ptr + dense, dx.to(dbranch_ptr.dtype.element_ty), inside)

    partial = tl.program_id(0) * C + col
    if dweight_partial_ptr is not None:
        tl.store(dweight_partial_ptr + partial, dweight, inside)
    if dbias_partial_ptr is not None:
        tl.store(dbias_partial_ptr + partial, dbias, inside)
    if dgamma_partial_ptr is not None:
        tl.store(dgamma_partial_ptr + partial, dgamma, inside)


def _as_tokens(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as (B, TOKENS, C) with unit stride along C: a view unless its layout has none."""
    channels = x.shape[-1]
    if x.dim() != 3:
        x = x.reshape(x.shape[0] if x.dim() > 1 else 1, -1, channels)
    return x if x.stride(-1) == 1 or channels == 1 else x.contiguous()


def _vector(channels: int, *tensors: torch.Tensor | None) -> int:
    """The largest power of two up to 16 that divides C and every stride. A dimension of size 1 has no say."""
    bits = channels | 16
    for x in tensors:
        if x is not None:
            (samples, tokens, _), (sample_stride, token_stride, _) = x.shape, x.stride()
            bits |= (sample_stride if samples > 1 else 0) | (token_stride if tokens > 1 else 0)
    return bits & -bits


def _dense(*tensors: torch.Tensor | None) -> bool:
    return all(x is None or x.is_contiguous() for x in tensors)


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
    config: Config | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x (..., C) of any strides, branch like x, drop_path_scale (x.shape[0],) fp32.

    Returns x_new (None without a branch) in the promoted dtype of x and branch, y in out_dtype, mean and rstd (M,) in fp32,
    None without keep_statistics.
    """
    shape, channels = x.shape, x.shape[-1]
    rows = x.numel() // channels
    y = x.new_empty(shape, dtype=out_dtype)
    x_new = mean = rstd = None
    if branch is not None:
        x_new = x.new_empty(shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    if keep_statistics:
        mean, rstd = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
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
            *(x, branch, gamma, drop_path_scale, weight, bias, x_new, y, mean, rstd),
            *(x.shape[1], *x_strides, *strides, eps),
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
    config: Config | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, branch, weight, bias and gamma, each in the dtype asked for and None where none is.

    x is what was normalised (x_new where there was a branch); branch is needed for gamma's gradient only.
    """
    shape, channels = x.shape, x.shape[-1]
    rows = x.numel() // channels

    def empty(size, dtype):
        return None if dtype is None else x.new_empty(size, dtype=dtype)

    dx, dbranch = empty(shape, dx_dtype), empty(shape, dbranch_dtype)
    sums = [empty(channels, dtype) for dtype in (dweight_dtype, dbias_dtype, dgamma_dtype)]
    if rows == 0:
        return dx, dbranch, *(s if s is None else s.zero_() for s in sums)
    wanted = [s for s in sums if s is not None]
    config = config or select_config(channels, architecture(x))
    programs = min(rows, config.backward_programs_per_sm * multiprocessors(x))
    partial = x.new_empty((len(wanted), programs, channels), dtype=torch.float32) if wanted else None
    tables = iter(partial.unbind(0) if wanted else ())
    dy, x = _as_tokens(dy), _as_tokens(x)
    dx_new = None if dx_new is None else _as_tokens(dx_new)
    branch = None if branch is None or dgamma_dtype is None else _as_tokens(branch)
    strided = [t if t is not None else x for t in (dy, dx_new, x, branch)]
    element_bytes = sum(t.element_size() for t in (dy, dx_new, x, branch) if t is not None)
    launch(
        layer_norm_backward_kernel,
        (programs,),
        (
            *(dy, dx_new, x, mean, rstd, weight, branch, gamma, drop_path_scale, dx, dbranch),
            *(None if s is None else next(tables) for s in sums),
            *(rows, x.shape[1]),
            *(stride for t in strided for stride in t.stride()[:2]),
        ),
        (
            *(channels, next_power_of_2(channels), _vector(channels, dy, dx_new, x, branch)),
            _dense(dy, dx_new, x, branch),
            config.backward_stages(channels, element_bytes),
        ),
        config.num_warps,
    )
    if wanted:
        add_partial_sums(*zip(partial, wanted, strict=True))
    return dx, dbranch, *sums


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """The widths of DeiT and DeiT III, bf16 models and bf16 autocast with everything folded in, and the widest row there is."""
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
            forward |= dict(TOKENS="i32", eps="fp32") | dict.fromkeys(strides, "i32")
            backward |= dict(M="i32", TOKENS="i32") | dict.fromkeys(backward_strides, "i32")
            label = f"C={channels} {label}"
            yield AotConfig(layer_norm_forward_kernel, forward, tile, config.num_warps, 1, label, matrix=False)
            element_bytes = 2 + 4 + 4 + 2 if residual else 2 + 2
            tile_backward = tile | dict(STAGES=config.backward_stages(channels, element_bytes))
            yield AotConfig(
                layer_norm_backward_kernel, backward, tile_backward, config.num_warps, 1, label, matrix=False
            )
