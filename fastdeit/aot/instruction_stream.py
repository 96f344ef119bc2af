"""Statistics of a compiled kernel's instructions: widths of memory accesses, instructions by class, bytes in flight."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastdeit.aot import sass
from fastdeit.aot.sass import Instruction, Listing

BULK_BYTES = 16  # a bulk copy (TMA) moves at least this much at once
_REGISTER = re.compile(r"(?<![\w.])R(\d+)(\.64)?")


@dataclass(frozen=True)
class Section:
    """Part of a kernel: its longest loop (one iteration of it), or everything else.

    Counts are of one thread, or of one warp for what a warp executes together.
    """

    instructions: dict[str, int] = field(default_factory=dict)  # class -> count
    matrix_flops: int = (
        0  # of one block's matrix instructions; 0 where their shape does not stand in their name (tcgen05)
    )
    shared_bytes: int = 0  # that a thread moves to and from shared memory
    scattered_bytes: int = (
        0  # written in pieces of one 16-byte unit, counted as the whole units that each piece touches
    )
    round_trips: int = 0  # waits for loads of global memory


@dataclass(frozen=True)
class InstructionStream:
    """Read from one kernel's machine code."""

    widest_access: int = 0  # bytes of global memory that a thread moves with one instruction; 0 where it moves none
    narrowest_access: int = 0
    narrow_share: float = 0.0  # of the bytes of all accesses, those of accesses of 1 or 2 bytes
    once: Section = Section()  # outside the longest loop; other loops count one iteration
    loop: Section = Section()  # one iteration of the longest loop: a tile, or a step over rows
    loops: int = 0  # how many there are
    in_flight_bytes: int = (
        0  # on a multiprocessor: loads that resident warps issue before they wait for the first of them
    )
    asynchronous: bool = False  # tiles are copied to shared memory while others are computed on
    serialised: str = ""  # the compiler's reason for waiting after every matrix product, such as "C7515"
    unfenced: int = 0  # loops whose products read, without a proxy fence, what a copy of the same loop has written

    @staticmethod
    def from_dict(facts: dict) -> "InstructionStream":
        """The inverse of `dataclasses.asdict`."""
        return InstructionStream(**{**facts, "once": Section(**facts["once"]), "loop": Section(**facts["loop"])})


def read(
    listing: Listing,
    *,
    num_warps: int,
    num_stages: int,
    blocks_per_sm: int,
    shared_bytes: int,
    ptxas_log: str,
    ptx: str,
) -> InstructionStream:
    """The stream of a listing.

    Args:
        num_warps, num_stages: the configuration's compile options.
        blocks_per_sm, shared_bytes: resident blocks, and bytes of shared memory of one.
        ptxas_log: what ptxas printed.
        ptx: what ptxas was given.
    """
    code = listing.instructions
    widths = Counter(x.access_bytes for x in code if x.access_bytes)
    bulk = any(x.opcode.startswith(("UTMALDG", "UTMASTG", "UBLKCP")) for x in code)
    found = [*widths, *([BULK_BYTES] if bulk else [])]
    moved = sum(width * count for width, count in widths.items())
    narrow = sum(width * count for width, count in widths.items() if width <= 2)
    longest = max(listing.loops, key=lambda loop: loop.last - loop.first, default=None)
    inside = range(longest.first, longest.last + 1) if longest else range(0)
    waits = round_trips(code)
    asynchronous = bulk or any(x.opcode.startswith("LDGSTS") for x in code)
    in_flight = most_outstanding_bytes(code) * 32 * num_warps
    if asynchronous:  # all buffers of the pipeline but the one in use
        in_flight += shared_bytes * max(num_stages - 1, 1) // max(num_stages, 2)
    return InstructionStream(
        widest_access=max(found, default=0),
        narrowest_access=min(found, default=0),
        narrow_share=0.0 if bulk or not moved else round(narrow / moved, 3),
        once=_section(
            [x for i, x in enumerate(code) if i not in inside], num_warps, sum(i not in inside for i in waits)
        ),
        loop=_section([code[i] for i in inside], num_warps, sum(i in inside for i in waits)),
        loops=len(listing.loops),
        in_flight_bytes=in_flight * blocks_per_sm,
        asynchronous=asynchronous,
        serialised=serialisation(ptxas_log),
        unfenced=unfenced_loops(ptx),
    )


def _section(code: Sequence[Instruction], num_warps: int, waits: int) -> Section:
    return Section(
        instructions=by_class(code),
        matrix_flops=sum(_matrix_flops(x.opcode, num_warps) for x in code),
        shared_bytes=sum(x.shared_bytes for x in code),
        scattered_bytes=scattered_bytes(code),
        round_trips=waits,
    )


def _matrix_flops(opcode: str, num_warps: int) -> int:
    """Floating-point operations of the matrix instructions of one block: four warps execute one wgmma, each warp an mma.sync."""
    if found := re.match(r"[A-Z]*GMMA\.(\d+)x(\d+)x(\d+)", opcode):
        return 2 * int(found[1]) * int(found[2]) * int(found[3]) * max(num_warps // 4, 1)
    if found := re.match(r"[A-Z]*MMA\.16(8)(\d+)", opcode):
        return 2 * 16 * 8 * int(found[2]) * num_warps
    return 0


def scattered_bytes(code: Sequence[Instruction]) -> int:
    """Bytes of a thread's stores, where each of several narrow stores into one 16-byte unit counts as a whole unit.

    Neighbouring threads then write 16 bytes apart, so that each store of a warp touches as much memory as a 16-byte one.
    """
    units: Counter[tuple[str, int]] = Counter()
    for x in code:
        address = re.search(r"\[(R\d+)(?:\.64)?(?:\+(0x[0-9a-f]+))?\]", x.operands)
        if x.opcode.startswith("STG") and x.access_bytes < 16 and address:
            units[address[1], int(address[2] or "0", 16) // 16] += 1
    return sum(16 * count for count in units.values() if count > 1)


def by_class(code: Sequence[Instruction]) -> dict[str, int]:
    """Class -> how many of the instructions, in the order of `sass.CLASSES`."""
    counts = Counter(x.kind for x in code)
    return {name: counts[name] for name in sass.CLASSES if counts[name]}


def serialisation(ptxas_log: str) -> str:
    """ptxas's warning that it waits after every asynchronous matrix product, as its number; "" where there is none."""
    found = re.search(r"\((C75\d\d)\)[^\n]*serializ", ptxas_log)
    return found[1] if found else ""


def unfenced_loops(ptx: str) -> int:
    """How many loops of a kernel multiply, by wgmma, what `cp.async` writes in the same loop, without a proxy fence.

    wgmma reads shared memory through the asynchronous proxy; cp.async writes it through the generic one. The memory model of PTX
    orders the two only where a `fence.proxy.async` stands between the barrier behind the copy and the product.
    """
    lines = ptx.splitlines()
    labels = {label[1]: i for i, line in enumerate(lines) if (label := re.match(r"(\$\w+):", line))}
    found = 0
    for at, line in enumerate(lines):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
        if branch and labels.get(branch[1], at) < at:
            body = "\n".join(lines[labels[branch[1]] : at])
            # Narrower copies bring what is no operand of a product: the rows' statistics.
            copied = re.search(r"cp\.async\.c[ag]\.shared\.global [^\n]*, 0x10\b", body) is not None
            found += copied and "wgmma.mma_async" in body and "fence.proxy.async" not in body
    return found


def most_outstanding_bytes(code: Sequence[Instruction]) -> int:
    """The most bytes that one thread has loads under way for, in the order of the code.

    The first instruction that names a register which a load is to write waits; every load before it has then arrived.
    """
    return max((bytes_ for bytes_, _ in _outstanding(code)), default=0)


def round_trips(code: Sequence[Instruction]) -> list[int]:
    """Positions of the instructions that wait for memory: each names what a load after the last wait is to bring."""
    return [at for at, (_, waits) in enumerate(_outstanding(code)) if waits]


def _outstanding(code: Sequence[Instruction]) -> list[tuple[int, bool]]:
    """For each instruction the bytes in flight after it, and whether it waits for a load issued since the last wait."""
    pending: set[int] = set()  # registers
    under_way, found = 0, []
    for instruction in code:
        named = {int(n) + k for n, wide in _REGISTER.findall(instruction.operands) for k in range(2 if wide else 1)}
        if waits := not pending.isdisjoint(named):
            pending, under_way = set(), 0
        if instruction.opcode.split(".")[0] == "LDG" and (target := _REGISTER.match(instruction.operands)):
            first, size = int(target[1]), instruction.access_bytes
            pending |= set(range(first, first + max(size // 4, 1)))
            under_way += size
        found.append((under_way, waits))
    return found
