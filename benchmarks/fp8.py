"""FP8 products by `torch._scaled_mm`: operands quantized by the formats' definition, with a scale per tensor or per row.

A mode of its own: quantization changes the result by more than rounding to bf16 does. A product is held to the float64 product of
the quantized operands, beside the same product in bf16.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeit.benchmarks.timing import NotSupported
from fastdeit.testing.accuracy import assert_close_to_oracle

LEAST_CAPABILITY = (8, 9)
PER_TENSOR, PER_ROW = "tensor", "row"  # what has one scale
# Weights and activations are E4M3, gradients E5M2, of more range and fewer bits (Micikevicius et al. 2022, "FP8 formats for deep
# learning").
VALUE, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Quantized:
    """A matrix as `values * scale`: values (rows, K) in an FP8 format, contiguous; scale fp32, one element or (rows, 1)."""

    values: Tensor
    scale: Tensor

    def exactly(self) -> Tensor:
        """What it stands for, in float64."""
        return self.values.double() * self.scale.double()


def quantize(matrix: Tensor, dtype: torch.dtype, scaled: str) -> Quantized:
    """Rounds (rows, K) to the nearest values of an FP8 format, the largest magnitude of each `scaled` to the format's largest."""
    matrix = matrix.float()
    largest = matrix.abs().amax() if scaled == PER_TENSOR else matrix.abs().amax(1, keepdim=True)
    most = torch.finfo(dtype).max
    scale = (largest / most).clamp_min(torch.finfo(torch.float32).tiny)
    return Quantized((matrix / scale).clamp(-most, most).to(dtype).contiguous(), scale)


def product(a: Quantized, b: Quantized) -> Tensor:
    """a (M, K) times b (N, K) transposed, accumulated in fp32: (M, N) in bf16.

    PyTorch's CPU product takes one scale a tensor: there scales of rows multiply its fp32 result.

    Raises:
        NotSupported: the GPU multiplies no FP8.
    """
    transposed, scales = b.values.t(), (a.scale, b.scale if b.scale.dim() == 0 else b.scale.t())
    if a.values.is_cuda:
        if (found := torch.cuda.get_device_capability(a.values.device)) < LEAST_CAPABILITY:
            raise NotSupported(
                "FP8 needs compute capability {}.{}, this GPU has {}.{}".format(*LEAST_CAPABILITY, *found)
            )
    elif a.scale.dim():
        one = torch.ones((), device=a.values.device)
        unscaled = torch._scaled_mm(a.values, transposed, one, one, out_dtype=torch.float32)
        return (unscaled * scales[0] * scales[1]).bfloat16()
    return torch._scaled_mm(a.values, transposed, *scales, out_dtype=torch.bfloat16)


def check(multiply: Callable[[Quantized, Quantized], Tensor], a: Quantized, b: Quantized) -> None:
    """Holds a product to the numerics contract, with the quantized operands as its inputs.

    Raises:
        AssertionError: its error against float64 is over twice that of a bf16 product of the same values, scaled afterwards.
    """
    exact = a.exactly() @ b.exactly().t()
    # FP8 values are bf16 values; only products of them with scales would be rounded.
    rounded = a.values.bfloat16() @ b.values.bfloat16().t()
    eager = (rounded.float() * a.scale * b.scale.t()).bfloat16()
    assert_close_to_oracle("FP8 product", multiply(a, b), exact, eager)
