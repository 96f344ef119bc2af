"""The ops on 8-bit tensors, as a frozen model calls them: LayerNorm with a scale for each token, attention and GELU with the casts
of their outputs, and a linear layer with what follows it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastdeit import ops
from fastdeit.benchmarks.baselines import op_baselines as baselines
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.cost import formulas as costs
from fastdeit.cost.formulas import Cost
from fastdeit.cost.models import DEIT
from fastdeit.testing import assert_close_to_oracle, kernel_device

FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
WORKS = ["layer_norm", "fc1", "activation", "attention", "proj"]
CASES = by_importance(["B", "S", "Ti"], [256, 64, 1024, 1], list(FORMATS), WORKS)
QUICK, TURNS = 4, 4
COMPARED_ROWS = 64
STEP = 0.05  # what one step of a static scale is worth


@dataclass(frozen=True)
class Work:
    """An op, its reference, and that in float64: functions of the inputs alone that give tensors, the op's output first."""

    op: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    exact: Callable[..., tuple[Tensor, ...]]
    inputs: Callable[[int], tuple[Tensor, ...]]  # of a number of rows
    cost: Cost
    matrix: bool = False


@dataclass(frozen=True)
class Sizes:
    batch: int
    tokens: int
    channels: int
    dtype: torch.dtype  # of 8 bits

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def hidden(self) -> int:
        return 4 * self.channels


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=kernel_device()).bfloat16()


def step(count: int = 1) -> Tensor:
    return torch.full((count,), STEP, device=kernel_device())


def layer_norm(sizes: Sizes) -> Work:
    def run(function):
        def call(x, branch):
            x_new, q, scale = function(x, branch, None, None, dtype=sizes.dtype)
            return q, scale, x_new

        return call

    reference = run(ops.add_layer_norm_quantize_reference)
    return Work(
        run(ops.add_layer_norm_quantize),
        reference,
        lambda x, branch: reference(x.double(), branch.double()),
        lambda rows: (randn(rows, sizes.channels), randn(rows, sizes.channels)),
        costs.add_layer_norm_quantize(sizes.rows, sizes.channels),
    )


def attention(sizes: Sizes) -> Work:
    """Of heads of 64 channels; rows are those of whole samples."""
    heads = max(1, sizes.channels // 64)
    given = heads, step()
    cost = costs.attention_forward(
        sizes.batch, sizes.tokens, heads, sizes.channels // heads, out_bytes=1, keep_lse=False
    )
    return Work(
        lambda qkv: (ops.attention_quantize(qkv, *given, dtype=sizes.dtype),),
        lambda qkv: (ops.attention_quantize_reference(qkv, *given, dtype=sizes.dtype),),
        lambda qkv: (ops.attention_quantize_reference(qkv.double(), *given, dtype=sizes.dtype),),
        lambda rows: (randn(-(-rows // sizes.tokens), sizes.tokens, 3 * sizes.channels),),
        cost,
        matrix=True,
    )


def activation(sizes: Sizes) -> Work:
    columns = sizes.hidden
    options = dict(activation="gelu", scale=step(), out_dtype=sizes.dtype)
    return Work(
        lambda z: (ops.rescale(z, **options),),
        lambda z: (ops.rescale_reference(z, **options),),
        lambda z: (ops.rescale_reference(z.double(), **options),),
        lambda rows: (randn(rows, columns),),
        costs.rescale(sizes.rows, columns),
    )


def linear(sizes: Sizes, layer: str) -> Work:
    """fc1 with GELU and the cast after it, or proj with neither."""
    outputs = sizes.hidden if layer == "fc1" else sizes.channels
    after = dict(activation="gelu", scale=step(), out_dtype=sizes.dtype) if layer == "fc1" else {}

    def eight_bits(*shape):
        return ops.rescale_reference(randn(*shape), scale=step(), out_dtype=sizes.dtype)

    weight, bias = eight_bits(outputs, sizes.channels), randn(outputs)
    scale = step(outputs) * sizes.channels**-0.5

    def exact(q, row_scale):
        given = q, row_scale.double(), weight, scale.double(), bias.double()
        return (ops.quantized_linear_reference(*given, **after or dict(out_dtype=torch.float64)),)

    return Work(
        lambda q, row_scale: (ops.quantized_linear(q, row_scale, weight, scale, bias, **after),),
        lambda q, row_scale: (ops.quantized_linear_reference(q, row_scale, weight, scale, bias, **after),),
        exact,
        lambda rows: (eight_bits(rows, sizes.channels), step(rows)),
        costs.quantized_linear(sizes.rows, sizes.channels, outputs, out_bytes=1 if after else 2),
        matrix=True,
    )


def make(name: str, sizes: Sizes) -> Work:
    if name == "layer_norm":
        return layer_norm(sizes)
    if name in ("fc1", "proj"):
        return linear(sizes, name)
    return attention(sizes) if name == "attention" else activation(sizes)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_quantization(compare, toy, case):
    model, batch, precision, name = case
    batch, tokens, channels = (2, 5, 16) if toy else (batch, DEIT[model].tokens, DEIT[model].channels)
    work = make(name, Sizes(batch, tokens, channels, FORMATS[precision]))

    def values(results):
        """Of the first result, in the steps of its format where that has 8 bits."""
        return results[0].double() * (results[1].double()[:, None] if name == "layer_norm" else 1.0)

    def expected(*arguments):
        return [result.double() for result in work.exact(*(argument[:COMPARED_ROWS] for argument in arguments))]

    small = work.inputs(COMPARED_ROWS)
    assert_close_to_oracle(name, values(work.op(*small)), values(work.exact(*small)), values(work.reference(*small)))
    candidates = {"fastdeit": work.op, "PyTorch eager": work.reference}
    if not toy:
        candidates["torch.compile"] = baselines.compiled(work.reference)
    compare(
        candidates,
        lambda: work.inputs(batch * tokens),
        expected=expected,
        cost=work.cost,
        matrix=work.matrix,
        work=name,
        batch=batch,
        model=model,
        precision=precision,
    )
