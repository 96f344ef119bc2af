"""What a shipped kernel configuration must not exceed. `fastdeit kernels` fails on a breach, and so do the tests.

- It spills no registers, but for the exceptions listed here with their reasons.
- Its shared memory fits a block of the architecture, and at least one block fits a multiprocessor.
- A `matrix` configuration contains the architecture's matrix instructions, or those that it names, and no product is made of
  scalar multiply-adds.
- The limits that the configuration sets itself (`max_registers`, `min_blocks_per_sm`) hold.

- The goals of the instruction stream (`missed_goals`) are reached, but for at most six exceptions with their reasons:

  - A streaming kernel moves at most a tenth of its bytes by 2-byte accesses: what a few threads gather or write, no more.
  - ptxas serialises no asynchronous matrix products, and no product reads a copied tile without a proxy fence.
  - A configuration that runs by default in DeiT-S and DeiT-B reaches the share of its floor that `workloads` names, as estimated.
"""

import re
from dataclasses import dataclass

from fastdeit.aot import workloads
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
    for arch, spilled_bytes in ((80, 16), (89, 16), (90, 24), (100, 8))
} | {
    ("attention_dkv_backward_kernel", "D=72 bf16 pointers tail=16", 80): (
        8,
        "ptxas stops at 168 registers for three blocks; without asynchronous copies nothing spills, but two blocks fit",
    ),
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
    return found + missed_goals(row, arch, resources)


NARROWEST_SHARE = 0.1  # of a streaming kernel's bytes, the most that 2-byte accesses may move
_GATHERING = (
    "augment_",
)  # kernels that read pixels of a byte each where an image's parameters say: they do not stream
# (start of a kernel's name, start of a label): why 2-byte accesses move more. One of the six exceptions that there may be.
ALLOWED_NARROW = {
    (
        "distillation_cross_entropy_",
        "C=21841 ",
    ): "rows of an odd number of classes begin at odd elements: no access can be wider",
}


@dataclass(frozen=True)
class Shortfall:
    """Kernels, all of one name's beginning, that miss the share of their floor on some architectures.

    Args:
        kernels: how their names begin.
        architectures: where.
        lowest_share: what their estimates reach nevertheless.
        reason: why they reach no more.
    """

    kernels: str
    architectures: tuple[int, ...]
    lowest_share: float
    reason: str


# With ALLOWED_NARROW at most six.
SHORTFALLS = (
    Shortfall(
        "attention_",
        (80,),
        0.42,
        "mma.sync takes its operands from registers, which ldmatrix fills from shared memory: that and the products take longer "
        "than memory does at 198 tokens. A warp of 32 rows, as now, reads half as often as one of 16; larger ones spill",
    ),
    Shortfall(
        "attention_forward_",
        (90,),
        0.54,
        "three full blocks and a tail of 16 keys a tile: what surrounds the loop is as many instructions as the loop, and the "
        "exponentials of a tile overlap with products of its neighbour alone",
    ),
    Shortfall(
        "attention_dkv_backward_",
        (90,),
        0.53,
        "tiles of 64 keys read queries and gradients four times from L2; 128 keys have registers for one block a multiprocessor. "
        "lse and delta come in 32 copies of 4 bytes a step; held in registers they spill, as tensor copies they gain 3 %",
    ),
    Shortfall(
        "attention_",
        (100,),
        0.27,
        "Triton 3.6 waits for every tcgen05 product and moves its operands through registers and tensor memory; the floor, at "
        "7.2 TB/s, is 0.6 of an H200's, special functions and instruction issue are what they are there",
    ),
    Shortfall(
        "layer_norm_forward_",
        (100,),
        0.55,
        "a row a program: two waits for memory and two reductions in a row take longer than 2 bytes in and out at 7.2 TB/s",
    ),
)


def missed_goals(row: AotConfig, arch: int, resources: Resources) -> list[str]:
    """Goals of the instruction stream that a compiled configuration misses, as phrases, but for its known shortfall."""
    stream, found = resources.stream, []
    if stream is None:
        return found
    if not row.matrix and not _may_be_narrow(row) and stream.narrow_share > NARROWEST_SHARE:
        found.append(f"2-byte accesses move {stream.narrow_share:.0%} of its bytes, allowed {NARROWEST_SHARE:.0%}")
    if stream.serialised:
        found.append(f"serialised matrix products: ptxas says {stream.serialised}")
    if stream.unfenced:
        found.append(f"unfenced: {stream.unfenced} loops multiply copied tiles without fence.proxy.async")
    for launch in workloads.launches_of(row, arch):
        reached, wanted = workloads.estimates(row, arch, resources)[launch.model], launch.lowest_share
        if (shortfall := shortfall_of(row, arch)) is not None:
            wanted = min(wanted, shortfall.lowest_share)
        if reached.share < wanted:
            found.append(
                f"estimated {reached.share:.0%} of the floor in DeiT-{launch.model}, bound by {reached.bound}, "
                f"at least {wanted:.0%} wanted"
            )
    return found


def _may_be_narrow(row: AotConfig) -> bool:
    name = row.kernel.__name__
    listed = any(name.startswith(kernel) and row.label.startswith(label) for kernel, label in ALLOWED_NARROW)
    return listed or name.startswith(_GATHERING)


def shortfall_of(row: AotConfig, arch: int) -> Shortfall | None:
    """What excuses a configuration's estimate, if anything does."""
    fits = (x for x in SHORTFALLS if arch in x.architectures and row.kernel.__name__.startswith(x.kernels))
    return next(fits, None)
