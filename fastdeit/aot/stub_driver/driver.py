"""Triton's real launch path on a machine without a GPU, over a stand-in for the CUDA driver.

The parent process builds the stand-in with the system's C compiler and starts a child that finds it in place of libcuda
(`run_python`); the child calls `activate` and launches kernels with CPU tensors. Nothing is computed: what shows is whether a
launch is accepted, what arrives at the driver (`record`), and what it costs the host.
"""

import contextlib
import ctypes
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

_SOURCE = Path(__file__).with_name("stub_libcuda.c")
_CUDA_HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
_IMPORTED_FROM = Path(__file__).absolute().parents[3]  # so that the child imports the same fastdeit
_TENSOR_MAP_MAGIC = 0x50414D524F534E54
_MAX_RECORDS = 256


# ---- in the parent


def why_unavailable() -> str | None:
    """None when the stand-in can be built here, else what is missing. Triton itself needs the compiler and Python's headers."""
    if _compiler() is None:
        return "no C compiler (gcc or clang)"
    if not (_CUDA_HEADERS / "cuda.h").exists():
        return "Triton came without cuda.h"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's C headers are not installed"
    return None


def run_python(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    """Runs `python *arguments` with the stand-in as its CUDA driver and kernels compiled, not interpreted.

    Raises:
        OSError: the stand-in cannot be built here.
    """
    if reason := why_unavailable():
        raise OSError(f"launching without a GPU is not possible here: {reason}")
    with tempfile.TemporaryDirectory() as directory:
        library = str(Path(directory) / "libcuda.so.1")
        headers = f"-I{_CUDA_HEADERS}"
        flags = ("-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
        subprocess.run([_compiler(), *flags, headers, str(_SOURCE), "-o", library], check=True)
        return subprocess.run(
            [sys.executable, *arguments],
            env={
                **os.environ,
                "LD_LIBRARY_PATH": f"{directory}:{os.environ.get('LD_LIBRARY_PATH', '')}",
                "PYTHONPATH": f"{_IMPORTED_FROM}:{os.environ.get('PYTHONPATH', '')}",
                "TRITON_LIBCUDA_PATH": directory,
                "TRITON_INTERPRET": "0",
                "CUDA_VISIBLE_DEVICES": "",
            },
            capture_output=True,
            text=True,
            timeout=timeout,
        )


def _compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("clang")


# ---- in the child


class Launch(NamedTuple):
    """One launch as it reached the driver."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    arguments: tuple[bytes, ...]  # in the order of the compiled kernel's parameters


class TensorMap(NamedTuple):
    """A tensor map as the driver was asked for it: dimensions outermost first, strides in bytes without the last."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


def activate() -> None:
    """Makes the stand-in's device, an H100, Triton's current one.

    Raises:
        RuntimeError: the process was not started by `run_python`.
    """
    from triton.backends.nvidia.driver import CudaDriver

    if not hasattr(_library(), "stub_record"):
        raise RuntimeError("libcuda.so.1 is not the stand-in: start this process with run_python")

    class StubDriver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.device = 0
            self.get_current_device = lambda: self.device
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: (9, 0)

    triton.runtime.driver.set_active(StubDriver())


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Fills a list with the launches of a with statement when it ends, at most 256."""
    library, launches = _library(), []
    library.stub_record(1)
    try:
        yield launches
    finally:
        count = library.stub_recorded()
        launches += [_launch(library, i) for i in range(min(count, _MAX_RECORDS))]
        library.stub_record(0)


def tensor_map(argument: bytes) -> TensorMap:
    """Reads an argument that is a tensor map.

    Raises:
        ValueError: it is something else.
    """
    magic, address, _, rank = struct.unpack_from("QQII", argument) if len(argument) == 128 else (0, 0, 0, 0)
    if magic != _TENSOR_MAP_MAGIC:
        raise ValueError(f"expected a tensor map, got {len(argument)} bytes: {argument[:16].hex()}...")
    shape, box = struct.unpack_from("5I", argument, 32), struct.unpack_from("5I", argument, 52)
    strides = struct.unpack_from("4Q", argument, 72)
    return TensorMap(address, shape[:rank][::-1], strides[: rank - 1][::-1], box[:rank][::-1])


class _Record(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 256),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("count", ctypes.c_int),
        ("size", ctypes.c_int * 64),
        ("bytes", ctypes.c_ubyte * 4096),
    )


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    if hasattr(library, "stub_launch"):
        library.stub_launch.restype = ctypes.POINTER(_Record)
    return library


def _launch(library: ctypes.CDLL, index: int) -> Launch:
    record = library.stub_launch(index).contents
    data, arguments = bytes(record.bytes), []
    for size in record.size[: record.count]:
        arguments.append(data[:size])
        data = data[size:]
    name, grid, block = record.name.decode(), tuple(record.grid), tuple(record.block)
    return Launch(name, grid, block, record.shared, record.stream, tuple(arguments))
