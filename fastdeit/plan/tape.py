"""What a run of ops does on the device, recorded as it happens: launches, matrix products, and the memory that each touches.

The recording sees every operation of PyTorch's below autograd and autocast, and every launch of a kernel. What it does not know how
to repeat makes it useless (`Tape.refused`) and changes nothing of the run.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdeit.kernels.runtime.observer import LaunchObserver

_ALLOCATIONS = {f"aten::{name}" for name in ("empty.memory_format", "empty_strided", "new_empty", "new_empty_strided")}
_ALLOCATIONS |= {"aten::empty_like"}
# Operations made up of others that do the same whether something looks on or not. Others, such as linear, may not.
_COMPOSITES = {
    f"aten::{name}" for name in ("reshape", "contiguous", "to.dtype", "to.dtype_layout", "flatten.using_ints")
}
_COMPOSITES |= {f"aten::{name}" for name in ("unflatten.int", "split.sizes", "view_as", "promote_types")}
# Operations that are repeated, by how: `code` writes them. Each makes one tensor, or writes to its first argument.
REPEATED = {
    "aten::mm": "mm",
    "aten::mm.dtype": "mm",
    "aten::addmm": "addmm",
    "aten::_to_copy": "copy_",
    "aten::clone": "copy_",
    "aten::copy_": "copy_",
}


class Buffer:
    """A piece of device memory that a recording touches: the storage of a parameter, an input, or one that was made on the way."""

    __slots__ = ("address", "input", "nbytes")

    def __init__(self, nbytes: int, address: int | None = None, input: int | None = None) -> None:
        self.nbytes = nbytes
        self.address = address  # of a parameter's storage, which stays where it is
        self.input = input  # which input it is, None for others


class View(NamedTuple):
    """A tensor's place: bytes from the start of its buffer (an input's own first element), and how it lies there."""

    buffer: Buffer
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Descriptor(NamedTuple):
    """A tensor descriptor over a view. What its blocks are is part of the compiled kernel."""

    view: View
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Launch(NamedTuple):
    """A kernel launch; tensors and descriptors among its arguments are `View` and `Descriptor`."""

    made: Any  # launch.DirectLaunch without its tensors
    args: tuple


class Operation(NamedTuple):
    """One of REPEATED: "mm" (a, b), "addmm" (bias, a, b) or "copy_" (source), into `out`."""

    kind: str
    args: tuple[View, ...]
    out: View
    out_dtype: torch.dtype | None  # of "mm", where the call named it


class _Kind(NamedTuple):
    """Of an operation: its name, whether others make it up, and whether it writes to an argument."""

    name: str
    composite: bool
    writes: bool


@functools.cache
def _kind(func: Any) -> _Kind:
    return _Kind(func.name(), func._can_decompose(), func._schema.is_mutable)


class Tape(LaunchObserver):
    """Records inside a with statement, in one thread, on one stream, below autograd, so that composite operations are seen as such.

    Args:
        parameters: tensors whose memory stays where it is.
        inputs: tensors that are others at each call, of the same shape, strides, dtype and alignment.

    Attributes:
        events: launches and operations in their order.
        refused: why the recording cannot be repeated, None if it can.
    """

    def __init__(self, parameters: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.events: list[Launch | Operation] = []
        self.refused: str | None = None
        self._buffers: dict[int, Buffer] = {}  # by the address of the storage that lives there now
        self._starts: dict[Buffer, int] = {}  # what offsets count from
        for tensor in parameters:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in self._buffers:
                self._add(address, Buffer(storage.nbytes(), address=address))
        self._input_dtypes = [tensor.dtype for tensor in inputs]
        for i, tensor in enumerate(inputs):
            address = tensor.untyped_storage().data_ptr()
            if address in self._buffers:
                self.refuse("an input shares the memory of a parameter or of another input")
            self._add(address, Buffer(0, input=i), tensor.data_ptr())

    def _add(self, address: int, buffer: Buffer, start: int | None = None) -> None:
        self._buffers[address] = buffer
        self._starts[buffer] = address if start is None else start

    def refuse(self, reason: str) -> None:
        """Makes the recording useless for this reason, unless another came first."""
        self.refused = self.refused or reason

    def view(self, tensor: Tensor) -> View:
        """Where a tensor lies, of all that the recording has seen and that still is."""
        storage = tensor.untyped_storage().data_ptr()
        buffer = self._buffers.get(storage)
        if buffer is None or not storage:
            self.refuse("a tensor comes from elsewhere")
            buffer = Buffer(0)
            self._add(storage, buffer)
        if buffer.input is not None and tensor.dtype != self._input_dtypes[buffer.input]:
            self.refuse("an input is read in another dtype")
        offset = tensor.data_ptr() - self._starts[buffer]
        return View(buffer, offset, tensor.dtype, tuple(tensor.shape), tensor.stride())

    # ---- launches

    def launched(self, launch: Any) -> None:
        args = tuple(map(self._argument, launch.args))
        self.events.append(Launch(launch._replace(args=()), args))

    def launched_publicly(self) -> None:
        self.refuse("a kernel was launched by Triton's public interface")

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self.view(arg)
        if hasattr(arg, "block_shape"):
            if arg.padding != "zero":
                self.refuse("a tensor descriptor pads with NaN")
            return Descriptor(self.view(arg.base), tuple(arg.shape), tuple(arg.strides))
        return arg

    # ---- PyTorch's operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = _kind(func)
        if kind.composite and kind.name in _COMPOSITES and self.refused is None:
            with self:
                return func.decompose(*args, **kwargs)
        if kind.composite:
            self.refuse(f"{kind.name} is called")
        result = func(*args, **kwargs)
        if self.refused is None:
            self._note(kind, args, kwargs, result)
        return result

    def _note(self, kind: "_Kind", args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        name = kind.name
        results = result if isinstance(result, (tuple, list)) else (result,)
        if not all(isinstance(made, Tensor) and made.is_cuda and made.layout is torch.strided for made in results):
            self.refuse(f"{name} is called")
        elif name in _ALLOCATIONS:
            self._make(result)
        elif name in REPEATED:
            self._repeat(kind, args, kwargs, result)
        elif kind.writes or not _only_views(args, results):
            self.refuse(f"{name} is called")

    def _make(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._add(storage.data_ptr(), Buffer(storage.nbytes()))

    def _repeat(self, kind_of: "_Kind", args: tuple, kwargs: dict[str, Any], result: Tensor) -> None:
        name, kind, out_dtype = kind_of.name, REPEATED[kind_of.name], None
        if name == "aten::mm.dtype":
            args, out_dtype = args[:2], args[2]
        if kind == "copy_":
            args = args[1:] if name == "aten::copy_" else args
            written = isinstance(args[0], Tensor) and args[0].is_cuda and not args[0].is_neg()
            if not written or len(args) > 1 + (len(args) == 2 and args[1] is False):
                self.refuse(f"{name} is called with {args[1:]}")
                return
            args = args[:1]
        elif kwargs or not all(isinstance(arg, Tensor) and arg.is_cuda for arg in args):  # such as beta
            self.refuse(f"{name} is called with {', '.join(kwargs) or 'numbers'}")
            return
        read = tuple(map(self.view, args))
        if not kind_of.writes:
            self._make(result)
        self.events.append(Operation(kind, read, self.view(result), out_dtype))


def _only_views(args: tuple, results: Sequence[Tensor]) -> bool:
    """Whether all results are in the memory of the first argument."""
    if not args or not isinstance(args[0], Tensor):
        return False
    storage = args[0].untyped_storage().data_ptr()
    return all(made.untyped_storage().data_ptr() == storage for made in results)
