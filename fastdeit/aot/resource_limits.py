"""What a shipped kernel configuration must not exceed. `fastdeit kernels` fails on a breach, and so do the tests.

- It spills no registers, but for the exceptions listed here with their reasons.
- Its shared memory fits a block of the architecture, and at least one block fits a multiprocessor.
- A `matrix` configuration contains the architecture's matrix instructions, or those that it names, and no product is made of
  scalar multiply-adds.
- The limits that the configuration sets itself (`max_registers`, `min_blocks_per_sm`) hold.
"""

import re

from fastdeit.aot.catalog import Resources
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import LIMITS

# The instructions that reach the full rate of the tensor cores.
MATRIX_INSTRUCTIONS = {
    80: r"HMMA",
    86: r"HMMA",
    89: r"HMMA",
    90: r"HGMMA",
    100: r"UTC[A-Z]+MMA",
    120: r"HMMA",
}

# (kernel, label, architecture): (bytes allowed, why it ships nevertheless)
ALLOWED_SPILLS: dict[tuple[str, str, int], tuple[int, str]] = {
    ("layer_norm_backward_kernel", "C=8192 autocast", arch): (
        spilled_bytes,
        "addresses kept from before the loop over rows until after it, at the 128 registers that 16 warps leave a thread",
    )
    for arch, spilled_bytes in ((80, 16), (89, 24), (90, 16), (100, 16))
}


def breaches(row: AotConfig, arch: int, resources: Resources) -> list[str]:
    """What a compiled configuration breaks, as phrases; empty when it may ship."""
    limits, found = LIMITS[arch], []
    allowed, _ = ALLOWED_SPILLS.get((row.kernel.__name__, row.label, arch), (0, ""))
    if resources.spilled_bytes > allowed:
        found.append(f"spills {resources.spilled_bytes} bytes, allowed {allowed}")
    if resources.shared_bytes > limits.shared_per_block:
        found.append(f"{resources.shared_bytes} bytes of shared memory, a block has {limits.shared_per_block}")
    elif resources.blocks_per_sm < (row.min_blocks_per_sm or 1):
        found.append(f"{resources.blocks_per_sm} blocks per SM, at least {row.min_blocks_per_sm or 1} needed")
    if row.max_registers is not None and resources.registers > row.max_registers:
        found.append(f"{resources.registers} registers, allowed {row.max_registers}")
    wanted = row.matrix if isinstance(row.matrix, str) else MATRIX_INSTRUCTIONS[arch]
    if row.matrix and not any(re.fullmatch(wanted, name) for name in resources.matrix_instructions):
        found.append(f"no {wanted} instruction, found {', '.join(resources.matrix_instructions) or 'none at all'}")
    if resources.scalar_products:
        found.append(f"{resources.scalar_products} products without matrix instructions")
    return found
