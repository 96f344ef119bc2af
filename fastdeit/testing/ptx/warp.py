"""Warp-wide instructions of sm_80: shuffles, barriers, cp.async, ldmatrix, mma.sync (PTX ISA 9.7.9.25, 9.7.13, 9.7.14).

Also stmatrix, elect and redux of later architectures, which belong to the same chapters.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

from fastdeit.testing.ptx.formats import canonical, halves, truncate_to_tf32
from fastdeit.testing.ptx.program import Immediate, Instruction, Pair, PtxError
from fastdeit.testing.ptx.scalar import expand

if TYPE_CHECKING:
    from fastdeit.testing.ptx.machine import Machine

Step = Callable[[], None]


# ---- 9.7.13 communication and barriers


def barrier(machine: "Machine", instruction: Instruction) -> tuple[Step, int]:
    """bar.sync 0: executed for blocks all of whose threads have arrived."""
    _require_immediates(instruction, 0)
    return (lambda: machine.shared.barrier(machine.active)), machine.threads


def warp_barrier(machine: "Machine", instruction: Instruction) -> Step:
    _require_immediates(instruction, -1)

    def step() -> None:
        machine.require_whole_warps()
        machine.shared.warp_barrier(machine.active)

    return step


def shuffle(machine: "Machine", instruction: Instruction) -> Step:
    """shfl.sync: d, or d|p, takes a's value in the lane that b and c select; p tells whether that lane is in range."""
    target, value, b, c, members = instruction.operands
    _require_all_members(members)
    mode = instruction.parts[2]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write = machine.writer(first, "b32")
    write_range = machine.writer(second, "pred") if second is not None else None
    read, read_b, read_c = machine.reader(value, "b32"), machine.reader(b, "b32"), machine.reader(c, "b32")

    def step() -> None:
        machine.require_whole_warps()
        lane = np.arange(machine.lane_count) % 32
        by, clamp = read_b().astype(np.int64) & 31, read_c().astype(np.int64)
        segment, clamp = (clamp >> 8) & 31, clamp & 31
        lowest = lane & segment
        highest = lowest | (clamp & ~segment)
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | (by & ~segment)}[mode]
        inside = source >= highest if mode == "up" else source <= highest
        source = np.where(inside, source, lane)
        values = np.broadcast_to(read(), machine.lane_count)
        write(values[machine.all_lanes - lane + source])
        if write_range:
            write_range(np.broadcast_to(inside, machine.lane_count))

    return step


def elect(machine: "Machine", instruction: Instruction) -> Step:
    """elect.sync: one lane of the warp, the lowest."""
    target, members = instruction.operands
    _require_all_members(members)
    write = machine.writer(target.second, "pred")

    def step() -> None:
        machine.require_whole_warps()
        write(machine.all_lanes % 32 == 0)

    return step


def reduce(machine: "Machine", instruction: Instruction) -> Step:
    """redux.sync: sum, maximum or minimum over the warp; of floats NaN is dropped."""
    target, value, members = instruction.operands
    read_members = machine.reader(members, "b32")
    _, _, name, kind = instruction.parts
    floats = kind == "f32"
    choose = {"add": np.add, "max": np.fmax if floats else np.maximum, "min": np.fmin if floats else np.minimum}[name]
    read, write = machine.reader(value, kind), machine.writer(target, kind)

    def step() -> None:
        machine.require_whole_warps()
        if (machine.pick(read_members()) != np.uint32(0xFFFFFFFF)).any():
            raise PtxError(f"{instruction}: only full member masks are known")
        values = np.broadcast_to(read(), machine.lane_count).reshape(-1, 32)
        found = choose.reduce(values, 1, dtype=values.dtype)  # integer sums wrap
        write(np.repeat(canonical(found) if floats else found, 32))

    return step


def ballot(machine: "Machine", instruction: Instruction) -> Step:
    """vote.sync.ballot: a bit for each lane whose predicate holds."""
    target, value, members = instruction.operands
    _require_all_members(members)
    read, write = machine.reader(value, "pred"), machine.writer(target, "b32")

    def step() -> None:
        machine.require_whole_warps()
        bits = np.broadcast_to(read(), machine.lane_count).reshape(-1, 32)
        write(np.repeat(np.packbits(bits, axis=1, bitorder="little").view(np.uint32)[:, 0], 32))

    return step


def _require_immediates(instruction: Instruction, *values: int) -> None:
    if [getattr(operand, "bits", None) for operand in instruction.operands] != list(values):
        raise PtxError(f"only operands {values} are known")


def _require_all_members(members: object) -> None:
    if not isinstance(members, Immediate) or members.bits not in (-1, 0xFFFFFFFF):
        raise PtxError("only the full member mask is known")


# ---- 9.7.9.25 cp.async


def async_copy(machine: "Machine", instruction: Instruction) -> Step:
    """cp.async: copies 4, 8 or 16 bytes from global to shared memory; what the source size leaves is filled with zeros."""
    target, source, size, *given = instruction.operands
    nbytes = size.bits
    if nbytes not in ((16,) if ".cg." in instruction.opcode else (4, 8, 16)):
        raise PtxError(f"copies of {nbytes} bytes")
    to, of = machine.address(target), machine.address(source)
    count = machine.reader(given[0], "u32") if given else None

    def step() -> None:
        lanes, at = machine.lanes(), to()
        words = machine.shared.locate(lanes, at, nbytes)[:, None] + np.arange(nbytes // 4)
        wanted = machine.pick(count()) if count else np.full(len(lanes), nbytes)
        if ((wanted != 0) & (wanted != nbytes)).any():
            raise PtxError(f"{instruction}: source sizes other than 0 and {nbytes} are not known")
        values = np.zeros(words.shape, np.uint32)
        copied = np.flatnonzero(wanted)
        if len(copied):
            address = of()[copied]
            if machine.observer:
                machine.observer.access(instruction, lanes[copied], address, nbytes, space="global")
            found = machine.memory.load(machine.shared.stamps[lanes[copied]], address, 4, nbytes // 4)
            values[copied] = np.stack(found, 1)
        if machine.observer:
            machine.observer.access(instruction, lanes, at, nbytes, space="shared")
        machine.shared.begin_fill(lanes, words)
        if not machine.late():  # the bytes may be there at once, though nobody may rely on it
            machine.shared.words[words] = values
        machine.copies.issue(lanes, lambda part: machine.shared.end_fill(lanes[part], words[part], values[part]))

    return step


def async_commit(machine: "Machine", instruction: Instruction) -> Step:
    return lambda: machine.copies.commit(machine.lanes())


def async_wait(machine: "Machine", instruction: Instruction) -> Step:
    allowed = instruction.operands[0].bits
    return lambda: machine.copies.wait(machine.lanes(), allowed)


# ---- 9.7.14 matrix loads, stores and products


def load_matrix(machine: "Machine", instruction: Instruction) -> Step:
    """ldmatrix: lanes 8k to 8k + 7 give the rows of matrix k, of 16 bytes; lane l gets elements 2 (l % 4) and the next of row
    l / 4, with .trans those of column l / 4."""
    target, source = instruction.operands
    writes = [machine.writer(item, "b32") for item in target.items]
    _require_matrices(instruction, len(writes))
    address, transposed = machine.address(source), "trans" in instruction.parts

    def step() -> None:
        machine.require_whole_warps()
        lanes, rows = machine.lanes(), address()
        position = np.arange(len(lanes))
        lane = position % 32
        if machine.observer:
            for k in range(len(writes)):
                asked = (lane // 8 == k).nonzero()[0]
                machine.observer.access(instruction, lanes[asked], rows[asked], 16)
        for k, write in enumerate(writes):
            of = position - lane + 8 * k
            if not transposed:
                at = rows[of + lane // 4]
                _require_rows(machine, at)
                (value,) = machine.shared.load(lanes, at + 4 * (lane % 4), 4, 1)
            else:
                pair = []
                for element in (0, 1):
                    at = rows[of + 2 * (lane % 4) + element]
                    _require_rows(machine, at)
                    pair.append(machine.shared.load(lanes, at + 2 * (lane // 4), 2, 1)[0].astype(np.uint32))
                value = pair[0] | pair[1] << np.uint32(16)
            write(machine.spread(value))

    return step


def store_matrix(machine: "Machine", instruction: Instruction) -> Step:
    """stmatrix: the reverse of ldmatrix."""
    target, source = instruction.operands
    reads = [machine.reader(item, "b32") for item in source.items]
    _require_matrices(instruction, len(reads))
    address, transposed = machine.address(target), "trans" in instruction.parts

    def step() -> None:
        machine.require_whole_warps()
        lanes, rows = machine.lanes(), address()
        position = np.arange(len(lanes))
        lane = position % 32
        if machine.observer:
            for k in range(len(reads)):
                asked = (lane // 8 == k).nonzero()[0]
                machine.observer.access(instruction, lanes[asked], rows[asked], 16)
        for k, read in enumerate(reads):
            value, of = machine.pick(read()), position - lane + 8 * k
            if not transposed:
                at = rows[of + lane // 4]
                _require_rows(machine, at)
                machine.shared.store(lanes, at + 4 * (lane % 4), 4, [value])
                continue
            # Two lanes fill a word; the lane that owns the row writes all of it: four pairs of its row's elements.
            elements = value.reshape(-1, 32)
            low, high = elements & np.uint32(0xFFFF), elements >> np.uint32(16)
            matrix = np.empty((len(elements), 8, 8), np.uint32)  # [row, column]
            lane32 = np.arange(32)
            matrix[:, 2 * (lane32 % 4), lane32 // 4] = low
            matrix[:, 2 * (lane32 % 4) + 1, lane32 // 4] = high
            at = rows[of + lane // 4]
            _require_rows(machine, at)
            packed = matrix[:, :, ::2] | matrix[:, :, 1::2] << np.uint32(16)  # [row, word]
            machine.shared.store(lanes, at + 4 * (lane % 4), 4, [packed.reshape(-1)])

    return step


def _require_matrices(instruction: Instruction, found: int) -> None:
    expected = next(int(part[1:]) for part in instruction.parts if re.fullmatch(r"x[124]", part))
    if found != expected:
        raise PtxError(f"{found} registers for x{expected}")


def _require_rows(machine: "Machine", at: ndarray) -> None:
    if (at % 16).any():
        machine.fault("misaligned shared access", "a matrix row is not aligned to 16 bytes")


_SHAPE = re.compile(r"m16n8k(\d+)")


def multiply(machine: "Machine", instruction: Instruction) -> Step:
    """mma.sync.m16n8kK: D = A B + C in float32, products of 16-bit floats exact; the order of the sum is not the hardware's.

    A warp's register j of A holds row l / 4 + 8 (j % 2) and columns from 2 (l % 4) + 8 (j / 2) of lane l; one column each for tf32.
    """
    d, a, b, c = instruction.operands
    kind = instruction.parts[-2]
    tf32 = kind == "tf32"
    depth = int(_SHAPE.fullmatch(instruction.parts[3])[1])
    if depth != (8 if tf32 else 16) or [len(x.items) for x in (d, a, b, c)] != [4, 4, 2, 4]:
        raise PtxError("shape and registers do not fit")
    read_a, read_b = ([machine.reader(item, "b32") for item in x.items] for x in (a, b))
    read_c = [machine.reader(item, "f32") for item in c.items]
    writes = [machine.writer(item, "f32") for item in d.items]

    def fragment(read: Callable[[], ndarray]) -> ndarray:
        """(warps, 8, depth / 2) of one register."""
        value = np.broadcast_to(read(), machine.lane_count).reshape(-1, 8, 4)
        return truncate_to_tf32(value) if tf32 else halves(value, kind).reshape(-1, 8, 8)

    def step() -> None:
        machine.require_whole_warps()
        upper, lower, upper_next, lower_next = (fragment(read) for read in read_a)
        left = np.concatenate(
            [np.concatenate([upper, upper_next], 2), np.concatenate([lower, lower_next], 2)], 1
        )  # (warps, 16, depth)
        right = np.concatenate([fragment(read) for read in read_b], 2)  # (warps, 8, depth), transposed
        sums = np.matmul(left, right.transpose(0, 2, 1)).reshape(-1, 2, 8, 4, 2)
        for k, (read, write) in enumerate(zip(read_c, writes, strict=True)):
            start = np.broadcast_to(read(), machine.lane_count)
            write(canonical(start + sums[:, k // 2, :, :, k % 2].reshape(-1)))

    return step


def nothing(machine: "Machine", instruction: Instruction) -> Step:
    return lambda: None


BUILDERS = {
    "bar.sync": barrier,
    "barrier.sync": barrier,
    "bar.warp.sync": warp_barrier,
    **dict.fromkeys(expand("shfl.sync.{up,down,bfly,idx}.b32"), shuffle),
    "elect.sync": elect,
    **dict.fromkeys(expand("redux.sync.{max,min}.f32"), reduce),
    **dict.fromkeys(expand("redux.sync.{add,max,min}.{s32,u32}"), reduce),
    "vote.sync.ballot.b32": ballot,
    **dict.fromkeys(expand("cp.async.{ca,cg}.shared.global"), async_copy),
    "cp.async.commit_group": async_commit,
    "cp.async.wait_group": async_wait,
    **dict.fromkeys(expand("ldmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared.b16"), load_matrix),
    **dict.fromkeys(expand("stmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared.b16"), store_matrix),
    **dict.fromkeys((f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" for kind in ("bf16", "f16")), multiply),
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": multiply,
}
