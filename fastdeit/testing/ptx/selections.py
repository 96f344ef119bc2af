"""Proves that nothing depends on what a mask selects instead of a number, by random numbers in its place."""

from collections.abc import Callable

import numpy as np

from fastdeit.testing.ptx.control_flow import definition
from fastdeit.testing.ptx.machine import Machine, Schedule
from fastdeit.testing.ptx.program import Instruction, Program


def selections(program: Program, line: int) -> list[int]:
    """Numbers of the `selp.f32` that a comparison governs; none where its predicate governs anything else as well."""
    comparison = next(x for x in program.instructions if x.line == line)
    predicate = comparison.operands[0].index
    using = [
        i
        for i, x in enumerate(program.instructions)
        if any(getattr(o, "index", None) == predicate for o in (*x.operands, x.guard)) and x is not comparison
    ]
    alone = definition(program, comparison.operands[0]) is comparison
    return using if alone and all(program.instructions[i].opcode == "selp.f32" for i in using) else []


class Scrambled(Machine):
    """A machine in step in which the mask of the comparison in `line` selects random finite numbers where it is false."""

    def __init__(self, program: Program, shared_bytes: int, line: int, seed: int) -> None:
        super().__init__(program, shared_bytes, Schedule(seed=seed))
        for at in selections(program, line):
            step, group = self._code[at]
            self._code[at] = self._scrambled(step, program.instructions[at]), group

    def _scrambled(self, step: Callable[[], None], instruction: Instruction) -> Callable[[], None]:
        target, *_, condition = instruction.operands
        read, kept = self.reader(target, "f32"), self.reader(condition, "pred")
        write = self.writer(target, "f32")

        def run() -> None:
            step()
            noise = self.random.normal(0, 4, self.lane_count).astype(np.float32)
            write(np.where(kept(), read(), noise))

        return run
