"""mov with packing, ld and st (PTX ISA 9.7.9), atom (9.7.13)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fastdeit.testing.ptx.formats import UNSIGNED, WIDTH
from fastdeit.testing.ptx.program import Address, Instruction, PtxError, Register, Symbol, Vector
from fastdeit.testing.ptx.threads import PARAMETERS

if TYPE_CHECKING:
    from fastdeit.testing.ptx.machine import Machine

Step = Callable[[], None]


def move(machine: "Machine", instruction: Instruction) -> Step:
    """mov: a register, or between a vector and the register that holds all of it, lowest element first."""
    target, source = instruction.operands
    kind = instruction.parts[-1]
    if isinstance(source, Vector):
        return _pack(machine, target, source.items, kind)
    if isinstance(target, Vector):
        return _unpack(machine, target.items, source, kind)
    write = machine.writer(target, kind)
    read = machine.reader(source, kind)
    return lambda: write(read())


def _pack(machine: "Machine", target: Register, items: tuple, kind: str) -> Step:
    bits, piece = UNSIGNED[WIDTH[kind]], WIDTH[kind] // len(items)
    reads = [machine.reader(item, f"b{8 * piece}") for item in items]
    write = machine.writer(target, kind)

    def step() -> None:
        value = reads[0]().astype(bits)
        for k, read in enumerate(reads[1:], 1):
            value = value | (read().astype(bits) << bits(8 * piece * k))
        write(value)

    return step


def _unpack(machine: "Machine", items: tuple, source: Register, kind: str) -> Step:
    bits, piece = UNSIGNED[WIDTH[kind]], WIDTH[kind] // len(items)
    read = machine.reader(source, kind)
    writes = [machine.writer(item, f"b{8 * piece}") for item in items]

    def step() -> None:
        value = read()
        for k, write in enumerate(writes):
            write((value >> bits(8 * piece * k)).astype(UNSIGNED[piece]))

    return step


def load_parameter(machine: "Machine", instruction: Instruction) -> Step:
    """ld.param by a parameter's name, or by an address that was selected among those of parameters."""
    target, source = instruction.operands
    kind = instruction.parts[-1]
    if not isinstance(source, Address) or source.offset or not isinstance(source.base, Symbol | Register):
        raise PtxError("expected [parameter] or [register]")
    base, names, width = source.base, [p.name for p in machine.program.parameters], WIDTH[kind]
    write = machine.writer(target, kind)
    if isinstance(base, Symbol):
        if base.name not in names:
            raise PtxError(f"no parameter {base.name}")
        return lambda: write(np.array([machine.arguments[base.name] & (1 << 8 * width) - 1], UNSIGNED[width]))
    read = machine.reader(base, "u32" if base.width == 4 else "u64")

    def step() -> None:
        numbers = machine.pick(read()).astype(np.int64) - PARAMETERS
        found = set(numbers.tolist())
        if not found <= set(range(len(names))):
            raise PtxError(f"{instruction}: an address that is no parameter's")
        held = {n: machine.arguments[names[n]] & (1 << 8 * width) - 1 for n in found}
        write(machine.spread(np.array([held[n] for n in numbers.tolist()], UNSIGNED[width])))

    return step


def load(machine: "Machine", instruction: Instruction) -> Step:
    """ld.global and ld.shared of one to four elements."""
    target, source = instruction.operands
    kind, shared = instruction.parts[-1], "shared" in instruction.parts
    targets = target.items if isinstance(target, Vector) else (target,)
    writes = [machine.writer(item, kind) for item in targets]
    address, width, count = machine.address(source), WIDTH[kind], _count(instruction, len(targets))

    def step() -> None:
        at, lanes = address(), machine.lanes()
        if machine.observer:
            machine.observer.access(instruction, lanes, at, width * count)
        if shared:
            values = machine.shared.load(lanes, at, width, count)
        else:
            values = machine.memory.load(machine.shared.stamps[lanes], at, width, count)
        for write, value in zip(writes, values, strict=True):
            write(machine.spread(value))

    return step


def store(machine: "Machine", instruction: Instruction) -> Step:
    """st.global and st.shared of one to four elements."""
    target, source = instruction.operands
    kind, shared = instruction.parts[-1], "shared" in instruction.parts
    sources = source.items if isinstance(source, Vector) else (source,)
    reads = [machine.reader(item, kind) for item in sources]
    address, width = machine.address(target), WIDTH[kind]
    count = _count(instruction, len(sources))

    def step() -> None:
        at, lanes = address(), machine.lanes()
        if machine.observer:
            machine.observer.access(instruction, lanes, at, width * count)
        values = [machine.pick(read()) for read in reads]
        if shared:
            machine.shared.store(lanes, at, width, values)
        else:
            machine.memory.store(machine.shared.stamps[lanes], at, width, values)

    return step


def atomic_add(machine: "Machine", instruction: Instruction) -> Step:
    """atom.shared.add.u32."""
    target, where, value = instruction.operands
    address, read, write = machine.address(where), machine.reader(value, "u32"), machine.writer(target, "u32")

    def step() -> None:
        at, lanes = address(), machine.lanes()
        if machine.observer:
            machine.observer.access(instruction, lanes, at, 4)
        write(machine.spread(machine.shared.add(lanes, at, machine.pick(read()))))

    return step


def _count(instruction: Instruction, found: int) -> int:
    expected = next((int(part[1:]) for part in instruction.parts if part in ("v2", "v4", "v8")), 1)
    if found != expected:
        raise PtxError(f"{found} elements, {expected} named")
    return found


_KINDS = ("b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64")
_VECTORS = [f".{v}{k}" for v in ("", "v2.", "v4.") for k in _KINDS if not (v == "v4." and k.endswith("64"))]

BUILDERS = {
    **{f"mov.{kind}": move for kind in ("b16", "b32", "b64", "u16", "u32", "u64", "s32", "f32")},
    **dict.fromkeys(("atom.shared.add.u32", "atom.relaxed.sys.shared.add.u32"), atomic_add),
    **{f"ld.param.{kind}": load_parameter for kind in _KINDS},
    **{f"ld.{space}{rest}": load for space in ("global", "shared") for rest in _VECTORS},
    **{f"st.{space}{rest}": store for space in ("global", "shared") for rest in _VECTORS},
}
