"""Proves that a planted fault changed nothing that matters: that the instruction it fell on was redundant in a launch.

Each proof uses other facts of a run than the checks that the mutant passed: which words of shared memory each thread touched
between two barriers, at which wait each asynchronous operation completed, the values that an instruction gave, or the text.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from fastdeit.testing.ptx.commits import CommitGroups
from fastdeit.testing.ptx.control_flow import governs_only_branches, governs_only_copies, predecessors, successors
from fastdeit.testing.ptx.machine import IN_STEP, Machine
from fastdeit.testing.ptx.program import Instruction, Pair, Program, Register, Vector
from fastdeit.testing.ptx.shared import SharedMemory


class Touch(NamedTuple):
    """Threads that access words of shared memory or elements of tensors; a barrier of whole blocks, or a proxy fence (no words).

    kind: "generic", "asynchronous" or "mbarrier" of an access to shared memory, "global", "barrier" or "fence".
    """

    kind: str
    line: int
    lanes: ndarray  # (k,) threads
    words: ndarray  # (k, n), numbered over all blocks that run together; of "global" addresses, which no word has as its number
    writes: bool
    ends: bool  # completes an asynchronous access that was told of when it began


class _Recorded(SharedMemory):
    """Shared memory that reports every access to a `Record`. Where a tensor copy lands is ordered by its mbarrier, not here."""

    record: "Record"

    def barrier(self, active: ndarray | None) -> None:
        lanes = np.arange(len(self.stamps)) if active is None else np.flatnonzero(active)
        self.record.touch("barrier", lanes, np.zeros((len(lanes), 0), np.int64), True)
        super().barrier(active)

    def fence(self, active: ndarray | None) -> None:
        lanes = np.arange(len(self.stamps)) if active is None else np.flatnonzero(active)
        self.record.touch("fence", lanes, np.zeros((len(lanes), 0), np.int64), False)
        super().fence(active)

    def read(self, lanes: ndarray, words: ndarray, mask: ndarray | int = 15) -> None:
        self.record.touch("generic", lanes, words, False)
        super().read(lanes, words, mask)

    def write(self, lanes: ndarray, words: ndarray, mask: ndarray | int, unchanged: Callable[[], ndarray]) -> None:
        self.record.touch("generic", lanes, words, True)
        super().write(lanes, words, mask, unchanged)

    def add(self, lanes: ndarray, address: ndarray, values: ndarray) -> ndarray:
        self.record.touch("generic", lanes, self.locate(lanes, address, 4)[:, None], True)
        return super().add(lanes, address, values)

    def begin_fill(self, lanes: ndarray, words: ndarray) -> None:
        self.record.touch("asynchronous", lanes, words, True)
        super().begin_fill(lanes, words)

    def end_fill(self, lanes: ndarray, words: ndarray, values: ndarray, *, copy: int = 0) -> None:
        if not copy:
            self.record.touch("asynchronous", lanes, words, True, ends=True)
        super().end_fill(lanes, words, values, copy=copy)

    def begin_borrow(self, words: ndarray, issuers: ndarray) -> str | None:
        for thread in {0, issuers.shape[1] - 1}:  # the first and the last stand for all of a warpgroup
            self.record.touch("asynchronous", issuers[:, thread], words, False)
        return super().begin_borrow(words, issuers)

    def end_borrow(self, words: ndarray, issuers: ndarray) -> None:
        for thread in {0, issuers.shape[1] - 1}:
            self.record.touch("asynchronous", issuers[:, thread], words, False, ends=True)
        super().end_borrow(words, issuers)

    def synchronise(self, lanes: ndarray, words: ndarray, changes: bool) -> None:
        self.record.touch("mbarrier", lanes, words, changes)
        super().synchronise(lanes, words, changes)


class _Groups(CommitGroups):
    """Commit groups that report to a `Record` at which line each operation completes."""

    def __init__(self, agents: int, record: "Record") -> None:
        super().__init__(agents)
        self._record = record

    def issue(self, agents: ndarray, complete: Callable[[ndarray], None]) -> None:
        number = self._record.issued = self._record.issued + 1

        def noted(part: ndarray) -> None:
            self._record.completions[number, self._record.line()] += len(part)
            complete(part)

        super().issue(agents, noted)


class Record(Machine):
    """A machine that runs in step and remembers.

    Args:
        program, shared_bytes: as of a `Machine`.
        line: of the instruction whose values are remembered; 0 for none.

    Attributes:
        touches: every access to shared and global memory, in order; of tensor copies, the former alone.
        completions: (operation, line of the wait) -> threads or warpgroups for which it completed there.
        digest: of the values that the instruction in that line gave, or of the addresses to which it stored.
        times: that a thread executed it, its guard true.
        accesses: digest of every access of global and shared memory: instruction, threads and addresses, in order.
        loaded: digest of what the loads gave that are not in that line.
        target: register that the instruction in that line writes.
    """

    def __init__(self, program: Program, shared_bytes: int, line: int = 0) -> None:
        super().__init__(program, shared_bytes, IN_STEP)
        self.touches: list[list[Touch]] = []  # of blocks that run together
        self.issued = 0  # asynchronous operations
        self.completions: Counter = Counter()
        self.digest, self.accesses, self.loaded = (hashlib.sha256() for _ in range(3))
        self.observer, self.target, self.times, self._watched_line = self, None, 0, line
        for at, instruction in enumerate(program.instructions):
            step, group = self._code[at]
            if instruction.line == line:
                self.target = next((o for o in instruction.operands[:1] if isinstance(o, Register)), None)
                self._code[at] = self._watched(step, instruction, self.digest), group
            elif instruction.opcode.startswith(("ld.shared", "ld.global", "ldmatrix")):
                self._code[at] = self._watched(step, instruction, self.loaded), group

    def start_memory(self, blocks: ndarray, kind: type[SharedMemory] = SharedMemory) -> SharedMemory:
        self.touches.append([])
        return super().start_memory(blocks, type("Recorded", (_Recorded,), {"record": self}))

    def start_groups(self, agents: int) -> CommitGroups:
        return _Groups(agents, self)

    def touch(self, kind: str, lanes: ndarray, words: ndarray, writes: bool, ends: bool = False) -> None:
        if self.current and self.current.opcode.startswith(("cp.async.ca", "cp.async.cg")):
            kind = "generic"  # copies without a tensor map are of that proxy
        words = np.broadcast_to(words, (len(lanes), words.shape[-1]))
        self.touches[-1].append(Touch(kind, self.line(), lanes, words, writes, ends))

    def access(self, instruction: Instruction, lanes: ndarray, address: ndarray, nbytes: int, space: str = "") -> None:
        """What an observer is told."""
        for numbers in (np.array([instruction.line, len(lanes)]), lanes, address):
            self.accesses.update(np.ascontiguousarray(numbers).tobytes())
        if instruction.line == self._watched_line and instruction.opcode.startswith("st."):
            self.digest.update(np.ascontiguousarray(address).tobytes())
        if (space or ("global" if ".global" in instruction.opcode else "shared")) == "global":
            unit = self.memory.unit
            elements = (address // unit)[:, None] * unit + np.arange(0, nbytes, unit)
            self.touches[-1].append(
                Touch("global", instruction.line, lanes, elements, instruction.opcode.startswith("st."), False)
            )

    def tensor_copy(self, instruction: Instruction, nbytes: int) -> None:
        self.accesses.update(np.array([instruction.line, nbytes]).tobytes())

    def line(self) -> int:
        return self.current.line if self.current else 0

    def _watched(self, step: Callable[[], None], instruction: Instruction, digest: Any) -> Callable[[], None]:
        written = [r.index for o in instruction.operands[:1] for r in _registers(o)]

        counted = instruction.line == self._watched_line

        def run() -> None:
            step()
            self.times += counted and int(self.mask().sum())
            for index in written:
                digest.update(np.ascontiguousarray(self.pick(self.registers[index])).tobytes())

        return run


def _registers(operand: object) -> Iterator[Register]:
    if isinstance(operand, Register):
        yield operand
    elif isinstance(operand, Vector | Pair):
        for item in operand.items if isinstance(operand, Vector) else operand:
            yield from _registers(item)


# ---- proofs: each returns the reason, or None where it proves nothing


def barrier_orders_nothing(original: Record, line: int) -> str | None:
    """The accesses on its two sides do not conflict: nothing is touched on both by different threads, one of them writing."""
    for touches in original.touches:
        if touches and _conflicts(touches, line, original.threads):
            return None
    return "redundant: nothing is written on one side and touched by another thread on the other"


def _conflicts(touches: list[Touch], line: int, threads: int) -> bool:
    """Whether barriers in `line` order a conflict. What they separate is taken as one interval."""
    blocks = 1 + max(int(touch.lanes.max()) for touch in touches) // threads
    interval, merged = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
    columns = []
    for touch in touches:
        block = touch.lanes // threads
        if touch.kind == "fence":
            continue
        if touch.kind != "barrier":
            size = touch.words.shape[1]
            columns.append(
                [
                    np.repeat(merged[block], size),
                    touch.words.reshape(-1),
                    np.repeat(touch.lanes, size),
                    np.repeat(interval[block], size),
                    np.full(touch.words.size, touch.writes),
                ]
            )
            continue
        arrived = np.unique(block)
        interval[arrived] += 1
        if touch.line != line:
            merged[arrived] += 1
    if not columns:
        return False
    group, word, thread, when, writes = (np.concatenate(column) for column in zip(*columns, strict=True))
    _, word = np.unique(word, return_inverse=True)
    _, key = np.unique(group << 32 | word, return_inverse=True)  # words are numbered over all blocks
    count = int(key.max()) + 1

    def spread(values: ndarray) -> ndarray:
        low, high = np.full(count, np.iinfo(np.int64).max), np.full(count, -1)
        np.minimum.at(low, key, values)
        np.maximum.at(high, key, values)
        return low != high

    written = np.zeros(count, bool)
    np.logical_or.at(written, key, writes)
    return bool((written & spread(thread) & spread(when)).any())


def same_values(original: Record, mutant: Record) -> str | None:
    same = original.digest.digest() == mutant.digest.digest()
    return "redundant here: it gives the same values in every execution" if same else None


def pass_accesses_nothing(original: Record, mutant: Record) -> str | None:
    """A loop's condition or bound: passes that the mutant adds read and write no memory, since masks of their own stop that."""
    condition = original.target
    if condition is None or not governs_only_branches(original.program, condition):
        return None
    same = original.accesses.digest() == mutant.accesses.digest()
    return "redundant here: the pass that it adds to a loop accesses no memory" if same else None


def copies_are_not_read(original: Record, mutant: Record) -> str | None:
    """A mask of cp.async: what the mutant copies besides reaches no register. wgmma reads shared memory without one."""
    mask = original.target
    if original.matrix_registers or mask is None or not governs_only_copies(original.program, mask):
        return None
    same = original.loaded.digest() == mutant.loaded.digest()
    return "redundant here: every load gives the same values, so that nothing reads what it lets copy" if same else None


def completes_elsewhere(original: Record, mutant: Record) -> str | None:
    """Operations still complete; the machine has checked that nothing touches what they use before."""
    if original.completions == mutant.completions:
        return "redundant: every operation completes at the same wait without it"
    lines = sorted({line for _, line in (mutant.completions - original.completions)})
    by_operation: dict[str, Counter] = {}
    for name, run in (("original", original), ("mutant", mutant)):
        by_operation[name] = Counter()
        for (number, _), count in run.completions.items():
            by_operation[name][number] += count
    if by_operation["original"] != by_operation["mutant"] or 0 in lines:
        return None
    where = ", ".join(map(str, lines))
    return f"redundant: what it waits for completes at the wait in line {where}, and is not touched before"


def _of_shared_memory(touches: list[Touch]) -> Iterator[Touch]:
    return (touch for touch in touches if touch.kind != "global")


def memory_is_not_used_again(original: Record, line: int) -> str | None:
    for touches in original.touches:
        freed: set[int] = set()
        for touch in _of_shared_memory(touches):
            words = set(touch.words.reshape(-1).tolist())
            if words & freed:
                return None
            if touch.line == line:
                freed |= words
    return "redundant: nothing accesses these 8 bytes afterwards"


def fence_orders_nothing(original: Record, line: int) -> str | None:
    """Between the fences around it, the asynchronous proxy accesses no word behind it that a load or store accessed before it.

    What tensor copies and wgmma accessed before it, they need no fence to access again.
    """
    for touches in original.touches:
        before: set[int] = set()
        ordered: set[int] = set()
        for touch in _of_shared_memory(touches):
            words = set(touch.words.reshape(-1).tolist())
            if touch.kind == "fence" and touch.line == line:
                ordered |= before
            elif touch.kind == "fence":
                before, ordered = set(), set()
            elif touch.kind == "asynchronous" and ordered & words:
                return None
            elif touch.kind == "generic":
                before |= words
    return "redundant: what tensor copies and wgmma access behind it, no load or store accessed since the fence before"


def copy_is_not_read(original: Record, line: int) -> str | None:
    for touches in original.touches:
        fresh: set[int] = set()  # words that the copy wrote, and nobody since
        for touch in _of_shared_memory(touches):
            if touch.ends or not (fresh or touch.line == line):
                continue
            words = set(touch.words.reshape(-1).tolist())
            if touch.line == line:
                fresh |= words
            elif touch.writes:
                fresh -= words
            elif fresh & words:
                return None
    return "redundant here: nothing reads what it copies"


def registers_were_fenced(program: Program, line: int) -> str | None:
    """On every path no other instruction than wgmma names, since the fence before, a register that a wgmma behind this one uses."""
    at = next(i for i, instruction in enumerate(program.instructions) if instruction.line == line)
    following = [i for i in _reach(program, at, successors(program)) if _is_wgmma(program.instructions[i])]
    before = _reach(program, at, predecessors(program))
    used = {
        r.index: _role(program.instructions[i], r) for i in following for r in _all_registers(program.instructions[i])
    }
    fenced = any(program.instructions[i].opcode.startswith("wgmma.fence") for i in before)
    for i in before:
        instruction = program.instructions[i]
        for register in _all_registers(instruction):
            if register.index in used and not (
                _is_wgmma(instruction) and _role(instruction, register) == used[register.index]
            ):
                return None
    return "redundant: no register of these products was accessed since the fence before" if fenced else None


def _is_wgmma(instruction: Instruction) -> bool:
    return instruction.opcode.startswith("wgmma.mma_async")


def _all_registers(instruction: Instruction) -> list[Register]:
    if _is_wgmma(instruction):  # descriptors and scale-d are no matrix registers
        return [r for o in instruction.operands if isinstance(o, Vector) for r in _registers(o)]
    operands = [getattr(o, "base", o) for o in instruction.operands]
    return [r for o in operands for r in _registers(o)]


def _role(instruction: Instruction, register: Register) -> tuple[str, bool]:
    return instruction.opcode, any(r.index == register.index for r in _registers(instruction.operands[0]))


def _reach(program: Program, at: int, edges: dict[int, list[int]]) -> set[int]:
    """Instructions that paths from `at` pass up to the next wgmma.fence, that included."""
    found: set[int] = set()
    todo = list(edges.get(at, ()))
    while todo:
        i = todo.pop()
        if i in found:
            continue
        found.add(i)
        if not program.instructions[i].opcode.startswith("wgmma.fence"):
            todo += edges.get(i, ())
    return found


# ---- by kind


def proof(kind: str, line: int, original: Record, mutant: Record) -> str | None:
    """Why a mutant of a kind that survived is equivalent to the kernel in this launch; None where nothing proves that."""
    if kind == "bar.sync dropped":
        return barrier_orders_nothing(original, line)
    if kind == "mbarrier.inval dropped":
        return memory_is_not_used_again(original, line)
    if kind == "fence.proxy.async dropped":
        return fence_orders_nothing(original, line)
    if kind == "cp.async dropped":
        return copy_is_not_read(original, line)
    if kind == "wgmma.fence dropped":
        return registers_were_fenced(original.program, line)
    if "wait" in kind or "commit" in kind:
        return completes_elsewhere(original, mutant)
    if kind.startswith("mask"):
        return (
            same_values(original, mutant)
            or pass_accesses_nothing(original, mutant)
            or copies_are_not_read(original, mutant)
        )
    if "dropped" not in kind:
        return same_values(original, mutant)
    return None
