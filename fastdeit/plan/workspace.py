"""Memory of a plan's intermediate results: offsets in one allocation, and tensors that do not own the memory at their address."""

import itertools
from bisect import insort
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit.plan.tape import Buffer, Launch, Operation, View

_ALIGNMENT = 512  # of the caching allocator's own


def lifetimes(events: Sequence[Launch | Operation]) -> dict[Buffer, tuple[int, int]]:
    """The first and the last event that touches each buffer, of those that are neither inputs nor parameters."""
    found: dict[Buffer, tuple[int, int]] = {}
    for at, event in enumerate(events):
        for buffer in event.buffers:
            if buffer.input is None and buffer.address is None:
                found[buffer] = (found[buffer][0] if buffer in found else at, at)
    return found


def written(event: Launch | Operation) -> set[Buffer]:
    """All that an event may write to: of a kernel everything that it is given, but inputs and parameters."""
    if isinstance(event, Launch):
        return set(lifetimes([event]))
    return {view.buffer for view in (event.out if isinstance(event.out[0], View) else (event.out,))}


class Allocation(NamedTuple):
    """A piece of memory, and where buffers lie in it, in bytes."""

    offsets: dict[Buffer, int]
    size: int


def packed(lives: dict[Buffer, tuple[int, int]]) -> Allocation:
    """One allocation for all: two buffers share memory only if one is last touched before the other's first event.

    Work on a stream is done in order, so that nothing is overwritten that is still to be read.
    """
    offsets: dict[Buffer, int] = {}
    placed: list[_Placed] = []
    for buffer, life in _largest_first(lives):
        offsets[buffer] = _lowest_gap(buffer, life, placed)
        _place(buffer, life, offsets[buffer], placed)
    return Allocation(offsets, max((each.end for each in placed), default=0))


def stacked(last: dict[Buffer, int], most: int) -> list[Allocation]:
    """At most so many allocations of similar size for buffers that live at one time until these events, those first that become
    free first."""
    share = -(-sum(map(aligned, last)) // most)
    made: list[Allocation] = []
    for buffer in sorted(last, key=last.__getitem__):
        if not made or (made[-1].size >= share and len(made) < most):
            made.append(Allocation({}, 0))
        offsets, size = made[-1]
        offsets[buffer] = size
        made[-1] = Allocation(offsets, size + aligned(buffer))
    return made


def packed_into(
    lives: dict[Buffer, tuple[int, int]], taken: dict[Buffer, tuple[int, int]], allocations: Sequence[Allocation]
) -> tuple[list[dict[Buffer, int]], dict[Buffer, tuple[int, int]]]:
    """Offsets as `packed` gives them in what others of some allocations leave free, as `taken` says of those: in the last first,
    so that the others become free early.

    Returns:
        Offsets in each allocation, and the buffers for which there is no place.
    """
    placed: list[list[_Placed]] = [[] for _ in allocations]
    for others, allocation in zip(placed, allocations, strict=True):
        for buffer, offset in allocation.offsets.items():
            _place(buffer, taken[buffer], offset, others)
    inside: list[dict[Buffer, int]] = [{} for _ in allocations]
    rest: dict[Buffer, tuple[int, int]] = {}
    for buffer, life in _largest_first(lives):
        for offsets, others, allocation in reversed(list(zip(inside, placed, allocations, strict=True))):
            offset = _lowest_gap(buffer, life, others)
            if offset + aligned(buffer) <= allocation.size:
                offsets[buffer] = offset
                _place(buffer, life, offset, others)
                break
        else:
            rest[buffer] = life
    return inside, rest


def early_and_late(lives: dict[Buffer, tuple[int, int]]) -> tuple[dict[Buffer, tuple[int, int]], ...]:
    """Those of the buffers that are no longer touched once all that live take less than half of what they take at most, and the
    others."""
    changes: dict[int, int] = {}
    for buffer, (first, last) in lives.items():
        changes[first] = changes.get(first, 0) + aligned(buffer)
        changes[last + 1] = changes.get(last + 1, 0) - aligned(buffer)
    times = sorted(changes)
    totals = list(itertools.accumulate(map(changes.__getitem__, times)))
    half = max(totals, default=0) / 2
    end = max((after for total, after in zip(totals, times[1:], strict=False) if total >= half), default=0)
    early = {buffer: life for buffer, life in lives.items() if life[1] < end}
    return early, {buffer: life for buffer, life in lives.items() if buffer not in early}


class _Placed(NamedTuple):
    """A placed buffer: first and last event, first byte and the one after the last."""

    first: int
    last: int
    start: int
    end: int


def _largest_first(lives: dict[Buffer, tuple[int, int]]) -> list[tuple[Buffer, tuple[int, int]]]:
    return sorted(lives.items(), key=lambda item: -item[0].nbytes)


def aligned(buffer: Buffer) -> int:
    """Bytes that a buffer takes of a workspace."""
    return max(-(-buffer.nbytes // _ALIGNMENT), 1) * _ALIGNMENT


def _place(buffer: Buffer, life: tuple[int, int], offset: int, placed: list[_Placed]) -> None:
    """Adds a buffer to those that are placed, which are in the order of their offsets."""
    insort(placed, _Placed(*life, offset, offset + aligned(buffer)), key=attrgetter("start"))


def _lowest_gap(buffer: Buffer, life: tuple[int, int], placed: list[_Placed]) -> int:
    """The lowest offset that is free for that long."""
    (first, last), size, offset = life, aligned(buffer), 0
    for begins, ends, start, end in placed:
        if begins <= last and first <= ends:
            if start - offset >= size:
                break
            offset = max(offset, end)
    return offset


def bytes_at(address: int, size: int, device: torch.device) -> Tensor:
    """(size,) uint8 at an address. It owns no memory: users of it, or of a view, hold the tensor that does.

    Not made in inference mode, it may be written to in either mode.
    """
    storage = torch._C._construct_storage_from_data_pointer(address, device, size)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (size,), (1,))


def view_of(memory: Tensor, offset: int, view: View) -> Tensor:
    """The tensor with a view's shape and strides that begins at an offset, in bytes, of memory seen in the view's dtype."""
    return memory.as_strided(view.shape, view.strides, offset // view.dtype.itemsize)


def tensor_at(address: int, view: View, device: torch.device) -> Tensor:
    """The tensor with a view's shape, strides and dtype at an address, as `bytes_at`."""
    extent = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)) + 1
    return view_of(bytes_at(address, extent * view.dtype.itemsize, device).view(view.dtype), 0, view)
