"""Shared memory for batches, used again and again: mapping new memory for each costs a worker more than filling it.

Each worker fills its slots in turn, without a lock: a DataLoader gives a worker its next batch number
only when one of its batches has arrived, `prefetch` of them at first, so that of a worker's batches at most `prefetch` are on their
way. With HELD slots more, and one, a slot is filled again only when HELD later batches of the worker have arrived, by which time
its reader is to have copied it. A ticket in each slot says which batch it holds: a reader that was too slow sees that.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from fastdeit.kernels.augment.operations import ROW

HELD = 1  # batches that a reader may not have copied yet when it requests the next


@dataclass(frozen=True)
class Batch:
    """One slot, or a copy of it.

    Attributes:
        images: (B, H, W, C) uint8, or memory for files in their place.
        plans: (B, layers, 8) float64.
        flips: (B,) uint8.
        classes: (B,) int64.
        parts: (B, columns) int64, where files lie and what is to be made of them; without columns where images are images.
    """

    images: Tensor
    plans: Tensor
    flips: Tensor
    classes: Tensor
    parts: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is copied to the device."""
        return self.images, self.plans, self.flips, self.classes

    def memory(self) -> tuple[Tensor, ...]:
        return *self.tensors(), self.parts


class Ticket(NamedTuple):
    """What a worker sends of a batch that it has put into a slot."""

    slot: int
    number: int  # of all batches that were put into this slot
    unreadable: list[str]  # images that others stand in for
    beyond: Mapping[int, bytes] = {}  # by place in the batch, what the slot had no room for
    keys: Sequence[Any] = ()  # of the images, where some may have to be made again


class OverwrittenError(RuntimeError):
    """A slot was filled again before its batch had been copied."""


class Ring:
    """Slots for batches.

    Args:
        batch_size: images of a batch.
        shape: height, width and channels of an image.
        layers: rows of a plan.
        workers: processes that fill slots; 0 for this one, whose memory is not shared.
        prefetch: batches that each of them is given at first.
        pinned: tell CUDA of the memory, so that copies run beside the computation.
        columns: of `Batch.parts`.
    """

    def __init__(
        self,
        batch_size: int,
        shape: tuple[int, int, int],
        layers: int,
        workers: int,
        prefetch: int,
        pinned: bool,
        columns: int = 0,
    ) -> None:
        self.slots_each = (prefetch if workers else 0) + HELD + 1
        count = self.slots_each * max(workers, 1)
        self._all = Batch(
            torch.zeros((count, batch_size, *shape), dtype=torch.uint8),
            torch.zeros((count, batch_size, layers, ROW), dtype=torch.float64),
            torch.zeros((count, batch_size), dtype=torch.uint8),
            torch.zeros((count, batch_size), dtype=torch.int64),
            torch.zeros((count, batch_size, columns), dtype=torch.int64),
        )
        self._numbers = torch.zeros(count, dtype=torch.int64)
        if workers:
            for tensor in (*self._all.memory(), self._numbers):
                tensor.share_memory_()
        if pinned:
            held = [tensor for tensor in self._all.tensors() if tensor.numel() and _pin(tensor)]
            weakref.finalize(self, _unpin, held)
        self._turn = 0

    def next_slot(self) -> tuple[int, int, Batch]:
        """In a worker: the slot to fill, its ticket's number, and its memory."""
        info = get_worker_info()
        slot = (info.id if info else 0) * self.slots_each + self._turn
        self._turn = (self._turn + 1) % self.slots_each
        self._numbers[slot] += 1
        return slot, int(self._numbers[slot]), self._at(slot)

    def read(self, ticket: Ticket) -> Batch:
        """The batch, in the ring's memory. Call `check` after copying it."""
        return self._at(ticket.slot)

    def check(self, ticket: Ticket) -> None:
        """Raises OverwrittenError if what `read` gave may not have been the ticket's batch until now."""
        if int(self._numbers[ticket.slot]) != ticket.number:
            raise OverwrittenError(
                f"data: slot {ticket.slot} of the loader was filled again before batch {ticket.number} of it was copied"
            )

    def _at(self, slot: int) -> Batch:
        return Batch(*(tensor[slot] for tensor in self._all.memory()))


def _pin(tensor: Tensor) -> bool:
    """Page-locks memory that exists. Where CUDA refuses, copies wait for one another as from any memory."""
    return not int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0))


def _unpin(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


def as_arrays(batch: Batch) -> tuple[np.ndarray, ...]:
    """The slot's memory, in the order of `Batch`, for a worker to fill."""
    return tuple(tensor.numpy() for tensor in batch.memory())
