"""Shared memory of the blocks that run together, and who may touch it when (PTX ISA 5.1.7, 8 and 9.7.13).

Every access is held to these rules, each a `Fault` when broken:

- it lies inside the block's allocation and is aligned to its width;
- what is read was written, and no asynchronous copy still fills it;
- two accesses to a byte, one of them a write, are ordered: by a barrier of the block, or within a warp by `bar.warp.sync` or by
  being one thread's;
- nothing is written that an asynchronous copy still fills, or that wgmma or a tensor copy may still read;
- the asynchronous proxy reads what generic stores wrote only behind `fence.proxy.async`;
- what a tensor copy wrote is read only by threads that waited on its mbarrier, or behind a barrier after such a thread.

A word is 4 bytes. Stamps order accesses (stamps.py).
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy import ndarray

from fastdeit.testing.ptx.formats import UNSIGNED
from fastdeit.testing.ptx.stamps import (
    THREAD,
    WARP,
    after_barrier,
    after_warp_barrier,
    first_stamps,
    floor_of,
    unordered,
)

_NEVER = np.int64(-1)


class SharedMemory:
    """Args:
    blocks, threads, nbytes: numbers of the blocks that run together, threads of one and bytes of its allocation.
    garbage: fills words with what unwritten memory holds.
    fault: called as fault(kind, detail) where a rule is broken; raises.
    """

    def __init__(
        self,
        blocks: ndarray,
        threads: int,
        nbytes: int,
        garbage: Callable[[int], ndarray],
        fault: Callable[[str, str], None],
    ) -> None:
        self.nbytes, self.threads, self.fault = nbytes, threads, fault
        self.stride = -(-nbytes // 1024) * 256 + 32  # words from one block's memory to the next
        total = len(blocks) * self.stride
        self.words = garbage(total)
        self.views = {width: self.words.view(UNSIGNED[width]) for width in (1, 2, 4, 8)}
        lane = np.arange(len(blocks) * threads)
        self.base = lane // threads * self.stride  # of each thread's block, in words
        self.stamps = first_stamps(blocks, threads)  # the next access of each thread
        self.floors = floor_of(self.stamps)  # the lowest stamp since the block's last barrier
        self.fenced = np.full(len(lane), _NEVER)  # clock of each thread's last proxy fence
        self.acquired = np.zeros(len(lane), np.int64)  # the last tensor copy that each thread has waited for
        self.clock = np.int64(0)  # of generic writes and proxy fences
        self.written = np.zeros(total, np.uint8)  # a bit a byte
        self.filling = np.zeros(total, np.int16)  # asynchronous copies under way into the word
        self.borrowed = np.zeros(total, np.int16)  # asynchronous reads under way of the word
        self.write_stamp = np.full(total, _NEVER)
        self.byte_stamps: ndarray | None = None  # (total, 4), by byte, once threads have filled a word together
        self.added = np.full(total, _NEVER)  # the floor at which atom.add last changed the word
        self.read_stamp = np.full(total, _NEVER)
        self.read_by_lanes = np.full(total, _NEVER)  # the floor at which several threads of the warp had read the word
        self.read_by_warps = np.full(total, _NEVER)
        self.read_clock = np.full(total, _NEVER)  # of the last generic read
        self.write_clock = np.full(total, _NEVER)  # of the last generic write; -1 for the asynchronous proxy's
        self.copied = np.zeros(total, np.int64)  # the tensor copy that wrote the word

    # ---- barriers and fences

    def barrier(self, active: ndarray | None) -> None:
        """bar.sync of whole blocks."""
        lanes = slice(None) if active is None else active
        self.stamps[lanes] = after_barrier(self.stamps[lanes])
        self.floors[lanes] = floor_of(self.stamps[lanes])
        by_block = self.acquired.reshape(-1, self.threads)
        latest = np.broadcast_to(by_block.max(1, keepdims=True), by_block.shape).reshape(-1)
        self.acquired[lanes] = latest[lanes]

    def warp_barrier(self, active: ndarray | None) -> None:
        lanes = slice(None) if active is None else active
        self.stamps[lanes] = after_warp_barrier(self.stamps[lanes])

    def fence(self, active: ndarray | None) -> None:
        """fence.proxy.async of the active threads."""
        self.clock += 1
        self.fenced[slice(None) if active is None else active] = self.clock

    # ---- generic accesses

    def locate(self, lanes: ndarray, address: ndarray, nbytes: int) -> ndarray:
        """Word numbers of the active lanes' addresses, after the checks that need no state."""
        if (address % min(nbytes, 16)).any():
            self.fault(
                "misaligned shared access", f"{nbytes} bytes at {_some(address, address % min(nbytes, 16) != 0)}"
            )
        outside = (address < 0) | (address + nbytes > self.nbytes)
        if outside.any():
            self.fault("shared access out of bounds", f"{_some(address, outside)} of {self.nbytes} bytes")
        return self.base[lanes] + (address >> 2)

    def load(self, lanes: ndarray, address: ndarray, width: int, count: int) -> list[ndarray]:
        first = self.locate(lanes, address, width * count)
        words = first[:, None] + np.arange(max(width * count // 4, 1))
        self.read(lanes, words, _byte_mask(address, width * count))
        at = (first * 4 + (address & 3)) // width
        view = self.views[width]
        return [view[at + k] for k in range(count)]

    def store(self, lanes: ndarray, address: ndarray, width: int, values: list[ndarray]) -> None:
        first = self.locate(lanes, address, width * len(values))
        words = first[:, None] + np.arange(max(width * len(values) // 4, 1))
        at = (first * 4 + (address & 3)) // width
        view = self.views[width]

        def unchanged() -> ndarray:
            """(lanes, words): whether memory holds what is to be written."""
            same = np.stack([view[at + k] == value for k, value in enumerate(values)], 1)
            return np.repeat(same, 2, 1) if width == 8 else same.reshape(*words.shape, -1).all(2)

        self.write(lanes, words, _byte_mask(address, width * len(values)), unchanged)
        for k, value in enumerate(values):
            view[at + k] = value
            if (view[at + k] != value).any():
                self.fault("shared race", "two threads store different values at one address in one instruction")

    def read(self, lanes: ndarray, words: ndarray, mask: ndarray | int = 15) -> None:
        """Checks and records generic reads of words (lanes, n) of which the bytes in `mask` matter."""
        held = self.written[words] & mask
        if (held != mask).any():
            self._why_unwritten(words[(held != mask)])
        stamps, floors = self.stamps[lanes, None], self.floors[lanes, None]
        for last in self._written_by(words, mask):
            if (last >= floors).any():
                self._require_order(last, stamps, "read after write")
        if self.acquired.any() or self.copied.any():
            if (self.copied[words] > self.acquired[lanes, None]).any():
                self.fault("shared race", "reads what a tensor copy wrote without having waited on its mbarrier")
        before = self.read_stamp[words]
        self.read_stamp[words] = stamps
        self.read_clock[words] = self.clock
        after = self.read_stamp[words]
        several = (after != stamps) | ((before >= floors) & (before != stamps))
        if several.any():
            others = np.where(after != stamps, after, before)
            same_warp = (others ^ stamps) & WARP == 0
            marked = np.broadcast_to(floors, words.shape)
            here = several & same_warp
            self.read_by_lanes[words[here]] = marked[here]
            here = several & ~same_warp
            self.read_by_warps[words[here]] = marked[here]

    def write(self, lanes: ndarray, words: ndarray, mask: ndarray | int, unchanged: Callable[[], ndarray]) -> None:
        """Checks and records generic writes. Layouts with copies of a value let several warps store the same: no race."""
        self.require_free(lanes, words, mask, unchanged)
        self.clock += 1
        if isinstance(mask, int):
            self.written[words] = mask
        else:  # several threads may fill one word
            np.bitwise_or.at(self.written, words, mask)
        self._stamp(words, self.stamps[lanes, None], mask)
        self.write_clock[words] = self.clock
        self.copied[words] = 0

    def add(self, lanes: ndarray, address: ndarray, values: ndarray) -> ndarray:
        """atom.add of 32-bit words, in the order of `lanes`; returns what each thread found."""
        words = self.locate(lanes, address, 4)
        if (self.written[words] != 15).any():
            self._why_unwritten(words[self.written[words] != 15])
        stamps, floors = self.stamps[lanes], self.floors[lanes]
        others_add = self.added[words] >= floors  # then the order of this one and theirs does not matter
        last = np.where(others_add, _NEVER, self.write_stamp[words])
        if (last >= floors).any():
            self._require_order(last, stamps, "atomic after write")
        last = np.where(others_add, _NEVER, self.read_stamp[words])
        if (last >= floors).any():
            self._require_order(last, stamps, "atomic after read")
        order = np.argsort(words, kind="stable")
        sums = np.cumsum(values[order], dtype=np.uint32) - values[order]  # of the threads before
        starts = np.r_[True, np.diff(words[order]) != 0]
        found = np.empty_like(values)
        found[order] = self.words[words[order]] + sums - sums[starts][np.cumsum(starts) - 1]
        np.add.at(self.words, words, values)
        self.clock += 1
        self.added[words] = floors
        self._stamp(words, stamps)
        self.write_clock[words], self.copied[words] = self.clock, 0
        return found

    def require_free(
        self,
        lanes: ndarray,
        words: ndarray,
        mask: ndarray | int = 15,
        unchanged: Callable[[], ndarray] = lambda: np.array([[False]]),
    ) -> None:
        """Checks that words may be written now, by stores or by a copy that these lanes issue."""
        if self.filling[words].any():
            self.fault("shared race", "writes shared memory that an asynchronous copy still fills")
        if self.borrowed[words].any():
            self.fault("shared race", "writes shared memory that wgmma or a tensor store may still read")
        stamps, floors = self.stamps[lanes, None], self.floors[lanes, None]
        for last in self._written_by(words, mask):
            if (last >= floors).any():
                self._require_order(np.where(unchanged(), _NEVER, last), stamps, "write after write")
        last = self.read_stamp[words]
        if (last >= floors).any():
            self._require_order(last, stamps, "write after read")
            recent = last >= floors
            same_step = (last & ~THREAD) == (stamps & ~THREAD)
            bad = recent & (self.read_by_warps[words] >= floors)
            bad |= recent & same_step & (self.read_by_lanes[words] >= floors)
            if bad.any():
                self.fault("shared race", "write after read of other threads without barrier")

    def _written_by(self, words: ndarray, mask: ndarray | int) -> Iterator[ndarray]:
        """Stamps of the last writes to the bytes in `mask`: one for all of a word until threads have filled one together."""
        if self.byte_stamps is None:
            yield self.write_stamp[words]
            return
        for byte in range(4):
            yield np.where(mask >> byte & 1, self.byte_stamps[words, byte], _NEVER)

    def _stamp(self, words: ndarray, stamps: ndarray | np.int64, mask: ndarray | int = 15) -> None:
        """Notes a write to the bytes in `mask`."""
        if self.byte_stamps is None and not isinstance(mask, int):
            self.byte_stamps = np.repeat(self.write_stamp[:, None], 4, 1)
        self.write_stamp[words] = stamps
        if self.byte_stamps is None:
            return
        stamps = np.broadcast_to(stamps, words.shape)
        for byte in range(4):
            here = np.broadcast_to(np.asarray(mask >> byte & 1, bool), words.shape)
            self.byte_stamps[words[here], byte] = stamps[here]

    def _require_order(self, last: ndarray, stamps: ndarray, what: str) -> None:
        if unordered(last, stamps).any():
            self.fault("shared race", f"{what} of another thread without barrier")

    def _why_unwritten(self, words: ndarray) -> None:
        if self.filling[words].any():
            self.fault("shared race", "reads shared memory that an asynchronous copy still fills")
        offsets = sorted(set((words % self.stride * 4).tolist()))
        self.fault(
            "unwritten shared memory", f"reads {len(offsets)} words never written, the first at byte {offsets[0]}"
        )

    def synchronise(self, lanes: ndarray, words: ndarray, changes: bool) -> None:
        """An operation on the mbarrier in these words, which it `changes` where it makes or ends it. None needs a proxy fence."""
        if changes:
            self._stamp(words, self.stamps[lanes, None])

    # ---- asynchronous accesses: begun at issue, ended when they take effect

    def begin_fill(self, lanes: ndarray, words: ndarray) -> None:
        """A copy into words (lanes, n) is issued."""
        self.require_free(lanes, words)
        np.add.at(self.filling, words.reshape(-1), 1)
        self.written[words] = 0

    def end_fill(self, lanes: ndarray, words: ndarray, values: ndarray, *, copy: int = 0) -> None:
        """It takes effect. `copy` numbers a tensor copy, whose writes belong to no thread; else they are the lanes' own."""
        self.words[words] = values
        self.filling[words] -= 1
        self.written[words] = 15
        self.copied[words] = copy
        self.clock += 1
        if copy:
            self._stamp(words, _NEVER)
            self.write_clock[words] = self.read_clock[words] = _NEVER
        else:
            self._stamp(words, self.stamps[lanes, None])
            self.write_clock[words] = self.clock

    def begin_borrow(self, words: ndarray, issuers: ndarray) -> str | None:
        """The asynchronous proxy will read `words` (k, n), distinct in a row, for the threads `issuers` (k, threads of one reader).

        Returns why a proxy fence is missing, or None.
        """
        if (self.written[words] != 15).any():
            self._why_unwritten(words[self.written[words] != 15])
        np.add.at(self.borrowed, words, 1)
        if (self.copied[words] > self.acquired[issuers].min(1)[:, None]).any():
            self.fault("shared race", "asynchronous read of what a tensor copy wrote, without a wait on its mbarrier")
        clocks = self.write_clock[words]
        generic = clocks >= 0
        if not generic.any():
            return None
        stamps, one = self.write_stamp[words], issuers.shape[1] == 1
        own = stamps == (self.stamps[issuers[:, :1]] if one else _NEVER)
        if (generic & (stamps >= self.floors[issuers[:, :1]]) & ~own).any():
            self.fault("shared race", "asynchronous read of what another thread wrote without barrier")
        if self._unfenced(words, issuers, stamps, clocks):
            return "no fence.proxy.async between generic writes and their asynchronous read"
        return None

    def _unfenced(self, words: ndarray, issuers: ndarray, stamps: ndarray, clocks: ndarray) -> bool:
        """Whether neither those who accessed words at these stamps and clocks, -1 for nobody, nor the issuers fenced since."""
        accessors = words // self.stride * self.threads + np.where(clocks >= 0, stamps & THREAD, 0)
        covered = (self.fenced[accessors] > clocks) | (self.fenced[issuers].min(1)[:, None] > clocks)
        return bool(((clocks >= 0) & ~covered).any())

    def overwritten_unfenced(self, words: ndarray, issuers: ndarray) -> str | None:
        """Why a tensor copy into `words` (k, n) by the threads `issuers` (k,) lacks a proxy fence, or None."""
        for stamps, clocks in ((self.write_stamp, self.write_clock), (self.read_stamp, self.read_clock)):
            if self._unfenced(words, issuers[:, None], stamps[words], clocks[words]):
                return "no fence.proxy.async between generic accesses and a tensor copy to their place"
        return None

    def end_borrow(self, words: ndarray, issuers: ndarray) -> None:
        """Ends the read: `issuers` (k, threads) have waited for it, other threads of the block only after a barrier."""
        np.add.at(self.borrowed, words, -1)
        self.read_stamp[words] = self.stamps[issuers[:, :1]]
        if issuers.shape[1] > 1:  # a warp's wait covers its own part of a wgmma
            self.read_by_warps[words] = self.floors[issuers[:, :1]]


def _byte_mask(address: ndarray, nbytes: int) -> ndarray | int:
    """Which bytes of a word an access of `nbytes` touches."""
    if nbytes >= 4:
        return 15
    return ((1 << nbytes) - 1 << (address & 3)).astype(np.uint8)[:, None]


def _some(values: ndarray, where: ndarray) -> str:
    found = sorted(set(np.broadcast_to(values, where.shape)[where].tolist()))
    return ", ".join(map(str, found[:4])) + (", ..." if len(found) > 4 else "")
