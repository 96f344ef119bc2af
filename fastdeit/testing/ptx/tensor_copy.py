"""Tensor copies of sm_90 between global and shared memory, and tensor maps (PTX ISA 5.5, 9.7.9.25.5)."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

from fastdeit.testing.ptx.program import Instruction, PtxError, TensorAddress
from fastdeit.testing.ptx.scalar import expand

if TYPE_CHECKING:
    from fastdeit.testing.ptx.machine import Machine

Step = Callable[[], None]

_CHUNK = 16  # bytes that a swizzle moves as one
_SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # a tensor map's swizzle mode -> bytes of a swizzled row


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A descriptor as the launcher encodes it, outermost dimension first.

    address: of the first element. shape, strides: of the tensor, in elements. box: of one copy. swizzle: bytes of a row, or 0.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    itemsize: int
    swizzle: int

    @classmethod
    def encode(cls, address: int, shape, strides, itemsize: int, metadata: dict) -> "TensorMap":
        """With the compiler's metadata: block_size and swizzle.

        Raises:
            ValueError: hardware would refuse the map.
        """
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        box = tuple(metadata["block_size"])
        if address % 16 or any(s * itemsize % 16 for s in strides[:-1]) or strides[-1] != 1:
            raise ValueError(
                f"a tensor map needs base and strides aligned to 16 bytes, got {strides} x {itemsize} bytes"
            )
        if len(box) != len(shape) or any(not 0 < b <= 256 for b in box) or box[-1] * itemsize % 16:
            raise ValueError(f"a tensor map cannot have the box {box} of shape {shape}")
        return cls(address, shape, strides, box, itemsize, _SWIZZLES[metadata["swizzle"]])


def swizzled(address: ndarray, width: int) -> ndarray:
    """Shared addresses under a swizzle of rows of `width` bytes: the number of a 16-byte chunk is xored with that of its row."""
    return address ^ (address >> 7 & width // _CHUNK - 1) << 4 if width else address


@lru_cache(maxsize=256)
def _chunks(box: tuple[int, ...], itemsize: int) -> ndarray:
    """(dimensions, n): where each 16-byte chunk of a box starts, in elements."""
    per_chunk = _CHUNK // itemsize
    index = np.indices((*box[:-1], box[-1] // per_chunk)).reshape(len(box), -1)
    index[-1] *= per_chunk
    return index


def copy(machine: "Machine", instruction: Instruction) -> Step:
    """cp.async.bulk.tensor: a box from global to shared memory, announced at an mbarrier, or back, in a bulk group.

    What lies outside the tensor reads as zeros and is not written.
    """
    loads = instruction.opcode.endswith("mbarrier::complete_tx::bytes")
    if loads:
        target, source, barrier = instruction.operands
        barrier_address = machine.address(barrier)
    else:
        source, target = instruction.operands
    if not isinstance(source, TensorAddress):
        raise PtxError("expected [map, {coordinates}]")
    shared_address, read_map = machine.address(target), machine.reader(source.map, "u64")
    coordinates = [machine.reader(item, "s32") for item in reversed(source.coordinates.items)]
    if len(coordinates) != int(instruction.parts[4][0]):
        raise PtxError("coordinates do not fit the dimensions")

    def step() -> None:
        lanes, at = machine.lanes(), shared_address()
        maps = np.unique(machine.pick(read_map()))
        if len(maps) != 1:
            raise PtxError(f"{instruction}: threads use different maps")
        found = machine.tensor_map(int(maps[0]))
        if (found.swizzle and (at % 128).any()) or (at % 16).any():
            machine.fault("misaligned shared access", f"a tensor copy at shared address {at[0]}")
        if len(found.box) != len(coordinates):
            raise PtxError(f"{instruction}: the map has {len(found.box)} dimensions")
        chunks = _chunks(found.box, found.itemsize)
        size = chunks.shape[1] * _CHUNK
        corner = np.stack([machine.pick(read()).astype(np.int64) for read in coordinates])
        place = corner[:, :, None] + chunks[:, None, :]  # (dimensions, lanes, chunks)
        shape, strides = np.array(found.shape), np.array(found.strides)
        inside = ((place[:-1] >= 0) & (place[:-1] < shape[:-1, None, None])).all(0)
        length = np.where(inside, np.clip((shape[-1] - place[-1]) * found.itemsize, 0, _CHUNK), 0)
        length = np.where(place[-1] < 0, 0, length)  # bytes of a chunk that are in the tensor
        if ((length % 4) != 0).any() or (corner[-1] * found.itemsize % _CHUNK != 0).any():
            raise PtxError(f"{instruction}: a tensor whose rows end within a word is not known")
        address = found.address + (place * strides[:, None, None]).sum(0) * found.itemsize
        machine.shared.locate(lanes, at, size if size % 16 == 0 else _CHUNK) if size <= 16 else _require_room(
            machine, at, size
        )
        relative = swizzled(at[:, None] + np.arange(chunks.shape[1]) * _CHUNK, found.swizzle)
        words = ((machine.shared.base[lanes, None] + (relative >> 2))[:, :, None] + np.arange(4)).reshape(
            len(lanes), -1
        )
        if machine.observer:
            machine.observer.tensor_copy(instruction, int(length.sum()))
        if loads:
            values = _read_global(machine, lanes, address, length, found.itemsize)
            missing = machine.shared.overwritten_unfenced(words, lanes)
            if missing:
                machine.fault("missing proxy fence", missing)
            machine.shared.begin_fill(lanes, words)
            machine.mbarriers.fill(lanes, barrier_address(), size, words, values.reshape(len(lanes), -1))
        else:
            missing = machine.shared.begin_borrow(words, lanes[:, None])
            if missing:
                machine.fault("missing proxy fence", missing)
            values = machine.shared.words[words].reshape(*length.shape, 4)
            _write_global(machine, lanes, address, length, values, found.itemsize)
            machine.bulk_copies.issue(lanes, lambda part: machine.shared.end_borrow(words[part], lanes[part][:, None]))

    return step


def _require_room(machine: "Machine", at: ndarray, size: int) -> None:
    if ((at < 0) | (at + size > machine.shared_bytes)).any():
        machine.fault("shared access out of bounds", f"a tensor copy of {size} bytes at {at.max()}")


def _rows(address: ndarray, length: ndarray, lanes: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Whole and partial chunks as words: their addresses, positions, and lanes."""
    word = np.arange(4)
    held = word * 4 < length[..., None]
    words = address[..., None] + word * 4
    who = np.broadcast_to(lanes[:, None, None], held.shape)
    return words[held], held, who[held]


def _read_global(machine: "Machine", lanes: ndarray, address: ndarray, length: ndarray, itemsize: int) -> ndarray:
    values = np.zeros((*length.shape, 4), np.uint32)
    full = length == _CHUNK
    who = np.broadcast_to(lanes[:, None], full.shape)[full]
    if full.any():
        found = machine.memory.load(machine.shared.stamps[who], address[full], 4, 4)
        values[full] = np.stack(found, 1)
    part = (length > 0) & ~full
    if part.any():
        who = np.broadcast_to(lanes[:, None], part.shape)[part]
        words, held, owners = _rows(address[part][:, None], length[part][:, None], who)
        (found,) = machine.memory.load(machine.shared.stamps[owners], words, 4, 1)
        partial = np.zeros(held.shape, np.uint32)
        partial[held] = found
        values[part] = partial[:, 0]
    return values


def _write_global(
    machine: "Machine", lanes: ndarray, address: ndarray, length: ndarray, values: ndarray, itemsize: int
) -> None:
    full = length == _CHUNK
    if full.any():
        who = np.broadcast_to(lanes[:, None], full.shape)[full]
        machine.memory.store(machine.shared.stamps[who], address[full], 4, list(values[full].T))
    part = (length > 0) & ~full
    if part.any():
        who = np.broadcast_to(lanes[:, None], part.shape)[part]
        words, held, owners = _rows(address[part][:, None], length[part][:, None], who)
        machine.memory.store(machine.shared.stamps[owners], words, 4, [values[part][:, None][held]])


def commit(machine: "Machine", instruction: Instruction) -> Step:
    return lambda: machine.bulk_copies.commit(machine.lanes())


def wait(machine: "Machine", instruction: Instruction) -> Step:
    allowed = instruction.operands[0].bits
    return lambda: machine.bulk_copies.wait(machine.lanes(), allowed)


BUILDERS = {
    **dict.fromkeys(
        expand("cp.async.bulk.tensor.{1,2,3,4,5}d.shared::{cluster,cta}.global.mbarrier::complete_tx::bytes"), copy
    ),
    **dict.fromkeys(expand("cp.async.bulk.tensor.{1,2,3,4,5}d.global.shared::cta.bulk_group"), copy),
    "cp.async.bulk.commit_group": commit,
    "cp.async.bulk.wait_group": wait,
    "cp.async.bulk.wait_group.read": wait,
}
