"""A linear layer of 8-bit operands: the product by cuBLAS, and what follows it. There is no gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit.ops.arguments import check_vector
from fastdeit.ops.quantized_formats import check_format, check_scale
from fastdeit.ops.rescale_op import rescale, rescale_reference

_FEWEST_ROWS = 32  # more than 16, which is too few for torch._int_mm on a GPU


def quantized_linear(
    q: Tensor,
    row_scale: Tensor | None,
    weight: Tensor,
    column_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """activation((q weight^T) * row_scale * column_scale + bias), quantized to 8 bits by a given scale or in a float dtype.

    Float8 products are `torch._scaled_mm`'s, which also applies the scales and adds the bias; int8 products are `torch._int_mm`'s,
    exact in int32, and `rescale` does the rest. Behind float8 products activation and cast are a kernel, `rescale` too.

    Args:
        q: (..., C), torch.float8_e4m3fn or torch.int8, such as `add_layer_norm_quantize` gives.
        row_scale: (...) float32, the value of one step in each row of q; None if column_scale includes it.
        weight: (O, C) of q's dtype.
        column_scale: (O,) float32, the value of one step in each row of weight.
        bias: (O,), a float dtype, or None.
        activation: as in `rescale`.
        scale: as in `rescale`.
        out_dtype: as in `rescale`. On a GPU float8 products are rounded to bfloat16.

    Returns:
        (..., O).

    Raises:
        TypeError: a dtype is another.
        ValueError: a shape or device does not fit, C or O is not a multiple of 16, or as `rescale`.
    """
    _check(q, row_scale, weight, column_scale, bias)
    rows = q.reshape(-1, q.shape[-1])
    shape = (*q.shape[:-1], len(weight))
    options: dict[str, Any] = dict(activation=activation, scale=scale, out_dtype=out_dtype)
    if q.dtype == torch.int8 or not q.is_cuda:  # on a CPU `_scaled_mm` takes one scale a tensor, and is slow
        integers = q.dtype == torch.int8
        z = _integer_product(rows, weight) if integers else F.linear(rows.float(), weight.float())
        return rescale(z.view(shape), row_scale=row_scale, column_scale=column_scale, bias=bias, **options)
    row_scale = _ones(len(rows), q.device) if row_scale is None else row_scale.reshape(-1, 1)
    bias = None if bias is None else bias.bfloat16()
    scales: dict[str, Any] = dict(scale_a=row_scale, scale_b=column_scale[None], bias=bias)
    z = torch._scaled_mm(rows, weight.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True).view(shape)
    plain = activation is None and out_dtype == torch.bfloat16
    return z if plain else rescale(z, **options)


def quantized_linear_reference(
    q: Tensor,
    row_scale: Tensor | None,
    weight: Tensor,
    column_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Reference of `quantized_linear` in plain PyTorch on float32; with out_dtype float64 or float64 scales it is the oracle."""
    exact = torch.float64 in (out_dtype, column_scale.dtype)
    wide = torch.float64 if exact else torch.float32
    options: dict[str, Any] = dict(
        row_scale=row_scale, column_scale=column_scale, bias=bias, activation=activation, scale=scale
    )
    return rescale_reference(F.linear(q.to(wide), weight.to(wide)), **options, out_dtype=out_dtype)


def _integer_product(rows: Tensor, weight: Tensor) -> Tensor:
    if torch.compiler.is_exporting() and not rows.is_cuda:  # `_int_mm` takes no symbolic number of rows
        return torch.mm(rows.int(), weight.int().t())
    count = len(rows)
    if rows.is_cuda and count < _FEWEST_ROWS:
        rows = F.pad(rows, (0, 0, 0, _FEWEST_ROWS - count))
    return torch._int_mm(rows, weight.t())[:count]


_ones_of: dict[tuple[int, torch.device], Tensor] = {}  # kept for good, since a captured graph may read them


def _ones(rows: int, device: torch.device) -> Tensor:
    """A scale of 1 for each row, which `_scaled_mm` requires where each column has a scale."""
    if torch.compiler.is_compiling():
        return torch.ones((rows, 1), device=device)
    most = 1 << (rows - 1).bit_length()
    ones = _ones_of.get((most, device))
    if ones is None:
        ones = torch.ones((most, 1), device=device)
        if not torch.cuda.is_current_stream_capturing():  # there it is in the graph's memory, and filled at each replay
            torch.cuda.current_stream(device).synchronize()  # once: other streams may read it
            _ones_of[most, device] = ones
    return ones[:rows]


def _check(q, row_scale, weight, column_scale, bias) -> None:
    if not isinstance(q, Tensor):
        raise TypeError(f"q: expected a tensor, got {type(q).__name__}")
    check_format("q", q.dtype)
    if not isinstance(weight, Tensor) or weight.dtype != q.dtype:
        given = getattr(weight, "dtype", type(weight).__name__)
        raise TypeError(f"weight: expected {q.dtype} as q has, got {given}")
    if q.dim() == 0 or weight.dim() != 2 or weight.shape[1] != q.shape[-1]:
        raise ValueError(f"weight: expected shape (rows, {q.shape[-1:].numel()}), got {tuple(weight.shape)}")
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        raise ValueError(f"weight: expected multiples of 16, which its products ask for, got {tuple(weight.shape)}")
    if weight.device != q.device:
        raise ValueError(f"weight: expected device {q.device} as q has, got {weight.device}")
    check_scale("row_scale", row_scale, q.shape[:-1], q)
    check_scale("column_scale", column_scale, weight.shape[:1], q, optional=False)
    check_vector("bias", bias, len(weight), q)
