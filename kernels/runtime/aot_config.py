"""A kernel configuration that a launcher can choose, described so that it can be compiled without a launch."""

from dataclasses import dataclass
from typing import Any

from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class AotConfig:
    """One configuration of a kernel that a launcher can choose.

    Args:
        kernel: the `@triton.jit` function.
        signature: run-time argument name -> Triton type, such as "*bf16" (16-byte aligned), "i32" (not specialised), "fp32" or
            "tensordesc<bf16[1, 64, 64]>". A pointer or descriptor named in neither dictionary is absent: compiled as None.
        constexprs: constexpr name -> value.
        num_warps, num_stages, maxnreg: compile options.
        label: names the configuration among those of its kernel on one architecture.
        matrix: it must contain the architecture's full-rate matrix instructions, or those of this name.
        fp_fusion: as the launcher has it.
        max_registers, min_blocks_per_sm: limits of this configuration, beyond those that hold for all.
        unaligned: pointers that are not 16-byte aligned.
    """

    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    label: str
    matrix: bool | str
    max_registers: int | None = None
    min_blocks_per_sm: int | None = None
    maxnreg: int | None = None
    fp_fusion: bool = True
    unaligned: tuple[str, ...] = ()
