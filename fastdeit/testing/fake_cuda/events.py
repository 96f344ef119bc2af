"""What reached the fake device: for the process that `run_python` started.

Kinds of events are `launch` (kernels of PyTorch), `triton_launch`, `gemm`, copies, waits, allocations and more: see `kinds()`.
A replayed graph is one `graph_launch`; what a capture records is counted when it is captured.
"""

import builtins
import contextlib
import ctypes
import functools
import struct
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

WAITS = ("wait_stream", "wait_device", "wait_event", "wait_copy")
_TENSOR_MAP_MAGIC = 0x50414D524F534E54
_TORCH = str(Path(torch.__file__).parent)


class Event(NamedTuple):
    """One call as it reached the device."""

    kind: str
    name: str  # of the kernel, the GEMM with its sizes, or the text of an error
    device: int
    stream: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    bytes: int  # copied, set or allocated; shared memory of a launch
    arguments: tuple[builtins.bytes, ...]  # of a Triton launch, as the compiled kernel has them; a GEMM's matrices


class TensorMap(NamedTuple):
    """A tensor map as the driver was asked for it: dimensions outermost first, strides in bytes without the last."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


class Wait(NamedTuple):
    """A synchronisation, and where in Python it was asked for: the innermost frames outside of torch, innermost first."""

    call: str
    where: tuple[str, ...]


def kinds() -> tuple[str, ...]:
    """All kinds of events."""
    library = _library()
    names: list[str] = []
    while name := library.fake_cuda_kind(len(names)):
        names.append(name.decode())
    return tuple(names)


def counts() -> Counter:
    """{kind: events since the process began}."""
    library = _library()
    return Counter({kind: library.fake_cuda_count(i) for i, kind in enumerate(kinds())})


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Fills a Counter with the events inside a with statement, when it ends."""
    counter: Counter[str] = Counter()
    before = counts()
    try:
        yield counter
    finally:
        counter.update(counts() - before)


@contextlib.contextmanager
def record(*wanted: str) -> Iterator[list[Event]]:
    """Fills a list with the events of these kinds (all by default) inside a with statement, when it ends. Does not nest.

    Raises:
        ValueError: there is no such kind.
    """
    known = kinds()
    if unknown := set(wanted) - set(known):
        raise ValueError(f"no kind of event is called {sorted(unknown)}; there are {', '.join(known)}")
    library = _library()
    events: list[Event] = []
    library.fake_cuda_record(1)
    try:
        yield events
    finally:
        library.fake_cuda_record(0)
        everything = (_event(library.fake_cuda_event(i).contents, known) for i in range(library.fake_cuda_events()))
        events += [event for event in everything if not wanted or event.kind in wanted]


def recorded() -> int:
    """How many events, of all kinds, the list of the `record()` around will begin with if it goes on from here."""
    return _library().fake_cuda_events()


@contextlib.contextmanager
def observe_waits() -> Iterator[list[Wait]]:
    """Appends to a list each wait, and each error, inside a with statement. Does not nest."""
    waits, lock = [], threading.Lock()

    @_OBSERVER
    def observer(call: bytes) -> None:
        frames = traceback.extract_stack()[:-1]
        where = [f"{f.filename}:{f.lineno} in {f.name}" for f in reversed(frames) if not f.filename.startswith(_TORCH)]
        with lock:
            waits.append(Wait(call.decode(), tuple(where)))

    library = _library()
    library.fake_cuda_observe(observer)
    try:
        yield waits
    finally:
        library.fake_cuda_observe(_OBSERVER())


def errors() -> list[str]:
    """Messages of everything that was refused, or found to be missing from a capture, since the process began."""
    library = _library()
    return [library.fake_cuda_error(i).decode() for i in range(library.fake_cuda_errors())]


@contextlib.contextmanager
def moved_data() -> Iterator[None]:
    """Inside, copies to and on the device are performed, for code that reads back what it wrote, as DistributedDataParallel does.

    Afterwards all device memory is zeros again.
    """
    library = _library()
    library.fake_cuda_move_data(1)
    try:
        yield
    finally:
        library.fake_cuda_move_data(0)


@contextlib.contextmanager
def separate_memory() -> Iterator[None]:
    """Inside, each tensor that is made has memory of its own for good: none lies where another lay that was freed.

    So tensors can be told apart by their addresses. PyTorch's allocator hands its requests on, without a cache: its statistics
    do not count them.
    """
    library = _library()
    library.fake_cuda_separate_memory(1)
    torch.cuda.memory.caching_allocator_enable(False)
    try:
        yield
    finally:
        torch.cuda.memory.caching_allocator_enable(True)
        library.fake_cuda_separate_memory(0)


@contextlib.contextmanager
def without_pointer_checks() -> Iterator[None]:
    """Takes the checks of pointers out of launches and GEMMs, for measuring host time."""
    library = _library()
    library.fake_cuda_check_pointers(0)
    try:
        yield
    finally:
        library.fake_cuda_check_pointers(1)


def tensor_map(argument: bytes) -> TensorMap:
    """Reads an argument of a launch that is a tensor map.

    Raises:
        ValueError: it is something else.
    """
    magic, _, rank, address = struct.unpack_from("QIIQ", argument) if len(argument) == 128 else (0, 0, 0, 0)
    if magic != _TENSOR_MAP_MAGIC:
        raise ValueError(f"expected a tensor map, got {len(argument)} bytes: {argument[:16].hex()}...")
    shape, box = struct.unpack_from("5I", argument, 32), struct.unpack_from("5I", argument, 52)
    strides = struct.unpack_from("4Q", argument, 72)
    return TensorMap(address, shape[:rank][::-1], strides[: rank - 1][::-1], box[:rank][::-1])


class _Event(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int),
        ("device", ctypes.c_int),
        ("stream", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("bytes", ctypes.c_uint64),
        ("count", ctypes.c_int),
        ("size", ctypes.c_int * 64),
        ("arguments", ctypes.c_void_p),
    )


_OBSERVER = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.fake_cuda_kind.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            "libcuda.so.1 is not the fake CUDA runtime: start this process with fake_cuda.run_python"
        ) from error
    library.fake_cuda_error.restype = ctypes.c_char_p
    library.fake_cuda_count.restype = library.fake_cuda_events.restype = ctypes.c_long
    library.fake_cuda_errors.restype = ctypes.c_long
    library.fake_cuda_error.argtypes = library.fake_cuda_event.argtypes = (ctypes.c_long,)
    library.fake_cuda_event.restype = ctypes.POINTER(_Event)
    library.fake_cuda_observe.argtypes = (_OBSERVER,)
    return library


def _event(record: _Event, known: tuple[str, ...]) -> Event:
    data = ctypes.string_at(record.arguments, sum(record.size[: record.count])) if record.arguments else b""
    arguments = []
    for size in record.size[: record.count]:
        arguments.append(data[:size])
        data = data[size:]
    grid, block = tuple(record.grid), tuple(record.block)
    name = record.name.decode(errors="replace")
    return Event(known[record.kind], name, record.device, record.stream, grid, block, record.bytes, tuple(arguments))
