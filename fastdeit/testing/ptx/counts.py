"""What a kernel executes and moves: warp instructions by class, sectors of global accesses, wavefronts of shared memory.

A warp's global access moves whole sectors of 32 bytes; the ideal is as few as hold its distinct bytes. A shared access takes a
wavefront for every 32 words in distinct banks: 32 threads at a time up to 4 bytes each, 16 at 8 bytes, 8 at 16 bytes.
"""

import dataclasses
from collections import Counter

import numpy as np
from numpy import ndarray

from fastdeit.aot.execution import Accesses
from fastdeit.testing.ptx.program import Instruction, Program

_CLASSES = (
    ("matrix", ("mma.", "wgmma.mma_async")),
    ("special", ("ex2.", "lg2.", "rcp.", "rsqrt.", "sqrt.", "tanh.", "div.full", "div.approx")),
    ("copy", ("cp.async",)),
    ("global", ("ld.global", "st.global")),
    ("shared", ("ld.shared", "st.shared", "ldmatrix", "stmatrix")),
    ("shuffle", ("shfl", "redux", "elect")),
    ("barrier", ("bar.", "mbarrier", "fence", "wgmma")),
    ("branch", ("bra", "ret")),
    ("move", ("mov", "ld.param", "cvta", "selp")),
    ("convert", ("cvt",)),
)
_FLOATING = ("f32", "f16", "bf16", "f16x2", "bf16x2", "f32x2")


def instruction_class(opcode: str) -> str:
    """One of the names of _CLASSES, "float" or "integer"."""
    for name, beginnings in _CLASSES:
        if opcode.startswith(beginnings):
            return name
    return "float" if opcode.rsplit(".", 1)[1] in _FLOATING else "integer"


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of one or more launches.

    Attributes:
        instructions: class -> warps that executed one of it, in PTX before the assembler.
        once, loop: accesses outside and inside the loops of the kernel.
    """

    instructions: dict[str, int] = dataclasses.field(default_factory=dict)
    once: Accesses = dataclasses.field(default_factory=Accesses)
    loop: Accesses = dataclasses.field(default_factory=Accesses)

    def __add__(self, other: "Counts") -> "Counts":
        instructions = dict(Counter(self.instructions) + Counter(other.instructions))
        return Counts(instructions, self.once + other.once, self.loop + other.loop)


class Observer:
    """Adds up one launch's memory accesses; a machine's `observer`."""

    def __init__(self) -> None:
        self._by_line: dict[int, Accesses] = {}  # line of the PTX -> of its instruction

    def access(self, instruction: Instruction, lanes: ndarray, address: ndarray, nbytes: int, space: str = "") -> None:
        """Threads `lanes` access `nbytes` at each address; `space`, where the instruction does not name it: global or shared."""
        if not len(lanes):
            return
        if (space or ("global" if ".global" in instruction.opcode else "shared")) == "global":
            sectors, ideal = sectors_of(lanes, address, nbytes)
            if instruction.opcode.startswith("st."):
                self._add(instruction, Accesses(stored=sectors, ideal_stored=ideal))
            elif instruction.opcode.startswith("cp.async"):
                self._add(instruction, Accesses(copied=sectors, ideal_copied=ideal))
            else:
                self._add(instruction, Accesses(loaded=sectors, ideal_loaded=ideal))
        else:
            wavefronts, ideal = wavefronts_of(lanes, address, nbytes)
            self._add(instruction, Accesses(wavefronts=wavefronts, ideal_wavefronts=ideal))

    def tensor_copy(self, instruction: Instruction, nbytes: int) -> None:
        self._add(instruction, Accesses(tensor_bytes=nbytes))

    def _add(self, instruction: Instruction, accesses: Accesses) -> None:
        self._by_line[instruction.line] = self._by_line.get(instruction.line, Accesses()) + accesses

    def counts(self, program: Program, executed: ndarray) -> Counts:
        """With the warps that executed each instruction of the program."""
        by_class: Counter = Counter()
        for instruction, warps in zip(program.instructions, executed.tolist(), strict=True):
            by_class[instruction_class(instruction.opcode)] += warps
        repeated = lines_of_loops(program)
        once, loop = Accesses(), Accesses()
        for line, accesses in self._by_line.items():
            if line in repeated:
                loop += accesses
            else:
                once += accesses
        return Counts({name: n for name, n in sorted(by_class.items()) if n}, once, loop)


def lines_of_loops(program: Program) -> set[int]:
    """The lines of all instructions between a label and a branch back to it."""
    found: set[int] = set()
    for at, instruction in enumerate(program.instructions):
        if instruction.opcode.split(".")[0] == "bra":
            found |= {x.line for x in program.instructions[program.target(instruction) : at]}
    return found


def sectors_of(lanes: ndarray, address: ndarray, nbytes: int) -> tuple[int, int]:
    """Sectors that one instruction's warps move, and the fewest that could hold their distinct addresses."""
    warp = (lanes // 32).astype(np.int64) << 44
    sectors = len(np.unique(warp | (address >> 5) & (1 << 44) - 1))
    distinct = np.unique(warp | address & (1 << 44) - 1)
    _, per_warp = np.unique(distinct >> 44, return_counts=True)
    return sectors, int((-(-per_warp * nbytes // 32)).sum())


def wavefronts_of(lanes: ndarray, address: ndarray, nbytes: int) -> tuple[int, int]:
    """Wavefronts that one instruction's warps take, and the fewest that their distinct words need."""
    together = 32 if nbytes <= 4 else 128 // nbytes
    words = (address >> 2)[:, None] + np.arange(max(nbytes // 4, 1))
    group = np.broadcast_to((lanes // together)[:, None].astype(np.int64), words.shape)
    distinct = np.unique(group << 32 | words)
    groups, position = np.unique(distinct >> 32, return_inverse=True)
    by_bank = np.bincount(position * 32 + (distinct & 31), minlength=32 * len(groups)).reshape(-1, 32)
    return int(by_bank.max(1).sum()), int((-(-by_bank.sum(1) // 32)).sum())
