"""Parses the PTX of one kernel into instructions with resolved registers and labels (PTX ISA, chapters 4 and 5).

The subset is what Triton emits: one entry, no functions, register scopes in braces, every statement on lines of its own or ended
by a semicolon. Anything else is an error that names the line.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple


class PtxError(Exception):
    """PTX that the machine does not understand: syntax, an instruction, or a modifier."""


class Register(NamedTuple):
    index: int
    width: int  # bytes; 0 for a predicate
    negated: bool = False  # `!%p1` as an operand
    name: str = ""


class Immediate(NamedTuple):
    bits: int  # two's complement or IEEE bits; a float literal's are those of float32


class Special(NamedTuple):
    name: str  # such as %tid.x


class Symbol(NamedTuple):
    name: str  # a parameter, the shared-memory array, or a label


class Address(NamedTuple):
    base: "Register | Symbol | Immediate"
    offset: int


class TensorAddress(NamedTuple):
    """`[map, {coordinates}]` of a tensor copy."""

    map: Register
    coordinates: "Vector"


class Vector(NamedTuple):
    items: tuple


class Pair(NamedTuple):
    """`a|b`, two destinations."""

    first: "Register | Symbol | Special"
    second: "Register | Symbol"


Operand = Register | Immediate | Special | Symbol | Address | TensorAddress | Vector | Pair


class Instruction(NamedTuple):
    opcode: str  # with all modifiers, such as ld.global.v4.b32
    operands: tuple[Operand, ...]
    guard: Register | None  # @%p or, negated, @!%p
    line: int  # of the PTX text, from 1
    text: str
    source: str  # file:line that the compiler names, or ""

    @property
    def parts(self) -> list[str]:
        """The opcode cut at its dots; `a::b` stays one part."""
        return self.opcode.split(".")

    def __str__(self) -> str:
        text = self.text if len(self.text) <= 100 else self.text[:97] + "..."
        return f"PTX line {self.line} ({self.source or 'no source'}): {text}"


class Parameter(NamedTuple):
    name: str
    type: str  # u32, u64, f32, ...; b8 with a size for a tensor map
    size: int  # bytes of an array, else 0


_WIDTHS = {"pred": 0, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "u16": 2, "u32": 4, "u64": 8, "f32": 4, "f64": 8}
_PARAMETER = re.compile(r"\.param\b.*?\.(b8|u8|u16|u32|u64|f32|f64|b32|b64)\b.*?([\w$]+)(?:\[(\d+)\])?$")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\n\{", re.S)
_BRANCH_TARGETS = re.compile(r"\.branchtargets\b[^;]*;")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)\s*")
_GUARD = re.compile(r"@(!?)(%?[\w$]+)\s+")
_FLOAT = re.compile(r"0(?:[fF]([0-9A-Fa-f]{8})|[dD]([0-9A-Fa-f]{16}))$")
_INTEGER = re.compile(r"-?(0x[0-9A-Fa-f]+|\d+)U?$")


class Program:
    """One kernel.

    Attributes:
        name, parameters, threads: the entry, its parameters in order, and threads of a block (`.reqntid`).
        instructions: in order.
        targets: label -> index of the instruction that it precedes; labels of an inner scope carry the scope's number.
        branch_targets: label of a `.branchtargets` list -> the labels in it.
        widths: bytes of each register by index, 0 for predicates.
        arch: compute capability of `.target`, such as 90.
    """

    def __init__(self, ptx: str) -> None:
        entry = _ENTRY.search(ptx)
        target = re.search(r"\.target\s+sm_(\d+)", ptx)
        threads = entry and re.search(r"\.reqntid\s+(\d+)", entry[3])
        if not entry or not target or not threads:
            raise PtxError("expected one .entry with .reqntid, and a .target")
        if len(re.findall(r"\.(?:entry|func)\b", ptx)) != 1:
            raise PtxError("expected one .entry and no .func")
        self.name, self.threads, self.arch = entry[1], int(threads[1]), int(target[1])
        self.parameters = [self._parameter(text) for text in _split(re.sub(r"//[^\n]*", "", entry[2]))]
        self.instructions: list[Instruction] = []
        self.targets: dict[str, int] = {}
        self.branch_targets: dict[str, list[str]] = {}
        self.widths: list[int] = []
        self._registers: dict[str, Register] = {}  # name with scope -> register
        self._files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx))
        body = _BRANCH_TARGETS.sub(_on_one_line, ptx[entry.end() :])
        self._read_body(body, ptx.count("\n", 0, entry.end()) + 1)

    def target(self, instruction: Instruction) -> int:
        """Where a branch goes."""
        label = instruction.operands[0]
        if not isinstance(label, Symbol) or label.name not in self.targets:
            raise PtxError(f"{instruction}: no such label")
        return self.targets[label.name]

    def listed_targets(self, instruction: Instruction) -> list[int]:
        """Where a `brx.idx` may go."""
        label = instruction.operands[1]
        if not isinstance(label, Symbol) or label.name not in self.branch_targets:
            raise PtxError(f"{instruction}: no list of targets")
        return [self.targets[target] for target in self.branch_targets[label.name]]

    @staticmethod
    def _parameter(text: str) -> Parameter:
        found = _PARAMETER.search(text)
        if not found:
            raise PtxError(f"parameter {text!r}")
        return Parameter(found[2], found[1], int(found[3] or 0))

    def _read_body(self, body: str, first_line: int) -> None:
        scopes, opened, source = [""], 0, ""
        for number, raw in enumerate(body.split("\n"), first_line):
            line = raw.split("//")[0].strip()
            if line.startswith(".loc"):
                _, file, row, *_ = line.split()
                source = f"{self._files.get(file, file).rsplit('/', 1)[-1]}:{row}"
                continue
            if line == "}" and len(scopes) == 1:
                return
            for statement in _statements(line):
                if statement == "{":
                    opened += 1
                    scopes.append(f"@{opened}")
                    continue
                if statement == "}":
                    scopes.pop()
                    continue
                while label := _LABEL.match(statement):
                    name = label[1] + scopes[-1]
                    self.targets[name] = len(self.instructions)
                    statement = statement[label.end() :]
                if not statement or statement.startswith('.pragma "used_bytes_mask '):  # tells the assembler alone
                    continue
                try:
                    if statement.startswith(".branchtargets"):
                        labels = _split(statement.removeprefix(".branchtargets"))
                        self.branch_targets[name] = [label + scopes[-1] for label in labels]
                    elif statement.startswith("."):
                        self._declare(statement, scopes[-1])
                    else:
                        self.instructions.append(self._instruction(statement, scopes, number, source))
                except (KeyError, ValueError, TypeError, AttributeError) as error:
                    raise PtxError(f"PTX line {number}: cannot parse {statement!r}") from error
        raise PtxError("the body has no end")

    def _declare(self, statement: str, scope: str) -> None:
        kind, names = re.match(r"\.reg\s*\.(\w+)\s+(.*)", statement, re.S).groups()
        width = _WIDTHS[kind]
        for name in _split(names):
            ranged = re.match(r"(%?\w+)<(\d+)>$", name)
            for full in [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]:
                self._registers[full + scope] = Register(len(self.widths), width, name=full)
                self.widths.append(width)

    def _instruction(self, statement: str, scopes: list[str], line: int, source: str) -> Instruction:
        guard, text = None, statement
        if found := _GUARD.match(statement):
            guard = self._lookup(found[2], scopes)
            if guard is None:
                raise ValueError(found[2])
            guard = guard._replace(negated=bool(found[1]))
            statement = statement[found.end() :]
        opcode, rest = re.match(r"([a-z][\w.:]*)\s*(.*)$", statement, re.S).groups()
        opcode = re.sub(r"^(ld|st)\.shared::cta\b", r"\1.shared", opcode)  # two spellings of one state space (5.1.7)
        operands = tuple(self._operand(text, scopes) for text in _split(rest))
        return Instruction(opcode, operands, guard, line, " ".join(text.split()), source)

    def _lookup(self, name: str, scopes: list[str]) -> Register | None:
        return next((self._registers[name + s] for s in reversed(scopes) if name + s in self._registers), None)

    def _operand(self, text: str, scopes: list[str]) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(item, scopes) for item in _split(text[1:-1])))
        if text.startswith("["):
            base, *more = _split(text[1:-1])
            if more:
                (coordinates,) = more
                return TensorAddress(self._operand(base, scopes), self._operand(coordinates, scopes))
            base, offset = re.match(r"(.*?)\s*(?:\+\s*(-?\w+))?$", base).groups()
            return Address(self._operand(base, scopes), int(offset or "0", 0))
        if "|" in text:
            return Pair(*(self._operand(item, scopes) for item in text.split("|")))
        register = self._lookup(text.lstrip("!"), scopes)
        if register is not None:
            return register._replace(negated=text.startswith("!"))
        if text.startswith("%"):
            return Special(text)
        if found := _FLOAT.match(text):
            return Immediate(int(found[1] or found[2], 16))
        if _INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if not re.fullmatch(r"[\w$]+", text):
            raise ValueError(text)
        return Symbol(text + scopes[-1] if text + scopes[-1] in self.targets else text)


def _on_one_line(found: re.Match) -> str:
    """A statement of several lines as one line and as many empty ones."""
    return found[0].replace("\n", " ") + "\n" * found[0].count("\n")


def _split(text: str) -> list[str]:
    """Cuts at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _statements(line: str) -> Iterator[str]:
    """Statements of a line; a brace that opens or closes a scope is one by itself."""
    current = ""
    for character in line:
        if character in "{}" and not current.strip():
            yield character
        elif character == ";":
            yield current.strip()
            current = ""
        else:
            current += character
    if current.strip():
        yield current.strip()
