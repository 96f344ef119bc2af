"""Memory of a plan's intermediate results: offsets in one allocation, and tensors at addresses that own nothing."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastdeit.plan.tape import Buffer, Descriptor, Launch, Operation, View

_ALIGNMENT = 512  # of the caching allocator's own


def views_of(event: Launch | Operation) -> list[View]:
    """All tensors that an event reads or writes."""
    if isinstance(event, Operation):
        return [*event.args, event.out]
    views = (arg.view if isinstance(arg, Descriptor) else arg for arg in event.args)
    return [view for view in views if isinstance(view, View)]


def lifetimes(events: Sequence[Launch | Operation]) -> dict[Buffer, tuple[int, int]]:
    """The first and the last event that touches each buffer, of those that are neither inputs nor parameters."""
    found: dict[Buffer, tuple[int, int]] = {}
    for at, event in enumerate(events):
        for view in views_of(event):
            buffer = view.buffer
            if buffer.input is None and buffer.address is None:
                found[buffer] = (found[buffer][0] if buffer in found else at, at)
    return found


def packed(lives: dict[Buffer, tuple[int, int]]) -> tuple[dict[Buffer, int], int]:
    """An offset for each buffer and the bytes of all: two share memory only if one is last touched before the other's first event.

    Work on a stream is done in order, so that nothing is overwritten that is still to be read.
    """
    offsets: dict[Buffer, int] = {}
    placed: list[tuple[int, int, int, int]] = []  # first and last event, first and last byte
    total = 0
    for buffer, (first, last) in sorted(lives.items(), key=lambda item: -item[0].nbytes):
        size = max(-(-buffer.nbytes // _ALIGNMENT), 1) * _ALIGNMENT
        offset = _lowest_gap(size, ((low, high) for f, la, low, high in placed if f <= last and first <= la))
        offsets[buffer] = offset
        placed.append((first, last, offset, offset + size))
        total = max(total, offset + size)
    return offsets, total


def _lowest_gap(size: int, taken: Iterable[tuple[int, int]]) -> int:
    offset = 0
    for low, high in sorted(taken):
        if low - offset >= size:
            break
        offset = max(offset, high)
    return offset


def tensor_at(address: int, view: View, device: torch.device) -> Tensor:
    """A tensor at an address, with a view's shape, strides and dtype. It owns no memory: whoever uses it holds what does.

    Not made in inference mode, it may be written to in either mode.
    """
    extent = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)) + 1
    storage = torch._C._construct_storage_from_data_pointer(address, device, extent * view.dtype.itemsize)
    return torch.empty(0, dtype=view.dtype, device=device).set_(storage, 0, view.shape, view.strides)
