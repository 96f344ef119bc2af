"""Executes a parsed kernel: all threads of several blocks at once, an instruction at a time (PTX ISA 3, 9.3, 9.4, 9.7.12).

Threads that part at a branch wait for each other at the lowest instruction that any of them has still to execute. A barrier or a
warpgroup instruction is executed for those groups of threads that have all arrived at it; the others wait there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray

from fastdeit.testing.ptx import mbarriers, moves, scalar, tensor_copy, warp, warpgroup
from fastdeit.testing.ptx.commits import CommitGroups
from fastdeit.testing.ptx.formats import UNSIGNED, Approximations
from fastdeit.testing.ptx.global_memory import GlobalMemory
from fastdeit.testing.ptx.mbarriers import Mbarriers
from fastdeit.testing.ptx.program import (
    Instruction,
    Program,
    PtxError,
)
from fastdeit.testing.ptx.shared import SharedMemory
from fastdeit.testing.ptx.threads import Threads

_POLLS = 4  # of an mbarrier by everybody who is left, before that is a deadlock
_LANES = 4096  # about as many threads run at once: few enough for the cache, enough to hide numpy's overhead

Step = Callable[[], None]
_BUILDERS = {
    **moves.BUILDERS,
    **warp.BUILDERS,
    **warpgroup.BUILDERS,
    **tensor_copy.BUILDERS,
    **mbarriers.BUILDERS,
}


class Fault(Exception):
    """A rule that the running kernel broke.

    Attributes:
        kind: which rule.
        instruction: where.
    """

    def __init__(self, kind: str, detail: str, instruction: Instruction | None) -> None:
        super().__init__(f"{kind}: {detail}; {instruction or 'at the end of the kernel'}")
        self.kind, self.instruction = kind, instruction


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the hardware is free to choose.

    Attributes:
        seed: of everything random, garbage in unwritten registers and shared memory included.
        shuffled: blocks run in random order, warps run ahead of each other at random between barriers, and each asynchronous
            operation takes effect at once or at the last legal moment. Else warps run in step and effects come as late as they can.
        perturbed: approximate instructions err within their documented bounds.
    """

    seed: int = 0
    shuffled: bool = False
    perturbed: bool = False


IN_STEP = Schedule()


class Machine(Threads):
    """One kernel, to be launched any number of times.

    Args:
        program: the kernel.
        shared_bytes: dynamic shared memory of a block.
        schedule: what is left to the hardware.

    Attributes:
        executed: warps that executed each instruction, over all launches.
        observer: receives every memory access, or None (see counts.py).
        branches: that groups of threads took or passed in the last launch.
        most_branches: of a launch, before it counts as one that does not end; None for any number.
    """

    def __init__(
        self,
        program: Program,
        shared_bytes: int,
        schedule: Schedule = IN_STEP,
    ) -> None:
        self.program, self.shared_bytes, self.schedule = program, shared_bytes, schedule
        self.threads = program.threads
        self.random = np.random.default_rng(schedule.seed)
        self.executed = np.zeros(len(program.instructions), np.int64)
        self.observer: Any = None
        self.branches = 0
        self.most_branches: int | None = None
        self.current: Instruction | None = None
        self.operations = scalar.table(Approximations(schedule.seed if schedule.perturbed else None))
        # Registers that wgmma reads or writes by itself: reading one too early, or late changes, are faults.
        self.matrix_registers = warpgroup.matrix_registers(program)
        self._unit = 128 if self.matrix_registers else 32  # threads that stay together
        self._joins = set(program.targets.values())
        self._code = [self._build(instruction) for instruction in program.instructions]

    # ---- launching

    def launch(self, grid: tuple[int, ...], arguments: dict[str, Any], memory: GlobalMemory) -> None:
        """Runs every block of the grid.

        Args:
            grid: one to three sizes.
            arguments: parameter name -> bits of a number or pointer, or a `warpgroup.TensorMap`.
            memory: what pointers point into.

        Raises:
            Fault: the kernel breaks a rule.
            PtxError: it holds something unknown.
        """
        self.arguments, self.memory, self.grid = arguments, memory, (*grid, 1, 1)[:3]
        memory.fault, self.branches = self.fault, 0
        blocks = np.arange(np.prod(self.grid))
        if self.schedule.shuffled:
            self.random.shuffle(blocks)
        together = max(1, _LANES // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), together):
                self._start(blocks[first : first + together])
                self._run()
                self._finish()
        memory.write_back()

    def fault(self, kind: str, detail: str) -> None:
        raise Fault(kind, detail, self.current)

    def _start(self, blocks: ndarray) -> None:
        self.start_threads(blocks, self.grid, self._garbage)
        self.shared = self.start_memory(blocks)
        self.copies = self.start_groups(self.lane_count)  # cp.async
        self.bulk_copies = self.start_groups(self.lane_count)  # cp.async.bulk stores
        self.products = self.start_groups(self.lane_count // 128)  # wgmma
        self.mbarriers = Mbarriers(self)
        self.matrix = warpgroup.MatrixRegisters(self)
        self.poll_failed = False

    def start_memory(self, blocks: ndarray, kind: type[SharedMemory] = SharedMemory) -> SharedMemory:
        """Shared memory of the blocks that start."""
        return kind(blocks, self.threads, self.shared_bytes, lambda n: self._garbage(n, 4).copy(), self.fault)

    def start_groups(self, agents: int) -> CommitGroups:
        return CommitGroups(agents)

    def _garbage(self, count: int, width: int) -> ndarray:
        """What unwritten storage holds: NaN in every float format without a seed's shuffle, else any bits."""
        if width == 0:
            return self.random.integers(0, 2, count).astype(bool)
        if not self.schedule.shuffled:
            return np.full(count * width, 0xFF, np.uint8).view(UNSIGNED[width])
        return self.random.integers(0, 256, count * width, np.uint8).view(UNSIGNED[width])

    # ---- running

    def _run(self) -> None:
        """Runs the started blocks to their end."""
        self._ready: dict[int, ndarray] = {}  # instruction -> threads that may go on there
        self._held: dict[int, ndarray] = {}  # threads that the schedule lets wait
        self._parked: dict[int, ndarray] = {}  # threads at a barrier
        self._polling: dict[int, ndarray] = {}  # threads at a barrier in memory whose phase is not complete
        self._polls = 0
        instructions, code, executed = self.program.instructions, self._code, self.executed
        warps, joins, end = self.lane_count // 32, self._joins, len(code)
        at: int | None = self._let_some_wait(0)
        moved = False
        while at is not None:
            if self._ready and (moved or at in joins):
                self._put(self._ready, at, self.mask())
                at = self._next()
            moved = False
            instruction = self.current = instructions[at]
            active = self.active
            executed[at] += warps if active is None else np.count_nonzero(active.reshape(-1, 32).any(1))
            opcode = instruction.opcode
            if opcode in ("bra", "bra.uni"):
                at, moved = self._branch(instruction, at), True
                continue
            if opcode == "brx.idx":
                at, moved = self._branch_by_index(instruction), True
                continue
            if opcode in ("ret", "exit"):
                at, moved = self._next(), True
                continue
            step, group = code[at]
            if group and not self._arrive(at, group):
                at, moved = self._next(), True
                continue
            if instruction.guard is None:
                step()
            else:
                guarded = self.guarded(instruction.guard)
                if guarded.any():
                    before = self.active
                    self.set_active(guarded)
                    step()
                    self.set_active(before)
            at += 1
            if group == self.threads and self.schedule.shuffled and opcode.startswith("bar"):
                at = self._let_some_wait(at)
            if at == end:
                raise PtxError("the kernel runs past its last instruction")

    def _finish(self) -> None:
        self.current = None
        if self.bulk_copies.unfinished():
            self.fault("unfinished", "a tensor store may still read shared memory when its block ends")
        if self.copies.unfinished() or self.products.unfinished():
            self.fault("unfinished", "an asynchronous copy or a product is under way when its block ends")
        self.mbarriers.check_idle()

    def late(self) -> bool:
        """Whether an asynchronous operation that is issued now takes effect as late as it can."""
        return not self.schedule.shuffled or bool(self.random.integers(2))

    @staticmethod
    def _put(pool: dict[int, ndarray], at: int, mask: ndarray) -> None:
        pool[at] = pool[at] | mask if at in pool else mask

    def _next(self) -> int | None:
        """Switches to threads that can run and returns where they stand; None when all have ended."""
        if not self._ready:
            for pool in (self._held, self._polling):
                if pool:
                    if pool is self._polling:
                        self._polls += 1
                        if self._polls > _POLLS:
                            self.fault("deadlock", f"threads wait on an mbarrier: {self.mbarriers.describe()}")
                    for at, mask in pool.items():
                        self._put(self._ready, at, mask)
                    pool.clear()
                    break
        if self._ready:
            at = min(self._ready)
            self.set_active(self._ready.pop(at))
            return at
        if self._parked:
            self.current = self.program.instructions[min(self._parked)]
            raise Fault("divergence", "not all threads of the group reach this barrier", self.current)
        return None

    def _branch(self, instruction: Instruction, at: int) -> int | None:
        target = self.program.target(instruction)
        self.branches += 1
        if self.most_branches and self.branches > self.most_branches:
            self.fault("endless loop", f"more than {self.most_branches} branches")
        polls, self.poll_failed = self.poll_failed and target < at, False
        taken = self.mask() if instruction.guard is None else self.guarded(instruction.guard)
        stay = self.mask() & ~taken
        if polls and taken.any():
            self._put(self._polling, target, taken)
            if not stay.any():
                return self._next()
            self.set_active(stay)
            return at + 1
        if not stay.any():
            return target
        if not taken.any():
            return at + 1
        self._put(self._ready, target, taken)
        self.set_active(stay)
        return at + 1

    def _branch_by_index(self, instruction: Instruction) -> int | None:
        targets = self.program.listed_targets(instruction)
        index = self.pick(self.reader(instruction.operands[0], "u32")())
        if (index >= len(targets)).any():
            self.fault("branch", f"index {index.max()} into {len(targets)} targets")
        for number in np.unique(index).tolist():
            self._put(self._ready, targets[number], self.spread(index == number))
        return self._next()

    def _arrive(self, at: int, group: int) -> bool:
        """Whether whole groups of threads have arrived at a barrier; then those are active, and the others are parked."""
        if self.active is None:
            return True
        arrived = self.mask() | self._parked.pop(at, False)
        complete = np.repeat(arrived.reshape(-1, group).all(1), group)
        if (arrived & ~complete).any():
            self._parked[at] = arrived & ~complete
        self.set_active(complete)
        return bool(complete.any())

    def _let_some_wait(self, at: int) -> int | None:
        """Lets a random part of the warps run first."""
        if not self.schedule.shuffled:
            return at
        mask = self.mask()
        ahead = np.repeat(self.random.integers(0, 2, self.lane_count // self._unit), self._unit).astype(bool) & mask
        if (mask & ~ahead).any():
            self._put(self._held, at, mask & ~ahead)
        if not ahead.any():
            return self._next()
        self.set_active(ahead)
        return at

    # ---- instructions

    def _build(self, instruction: Instruction) -> tuple[Step, int]:
        """The function that executes an instruction, and the number of threads that execute it together (0: any)."""
        opcode = instruction.opcode
        if opcode in ("bra", "bra.uni", "brx.idx", "ret", "exit"):
            if opcode in ("brx.idx", "ret", "exit") and instruction.guard:
                raise PtxError(f"{instruction}: predicated {opcode}")
            return (lambda: None), 0
        try:
            if opcode in _BUILDERS:
                built = _BUILDERS[opcode](self, instruction)
                return built if isinstance(built, tuple) else (built, 0)
            if opcode in self.operations:
                return self._scalar(instruction, self.operations[opcode]), 0
        except (PtxError, KeyError, ValueError, IndexError, AttributeError) as error:
            raise PtxError(f"{instruction}: {error}") from error
        raise PtxError(f"{instruction}: unknown instruction {opcode}")

    def _scalar(self, instruction: Instruction, operation: scalar.Operation) -> Step:
        sources = [self.reader(o, t) for o, t in zip(instruction.operands[1:], operation.reads, strict=True)]
        compute = operation.compute
        if len(operation.writes) == 2:
            first, second = (self.writer(o, t) for o, t in zip(instruction.operands[0], operation.writes, strict=True))

            def both() -> None:
                one, other = compute(*(source() for source in sources))
                first(one)
                second(other)

            return both
        write = self.writer(instruction.operands[0], operation.writes[0])
        if len(sources) == 1:
            (a,) = sources
            return lambda: write(compute(a()))
        if len(sources) == 2:
            a, b = sources
            return lambda: write(compute(a(), b()))
        a, b, c, *more = sources
        if more:
            (d,) = more
            return lambda: write(compute(a(), b(), c(), d()))
        return lambda: write(compute(a(), b(), c()))
