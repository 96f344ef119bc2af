"""The kernels that ship: every configuration that a launcher can choose, so that each can be compiled and judged without a GPU."""

from dataclasses import dataclass
from typing import Any

KERNEL_FILES = ("layer_norm",)


@dataclass(frozen=True)
class Shipped:
    """One configuration of one kernel, as `shipped(arch)` of a kernel file yields it."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    label: str
    matrix: bool
    max_registers: int | None = None
    min_blocks_per_sm: int | None = None
