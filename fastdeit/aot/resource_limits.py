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

- Executed on a CPU, a configuration moves at most SECTOR_LIMIT times the sectors and takes at most WAVEFRONT_LIMIT times the
  wavefronts that its accesses need, but for the exceptions listed here with their reasons.
"""

import re
from collections.abc import Sequence
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
    """The limits that a compiled configuration breaks, as phrases; empty when it may ship."""
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
    return found + missed_goals(row, arch, resources) + excesses(row, arch, resources)


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
    """The exception that allows a configuration's estimate to miss its goal, if there is one."""
    fits = (x for x in SHORTFALLS if arch in x.architectures and row.kernel.__name__.startswith(x.kernels))
    return next(fits, None)


SECTOR_LIMIT = 1.1  # times the ideal: the fewest 32-byte sectors for a warp's distinct addresses
WAVEFRONT_LIMIT = 1.5  # times the ideal: the fewest wavefronts for a warp's distinct words


@dataclass(frozen=True)
class Excess:
    """Configurations that move more sectors, or take more wavefronts, than the limit.

    Args:
        kernels: a pattern of the whole name, without `_kernel`.
        labels: a pattern that their labels begin with.
        most: times the ideal.
        reason: why they ship nevertheless.
    """

    kernels: str
    labels: str
    most: float
    reason: str


_TWO_PIECES = (
    "a thread owns 8 values of each stream, and loads the 4-byte ones in two pieces, 32 bytes apart: the second finds its sectors "
    "in the L1 cache. Stores are not affected"
)
_OFF_SECTORS = "rows begin anywhere in a sector: every access of a warp touches one more than it needs"
SECTOR_EXCESSES = (
    Excess("layer_norm_forward", "C=[0-9]+ autocast", 1.67, _TWO_PIECES),
    Excess("folded_layer_norm_backward", "C=[0-9]+ autocast, subsets", 1.29, f"{_TWO_PIECES}. A slot is a sector"),
    Excess("folded_layer_norm_backward", "C=[0-9]+ autocast", 1.28, _TWO_PIECES),
    Excess("scale_add_forward", "autocast", 1.32, _TWO_PIECES),
    Excess("fold_(both_|four_)?forward", "Layer", 1.65, _TWO_PIECES),
    Excess("gemm_forward", "128x128 residual", 1.37, _TWO_PIECES),
    Excess("fused_mlp_forward(_descriptor)?", "[0-9x]+ add_layer_norm_mlp autocast", 1.36, _TWO_PIECES),
    Excess("rescale", "int8 product", 1.46, _TWO_PIECES),
    Excess(
        "attention_forward",
        "D=64 bf16 pointers.* to ",
        1.9,
        "a thread stores 16 values of a byte at once, and loads as many of 2 bytes in two pieces: the second finds its sectors in "
        "the L1 cache. Stores are not affected",
    ),
    Excess(
        "layer_norm_backward",
        "C=[0-9]+ autocast",
        1.6,
        "the same, and up to 1280 channels the pieces are copied past L1, so that the L2 cache moves them twice. An accelerated "
        "model runs the kernel behind folded weights (`folded_layer_norm_backward`) instead",
    ),
    Excess("distillation_cross_entropy_(forward|backward)", "C=1000 bf16|C=21841 ", 1.65, _OFF_SECTORS),
    Excess("attention_(forward|dq_backward|dkv_backward)", "D=(72|88|104) bf16 pointers", 1.23, _OFF_SECTORS),
    Excess(
        "attention_(forward|dq_backward|dkv_backward)_descriptor",
        "D=64 bf16 descriptors",
        1.51,
        "a head's log-sum-exp and delta begin anywhere in a sector; most bytes come by tensor copies, which are not counted here",
    ),
    Excess("augment_apply", "", 7.3, "pixels of one byte each from where an image's parameters say"),
    Excess("augment_tables", "", 3.0, "three channels of a byte each, counted one channel at a time"),
)
WAVEFRONT_EXCESSES = (
    Excess(
        "attention_(forward|dq_backward|dkv_backward)",
        "D=64 fp32 pointers",
        3.15,
        "wgmma takes 4-byte operands along the reduced dimension only, so that tiles are transposed on their way to shared memory, "
        "a word at a time; TF32 is opt-in",
    ),
    Excess(
        "attention_dq_backward_descriptor",
        "D=(72|80) bf16",
        1.53,
        "delta: O and its gradient are loaded once a program from tiles of 16 columns without a swizzle",
    ),
    Excess(
        "gemm_backward", "64x128 bf16", 1.7, "column sums of a tile across warps, once a tile, between two products"
    ),
    Excess("partial_sums_backward", "", 3.0, "eight warps' sums of 16 columns meet once a program, in a few words"),
    Excess("augment_tables", "", 5.2, "a histogram: atomic additions to the same counters"),
)


def excesses(row: AotConfig, arch: int, resources: Resources) -> list[str]:
    """The counts of an executed configuration that exceed the limits, as phrases."""
    if resources.execution is None:
        return []
    accesses, found = resources.execution.accesses, []
    for ratio, limit, known, noun in (
        (accesses.sector_ratio, SECTOR_LIMIT, SECTOR_EXCESSES, "sectors"),
        (accesses.wavefront_ratio, WAVEFRONT_LIMIT, WAVEFRONT_EXCESSES, "wavefronts of shared memory"),
    ):
        excess = excess_of(row, known)
        most = limit if excess is None else excess.most
        if ratio > most:
            found.append(f"{ratio:.2f} times the ideal {noun}, allowed {most}")
    return found


def excess_of(row: AotConfig, known: Sequence[Excess]) -> Excess | None:
    """The exception that a configuration falls under, if any does."""
    name = row.kernel.__name__.removesuffix("_kernel")
    return next((x for x in known if re.fullmatch(x.kernels, name) and re.match(x.labels, row.label)), None)
