"""Barriers in shared memory that asynchronous copies complete (PTX ISA 9.7.13.15)."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

from fastdeit.testing.ptx.program import Instruction, PtxError, Symbol

if TYPE_CHECKING:
    from fastdeit.testing.ptx.machine import Machine

Step = Callable[[], None]


class _Barrier:
    """The mbarrier at one address, in each of the blocks that run together."""

    def __init__(self, blocks: int) -> None:
        self.live = np.zeros(blocks, bool)
        self.count = np.zeros(blocks, np.int64)  # arrivals of a phase
        self.missing = np.zeros(blocks, np.int64)  # arrivals that the phase still waits for
        self.bytes = np.zeros(blocks, np.int64)  # that it still waits for
        self.phase = np.zeros(blocks, np.int64)
        self.owner = np.zeros(blocks, np.int64)  # the thread that initialised it
        self.born = np.zeros(blocks, np.int64)  # the owner's floor then
        self.waited = np.full(blocks, -1)  # floor of the last wait
        self.copied = np.zeros(blocks, np.int64)  # the last tensor copy that it announced

    def turn(self) -> None:
        done = self.live & (self.missing == 0) & (self.bytes == 0)
        self.phase[done] += 1
        self.missing[done] = self.count[done]


@dataclasses.dataclass
class _Copy:
    address: int
    lanes: ndarray
    size: int
    land: Callable[[ndarray], None]  # given positions in `lanes`


class Mbarriers:
    """All mbarriers of the running blocks, and the tensor copies that they wait for."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._barriers: dict[int, _Barrier] = {}
        self._under_way: list[_Copy] = []
        self._copies = 0

    def initialise(self, lanes: ndarray, address: ndarray, count: ndarray) -> None:
        machine = self._machine
        words = machine.shared.locate(lanes, address, 8)[:, None] + np.arange(2)
        machine.shared.require_free(lanes, words)
        for at, part in self._by_address(address):
            barrier = self._barriers.setdefault(at, _Barrier(machine.lane_count // machine.threads))
            blocks = lanes[part] // machine.threads
            if barrier.live[blocks].any():
                machine.fault("mbarrier", f"initialised again at {at}")
            barrier.live[blocks] = True
            barrier.count[blocks] = barrier.missing[blocks] = count[part]
            barrier.bytes[blocks] = barrier.phase[blocks] = 0
            barrier.owner[blocks] = lanes[part]
            barrier.born[blocks] = machine.shared.floors[lanes[part]]
            barrier.waited[blocks] = -1
        machine.shared.recent[words] = 15
        machine.shared.written[words] = 0  # nobody reads or writes it as memory
        machine.shared.borrowed[words] += 1
        machine.shared.synchronise(lanes, words, changes=True)

    def invalidate(self, lanes: ndarray, address: ndarray) -> None:
        machine = self._machine
        for at, part in self._by_address(address):
            barrier, blocks = self._live(at, lanes[part])
            if any(
                copy.address == at and np.isin(copy.lanes // machine.threads, blocks).any() for copy in self._under_way
            ):
                machine.fault("mbarrier", f"invalidated at {at} with a tensor copy under way")
            if (barrier.waited[blocks] >= machine.shared.floors[lanes[part]]).any():
                machine.fault("mbarrier", f"invalidated at {at} while other threads may still wait on it")
            barrier.live[blocks] = False
        words = machine.shared.locate(lanes, address, 8)[:, None] + np.arange(2)
        machine.shared.borrowed[words] -= 1
        machine.shared.synchronise(lanes, words, changes=True)

    def arrive(self, lanes: ndarray, address: ndarray, expected: ndarray) -> None:
        """One arrival of each lane, and bytes that the phase shall wait for."""
        self._note(lanes, address)
        for at, part in self._by_address(address):
            barrier, blocks = self._live(at, lanes[part])
            np.add.at(barrier.bytes, blocks, expected[part])
            np.add.at(barrier.missing, blocks, -1)
            if (barrier.missing < 0).any():
                self._machine.fault("mbarrier", f"more arrivals at {at} than it was initialised for")
            barrier.turn()

    def fill(self, lanes: ndarray, address: ndarray, size: int, words: ndarray, values: ndarray) -> None:
        """A tensor copy that writes `values` to `words` and then announces its bytes."""
        machine = self._machine
        self._copies += 1
        number = self._copies
        for at, part in self._by_address(address):
            barrier, blocks = self._live(at, lanes[part])
            barrier.copied[blocks] = number
            own, own_words, own_values = lanes[part], words[part], values[part]

            def land(done: ndarray, own=own, own_words=own_words, own_values=own_values) -> None:
                machine.shared.end_fill(own[done], own_words[done], own_values[done], copy=number)

            self._under_way.append(_Copy(at, own, size, land))
            if not machine.late():
                self._land(at, blocks)

    def poll(self, lanes: ndarray, address: ndarray, parity: ndarray) -> ndarray:
        """Whether the phase of that parity is complete, by lane. Copies under way take effect now at the latest."""
        machine = self._machine
        self._note(lanes, address)
        complete = np.zeros(len(lanes), bool)
        for at, part in self._by_address(address):
            barrier, blocks = self._live(at, lanes[part])
            if ((barrier.phase[blocks] & 1) == parity[part]).any():
                self._land(at, blocks)
            complete[part] = (barrier.phase[blocks] & 1) != parity[part]
            barrier.waited[blocks] = machine.shared.floors[lanes[part]]
            done = lanes[part][complete[part]]
            acquired = np.maximum(machine.shared.acquired[done], barrier.copied[done // machine.threads])
            machine.shared.acquired[done] = acquired
        return complete

    def check_idle(self) -> None:
        """Checks at the blocks' end that each copy was waited for: it may write memory that belongs to another block by then."""
        if self._under_way:
            self._machine.fault("mbarrier", "a tensor copy is still under way when its block ends")

    def describe(self) -> str:
        return "; ".join(
            f"at {at} phase {int(b.phase[0])} waits for {b.missing.tolist()[:4]} arrivals, {b.bytes.tolist()[:4]} bytes"
            for at, b in self._barriers.items()
            if b.live.any()
        )

    def _note(self, lanes: ndarray, address: ndarray) -> None:
        shared = self._machine.shared
        shared.synchronise(lanes, shared.locate(lanes, address, 8)[:, None] + np.arange(2), changes=False)

    def _land(self, at: int, blocks: ndarray) -> None:
        threads, left = self._machine.threads, []
        barrier = self._barriers[at]
        for copy in self._under_way:
            done = np.isin(copy.lanes // threads, blocks) if copy.address == at else np.zeros(len(copy.lanes), bool)
            if done.any():
                copy.land(np.flatnonzero(done))
                np.add.at(barrier.bytes, copy.lanes[done] // threads, -copy.size)
            if not done.all():
                left.append(self._rest(copy, np.flatnonzero(~done)) if done.any() else copy)
        self._under_way = left
        barrier.turn()

    @staticmethod
    def _rest(copy: _Copy, keep: ndarray) -> _Copy:
        return _Copy(copy.address, copy.lanes[keep], copy.size, lambda part: copy.land(keep[part]))

    def _live(self, at: int, lanes: ndarray) -> tuple[_Barrier, ndarray]:
        """The barrier, live in the lanes' blocks and known to the lanes; and the blocks."""
        machine = self._machine
        barrier, blocks = self._barriers.get(at), lanes // machine.threads
        if barrier is None or not barrier.live[blocks].all():
            machine.fault("mbarrier", f"there is none at {at}")
        unordered = (barrier.born[blocks] >= machine.shared.floors[lanes]) & (barrier.owner[blocks] != lanes)
        if unordered.any():
            machine.fault("mbarrier", f"used at {at} by other threads than the initialising one, without a barrier")
        return barrier, blocks

    @staticmethod
    def _by_address(address: ndarray) -> list[tuple[int, ndarray]]:
        return [(int(at), np.flatnonzero(address == at)) for at in np.unique(address)]


def initialise(machine: "Machine", instruction: Instruction) -> Step:
    address, count = machine.address(instruction.operands[0]), machine.reader(instruction.operands[1], "u32")

    def step() -> None:
        machine.mbarriers.initialise(machine.lanes(), address(), machine.pick(count()).astype(np.int64))

    return step


def invalidate(machine: "Machine", instruction: Instruction) -> Step:
    address = machine.address(instruction.operands[0])
    return lambda: machine.mbarriers.invalidate(machine.lanes(), address())


def arrive(machine: "Machine", instruction: Instruction) -> Step:
    """mbarrier.arrive, with .expect_tx and its bytes."""
    state, where, *given = instruction.operands
    if state != Symbol("_"):
        raise PtxError("the state that arrive returns is not known")
    address = machine.address(where)
    expected = machine.reader(given[0], "u32") if given else None

    def step() -> None:
        lanes = machine.lanes()
        bytes_ = machine.pick(expected()).astype(np.int64) if expected else np.zeros(len(lanes), np.int64)
        machine.mbarriers.arrive(lanes, address(), bytes_)

    return step


def try_wait(machine: "Machine", instruction: Instruction) -> Step:
    target, where, parity = instruction.operands
    write, address, read = machine.writer(target, "pred"), machine.address(where), machine.reader(parity, "u32")

    def step() -> None:
        complete = machine.mbarriers.poll(machine.lanes(), address(), machine.pick(read()))
        machine.poll_failed = not complete.all()
        write(machine.spread(complete))

    return step


BUILDERS = {
    "mbarrier.init.shared::cta.b64": initialise,
    "mbarrier.inval.shared::cta.b64": invalidate,
    "mbarrier.arrive.expect_tx.shared.b64": arrive,
    "mbarrier.arrive.expect_tx.shared::cta.b64": arrive,
    "mbarrier.arrive.shared::cta.b64": arrive,
    "mbarrier.try_wait.parity.shared.b64": try_wait,
    "mbarrier.try_wait.parity.shared::cta.b64": try_wait,
}
