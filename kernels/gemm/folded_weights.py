"""Per-channel factors and shifts folded into a layer's weight, W' = s_row * W * s_column, and their gradients.

A LayerNorm before a linear layer, or a LayerScale after it, costs no pass over the tokens if its parameters go into the layer's
weight as that is cast for the product. These kernels pass over the weight once, where PyTorch's operations take up to five times.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastdeit.kernels.gemm.folded_weights_kernels import (
    fold_both_forward_kernel,
    fold_columns_backward_kernel,
    fold_forward_kernel,
    fold_four_forward_kernel,
    fold_rows_backward_kernel,
)
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.column_sums import Table, row_strips, sum_later
from fastdeit.kernels.runtime.launch import cdiv, launch, next_power_of_2

_BLOCK_STRIPS = 64  # of a bias's partial sums, added at a time: of 8 rows 4 a thread


@dataclass(frozen=True)
class Config:
    rows: int  # of a program's step
    columns: int
    num_warps: int


def select_config(columns: int) -> Config:
    """2048 elements a step, 16 a thread, in rows of 256 or of what a narrower weight has."""
    width = min(next_power_of_2(columns), 256)
    return Config(rows=2048 // width, columns=width, num_warps=4)


def fold_forward(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    column_scale: torch.Tensor | None = None,
    column_shift: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """row_scale * weight * column_scale (N, C) and row_scale * (bias + weight column_shift) (N,), rounded once to dtype.

    What is None does nothing; the second is None without bias and shift. What nothing changes is returned as it is.
    """
    if column_scale is column_shift is row_scale is None and weight.dtype == dtype:
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        return weight, _contiguous(bias)
    weight, bias, column_scale, column_shift, row_scale = map(
        _contiguous, (weight, bias, column_scale, column_shift, row_scale)
    )
    outputs, channels = weight.shape
    folded = weight.new_empty(outputs, channels, dtype=dtype)
    shifts = bias is not None or column_shift is not None
    folded_bias = weight.new_empty(outputs, dtype=dtype) if shifts else None
    if outputs:
        config = select_config(channels)
        launch(
            fold_forward_kernel,
            (cdiv(outputs, config.rows),),
            (weight, bias, column_scale, column_shift, row_scale, folded, folded_bias, outputs, channels),
            _constexprs(config, channels),
            config.num_warps,
        )
    return folded, folded_bias


Layer = tuple[torch.Tensor, torch.Tensor | None]  # weight (N, C) and bias (N,)


def fold_both_forward(
    head: Layer,
    tail: Layer,
    dtype: torch.dtype,
    *,
    column_scale: torch.Tensor | None,
    column_shift: torch.Tensor | None,
    row_scale: torch.Tensor | None,
) -> tuple[Layer, Layer]:
    """`fold_forward` of a branch's first layer by columns and of its last one by rows, in one launch where both change."""
    of_head, of_tail = dict(column_scale=column_scale, column_shift=column_shift), dict(row_scale=row_scale)
    changes = head[0].dtype != dtype and (tail[0].dtype != dtype or row_scale is not None)
    if not changes or not head[0].numel() or not tail[0].numel():
        return fold_forward(*head, dtype, **of_head), fold_forward(*tail, dtype, **of_tail)
    (weight0, bias0), (weight1, bias1) = (map(_contiguous, layer) for layer in (head, tail))
    column_scale, column_shift, row_scale = map(_contiguous, (column_scale, column_shift, row_scale))
    (N0, C0), (N1, C1) = weight0.shape, weight1.shape
    folded0, folded1 = (torch.empty_like(weight, dtype=dtype) for weight in (weight0, weight1))
    folded_bias0 = None if bias0 is column_shift is None else weight0.new_empty(N0, dtype=dtype)
    folded_bias1 = None if bias1 is None else weight1.new_empty(N1, dtype=dtype)
    config = select_config(min(C0, C1))
    launch(
        fold_both_forward_kernel,
        (cdiv(N0, config.rows) + cdiv(N1, config.rows),),
        (
            weight0,
            bias0,
            column_scale,
            column_shift,
            folded0,
            folded_bias0,
            weight1,
            bias1,
            row_scale,
            folded1,
            folded_bias1,
            N0,
            C0,
            N1,
            C1,
        ),
        (config.rows, config.columns, min(C0 & -C0, C1 & -C1, 16)),
        config.num_warps,
    )
    return (folded0, folded_bias0), (folded1, folded_bias1)


Call = tuple[tuple[int, ...], tuple, tuple]  # a launch's grid, arguments and constexprs


def of_two_branches(first: Call, second: Call) -> Call | None:
    """A launch of `fold_four_forward_kernel` that does what two of `fold_both_forward_kernel` do, with the bits of their results.

    None where one kernel cannot: tiles, dtypes or what is None differ. A tensor may be anything that has its dtype.
    """
    kinds = ([getattr(arg, "dtype", type(arg)) for arg in args] for _, args, _ in (first, second))
    if first[2] != second[2] or next(kinds) != next(kinds):
        return None
    return (first[0][0] + second[0][0],), (*first[1], *second[1]), first[2]


def fold_columns_backward(
    dfolded: torch.Tensor | None,
    dfolded_bias: torch.Tensor | None,
    weight: torch.Tensor,
    column_scale: torch.Tensor | None,
    column_shift: torch.Tensor | None,
    *,
    needs_weight: bool,
    needs_scale: bool,
    needs_shift: bool,
    later: list[Table] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of weight (N, C), which is dfolded's memory, of column_scale and of column_shift (C,), in fp32; None if not needed.

    dfolded (N, C) and dfolded_bias (N,) are contiguous fp32, and there where a needed gradient depends on them. With `later` the
    gradients of column_scale and column_shift are there once `add_partial_sums` has run on it. If dfolded_bias is one of its totals
    and is read, this launch adds its partial sums, and takes it from the list.
    """
    outputs, channels = weight.shape
    dweight = dfolded if needs_weight else None
    sums = [
        weight.new_empty(channels, dtype=torch.float32) if needed else None for needed in (needs_scale, needs_shift)
    ]
    wanted = [total for total in sums if total is not None]
    changes = needs_weight and not (column_scale is column_shift is None)
    if not weight.numel():
        for total in wanted:
            total.zero_()
    elif wanted or changes:
        config = select_config(channels)
        column_blocks = cdiv(channels, config.columns)
        strips, rows_per_strip = row_strips(outputs, config.rows, column_blocks, weight)
        dbias_partial = dbias = None
        if dfolded_bias is not None and (needs_shift or (changes and column_shift is not None)):
            dbias_partial, dbias = _partial_sums(dfolded_bias, later)
        partial = weight.new_empty(len(wanted), strips, channels, dtype=torch.float32)
        tables = partial.unbind(0)
        next_table = iter(tables)
        dscale_partial, dshift_partial = (None if total is None else next(next_table) for total in sums)
        launch(
            fold_columns_backward_kernel,
            (column_blocks, strips),
            (
                dfolded if needs_weight or needs_scale else None,
                dbias_partial,
                dbias,
                _contiguous(weight),
                _contiguous(column_scale),
                _contiguous(column_shift),
                dweight if changes else None,
                dscale_partial,
                dshift_partial,
                outputs,
                channels,
                rows_per_strip,
                0 if dbias_partial is None else dbias_partial.shape[0],
            ),
            (*_constexprs(config, channels), _BLOCK_STRIPS),
            config.num_warps,
        )
        sum_later(later, *zip(tables, wanted, strict=True))
    return dweight, *sums


def _partial_sums(total: torch.Tensor, later: list[Table] | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The partial sums of a total, taken from the list, and where they are to be written; a total that is there is its own."""
    tables = later or []
    for index, (_, known) in enumerate(tables):
        if known is total:
            return tables.pop(index)
    return total.unsqueeze(0), None


def fold_rows_backward(
    dfolded: torch.Tensor | None,
    dfolded_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor,
    *,
    needs_weight: bool,
    needs_bias: bool,
    needs_scale: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of weight (N, C), which is dfolded's memory, of bias and of row_scale (N,), in fp32; None if not needed.

    dfolded (N, C) and dfolded_bias (N,) are contiguous fp32, and there where a needed gradient depends on them.
    """
    outputs, channels = weight.shape
    dweight = dfolded if needs_weight else None
    dbias, dscale = (
        weight.new_empty(outputs, dtype=torch.float32) if needed else None for needed in (needs_bias, needs_scale)
    )
    if outputs and (needs_weight or needs_bias or needs_scale):
        config = select_config(channels)
        launch(
            fold_rows_backward_kernel,
            (cdiv(outputs, config.rows),),
            (
                dfolded if needs_weight or needs_scale else None,
                dfolded_bias,
                _contiguous(weight),
                _contiguous(bias),
                _contiguous(row_scale),
                dweight,
                dbias,
                dscale,
                outputs,
                channels,
            ),
            _constexprs(config, channels),
            config.num_warps,
        )
    return dweight, dbias, dscale


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _constexprs(config: Config, channels: int) -> tuple[int, int, int]:
    return config.rows, config.columns, min(channels & -channels, 16) or 1


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Masters of autocast with a LayerNorm's parameters, and with LayerScale's; weights of 256 columns or more share one tile."""
    config = select_config(256)
    tile = dict(BLOCK_M=config.rows, BLOCK_N=config.columns, VECTOR=16)
    sizes = dict(N="i32", C="i32")
    single = "*fp32"
    forward = dict(weight_ptr=single, bias_ptr=single, folded_ptr="*bf16", folded_bias_ptr="*bf16") | sizes
    columns = dict(column_scale_ptr=single, column_shift_ptr=single)
    for label, arguments in (("LayerNorm", forward | columns), ("LayerScale", forward | dict(row_scale_ptr=single))):
        yield AotConfig(fold_forward_kernel, arguments, tile, config.num_warps, 1, label, matrix=False)
    for kernel, branches in ((fold_both_forward_kernel, 1), (fold_four_forward_kernel, 2)):
        for label, scaled in (("LayerNorm", False), ("LayerNorm and LayerScale", True)):
            arguments = _branch_signature(0, scaled) | (_branch_signature(2, scaled) if branches == 2 else {})
            yield AotConfig(kernel, arguments, tile, config.num_warps, 1, label, matrix=False)
    pointers = ("dfolded_ptr", "dbias_partial_ptr", "dbias_ptr", "weight_ptr", "dweight_ptr")
    backward = dict.fromkeys(pointers, single) | columns | sizes
    backward |= dict(dscale_partial_ptr=single, dshift_partial_ptr=single, rows_per_strip="i32", dbias_strips="i32")
    strips = tile | dict(BLOCK_STRIPS=_BLOCK_STRIPS)
    yield AotConfig(fold_columns_backward_kernel, backward, strips, config.num_warps, 1, "LayerNorm", matrix=False)
    backward = dict.fromkeys(("dfolded_ptr", "dfolded_bias_ptr", "weight_ptr", "bias_ptr", "row_scale_ptr"), single)
    backward |= dict.fromkeys(("dweight_ptr", "dbias_ptr", "dscale_ptr"), single) | sizes
    yield AotConfig(fold_rows_backward_kernel, backward, tile, config.num_warps, 1, "LayerScale", matrix=False)


def _branch_signature(first: int, scaled: bool) -> dict[str, str]:
    """Types of the arguments of a branch whose layers have the numbers first and first + 1."""
    layers = (first, first + 1)
    names = [f"{name}{i}_ptr" for i in layers for name in ("weight", "bias")]
    names += [
        f"column_scale{first}_ptr",
        f"column_shift{first}_ptr",
        *([f"row_scale{layers[1]}_ptr"] if scaled else []),
    ]
    folded = [f"{name}{i}_ptr" for i in layers for name in ("folded", "folded_bias")]
    sizes = [f"{size}{i}" for i in layers for size in ("N", "C")]
    return dict.fromkeys(names, "*fp32") | dict.fromkeys(folded, "*bf16") | dict.fromkeys(sizes, "i32")
