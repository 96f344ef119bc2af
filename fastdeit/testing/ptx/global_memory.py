"""Global memory: the tensors that a launch was given, in place (PTX ISA 5.1.4).

A tensor's storage occupies addresses of its own, far from every other's. Every access is held to these rules, each a `Fault` when
broken:

- it lies on elements of a tensor that was passed, and is aligned to its full width;
- two accesses to an element, one of them a write, are of one block: blocks of one launch cannot be ordered;
- within the block they are ordered as in shared memory, by a barrier of the block, or within a warp by `bar.warp.sync` or by being
  one thread's. Layouts with copies of a value let several threads store the same.

A copy, with a tensor map or without one, accesses global memory where it is issued, for the threads that issue it.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy import ndarray

from fastdeit.testing.ptx.formats import UNSIGNED
from fastdeit.testing.ptx.stamps import BLOCKS, NOBODY, merged, other_block, unordered

SLOT = 38  # a storage begins at (its number + 1) << SLOT


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
        self.unit = 4  # bytes of a word, or of the smallest element if that is less: what has an order of its own

    @functools.cached_property
    def writers(self) -> ndarray:
        """The stamp of the last write to each unit. Memory of zeros costs nothing until it is written."""
        return np.zeros(-(-len(self.padded) // self.unit), np.int64)

    @functools.cached_property
    def readers(self) -> ndarray:
        return np.zeros(len(self.writers), np.int64)

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

    def units(self, first: ndarray, nbytes: int) -> ndarray:
        """The numbers of the units that accesses of `nbytes` at `first` touch, shape (accesses, units of one)."""
        return (first // self.unit)[:, None] + np.arange(-(-nbytes // self.unit))

    def holds(self, first: ndarray, values: ndarray) -> ndarray:
        """Whether units hold already what stores of `values` (k, n) at `first` write, shape (k, units of one)."""
        new = values.view(np.uint8)
        same = self.padded[first[:, None] + np.arange(new.shape[1])] == new
        return same.reshape(len(first), -1, min(self.unit, new.shape[1])).all(2)

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

    @property
    def unit(self) -> int:
        """Bytes of the smallest unit."""
        return min(storage.unit for storage in self._storages)

    def write_back(self) -> None:
        """Ends a launch: storages whose size is no multiple of 8 bytes were copies."""
        for storage in self._storages:
            storage.write_back()

    def load(self, stamps: ndarray, address: ndarray, width: int, count: int) -> list[ndarray]:
        """`count` numbers of `width` bytes from each address, read by threads at these stamps."""
        parts = _by_storage(address)
        if len(parts) > 1:
            found = [np.empty(len(address), UNSIGNED[width]) for _ in range(count)]
            for part in parts:
                for whole, numbers in zip(found, self.load(stamps[part], address[part], width, count), strict=True):
                    whole[part] = numbers
            return found
        storage, first = self._locate(address, width, count)
        view, index = storage.views[width], first // width
        self._read(storage, storage.units(first, width * count), stamps[:, None])
        return [view[index + k] for k in range(count)]

    def store(self, stamps: ndarray, address: ndarray, width: int, values: list[ndarray]) -> None:
        parts = _by_storage(address)
        if len(parts) > 1:
            for part in parts:
                self.store(stamps[part], address[part], width, [value[part] for value in values])
            return
        storage, first = self._locate(address, width, len(values))
        view, index = storage.views[width], first // width
        self._write(storage, first, stamps[:, None], np.stack(values, 1))
        for k, value in enumerate(values):
            view[index + k] = value
            if (view[index + k] != value).any():
                self.fault("global race", "two threads store different values at one address in one instruction")

    def storage_at(self, address: int) -> tuple[_Storage, int]:
        """The storage that holds an address, and the offset in it."""
        number = (address >> SLOT) - 1
        if not 0 <= number < len(self._storages):
            self.fault("global access outside the tensors", f"address {address:#x} belongs to none")
        return self._storages[number], address & (1 << SLOT) - 1

    def _read(self, storage: _Storage, units: ndarray, stamps: ndarray) -> None:
        writers = storage.writers[units]
        if writers.any():
            if other_block(writers, stamps).any():
                self.fault("global race", "reads what another block wrote")
            if unordered(writers, stamps).any():
                self.fault("global race", "reads what another thread of the block wrote, without barrier")
        _enter(storage.readers, units, stamps)

    def _write(self, storage: _Storage, first: ndarray, stamps: ndarray, values: ndarray) -> None:
        units = storage.units(first, values.itemsize * values.shape[1])
        before = storage.writers[units]
        _enter(storage.writers, units, stamps)
        if (storage.writers[units] == BLOCKS).any():
            self.fault("global race", "two blocks write one address")
        late = unordered(before, stamps)
        if late.any() and (late & ~storage.holds(first, values)).any():
            self.fault("global race", "writes another value than another thread of the block, without barrier")
        readers = storage.readers[units]
        if readers.any():
            if other_block(readers, stamps).any():
                self.fault("global race", "writes what another block read")
            if unordered(readers, stamps).any():
                self.fault("global race", "writes what another thread of the block read, without barrier")

    def _locate(self, address: ndarray, width: int, count: int) -> tuple[_Storage, ndarray]:
        storage, _ = self.storage_at(int(address[0]))
        first = address & (1 << SLOT) - 1
        nbytes = width * count
        if (first % nbytes).any():
            self.fault("misaligned global access", f"{nbytes} bytes at offset {first[first % nbytes != 0][0]}")
        if int(first.max()) + nbytes > len(storage.bytes):
            self.fault("global access outside the tensors", f"offset {first.max()} of {len(storage.bytes)} bytes")
        for k in range(0 if storage.covered else count):
            units = storage.units(first + k * width, width) * storage.unit
            if not storage.held[units].all():
                stray = units[~storage.held[units]]
                self.fault("global access outside the tensors", f"offset {stray[0]} is no element of the tensor")
        return storage, first


def _enter(table: ndarray, units: ndarray, stamps: ndarray) -> None:
    """Enters accesses to units at stamps (k, 1) in a table of the last ones."""
    before = table[units]
    if (before == BLOCKS).all():  # as after a few loads of what every block reads: nothing can be added
        return
    table[units] = stamps
    after = table[units]
    several = (after != stamps) | (before != NOBODY) & (before != stamps)
    if several.any():  # threads of this instruction, or with those of earlier ones
        now = np.broadcast_to(stamps, units.shape)[several]
        for last in (before, after):
            np.maximum.at(table, units[several], merged(last[several], now))


def _by_storage(address: ndarray) -> list[ndarray]:
    """The places of the addresses of each storage: blocks may have tensors of their own, further apart than any offset."""
    slots = address >> SLOT
    if (slots == slots[0]).all():
        return [np.arange(len(address))]
    return [np.flatnonzero(slots == slot) for slot in np.unique(slots)]
