"""Tables of the attention kernels' form and tiles by architecture and shape; a lookup needs no GPU.

The tables rest on what the compiler makes of them: no spills, then the most resident blocks. Nothing in them was timed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from fastdeit.kernels.runtime.architecture import has_descriptors, pointer_stages, triton_version

# Head dimensions that are no power of two are cut in two pieces rather than padded: 80 = 64 + 16 does five eighths of the work of
# 128. 72, 88 and 104 carry 8, 8 and 24 columns of zeros. 128 is cut in halves because whole it spills on sm_80; on sm_90 both
# compile without.
HEAD_DIM_SPLITS = {
    32: (32, 0),
    48: (32, 16),
    64: (64, 0),
    72: (64, 16),
    80: (64, 16),
    88: (64, 32),
    96: (64, 32),
    104: (64, 64),
    128: (64, 64),
}

# Up to this many tokens backward runs as one kernel, a head a program. None yet: the two-kernel form is the one that is safe to
# choose without a measurement. A persistent form of that kernel, which would fetch the next head's keys early, is out of reach:
# nested loops spill 160 to 224 bytes on sm_90, flattened ones (`tl.range(flatten=True)`) do not compile with Triton 3.6.
ONE_PROGRAM_BACKWARD_TOKENS = {90: 0, 100: 0}
_ONE_PROGRAM_LONGEST = 256


@dataclass(frozen=True)
class Tiles:
    owned: int  # rows of the tile that a program keeps: queries, or keys for dK and dV
    streamed: int  # rows of a tile that a step of its loop loads
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None  # of a thread, where that makes room for another block on a multiprocessor


@dataclass(frozen=True)
class Config:
    descriptors: bool  # load and store through tensor descriptors
    forward: Tiles
    dq: Tiles
    dkv: Tiles
    one_program: Tiles | None = None  # backward in one kernel instead of dq and dkv; `owned` holds all keys


@dataclass(frozen=True)
class Shapes:
    """Calls of attention with one head dimension, within a range of tokens and one of batch times heads."""

    head_dim: int
    tokens: range
    batch_heads: range
    gradients: bool  # forward and backward together, or forward alone


# Architecture -> where PyTorch's own attention was measured to be faster, as `fastdeit tune attention` prints it. Empty: nothing
# was measured yet.
SDPA_PREFERRED: dict[int, tuple[Shapes, ...]] = {}


def handed_over(arch: int, head_dim: int, tokens: int, batch_heads: int, gradients: bool) -> bool:
    """Whether a call of N tokens and B * H heads in all is left to PyTorch."""
    return any(
        head_dim == shapes.head_dim
        and gradients == shapes.gradients
        and tokens in shapes.tokens
        and batch_heads in shapes.batch_heads
        for shapes in SDPA_PREFERRED.get(arch, ())
    )


def around(head_dim: int, tokens: int, batch_heads: int, gradients: bool) -> Shapes:
    """The range that a measurement applies to: lengths with as many blocks of 16 tokens, and grids of half to twice the size."""
    first = (tokens - 1) // 16 * 16 + 1
    return Shapes(head_dim, range(first, first + 16), range(-(-batch_heads // 2), 2 * batch_heads), gradients)


def tail(length: int, block: int) -> int:
    """The width of the masked last block, 16 at least: a loop over full blocks leaves 1 ... block rows to it."""
    rest = (length - 1) % block + 1
    return max(16, 1 << (rest - 1).bit_length())


def takes_descriptors(arch: int) -> bool:
    """Whether 16-bit kernels load packed inputs through descriptors. Triton 3.4 does not compile the one of dQ for sm_90 (its pass
    TritonNvidiaGPUTMALowering fails): with it, attention runs over pointers there."""
    return has_descriptors(arch) and (arch != 90 or triton_version() >= (3, 5))


@lru_cache(maxsize=1024)
def select_config(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    itemsize: int,
    arch: int,
    multiprocessors: int,
    describable: bool,
) -> Config:
    """The configuration for a call.

    Args:
        batch, heads, queries, keys, head_dim: B, H, N, M and D; D is one of HEAD_DIM_SPLITS.
        itemsize: bytes per element, 2, or 4 for TF32.
        arch: compute capability such as 90.
        multiprocessors: of the GPU.
        describable: q, k and v lie packed in one tensor that a descriptor can express.
    """
    tiles = -(-queries // 64)
    narrow = batch * heads * tiles < multiprocessors
    # Tiles of 128 queries read K and V from L2 half as often: where they compute no row more, and two still fill a multiprocessor.
    tall = tiles % 2 == 0 and batch * heads * tiles >= 4 * multiprocessors
    descriptors = describable and takes_descriptors(arch) and itemsize == 2 and not narrow
    config = Config(descriptors, *_tiles(head_dim, itemsize, arch, descriptors, narrow, tall))
    if descriptors and one_program_fits(keys, head_dim) and keys <= ONE_PROGRAM_BACKWARD_TOKENS.get(arch, 0):
        return Config(descriptors, config.forward, config.dq, config.dkv, one_program_tiles(keys))
    return config


def one_program_fits(keys: int, head_dim: int) -> bool:
    return keys <= _ONE_PROGRAM_LONGEST and head_dim == 64


def one_program_tiles(keys: int) -> Tiles:
    """Two stages: one leaves the loads uncovered and, oddly, spills."""
    return Tiles(128 if keys <= 128 else 256, 32, num_warps=8)


def _tiles(
    head_dim: int, itemsize: int, arch: int, descriptors: bool, narrow: bool, tall: bool
) -> tuple[Tiles, Tiles, Tiles]:
    """The tiles of forward, of dQ, and of dK and dV."""
    piece1 = HEAD_DIM_SPLITS[head_dim][1]
    if itemsize == 4:
        return (Tiles(64, 32 if has_descriptors(arch) else 16, num_stages=pointer_stages(arch, 2)),) * 3
    # A grid that does not fill the machine gets programs of half the size. Larger heads have no registers to lose on it.
    owned = 32 if narrow and head_dim <= 64 else 64
    if has_descriptors(arch) and arch >= 100 and owned == 64:
        # tcgen05 multiplies 128 rows at a time. Other sizes of these three spill at one head dimension or another.
        return Tiles(128, 64), Tiles(128, 64) if head_dim == 64 else Tiles(64, 32), Tiles(64, 32)
    if has_descriptors(arch):
        # 32 rows are too few for wgmma, so that their copies may be asynchronous.
        stages = 2 if descriptors or owned == 32 else pointer_stages(arch, 2)
        narrower = 64 if descriptors or piece1 < 64 else 32
        # At 64 columns dK and dV take 171 registers by themselves: 168 leave room for a third block.
        fewer = 168 if descriptors and head_dim == 64 else None
        tiles = Tiles(owned, 64, num_stages=stages)
        if tall and descriptors and head_dim == 64:
            tiles = Tiles(128, 64, num_warps=8)
        return tiles, tiles, Tiles(owned, narrower, num_stages=stages, maxnreg=fewer)
    if tall and arch == 80 and head_dim == 64:
        # A warp multiplies 32 rows instead of 16 by what it reads of shared memory, which is the bound there.
        return Tiles(128, 32), Tiles(128, 32), Tiles(128, 16)
    if head_dim <= 64:
        return Tiles(owned, 32), Tiles(owned, 32), Tiles(owned, 32)
    if piece1 < 64:
        return Tiles(64, 32), Tiles(64, 32), Tiles(64, 16)
    return Tiles(64, 32), Tiles(64, 16), Tiles(64, 16, num_warps=8)


@dataclass(frozen=True)
class Case:
    """A configuration together with what a call adds to it, for the compile gate."""

    head_dim: int
    dtype: str  # in Triton's spelling
    tail: int
    config: Config
    label: str
    matrix: bool | str  # tiles too small for wgmma's 64 rows run mma.sync on sm_90 and later, on purpose


def aot_cases(arch: int) -> Iterator[Case]:
    """What the gate compiles: bf16 at every head dimension and 16 wide tails where a family is at home (pointers on sm_80,
    descriptors on sm_90), and the least, the commonest and the largest of the other tiles, tails and dtypes."""
    some, every = (64, 80, 128), tuple(HEAD_DIM_SPLITS)
    pointer_dims = {80: every, 89: some[:2], 90: some if takes_descriptors(90) else every, 100: some[:1]}[arch]
    yield from (case(arch, d, "bf16", 16, describable=False) for d in pointer_dims)
    yield case(arch, 64, "bf16", 16, describable=False, samples=1)
    if arch == 80:
        yield case(arch, 64, "bf16", 16, describable=False, tokens=144)
    if arch != 89:
        yield case(arch, 64, "fp32", 16, describable=True)
    if not takes_descriptors(arch):
        return
    yield from (case(arch, d, "bf16", 16, describable=True) for d in (every if arch == 90 else some))
    if arch == 90:
        yield from (case(arch, 64, "bf16", last, describable=True) for last in (32, 64))
        yield case(arch, 64, "fp16", 16, describable=True)
        yield case(arch, 64, "bf16", 16, describable=True, tokens=144)


def eight_bit_cases(arch: int) -> Iterator[tuple[Case, str]]:
    """Forward kernels with an 8-bit output, each with the output's format in Triton's spelling: DeiT's heads in the forms that
    frozen models launch, in float8 where there is a conversion to it; on sm_90 a head in two pieces too."""
    if arch < 100:
        yield case(arch, 64, "bf16", 16, describable=False), "i8" if arch < 89 else "fp8e4nv"
    if not takes_descriptors(arch):
        return
    yield case(arch, 64, "bf16", 16, describable=True), "fp8e4nv"
    if arch == 90:
        yield case(arch, 80, "bf16", 16, describable=True), "fp8e4nv"


def eight_bit_label(case: Case, out: str) -> str:
    """The label of a case whose output has an 8-bit format."""
    return f"{case.label} to {out}"


def case(
    arch: int,
    head_dim: int,
    dtype: str,
    last: int,
    *,
    describable: bool,
    samples: int = 1024,
    tokens: int | None = None,
) -> Case:
    """A case for so many samples of one head; `last` is the width of the masked tail, where the tile has room for it.

    Args:
        tokens: by default three full blocks of 64 and the tail, as the 197 and 198 tokens of DeiT at 224 pixels.
    """
    itemsize = 4 if dtype == "fp32" else 2
    tokens = tokens or 192 + last
    config = select_config(samples, 1, tokens, tokens, head_dim, itemsize, arch, 132, describable)
    form = "descriptors" if config.descriptors else "pointers"
    narrow = "" if config.forward.owned == 64 else f" {config.forward.owned} rows"
    matrix = "HMMA" if config.forward.owned < 64 and has_descriptors(arch) else True
    return Case(head_dim, dtype, last, config, f"D={head_dim} {dtype} {form}{narrow} tail={last}", matrix)
