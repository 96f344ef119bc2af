"""Asynchronous warpgroup products of sm_90: wgmma and the registers it works on (PTX ISA 9.7.15)."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

from fastdeit.testing.ptx import tensor_copy
from fastdeit.testing.ptx.formats import canonical, halves, to_f32, truncate_to_tf32
from fastdeit.testing.ptx.program import Instruction, Program, PtxError, Vector

if TYPE_CHECKING:
    from fastdeit.testing.ptx.machine import Machine

Step = Callable[[], None]

_SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a descriptor -> bytes of a swizzled row


def matrix_registers(program: Program) -> frozenset[int]:
    """Registers that some wgmma reads or writes."""
    found: set[int] = set()
    for instruction in program.instructions:
        if instruction.opcode.startswith("wgmma.mma_async"):
            for operand in instruction.operands:
                if isinstance(operand, Vector):
                    found |= {item.index for item in operand.items}
    return frozenset(found)


class MatrixRegisters:
    """Checks of accesses to these registers (ISA 9.7.15.7).

    No access is allowed while a wgmma that names them is under way. A wgmma may name them only behind a `wgmma.fence` after the
    last access. Only wgmma after wgmma of one shape on the same accumulators needs no fence.
    """

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._results: dict[int, ndarray] = {}  # register -> commit group that completes it, by warpgroup; -1 for none
        self._sources: dict[int, ndarray] = {}
        self._accessed: dict[int, int | ndarray] = {}  # register -> clock of the last access by another instruction
        self._multiplied: dict[int, tuple[str, ndarray]] = {}  # register -> what the last wgmma made of it, and clocks
        self._clock = 0  # counts fences
        self._fenced = np.full(machine.lane_count // 128, -1)

    def read(self, index: int) -> None:
        if index in self._results and self._busy(self._results, index):
            self._machine.fault("wgmma registers", "a result is read before wgmma.wait_group")
        self._access(index)

    def write(self, index: int) -> None:
        for busy in (self._results, self._sources):
            if index in busy and self._busy(busy, index):
                self._machine.fault("wgmma registers", "a register is changed before wgmma.wait_group")
        self._access(index)

    def _access(self, index: int) -> None:
        if self._machine.active is None:
            self._accessed[index] = self._clock
        else:
            clocks = np.array(np.broadcast_to(self._accessed.get(index, -1), self._fenced.shape))
            clocks[self._machine.lanes() // 128] = self._clock
            self._accessed[index] = clocks

    def fence(self) -> None:
        self._clock += 1
        self._fenced[self._machine.warpgroups()] = self._clock

    def issue(self, results: list[int], sources: list[int], shape: str) -> None:
        """A wgmma of this shape reads and writes these registers until its commit group is waited for."""
        groups = self._machine.warpgroups()
        fenced = self._fenced[groups]
        if (fenced < 0).any():
            self._machine.fault("wgmma registers", "no wgmma.fence before the first wgmma")
        numbers = self._machine.products.committed
        for busy, indices, role in ((self._results, results, shape), (self._sources, sources, "A")):
            for index in indices:
                accessed = np.broadcast_to(self._accessed.get(index, -1), self._fenced.shape)
                if (accessed[groups] >= fenced).any():
                    self._machine.fault("wgmma registers", "no wgmma.fence between an access to a register and its use")
                before, clocks = self._multiplied.get(index, (role, self._fenced))
                if before != role and (clocks[groups] >= fenced).any():
                    self._machine.fault("wgmma registers", "no wgmma.fence between uses of a register in two shapes")
                self._multiplied[index] = role, _with(clocks, groups, self._clock)
                busy[index] = _with(busy.get(index, np.full(self._fenced.shape, -1)), groups, numbers[groups])

    def _busy(self, busy: dict[int, ndarray], index: int) -> bool:
        numbers, completed = busy[index], self._machine.products.completed
        if (numbers < completed).all():
            del busy[index]
            return False
        groups = self._machine.lanes() // 128
        return bool((numbers[groups] >= completed[groups]).any())


def _with(values: ndarray, at: ndarray, new: ndarray | int) -> ndarray:
    """A copy with some elements replaced."""
    copied = np.array(values)
    copied[at] = new
    return copied


def fence(machine: "Machine", instruction: Instruction) -> tuple[Step, int]:
    return (lambda: machine.matrix.fence()), 128


def commit(machine: "Machine", instruction: Instruction) -> tuple[Step, int]:
    return (lambda: machine.products.commit(machine.warpgroups())), 128


def wait(machine: "Machine", instruction: Instruction) -> tuple[Step, int]:
    allowed = instruction.operands[0].bits
    return (lambda: machine.products.wait(machine.warpgroups(), allowed)), 128


@lru_cache(maxsize=4096)
def tile(descriptor: int, rows: int, depth: int, transposed: bool, itemsize: int) -> tuple[ndarray, ndarray]:
    """Where a shared-memory descriptor's tile lies in a block's memory.

    Args:
        descriptor: start, leading and stride offset in units of 16 bytes (14 bits from 0, 16 and 32), swizzle (from 62).
        rows, depth: of the tile: M or N, and K.
        transposed: the tile is stored with M or N, not K, contiguous.

    Returns:
        Byte addresses (rows, depth), and the sorted numbers of the words they are in.
    """
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise PtxError("descriptors with a base offset are not known")
    width = _SWIZZLES[descriptor >> 62]
    r, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if not transposed:  # core matrices of 8 rows by 16 bytes of K
        across = (k * itemsize // 16) * leading + k * itemsize % 16 if width == 16 else k * itemsize
        address = start + r // 8 * stride + r % 8 * width + across
    elif width == 16:
        address = start + r % 8 * itemsize + r // 8 * stride + k % 8 * 16 + k // 8 * leading
    else:  # atoms of `width` bytes of M or N by 8 of K
        per_atom = width // itemsize
        address = start + r % per_atom * itemsize + r // per_atom * leading + k % 8 * width + k // 8 * stride
    address = tensor_copy.swizzled(address, 0 if width == 16 else width)
    words = np.unique(address >> 2)
    address.setflags(write=False)
    words.setflags(write=False)
    return address, words


_SHAPE = re.compile(r"m64n(\d+)k(\d+)")


def multiply(machine: "Machine", instruction: Instruction) -> tuple[Step, int]:
    """wgmma.mma_async: D = A B, or A B + D, in float32; B and perhaps A from shared memory.

    Register j of D in lane l of warp w: row 16 w + l / 4 + 8 (j / 2 % 2), column 8 (j / 4) + 2 (l % 4) + j % 2.
    The result is computed at once: reading or changing the registers or the memory before the wait is a fault.
    """
    d, a, b, scale_d, scale_a, scale_b, *layout = instruction.operands
    kind = instruction.parts[-1]
    columns, depth = map(int, _SHAPE.fullmatch(instruction.parts[4]).groups())
    tf32, itemsize = kind == "tf32", 4 if kind == "tf32" else 2
    from_registers = isinstance(a, Vector)
    flags = [operand.bits for operand in layout]
    expected = 0 if tf32 else 1 if from_registers else 2
    if depth != 32 // itemsize or len(d.items) != columns // 2 or len(flags) != expected or columns % 8:
        raise PtxError("shape, registers and layout do not fit")
    a_transposed, b_transposed = (False, False) if tf32 else (False, *map(bool, flags)) if from_registers else flags
    signs = np.float32(scale_a.bits) * np.float32(scale_b.bits)
    results = [item.index for item in d.items]
    sources = [item.index for item in a.items] if from_registers else []
    read_a = [machine.reader(item, "b32") for item in a.items] if from_registers else [machine.reader(a, "u64")]
    read_b = machine.reader(b, "u64")
    accumulate = machine.reader(scale_d, "pred")

    def memory_tile(value: ndarray, rows: int, transposed: bool, groups: ndarray) -> ndarray:
        """(warpgroups, rows, depth) float32."""
        descriptors = np.broadcast_to(value, machine.lane_count).reshape(-1, 128)[groups]
        if (descriptors != descriptors[:, :1]).any():
            machine.fault("divergence", "the threads of a warpgroup hold different descriptors")
        found = np.empty((len(groups), rows, depth), np.float32)
        for descriptor in set(descriptors[:, 0].tolist()):
            which = np.flatnonzero(descriptors[:, 0] == descriptor)
            address, words = tile(descriptor, rows, depth, bool(transposed), itemsize)
            if int(address.max()) + itemsize > machine.shared_bytes:
                machine.fault("shared access out of bounds", f"wgmma reads byte {address.max()}")
            issuers = groups[which, None] * 128 + np.arange(128)
            base = machine.shared.base[issuers[:, 0]]
            _borrow(machine, base[:, None] + words, issuers)
            element = base[:, None, None] * (4 // itemsize) + address // itemsize
            bits = machine.shared.views[itemsize][element]
            found[which] = truncate_to_tf32(bits) if tf32 else to_f32(bits, kind)
        return found

    def register_tile(groups: ndarray) -> ndarray:
        """(warpgroups, 64, depth) float32 of the registers of A."""
        parts = []
        for read in read_a:
            bits = np.broadcast_to(read(), machine.lane_count).reshape(-1, 4, 8, 4)[groups]
            parts.append(truncate_to_tf32(bits) if tf32 else halves(bits, kind).reshape(len(groups), 4, 8, 8))
        upper, lower, upper_next, lower_next = parts
        whole = np.concatenate([np.concatenate([upper, upper_next], 3), np.concatenate([lower, lower_next], 3)], 2)
        return whole.reshape(len(groups), 64, depth)

    def step() -> None:
        groups = machine.warpgroups()
        scaled = np.broadcast_to(accumulate(), machine.lane_count).reshape(-1, 128)[groups]
        if (scaled != scaled[:1, :1]).any():
            raise PtxError(f"{instruction}: scale-d differs between threads")
        adds = bool(scaled[0, 0])
        machine.matrix.issue(results, sources, instruction.parts[4])
        left = register_tile(groups) if from_registers else memory_tile(read_a[0](), 64, a_transposed, groups)
        right = memory_tile(read_b(), columns, b_transposed, groups)
        sums = np.matmul(left, right.transpose(0, 2, 1)) * signs
        sums = sums.reshape(len(groups), 4, 2, 8, columns // 8, 4, 2)
        for j, index in enumerate(results):
            value = np.ascontiguousarray(sums[:, :, j // 2 % 2, :, j // 4, :, j % 2]).reshape(-1)
            if adds:
                value = value + machine.pick(machine.registers[index]).view(np.float32)
            machine.set_raw(index, canonical(value).view(np.uint32))

    return step, 128


def _borrow(machine: "Machine", words: ndarray, issuers: ndarray) -> None:
    missing = machine.shared.begin_borrow(words, issuers)
    if missing:
        machine.fault("missing proxy fence", missing)
    machine.products.issue(issuers[:, 0] // 128, lambda part: machine.shared.end_borrow(words[part], issuers[part]))


def proxy_fence(machine: "Machine", instruction: Instruction) -> Step:
    return lambda: machine.shared.fence(machine.active)


BUILDERS = {
    "wgmma.fence.sync.aligned": fence,
    "wgmma.commit_group.sync.aligned": commit,
    "wgmma.wait_group.sync.aligned": wait,
    **{
        f"wgmma.mma_async.sync.aligned.m64n{n}k{32 // size}.f32.{kind}.{kind}": multiply
        for n in range(8, 264, 8)
        for kind, size in (("bf16", 2), ("f16", 2), ("tf32", 4))
    },
    "fence.proxy.async.shared::cta": proxy_fence,
    "fence.proxy.async": proxy_fence,
}
