"""Records what a run of ops does on the device: launches, GEMMs, and the memory that each touches.

The recording sees every PyTorch operation below autograd and autocast, and every launch of a kernel. An operation that it cannot
repeat makes the recording unusable (`Tape.refused`) and leaves the run unchanged.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastdeit.kernels.runtime.observer import LaunchObserver

_ALLOCATIONS = {f"aten::{name}" for name in ("empty.memory_format", "empty_strided", "new_empty", "new_empty_strided")}
_ALLOCATIONS |= {"aten::empty_like"}
# Operations made up of others that do the same whether something looks on or not. Others, such as linear, may not.
_COMPOSITES = {
    f"aten::{name}" for name in ("reshape", "contiguous", "to.dtype", "to.dtype_layout", "flatten.using_ints")
}
_COMPOSITES |= {f"aten::{name}" for name in ("unflatten.int", "split.sizes", "view_as", "promote_types", "argsort")}
# Operations that are repeated, by how: `code` writes them. Each makes one tensor, or writes to its first argument.
_COPIES = {"aten::_to_copy", "aten::clone", "aten::copy_"}
_PRODUCTS = {"aten::mm", "aten::mm.dtype", "aten::addmm"}
_FUNCTIONS = {  # with what may be said of them by keyword
    "aten::mm": ("mm", ()),
    "aten::addmm": ("addmm", ()),
    "aten::add.Tensor": ("add", ()),
    "aten::div.Tensor": ("div", ()),
    "aten::cat": ("cat", ()),
    "aten::stack": ("stack", ()),
    "aten::sum.dim_IntList": ("sum", ("dtype",)),
    "aten::mul.Tensor": ("mul", ()),
    "aten::sort": ("sort", ()),
    "aten::index_select": ("index_select", ()),
    "aten::index_add": ("index_add", ()),
    "aten::index_copy": ("index_copy", ()),
}
# Allocations that are filled, by the method that fills them, with the argument that says by what.
_FILLED = {"aten::rand": ("uniform_", None), "aten::new_full": ("fill_", 2), "aten::new_zeros": ("zero_", None)}
_METHODS = {
    "aten::add_.Tensor": "add_",
    "aten::mul_.Tensor": "mul_",
    "aten::div_.Tensor": "div_",
    "aten::floor_": "floor_",
    "aten::zero_": "zero_",
    "aten::bernoulli_.float": "bernoulli_",
}


_expired = torch.UntypedStorage._expired  # what StorageWeakRef.expired calls in the end

_NUMBERS = {int, float, bool, type(None)}  # and what stands in the place of a pointer that is not given


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


class Launch:
    """A kernel launch.

    Args:
        made: launch.DirectLaunch without its tensors.
        args: of it. Tensors and descriptors among them are `View` and `Descriptor`.

    Attributes:
        buffers: all that it reads or writes.
    """

    __slots__ = ("args", "buffers", "made")

    def __init__(self, made: Any, args: tuple) -> None:
        self.made, self.args = made, args
        self.buffers = tuple(dict.fromkeys(_buffers_of(args)))


class Operation:
    """A function of torch's into `out`, one tensor or several, or a method of it that writes to it, whose name ends in `_`.

    Args:
        args: views, tuples of views, numbers.

    Attributes:
        buffers: all that it reads or writes.
    """

    __slots__ = ("args", "buffers", "kind", "options", "out")

    def __init__(
        self, kind: str, args: tuple, out: View | tuple[View, ...], options: tuple[tuple[str, Any], ...] = ()
    ) -> None:
        self.kind, self.args, self.out, self.options = kind, args, out, options
        self.buffers = tuple(dict.fromkeys(_buffers_of((*args, out))))


def _buffers_of(args: tuple) -> Iterator[Buffer]:
    for arg in args:
        kind = type(arg)
        if kind is View:
            yield arg.buffer
        elif kind is Descriptor:
            yield arg.view.buffer
        elif kind is tuple:
            yield from _buffers_of(arg)


class _Kind(NamedTuple):
    """Facts about an operation: its name, whether it is composed of other operations, whether it writes to an argument, and whether
    it gives views alone."""

    name: str
    composite: bool
    writes: bool
    views: bool


_kinds: dict[int, tuple[Any, _Kind]] = {}  # by id: an operation computes its hash in Python


def _kind(func: Any) -> _Kind:
    if (known := _kinds.get(id(func))) is None:
        kind = _Kind(func.name(), func._can_decompose(), func._schema.is_mutable, func.is_view)
        known = _kinds[id(func)] = func, kind
    return known[1]


def _untraced(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method under which `sys.settrace`'s function is not called, which takes microseconds: it has nothing to look for in the
    recording's own code, or in an operation below autograd."""

    @functools.wraps(method)
    def called(*args: Any) -> Any:
        trace = sys.gettrace()
        if trace is None:
            return method(*args)
        sys.settrace(None)
        try:
            return method(*args)
        finally:
            sys.settrace(trace)

    return called


class Tape(LaunchObserver):
    """Records inside a with statement, in one thread, on one stream: below autograd, so that composite operations are seen as such,
    or what autograd runs of our ops, forward and, in a with statement of its own, backward.

    Args:
        parameters: tensors whose memory stays where it is.
        inputs: tensors that are others at each call, of the same shape, strides, dtype and alignment.
        differentiated: autograd is recorded too.

    Attributes:
        events: launches and operations in their order.
        refused: why the recording cannot be repeated, None if it can.
        compiled: a kernel was launched that was not compiled before, so that another recording may be one that can.
    """

    def __init__(self, parameters: Sequence[Tensor], inputs: Sequence[Tensor], differentiated: bool = False) -> None:
        super().__init__()
        self._differentiated = differentiated
        self.events: list[Launch | Operation] = []
        self.refused: str | None = None
        self.compiled = False
        self._buffers: dict[int, Buffer] = {}  # by the address of the storage that lives there now
        self._starts: dict[Buffer, int] = {}  # what offsets count from
        self._storages: dict[Buffer, StorageWeakRef] = {}  # of all but parameters
        self._input_dtypes: list[torch.dtype] = []
        for tensor in parameters:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in self._buffers:
                self._add(address, Buffer(storage.nbytes(), address=address))
        self.receive(inputs)

    def receive(self, inputs: Sequence[Tensor]) -> list[Buffer]:
        """Makes more tensors inputs, such as the gradients with which a backward pass begins."""
        received = []
        for tensor in inputs:
            address = tensor.untyped_storage().data_ptr()
            if (known := self._buffers.get(address)) is not None and self._lives(known):
                self.refuse("an input shares the memory of a parameter or of another input")
            received.append(Buffer(0, input=len(self._input_dtypes)))
            self._input_dtypes.append(tensor.dtype)
            self._add(address, received[-1], tensor.data_ptr())
            self._storages[received[-1]] = StorageWeakRef(tensor.untyped_storage())
        return received

    def _lives(self, buffer: Buffer) -> bool:
        storage = self._storages.get(buffer)
        return storage is None or not _expired(storage.cdata)

    def _add(self, address: int, buffer: Buffer, start: int | None = None) -> None:
        self._buffers[address] = buffer
        self._starts[buffer] = address if start is None else start

    def refuse(self, reason: str) -> None:
        """Makes the recording useless for this reason, unless another came first."""
        self.refused = self.refused or reason

    def view(self, tensor: Tensor) -> View:
        """Where a tensor lies, of all that the recording has seen and that still is."""
        address, dtype = tensor.data_ptr(), tensor.dtype
        storage = address - int(tensor.storage_offset()) * dtype.itemsize
        buffer = self._buffers.get(storage)
        if buffer is None or not address or not self._lives(buffer):
            self.refuse("a tensor comes from elsewhere")
            buffer = Buffer(0)
            self._add(storage, buffer)
        if buffer.input is not None and dtype != self._input_dtypes[buffer.input]:
            self.refuse("an input is read in another dtype")
        return View(buffer, address - self._starts[buffer], dtype, tuple(tensor.shape), tensor.stride())

    # ---- launches

    @_untraced
    def launched(self, launch: Any) -> None:
        from fastdeit.kernels.runtime.raw_launch import raw_launcher

        if raw_launcher(launch) is None:
            self.refuse(f"{launch.kernel.__name__} needs memory of its own")
        args = tuple(arg if type(arg) in _NUMBERS else self._argument(arg) for arg in launch.args)
        self.events.append(Launch(launch._replace(args=()), args))

    def launched_publicly(self) -> None:
        self.compiled = True
        self.refuse("a kernel was launched by Triton's public interface")

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self.view(arg)
        if hasattr(arg, "block_shape"):
            if arg.padding != "zero" or getattr(arg, "round_f32_to_tf32", False):  # the latter since Triton 3.7
                self.refuse("a tensor descriptor pads with NaN or rounds to TF32")
            return Descriptor(self.view(arg.base), tuple(arg.shape), tuple(arg.strides))
        return arg

    # ---- PyTorch's operations

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is recorded inside a compiler, and its guard takes as long as all the rest

    @_untraced
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
        if kind.views and isinstance(result, Tensor) and result.is_cuda and result.layout is torch.strided:
            return
        results = result if isinstance(result, (tuple, list)) else (result,)
        if not all(isinstance(made, Tensor) and made.is_cuda and made.layout is torch.strided for made in results):
            self.refuse(f"{name} is called")
        elif name in _ALLOCATIONS:
            self._make(result)
        elif name in _FILLED:
            method, position = _FILLED[name]
            self._make(result)
            self.events.append(Operation(method, () if position is None else (args[position],), self.view(result)))
        elif name in _COPIES:
            self._copy(kind, args, result)
        elif name == "aten::slice_backward":
            self._slice_backward(args, result)
        elif name in _FUNCTIONS or name in _METHODS or name == "aten::mm.dtype":
            self._repeat(kind, args, kwargs, result)
        elif kind.writes or not _only_views(args, results):
            self.refuse(f"{name} is called")

    def _make(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        buffer = Buffer(storage.nbytes())
        self._add(storage.data_ptr(), buffer)
        self._storages[buffer] = StorageWeakRef(storage)

    def _copy(self, kind: "_Kind", args: tuple, result: Tensor) -> None:
        args = args[1:] if kind.name == "aten::copy_" else args
        if not _is_plain(args[0]) or len(args) > 1 + (len(args) == 2 and args[1] is False):
            self.refuse(f"{kind.name} is called with {args[1:]}")
            return
        read = self.view(args[0])
        if not kind.writes:
            self._make(result)
        self.events.append(Operation("copy_", (read,), self.view(result)))

    def _slice_backward(self, args: tuple, result: Tensor) -> None:
        """Zeros with the slice's gradient in its place."""
        gradient, _, *where = args
        read = self.view(gradient)
        self._make(result)
        self.events.append(Operation("zero_", (), self.view(result)))
        self.events.append(Operation("copy_", (read,), self.view(torch.ops.aten.slice.Tensor(result, *where))))

    def _repeat(self, kind: "_Kind", args: tuple, kwargs: dict[str, Any], result: Tensor) -> None:
        name = kind.name
        if self._differentiated and name in _PRODUCTS and torch.is_grad_enabled() and _any_learned(args):
            self.refuse(
                "a matrix product outside of our ops"
            )  # what it is part of may depend on whether something looks on
            return
        if name == "aten::mm.dtype":
            allowed: tuple[str, ...]
            repeated, allowed, args, kwargs = "mm", ("out_dtype",), args[:2], {"out_dtype": args[2]}
        elif kind.writes:
            repeated, allowed, args = _METHODS[name], (), args[1:]
        else:
            repeated, allowed = _FUNCTIONS[name]
        if not set(kwargs) <= set(allowed) or not all(map(_is_understood, args)):  # such as beta
            self.refuse(f"{name} is called with {', '.join(kwargs) or 'numbers'}")
            return
        read = tuple(map(self._read, args))
        results = result if isinstance(result, tuple) else (result,)
        for made in () if kind.writes else results:
            self._make(made)
        views = tuple(map(self.view, results))
        self.events.append(Operation(repeated, read, views if len(views) > 1 else views[0], tuple(kwargs.items())))

    def _read(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self.view(arg)
        return tuple(map(self._read, arg)) if isinstance(arg, (list, tuple)) else arg


def _any_learned(args: tuple) -> bool:
    return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def _is_plain(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_cuda and not tensor.is_neg()


def _is_understood(arg: Any) -> bool:
    if isinstance(arg, (list, tuple)):
        return all(map(_is_understood, arg))
    return isinstance(arg, (bool, int, float)) or _is_plain(arg)


def _only_views(args: tuple, results: Sequence[Tensor]) -> bool:
    """Whether all results are in the memory of the first argument."""
    if not args or not isinstance(args[0], Tensor):
        return False
    storage = args[0].untyped_storage().data_ptr()
    return all(made.untyped_storage().data_ptr() == storage for made in results)
