"""Tables of GEMM backends and tiles by architecture and shape; a lookup needs no GPU.

- cublas: cuBLAS's product, then a pointwise kernel.
- triton: one kernel over pointers, epilogue included.
- tma: the same over tensor descriptors, persistent; sm_90 and later.

cuBLAS's product is hard to beat, so a Triton kernel runs only where it was measured to be faster. The tiles rest on what
the compiler makes of them: no spills, matrix instructions at full rate, two blocks on a multiprocessor where that is possible, so
that one's epilogue runs under the other's product.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fastdeit.kernels.runtime.architecture import has_descriptors, pointer_stages

BACKENDS = ("cublas", "triton", "tma")

# What follows a product: the activation; that and the pre-activation; gamma, drop-path factor and residual; in backward the
# derivative of the activation with the bias gradient. And the activation in it that is compiled ahead of time and tuned.
EPILOGUES = {"activation": "gelu", "activation_z": "gelu", "residual": None, "derivative": "gelu"}


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int  # their quarters are what an epilogue works on
    depth: int = 64  # of K, in a step of the loop
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 2  # of the persistent kernel; as many as fit


@dataclass(frozen=True)
class Gemm:
    backend: str = "cublas"
    tile: Tile | None = None


@dataclass(frozen=True)
class Measured:
    """Products (M, K) x (K, N) with M in a range, whose fastest backend is known."""

    rows: range
    N: int
    K: int
    dtype: torch.dtype
    epilogue: str
    gemm: Gemm


CUBLAS = Gemm()

# Architecture -> what was measured to be faster than the library. Empty: nothing was measured.
GEMMS: dict[int, tuple[Measured, ...]] = {}

_POINTERS = (Tile(128, 128, depth=32), Tile(64, 128))
_WIDE = Tile(128, 256, num_warps=8, programs_per_sm=1)
_SQUARE = Tile(128, 128)
_NARROW = Tile(64, 128, num_stages=4)
_DESCRIPTORS = (_SQUARE, _WIDE, _NARROW)

_forced: Gemm | None = None


def candidates(arch: int, epilogue: str) -> tuple[Gemm, ...]:
    """Every kernel of ours that may be named in the table: what tuning tries and the compile gate holds."""
    if not has_descriptors(arch):
        return tuple(Gemm("triton", tile) for tile in _POINTERS)
    # The fp32 stream's staging leaves room for one block of 128 x 128; tcgen05's 128 x 128 spills 16 bytes in backward.
    left_out = epilogue == "residual" or (epilogue == "derivative" and arch >= 100)
    tiles = [tile for tile in _DESCRIPTORS if not (left_out and tile is _SQUARE)]
    pointers = replace(_POINTERS[1], num_stages=pointer_stages(arch, _POINTERS[1].num_stages))
    return (*(Gemm("tma", tile) for tile in tiles), Gemm("triton", pointers))


def select_gemm(
    M: int, N: int, K: int, dtype: torch.dtype, epilogue: str, arch: int, *, tuned_activation: bool = True
) -> Gemm:
    """The backend and tile for a product (M, K) x (K, N) of the given dtype with one of EPILOGUES behind it.

    Args:
        tuned_activation: it has the activation that EPILOGUES names, the only one that the table applies to.
    """
    if _forced is not None:
        return _forced_for(epilogue, arch)
    return _select(M, N, K, dtype, epilogue, arch) if tuned_activation else CUBLAS


@lru_cache(maxsize=1024)
def _select(M: int, N: int, K: int, dtype: torch.dtype, epilogue: str, arch: int) -> Gemm:
    for entry in GEMMS.get(arch, ()):
        if (N, K, dtype, epilogue) == (entry.N, entry.K, entry.dtype, entry.epilogue) and M in entry.rows:
            return entry.gemm
    return CUBLAS


def around(M: int) -> range:
    """The numbers of rows that a measurement at M speaks for."""
    return range(-(-M // 2), 2 * M)


@contextlib.contextmanager
def use_gemm(backend: str, tile: Tile | None = None) -> Iterator[None]:
    """Takes this backend for every product that it can do, in place of the table's: for tests and measurements.

    Args:
        backend: one of BACKENDS.
        tile: by default the first candidate of the architecture at hand.

    Raises:
        ValueError: another backend.
    """
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    previous, _forced = _forced, Gemm(backend, tile)
    try:
        yield
    finally:
        _forced = previous


def gemm_in_force() -> Gemm | None:
    """The choice that `use_gemm` sets instead of the table's; None outside of it."""
    return _forced


def _forced_for(epilogue: str, arch: int) -> Gemm:
    fitting = [gemm for gemm in candidates(arch, epilogue) if gemm.backend == _forced.backend]
    if not fitting:
        return CUBLAS
    return _forced if _forced.tile is not None else fitting[0]
