"""Threads of the blocks that run together, their registers, and how instructions name operands (PTX ISA 5.1, 6, 9.3, 10)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray

from fastdeit.testing.ptx import tensor_copy, warpgroup
from fastdeit.testing.ptx.formats import SIGNED, UNSIGNED, WIDTH, numpy_type
from fastdeit.testing.ptx.program import Address, Immediate, Operand, Program, PtxError, Register, Special, Symbol

SHARED_ARRAY = "global_smem"
# A parameter's address is PARAMETERS + its number: 32 bits, beyond all shared memory and below all tensors.
PARAMETERS = 0xF000_0000
_AXES = [f"{name}.{axis}" for name in ("%tid", "%ctaid", "%nctaid", "%ntid") for axis in "xyz"]
_SPECIAL = frozenset([*_AXES, "%laneid", "%warpid", "%cluster_ctarank"])


class Threads:
    """State of a machine's running threads.

    Attributes:
        lane_count: threads of all blocks that run together; block after block.
        thread, block: of each, its number in the block and its block's number in the grid.
        active: mask of those that execute, None for all.
        registers: values by number: unsigned integers of the register's width or booleans, one a thread or one for all. Arrays are
            never changed in place.
        arguments: of the launch.
    """

    program: Program
    threads: int  # of a block
    matrix_registers: frozenset[int]
    matrix: warpgroup.MatrixRegisters
    arguments: dict[str, Any]
    fault: Callable[[str, str], None]

    def start_threads(
        self, blocks: ndarray, grid: tuple[int, int, int], garbage: Callable[[int, int], ndarray]
    ) -> None:
        """Begins with the first instruction of these blocks; garbage(count, width) is what unwritten registers hold."""
        self.lane_count = len(blocks) * self.threads
        self.all_lanes = np.arange(self.lane_count)
        self.thread = self.all_lanes % self.threads
        self.block = np.repeat(blocks, self.threads)
        unwritten = {width: garbage(self.lane_count, width) for width in (0, 1, 2, 4, 8)}
        self.registers = [unwritten[width] for width in self.program.widths]
        self.active: ndarray | None = None
        self._active_lanes: ndarray | None = None
        x, y, _ = grid
        values = {
            "%tid.x": self.thread,
            "%laneid": self.thread % 32,
            "%warpid": self.thread // 32,
            "%ctaid.x": self.block % x,
            "%ctaid.y": self.block // x % y,
            "%ctaid.z": self.block // (x * y),
            **{f"%nctaid.{axis}": np.array([size]) for axis, size in zip("xyz", grid, strict=True)},
            "%ntid.x": np.array([self.threads]),
            **{name: np.array([0]) for name in ("%tid.y", "%tid.z", "%cluster_ctarank")},
            **{name: np.array([1]) for name in ("%ntid.y", "%ntid.z")},
        }
        self.special = {name: value.astype(np.uint32) for name, value in values.items()}

    # ---- who executes

    def set_active(self, mask: ndarray | None) -> None:
        self.active = None if mask is None or mask.all() else mask
        self._active_lanes = None

    def lanes(self) -> ndarray:
        """Numbers of the threads that execute."""
        if self.active is None:
            return self.all_lanes
        if self._active_lanes is None:
            self._active_lanes = np.flatnonzero(self.active)
        return self._active_lanes

    def warpgroups(self) -> ndarray:
        """Numbers of the groups of 128 threads that execute; whole ones where that is asked for."""
        return self.lanes()[::128] // 128

    def tensor_map(self, address: int) -> tensor_copy.TensorMap:
        """The argument that a tensor map's address names."""
        parameters = self.program.parameters
        number = address - PARAMETERS
        found = self.arguments[parameters[number].name] if 0 <= number < len(parameters) else None
        if not isinstance(found, tensor_copy.TensorMap):
            self.fault("wild tensor map", f"{address:#x}")
        return found

    def require_whole_warps(self) -> None:
        """`.sync` instructions name all threads of a warp."""
        if self.active is not None:
            by_warp = self.active.reshape(-1, 32)
            if (by_warp.any(1) != by_warp.all(1)).any():
                self.fault("divergence", "a warp-wide instruction is reached by a part of its warp")

    def mask(self) -> ndarray:
        """The threads that execute, as booleans."""
        return np.ones(self.lane_count, bool) if self.active is None else self.active

    def guarded(self, guard: Register) -> ndarray:
        """The active threads for which a guard holds."""
        value = self.registers[guard.index]
        value = np.broadcast_to(~value if guard.negated else value, self.lane_count)
        return value if self.active is None else value & self.active

    # ---- operands

    def reader(self, operand: Operand, kind: str) -> Callable[[], ndarray]:
        """What reads an operand as PTX type `kind`: arrays of one element a thread, or of one for all."""
        if isinstance(operand, Register):
            return self._register_reader(operand, kind)
        if isinstance(operand, Immediate):
            if kind == "pred":
                value = np.array([bool(operand.bits)])
            else:
                width = WIDTH[kind]
                bits = operand.bits & (1 << 8 * width) - 1
                value = np.array([bits], UNSIGNED[width]).view(self._view(kind))
            return lambda: value
        if isinstance(operand, Special):
            width, view, name = WIDTH[kind], self._view(kind), operand.name
            if width != 4 or name not in _SPECIAL:
                raise PtxError(f"{name} read as {kind}")
            return lambda: self.special[name].view(view)
        if isinstance(operand, Symbol):
            names = [p.name for p in self.program.parameters]
            if operand.name == SHARED_ARRAY:
                value = np.zeros(1, UNSIGNED[WIDTH[kind]])
            elif operand.name in names:
                value = np.array([PARAMETERS + names.index(operand.name)], UNSIGNED[WIDTH[kind]])
            else:
                raise PtxError(f"unknown name {operand.name}")
            return lambda: value
        raise PtxError(f"expected a value, found {operand}")

    @staticmethod
    def _view(kind: str) -> type:
        return bool if kind == "pred" else numpy_type(kind)

    def _register_reader(self, operand: Register, kind: str) -> Callable[[], ndarray]:
        index = operand.index
        if kind == "pred":
            if operand.width:
                raise PtxError(f"{operand.name} is no predicate")
            return (lambda: ~self.registers[index]) if operand.negated else (lambda: self.registers[index])
        width, view = WIDTH[kind], self._view(kind)
        if operand.width < width:
            raise PtxError(f"{operand.name} has {operand.width} bytes, read as {kind}")
        if operand.width > width:  # the lower part
            return lambda: self.registers[index].astype(UNSIGNED[width]).view(view)
        if index in self.matrix_registers:

            def checked() -> ndarray:
                self.matrix.read(index)
                return self.registers[index].view(view)

            return checked
        if view is UNSIGNED[width]:
            return lambda: self.registers[index]
        return lambda: self.registers[index].view(view)

    def writer(self, operand: Operand, kind: str) -> Callable[[ndarray], None]:
        """What writes arrays of PTX type `kind` to a register, for the threads that execute."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return lambda value: None
        if not isinstance(operand, Register):
            raise PtxError(f"expected a register, found {operand}")
        index, width = operand.index, operand.width
        if width < WIDTH[kind] or (width == 0) != (kind == "pred"):
            raise PtxError(f"{operand.name} of {width} bytes cannot hold {kind}")
        bits = bool if width == 0 else UNSIGNED[width]
        if width > WIDTH[kind]:  # extends by the sign of signed types
            extended = SIGNED[width] if kind[0] == "s" else bits

            def convert(value: ndarray) -> ndarray:
                return value.astype(extended).view(bits)
        else:

            def convert(value: ndarray) -> ndarray:
                return value.view(bits)

        of_wgmma = index in self.matrix_registers

        def write(value: ndarray) -> None:
            if value.dtype != bits:
                value = convert(value)
            if self.active is not None:
                value = np.where(self.active, value, self.registers[index])
            self.registers[index] = value
            if of_wgmma:
                self.matrix.write(index)

        return write

    def address(self, operand: Operand) -> Callable[[], ndarray]:
        """What reads the addresses of the threads that execute, int64."""
        if not isinstance(operand, Address):
            raise PtxError(f"expected an address, found {operand}")
        width = operand.base.width if isinstance(operand.base, Register) else 4
        base, offset = self.reader(operand.base, f"u{8 * width}"), operand.offset

        def read() -> ndarray:
            return self.pick(base()).astype(np.int64) + offset

        return read

    def pick(self, value: ndarray) -> ndarray:
        """The elements of the threads that execute."""
        value = np.broadcast_to(value, self.lane_count) if value.shape[0] != self.lane_count else value
        return value if self.active is None else value[self.lanes()]

    def set_raw(self, index: int, value: ndarray) -> None:
        """Sets a register of the threads that execute, with none of the writer's checks."""
        if self.active is not None:
            value = np.where(self.active, self.spread(value), self.registers[index])
        self.registers[index] = value

    def spread(self, value: ndarray) -> ndarray:
        """The inverse of `pick`; other threads' elements are anything."""
        if self.active is None:
            return value
        spread = np.zeros(self.lane_count, value.dtype)
        spread[self.lanes()] = value
        return spread
