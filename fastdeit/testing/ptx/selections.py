"""Proves that nothing depends on what a mask selects instead of a number, or on what a register holds before a masked load, by
other values in its place."""

from collections.abc import Callable

import numpy as np

from fastdeit.testing.ptx.control_flow import definition, uses
from fastdeit.testing.ptx.machine import Machine, Schedule
from fastdeit.testing.ptx.program import Instruction, Program, Register

_FLOATS = {"selp.f32": "b32", "selp.b16": "b16"}  # no size or offset has 16 bits


def selections(program: Program, line: int) -> list[int]:
    """Numbers of the selections of floats that a comparison governs; none where its predicate governs anything else as well."""
    comparison = next(x for x in program.instructions if x.line == line)
    predicate = comparison.operands[0]
    if not isinstance(predicate, Register) or definition(program, predicate) is not comparison:
        return []
    using = [i for i, x in enumerate(program.instructions) if x in uses(program, predicate)]
    return using if all(program.instructions[i].opcode in _FLOATS for i in using) else []


class Scrambled(Machine):
    """A machine in step in which the mask of the comparison in `line` selects random finite numbers where it is false."""

    def __init__(self, program: Program, shared_bytes: int, line: int, seed: int) -> None:
        super().__init__(program, shared_bytes, Schedule(seed=seed))
        for at in selections(program, line):
            step, group = self._code[at]
            self._code[at] = self._scrambled(step, program.instructions[at]), group

    def _scrambled(self, step: Callable[[], None], instruction: Instruction) -> Callable[[], None]:
        target, *_, condition = instruction.operands
        kind = _FLOATS[instruction.opcode]
        read, kept = self.reader(target, kind), self.reader(condition, "pred")
        write = self.writer(target, kind)

        def run() -> None:
            step()
            # The same in every warp: warps that hold the same elements of a tile store equal numbers.
            noise = np.tile(self.random.uniform(1, 9, 32).astype(np.float32).view(np.uint32), self.lane_count // 32)
            if kind == "b16":  # finite as bfloat16, of which these are the first half, and as float16
                noise = (noise >> 16).astype(np.uint16)
            write(np.where(kept(), read(), noise))

        return run


class Replaced(Machine):
    """A machine in step in which the move in `line` gives other bits than its source.

    seed: of random bits; None for ones, which are NaN in every float format.
    """

    def __init__(self, program: Program, shared_bytes: int, line: int, seed: int | None) -> None:
        super().__init__(program, shared_bytes, Schedule(seed=seed or 0))
        at = next(i for i, x in enumerate(program.instructions) if x.line == line)
        (step, group), write = self._code[at], self.writer(program.instructions[at].operands[0], "b32")

        def run() -> None:
            step()
            bits = (
                self.random.integers(0, 1 << 32, 32, np.uint32)
                if seed is not None
                else np.full(32, -1).astype(np.uint32)
            )
            write(np.tile(bits, self.lane_count // 32))  # the same in every warp, as in `Scrambled`

        self._code[at] = run, group
