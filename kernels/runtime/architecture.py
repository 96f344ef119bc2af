"""A GPU's architecture number and hardware limits, as far as the kernels depend on them. They are defined only here."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

# Architecture and multiprocessors that stand in for the device of CPU tensors, which only the interpreter, launch tests and the
# PTX machine use: an H100's.
_nominal = 90, 132


@contextlib.contextmanager
def nominal_device(arch: int, multiprocessors: int | None = None) -> Iterator[None]:
    """Inside, kernels for CPU tensors are chosen as on this architecture, such as 80, by default with as many multiprocessors."""
    global _nominal
    previous, _nominal = _nominal, (arch, multiprocessors or _nominal[1])
    try:
        yield
    finally:
        _nominal = previous


@dataclass(frozen=True)
class Limits:
    """Limits of one streaming multiprocessor (CUDA C++ Programming Guide, table of technical specifications).

    shared_per_block, shared_per_sm in bytes; a block also pays 1 KB of shared memory that the driver reserves.
    """

    name: str
    shared_per_block: int
    shared_per_sm: int
    registers_per_sm: int = 65536
    threads_per_sm: int = 2048
    blocks_per_sm: int = 32


LIMITS = {
    80: Limits("sm_80", shared_per_block=163 * 1024, shared_per_sm=164 * 1024),
    86: Limits("sm_86", shared_per_block=99 * 1024, shared_per_sm=100 * 1024, threads_per_sm=1536, blocks_per_sm=16),
    89: Limits("sm_89", shared_per_block=99 * 1024, shared_per_sm=100 * 1024, threads_per_sm=1536, blocks_per_sm=24),
    90: Limits("sm_90", shared_per_block=227 * 1024, shared_per_sm=228 * 1024),
    100: Limits("sm_100", shared_per_block=227 * 1024, shared_per_sm=228 * 1024),
    120: Limits("sm_120", shared_per_block=99 * 1024, shared_per_sm=100 * 1024, threads_per_sm=1536, blocks_per_sm=24),
}


def has_descriptors(arch: int) -> bool:
    """Where tensor descriptors are hardware and products read shared memory. Elsewhere they become int64 pointer arithmetic, and
    spill."""
    return 90 <= arch < 120


@lru_cache
def triton_version() -> tuple[int, ...]:
    """Triton's version as three integers, such as (3, 6, 0)."""
    import triton

    return tuple(map(int, triton.__version__.split("+")[0].split(".")[:3]))


# Triton up to 3.7.0 leaves out `fence.proxy.async` between an asynchronous copy to shared memory and the wgmma that reads it: by
# PTX's memory model wgmma may read what was there before.
def _copies_are_fenced() -> bool:
    return triton_version() >= (3, 7, 1)


def pointer_stages(arch: int, num_stages: int) -> int:
    """The stages of a loop that feeds wgmma from loads over pointers: 1, no asynchronous copies, where those are not fenced."""
    return num_stages if arch != 90 or _copies_are_fenced() else 1


@lru_cache
def _capability(device_index: int) -> int:
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@lru_cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def architecture(x: torch.Tensor) -> int:
    """The compute capability of x's device as one number, such as 90; that of `nominal_device` for a CPU tensor."""
    return _capability(x.get_device()) if x.is_cuda else _nominal[0]


def multiprocessors(x: torch.Tensor) -> int:
    """The number of streaming multiprocessors of x's device; those of `nominal_device` for a CPU tensor."""
    return _multiprocessors(x.get_device()) if x.is_cuda else _nominal[1]
