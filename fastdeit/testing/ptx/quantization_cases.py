"""Calls that launch the kernels of 8-bit inference between two GEMMs of quantized operands, attention among them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from fastdeit import ops
from fastdeit.kernels.attention import config as attention_config
from fastdeit.kernels.attention import forward as attention
from fastdeit.kernels.quantization.bounds import LARGEST
from fastdeit.testing.accuracy import Error, assert_close_to_oracle, poisoned_memory

_FORMATS = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
_BITS = {"output 0": (Error(0.0, 0.0, 0.0, 0.0),) * 2}


def eight_bit(arch: int) -> Iterator[tuple[str, Callable]]:
    """A name and a call for each; float8 from sm_89 on, which is the first to convert to it."""
    for name, dtype in _FORMATS.items():
        if dtype == torch.int8 or arch >= 89:
            for channels in (192, 768):
                yield f"add_layer_norm_quantize C={channels} {name}", functools.partial(_normalise, channels, dtype)
            yield f"rescale to {name}", functools.partial(_cast, dtype, None)
    yield "rescale int8 product", functools.partial(_product, None)
    yield "rescale int8 product gelu to int8", functools.partial(_product, torch.int8)
    if arch >= 89:
        yield "rescale gelu to float8", functools.partial(_cast, torch.float8_e4m3fn, "gelu")
    for case, out in attention_config.eight_bit_cases(arch):
        dtype = torch.int8 if out == "i8" else torch.float8_e4m3fn
        yield f"attention {attention_config.eight_bit_label(case, out)}", functools.partial(_attend, case, dtype)


def _normalise(channels: int, dtype: torch.dtype) -> dict:
    x, branch = torch.randn(2, 2, 5, channels).bfloat16().unbind()
    weight = (1 + 0.3 * torch.randn(channels)).bfloat16() if dtype == torch.int8 else None
    with poisoned_memory():
        x_new, q, scale = ops.add_layer_norm_quantize(x, branch, weight, None, 1e-6, dtype=dtype)
    plain = ops.add_layer_norm_quantize_reference(x, branch, weight, None, 1e-6, dtype=dtype)
    assert_close_to_oracle("x_new", x_new, plain[0].double(), plain[0])
    exact = ops.layer_norm_reference(x_new.double(), None if weight is None else weight.double(), None, 1e-6)
    found, eager = (values.float() * scales[..., None] for values, scales in ((q, scale), plain[1:]))
    assert_close_to_oracle("tokens", found, exact, eager)
    return _BITS


def _cast(dtype: torch.dtype, activation: str | None) -> dict:
    """To the reference's bits where nothing but the rounding is computed; every finite bfloat16 is cast."""
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    z = every[every.isfinite()][::3][:21824].reshape(-1, 32) if activation is None else torch.randn(9, 272).bfloat16()
    options: dict[str, Any] = dict(scale=torch.tensor([0.0625]), activation=activation, out_dtype=dtype)
    with poisoned_memory():
        found = ops.rescale(z, **options)
    plain = ops.rescale_reference(z, **options)
    if activation is None:
        if not torch.equal(found.view(torch.uint8), plain.view(torch.uint8)):
            raise AssertionError(f"{(found.float() != plain.float()).sum()} of {found.numel()} casts differ")
        return _BITS
    exact = torch.nn.functional.gelu(z.double()) / 0.0625
    assert_close_to_oracle("y", found.float(), exact.clamp(-448, 448), plain.float())
    return _BITS


def _product(dtype: torch.dtype | None) -> dict:
    z = torch.randint(-3000, 3000, (2, 5, 272), dtype=torch.int32)
    given: dict[str, Any] = dict(
        row_scale=torch.rand(2, 5) / 100, column_scale=torch.rand(272), bias=torch.randn(272).bfloat16()
    )
    exact_given = {name: value.double() for name, value in given.items()}
    activation = None if dtype is None else "gelu"
    options: dict[str, Any] = dict(activation=activation, scale=None if dtype is None else torch.tensor([0.1]))
    with poisoned_memory():
        found = ops.rescale(z, **given, **options, out_dtype=dtype or torch.bfloat16)
    plain = ops.rescale_reference(z, **given, **options, out_dtype=dtype or torch.bfloat16)
    exact = ops.rescale_reference(z, **exact_given, activation=activation, out_dtype=torch.float64)
    if dtype is not None:
        exact = (exact / 0.1).clamp(-127, 127)
    assert_close_to_oracle("y", found.float(), exact, plain.float())
    return _BITS


def _attend(case: attention_config.Case, dtype: torch.dtype) -> dict:
    """Two heads; the largest values of the first do not fit the format."""
    qkv = torch.randn(1, 134, 3, 2, case.head_dim).bfloat16()
    qkv[:, :, 2, 0] *= 200
    q, k, v = qkv.unbind(2)
    out_scale = torch.tensor([0.0625])
    with mock.patch.object(attention, "select_config", lambda *_: case.config), poisoned_memory():
        found = ops.attention_quantize(qkv.flatten(2), 2, out_scale, dtype=dtype)
    plain = ops.attention_quantize_reference(qkv.flatten(2), 2, out_scale, dtype=dtype)
    exact = ops.attention_qkv_reference(q.double(), k.double(), v.double()).flatten(2) / out_scale.double()
    largest = LARGEST[dtype]
    return {"out": assert_close_to_oracle("out", found.float(), exact.clamp(-largest, largest), plain.float())}
