"""The fastest that an op could run: the larger of its arithmetic and its memory traffic over what the device reaches."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from fastdeit.cost.formulas import Cost
from fastdeit.cost.models import Part, seconds


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches, measured on it: large bf16 matrix products, and a copy counting bytes read and written."""

    tflops: float
    tb_per_s: float

    def floor_us(self, cost: Cost, *, matrix: bool) -> float:
        """Microseconds below which the work cannot be done. Pointwise work counts its traffic alone."""
        memory = cost.bytes / self.tb_per_s / 1e6
        return max(memory, cost.flops / self.tflops / 1e6) if matrix else memory


def beside_compile(cost: Cost, more_bytes: int, *, matrix: bool) -> Callable[[Ceilings], tuple[float, float]]:
    """From ceilings the floor of an op, and that of an ideal torch.compile, which moves so many bytes more for it."""

    def floors(ceilings: Ceilings) -> tuple[float, float]:
        compiled = cost + Cost(0, more_bytes, 0)
        return ceilings.floor_us(cost, matrix=matrix), ceilings.floor_us(compiled, matrix=matrix)

    return floors


def after_product(cost: Cost, product: Cost, more_bytes: int) -> Callable[[Ceilings], tuple[float, float]]:
    """From ceilings the floor of a matrix product with what follows it inside, and that of an ideal torch.compile: the library's
    product, then kernels that move so many bytes."""

    def floors(ceilings: Ceilings) -> tuple[float, float]:
        compiled = ceilings.floor_us(product, matrix=True) + ceilings.floor_us(Cost(0, more_bytes, 0), matrix=False)
        return ceilings.floor_us(cost, matrix=True), compiled

    return floors


def one_after_another(found: Callable[[str], list[Part]]) -> Callable[[Ceilings], tuple[float, float]]:
    """From ceilings the floor with everything fused, and that of an ideal torch.compile.

    Args:
        found: the parts of an execution of model_costs, which run one after the other.
    """

    def floors(ceilings: Ceilings) -> tuple[float, float]:
        rates = ceilings.tflops * 1e12, ceilings.tb_per_s * 1e12
        fused, compiled = (1e6 * seconds(found(execution), *rates) for execution in ("epilogues", "compile"))
        return fused, compiled

    return floors


@lru_cache
def measured_ceilings() -> Ceilings | None:
    """The present device's, None without a GPU."""
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = _seconds(lambda: a @ b)
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source))
    return Ceilings(tflops=2 * 8192**3 / product / 1e12, tb_per_s=2 * source.numel() / copy / 1e12)


def _seconds(function, repeats: int = 20) -> float:
    for _ in range(3):
        function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
