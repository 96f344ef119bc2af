"""The GEMMs of a block's four linear layers and of their gradients, without what surrounds them: bf16 beside FP8.

Operands are quantized beforehand: what that takes depends on the kernel that it becomes a part of.
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastdeit import ops
from fastdeit.benchmarks import fp8
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.cost.formulas import linear_forward
from fastdeit.cost.models import DEIT
from fastdeit.testing import kernel_device

LAYERS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}  # inputs and outputs, over the model's width
DIRECTIONS = ["forward", "data_gradient", "weight_gradient"]
SHAPES = by_importance(["B", "S", "Ti"], DIRECTIONS, list(LAYERS))
CASES = [(batch, *shape) for batch in (256, 64, 1024) for shape in SHAPES]
QUICK, TURNS = len(SHAPES), 4
COMPARED_ROWS = 64
CHECKED_IMAGES = 16  # FP8 products sum over a multiple of 16 elements, which may be rows


@dataclass(frozen=True)
class Operands:
    """a (M, K) and b (N, K) of a product a b^T: in bf16 as the layer has them, and quantized by what has one scale."""

    a: Tensor
    b: Tensor
    quantized: dict[str, tuple[fp8.Quantized, fp8.Quantized]]


@dataclass(frozen=True)
class Layer:
    """A linear layer, one of whose three products is timed."""

    inputs: int
    outputs: int
    direction: str
    low: torch.dtype

    def operands(self, rows: int) -> Operands:
        """Random ones for so many rows of input."""

        def randn(*shape):
            return torch.randn(shape, device=kernel_device()).to(self.low)

        if self.direction == "forward":
            a, b = randn(rows, self.inputs), randn(self.outputs, self.inputs)
        elif self.direction == "data_gradient":
            a, b = randn(rows, self.outputs), randn(self.outputs, self.inputs).t()
        else:
            a, b = randn(rows, self.outputs).t(), randn(rows, self.inputs).t()
        first = fp8.VALUE if self.direction == "forward" else fp8.GRADIENT
        quantized = {
            scaled: (fp8.quantize(a, first, scaled), fp8.quantize(b, fp8.VALUE, scaled))
            for scaled in (fp8.PER_TENSOR, fp8.PER_ROW)
        }
        return Operands(a, b, quantized)


def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.t()


@pytest.mark.parametrize("case", CASES, ids=label)
def test_gemm(compare, toy, case):
    batch, model, direction, name = case
    tokens, channels = (4, DEIT[model].channels // 12) if toy else (DEIT[model].tokens, DEIT[model].channels)
    batch, low = (CHECKED_IMAGES, torch.float32) if toy else (batch, torch.bfloat16)
    layer = Layer(*(channels * width for width in LAYERS[name]), direction, low)

    def bf16(function):
        return lambda *given: function(given[-1].a, given[-1].b)

    def in_fp8(scaled):
        @functools.cache
        def check():
            fp8.check(fp8.product, *layer.operands(CHECKED_IMAGES * tokens).quantized[scaled])

        def run(*given):
            check()
            return fp8.product(*given[-1].quantized[scaled])

        return run

    def inputs():
        made = layer.operands(batch * tokens)
        # Sets are as many as the candidate needs that reads the fewest bytes: only tensors count.
        return *(matrix.values for matrix in made.quantized[fp8.PER_TENSOR]), made

    def expected(*given):
        return [given[-1].a[:COMPARED_ROWS].double() @ given[-1].b.double().t()]

    compare(
        {
            "fastdeit": bf16(ops.linear if direction == "forward" else product),
            "PyTorch eager": bf16(product),
            "FP8, a scale per tensor": in_fp8(fp8.PER_TENSOR),
            "FP8, a scale per row": in_fp8(fp8.PER_ROW),
        },
        inputs,
        expected=expected,
        cost=linear_forward(batch * tokens, layer.inputs, layer.outputs),
        matrix=True,
        direction=direction,
        batch=batch,
        model=model,
        layer=name,
    )
