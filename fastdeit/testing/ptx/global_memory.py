"""Global memory: the tensors that a launch was given, in place (PTX ISA 5.1.4).

A tensor's storage occupies addresses of its own, far from every other's. Each access must lie on elements of a tensor that was
passed, be aligned to its full width, and not meet another block's write: blocks of one launch cannot be ordered.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy import ndarray

from fastdeit.testing.ptx.formats import UNSIGNED

SLOT = 38  # a storage begins at (its number + 1) << SLOT
_NOBODY, _SEVERAL = 0, -1  # else a block's number + 1: memory of zeros costs nothing until it is written


class _Storage:
    def __init__(self, tensor: torch.Tensor) -> None:
        raw = tensor.untyped_storage()
        bytes_ = torch.empty(0, dtype=torch.uint8, device=raw.device).set_(raw).numpy()
        self.tensor, self.bytes = tensor, bytes_  # the tensor keeps the storage alive
        whole = len(bytes_) // 8 * 8
        self.padded = bytes_ if whole == len(bytes_) else np.concatenate([bytes_, np.zeros(8, np.uint8)])[: whole + 8]
        self.views = {width: self.padded.view(UNSIGNED[width]) for width in UNSIGNED}
        self.covered = False  # every byte belongs to an element
        self.held = np.zeros(len(self.padded), bool)  # bytes of elements, where not all do
        self.unit = tensor.element_size()  # of the tensors in it the smallest
        self.writer = np.zeros(len(self.padded), np.int32)  # at the first byte of each unit
        self.reader = np.zeros(len(self.padded), np.int32)

    def cover(self, tensor: torch.Tensor) -> None:
        self.unit = min(self.unit, tensor.element_size())
        if tensor.is_contiguous() and tensor.numel() * tensor.element_size() == len(self.bytes):
            self.covered = True
        if tensor.numel() == 0 or self.covered:
            return
        size = tensor.element_size()
        strides = [s * size for s in tensor.stride()] + [1]
        start = tensor.storage_offset() * size
        shape = (*tensor.shape, size)
        np.lib.stride_tricks.as_strided(self.held[start:], shape, strides)[...] = True

    def units(self, first: ndarray, width: int) -> ndarray:
        """The first bytes of the units that accesses of `width` bytes at `first` touch, shape (accesses, units of one)."""
        return (first - first % self.unit)[:, None] + np.arange(0, width, self.unit)

    def write_back(self) -> None:
        if self.padded is not self.bytes:
            self.bytes[:] = self.padded[: len(self.bytes)]


class GlobalMemory:
    """Args:
    fault: called as fault(kind, detail) where a rule is broken; raises.
    """

    def __init__(self, fault: Callable[[str, str], None]) -> None:
        self.fault = fault
        self._storages: list[_Storage] = []
        self._numbers: dict[int, int] = {}  # address of a storage -> its number

    def add(self, tensor: torch.Tensor) -> int:
        """Makes a CPU tensor's elements accessible; returns the address of its first one."""
        key = tensor.untyped_storage().data_ptr()
        if key not in self._numbers:
            self._numbers[key] = len(self._storages)
            self._storages.append(_Storage(tensor))
        number = self._numbers[key]
        self._storages[number].cover(tensor)
        return (number + 1 << SLOT) + tensor.storage_offset() * tensor.element_size()

    def write_back(self) -> None:
        """Ends a launch: storages whose size is no multiple of 8 bytes were copies."""
        for storage in self._storages:
            storage.write_back()

    def load(self, blocks: ndarray, address: ndarray, width: int, count: int) -> list[ndarray]:
        """`count` numbers of `width` bytes from each address; `blocks` are the accessing blocks' numbers in the grid."""
        parts = _by_storage(address)
        if len(parts) > 1:
            found = [np.empty(len(address), UNSIGNED[width]) for _ in range(count)]
            for part in parts:
                for whole, numbers in zip(found, self.load(blocks[part], address[part], width, count), strict=True):
                    whole[part] = numbers
            return found
        storage, first = self._locate(address, width, count)
        view, index = storage.views[width], first // width
        found = []
        for k in range(count):
            self._note_read(storage, storage.units(first + k * width, width), blocks[:, None])
            found.append(view[index + k])
        return found

    def store(self, blocks: ndarray, address: ndarray, width: int, values: list[ndarray]) -> None:
        parts = _by_storage(address)
        if len(parts) > 1:
            for part in parts:
                self.store(blocks[part], address[part], width, [value[part] for value in values])
            return
        storage, first = self._locate(address, width, len(values))
        view, index = storage.views[width], first // width
        for k, value in enumerate(values):
            self._note_write(storage, storage.units(first + k * width, width), blocks[:, None])
            view[index + k] = value
            if (view[index + k] != value).any():
                self.fault("global race", "two threads store different values at one address in one instruction")

    def storage_at(self, address: int) -> tuple[_Storage, int]:
        """The storage that holds an address, and the offset in it."""
        number = (address >> SLOT) - 1
        if not 0 <= number < len(self._storages):
            self.fault("global access outside the tensors", f"address {address:#x} belongs to none")
        return self._storages[number], address & (1 << SLOT) - 1

    def _note_read(self, storage: _Storage, units: ndarray, blocks: ndarray) -> None:
        writer = storage.writer[units]
        blocks = (blocks + 1).astype(np.int32)
        if ((writer != _NOBODY) & (writer != blocks)).any():
            self.fault("global race", "reads what another block wrote")
        before = storage.reader[units]
        storage.reader[units] = blocks
        several = (storage.reader[units] != blocks) | ((before != _NOBODY) & (before != blocks))
        if several.any():
            storage.reader[units[several]] = _SEVERAL

    def _note_write(self, storage: _Storage, units: ndarray, blocks: ndarray) -> None:
        blocks = (blocks + 1).astype(np.int32)
        before = storage.writer[units]
        storage.writer[units] = blocks
        if ((before != _NOBODY) & (before != blocks)).any() or (storage.writer[units] != blocks).any():
            self.fault("global race", "two blocks write one address")
        reader = storage.reader[units]
        if ((reader != _NOBODY) & (reader != blocks)).any():
            self.fault("global race", "writes what another block read")

    def _locate(self, address: ndarray, width: int, count: int) -> tuple[_Storage, ndarray]:
        storage, _ = self.storage_at(int(address[0]))
        first = address & (1 << SLOT) - 1
        nbytes = width * count
        if (first % nbytes).any():
            self.fault("misaligned global access", f"{nbytes} bytes at offset {first[first % nbytes != 0][0]}")
        if int(first.max()) + nbytes > len(storage.bytes):
            self.fault("global access outside the tensors", f"offset {first.max()} of {len(storage.bytes)} bytes")
        for k in range(0 if storage.covered else count):
            units = storage.units(first + k * width, width)
            if not storage.held[units].all():
                stray = units[~storage.held[units]]
                self.fault("global access outside the tensors", f"offset {stray[0]} is no element of the tensor")
        return storage, first


def _by_storage(address: ndarray) -> list[ndarray]:
    """The places of the addresses of each storage: blocks may have tensors of their own, further apart than any offset."""
    slots = address >> SLOT
    if (slots == slots[0]).all():
        return [np.arange(len(address))]
    return [np.flatnonzero(slots == slot) for slot in np.unique(slots)]
