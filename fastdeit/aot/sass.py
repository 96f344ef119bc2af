"""Machine code as `nvdisasm` prints it, as a list of instructions with its loops."""

import re
from dataclasses import dataclass

# Instruction classes in the order in which they are tried: the first pattern that matches an opcode names its class.
CLASSES = {
    "matrix": r"(UTC)?[A-Z]*MMA(?!\.MMA)\b",  # not HFMA2.MMA, which moves a constant
    "special": r"MUFU",
    "global": r"LDG\b|STG|LDGSTS|UTMALDG|UTMASTG|UTMAREDG|UBLKCP|RED\b|ATOMG",
    "shared": r"LDS|STS|LDSM|STSM|LDT|STT|UTCCP",
    "local": r"LDL|STL",
    "shuffle": r"SHFL|REDUX",
    "barrier": r"BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPSYNC|WARPGROUP|FENCE|MEMBAR|UTMACMDFLUSH|UTCBAR|ERRBAR|CCTL|UCGABAR",
    "convert": r"F2F|F2FP|I2F|I2FP|F2I|PRMT|HADD2|HFMA2|HMUL2|HSET|HMNMX|F2IP",
    "fp32 pair": r"FADD2|FMUL2|FFMA2",  # two results
    "compare": r"FMNMX|FSEL|FSETP|FCHK|FSET",
    "fp32": r"FADD|FMUL|FFMA",
    "multiply": r"IMAD|IMUL|IDP",  # of integers, and moves that the compiler writes as such
    "branch": r"BRA|EXIT|BSSY|BSYNC|CALL|RET|NOP|NANOSLEEP|YIELD|BREAK|BRX|JMP",
    "uniform": r"U[A-Z]|R2UR|S2UR|VOTEU|LDCU|ELECT",  # one value for a warp, on a unit of its own
    "integer": r"[A-Z]",  # what is left: address arithmetic, logic, predicates, moves
}
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][A-Z0-9_.x]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"\.L_x_\d+")
_WIDTHS = (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1))
_SHORTEST_LOOP = 8  # instructions; shorter backward branches wait for a barrier
_WORK = {"matrix", "special", "fp32", "fp32 pair", "compare", "global", "convert"}


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    predicated: bool

    @property
    def kind(self) -> str:
        """The class: a key of CLASSES."""
        return next(name for name, pattern in CLASSES.items() if re.match(pattern, self.opcode))

    @property
    def access_bytes(self) -> int:
        """Bytes that one thread moves with a load, store or copy of global memory; 0 for others, and for bulk copies."""
        return self._width() if self.opcode.split(".")[0] in ("LDG", "STG", "LDGSTS") else 0

    @property
    def shared_bytes(self) -> int:
        """Bytes that one thread moves to or from shared memory; 0 for others."""
        base, *modifiers = self.opcode.split(".")
        if base in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits, 4 bytes a thread each
            return 4 * next((int(m) for m in modifiers if m in ("2", "4")), 1)
        return self._width() if base in ("LDS", "STS", "LDGSTS") else 0

    def _width(self) -> int:
        modifiers = self.opcode.split(".")
        return next((size for name, size in _WIDTHS if name in modifiers), 4)


@dataclass(frozen=True)
class Loop:
    """Instructions first ... last, both included; the last branches back to the first."""

    first: int
    last: int


@dataclass(frozen=True)
class Listing:
    instructions: tuple[Instruction, ...]  # up to the last EXIT; what lies behind it are slow paths of waits
    loops: tuple[Loop, ...]  # those that do work, by their first instruction


def parse(text: str) -> Listing:
    """The listing of one kernel, from the output of `nvdisasm --print-code`.

    Raises:
        ValueError: the text has no instruction.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(found[2], found[3], found[1] is not None))
    if not instructions:
        raise ValueError("no instruction found in what nvdisasm printed")
    end = max((i for i, x in enumerate(instructions) if x.opcode.startswith("EXIT")), default=len(instructions) - 1)
    instructions = [x for x in instructions[: end + 1] if x.opcode != "NOP"]
    return Listing(tuple(instructions), tuple(_loops(instructions, labels)))


def _loops(instructions: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    found: dict[int, int] = {}
    for at, instruction in enumerate(instructions):
        if instruction.opcode.split(".")[0] != "BRA" or not (target := _TARGET.search(instruction.operands)):
            continue
        first = labels.get(target[0], len(instructions))
        if at - first >= _SHORTEST_LOOP and any(x.kind in _WORK for x in instructions[first:at]):
            found[first] = max(at, found.get(first, 0))
    return [Loop(first, last) for first, last in sorted(found.items())]
