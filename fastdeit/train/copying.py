"""Copies batches to the device. When the next one is requested, at most one may still be read from the loader's memory."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def _nothing() -> None:
    pass


class HostBatch(NamedTuple):
    """Tensors in memory that may be used again once they have been copied.

    Attributes:
        tensors: the batch.
        copied: is called then, and checks that the memory was not used before.
        decoded: in place of a copy, makes the tensors on the device of what the memory holds.
    """

    tensors: tuple[Tensor, ...]
    copied: Callable[[], None] = _nothing
    decoded: Callable[[], tuple[Tensor, ...]] | None = None

    def on_device(self, device: torch.device) -> tuple[Tensor, ...]:
        """In memory of their own. From page-locked memory the copy runs on the current stream."""
        if self.decoded is not None:
            return self.decoded()
        return tuple(t.to(device, non_blocking=True, copy=True) for t in self.tensors)


def copied(batches: Iterator[HostBatch], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Each batch's tensors on device, in memory of their own."""
    for batch in batches:
        tensors = batch.on_device(device)
        batch.copied()
        yield tensors


def copied_ahead(batches: Iterator[HostBatch], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Copies one batch ahead: while a step uses a batch, the next one's copy runs on another stream.

    When another batch is requested, the copy before the latest is waited for, and at the end the latest: the loader may then
    reuse its memory.
    """
    stream = torch.cuda.Stream(device)
    waiting: tuple[Tensor, ...] | None = None
    latest: tuple[HostBatch, torch.cuda.Event] | None = None
    try:
        for batch in batches:
            before, latest = latest, None
            if before is not None:
                _await(*before)
            with torch.cuda.stream(stream):
                tensors = batch.on_device(device)
                latest = batch, stream.record_event()
            if waiting is not None:
                yield waiting
            torch.cuda.current_stream(device).wait_stream(stream)
            for tensor in tensors:  # its memory must not be given to another copy while the step still reads it
                tensor.record_stream(torch.cuda.current_stream(device))
            waiting = tensors
        if waiting is not None:
            yield waiting
    finally:
        if latest is not None:
            _await(*latest)


def _await(batch: HostBatch, event: "torch.cuda.Event") -> None:
    if not event.query():
        event.synchronize()
    batch.copied()
