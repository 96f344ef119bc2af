"""Recorded events as straight-line code: `launcher(*constants, pointer, *constants)`, and GEMMs into existing tensors.

The code is compiled once, when it is first bound, so that a recording does not wait for it. It is bound to an address of the
workspace by the values of its constants.
"""

import builtins
import functools
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch._C import _dynamo

from fastdeit.plan.tape import Buffer, Descriptor, Launch, Operation, View
from fastdeit.plan.workspace import aligned, bytes_at, tensor_at, view_of, views_of

_guards: Any = _dynamo.guards  # whose types name some of it
# Of torch, which take `out`.
FUNCTIONS = (
    "mm",
    "addmm",
    "add",
    "mul",
    "div",
    "cat",
    "stack",
    "sum",
    "sort",
    "index_select",
    "index_add",
    "index_copy",
)


class Unsupported(Exception):
    """Recorded events that cannot be written as code; the text says why."""


def why_not_output(view: View, tensor: torch.Tensor) -> str | None:
    """Why a program cannot make a tensor, seen as view, anew at each call: it is in memory that is not its alone."""
    if view.buffer.input is not None or view.buffer.address is not None:
        return "the output is in the memory of an input or a parameter"
    if view.offset or not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
        return "the output shares its memory"
    return None


def why_not_gradients(views: Sequence[View | None], tensors: Sequence[torch.Tensor | None]) -> str | None:
    """Why a program cannot make gradients, seen as these views, anew: as `why_not_output`, but several may be parts of one buffer,
    as those of weights that were concatenated are."""
    parts: dict[Buffer, set[tuple[int, int, torch.dtype]]] = {}
    for view, tensor in zip(views, tensors, strict=True):
        if view is None or tensor is None or why_not_output(view, tensor) is None:
            continue
        if view.buffer.input is not None or view.buffer.address is not None or not tensor.is_contiguous():
            return why_not_output(view, tensor)
        parts.setdefault(view.buffer, set()).add((view.offset, view.offset + tensor.nbytes, view.dtype))
    for found in parts.values():
        ordered = sorted(found, key=lambda part: part[:2])
        if any(end > start or dtype is not other for (_, end, dtype), (start, _, other) in itertools.pairwise(ordered)):
            return "the output shares its memory"
    return None


class Place(NamedTuple):
    """Where a buffer, or what a pointer points to, lies in the workspaces of a program."""

    workspace: int
    offset: int  # bytes from its start


class _TensorMap(NamedTuple):
    """A tensor descriptor of memory at an offset of a workspace, or at the address `offset` outside all workspaces."""

    place: Place
    descriptor: Descriptor
    like: Any


_STREAM = object()  # among the arguments of a launch: where it goes, which is known when the code is bound


class _TensorAt(NamedTuple):
    """A tensor in a workspace."""

    place: Place
    view: View


class _Made(NamedTuple):
    """One of the two above, by its number in its workspace: made once for each address of the workspace."""

    workspace: int
    number: int


_NOWHERE = -1  # in the place of a workspace, for what lies in the memory of parameters
MOST_ADDRESSES = 8  # of a workspace, the last used, of which tensors and descriptors are kept


class Program:
    """Code for a function of the inputs' tensors that returns the outputs, bound to one address of each workspace at a time.

    Args:
        events: in their order.
        places: of the buffers in the workspaces.
        inputs: buffers of tensors that each call is given; None for one that is not read.
        outputs: contiguous views that fill their buffers, or parts of one that do not overlap; each call makes the buffers anew. A
            view may come twice; None gives None.
        device: of everything.
        gives_back: each workspace is given back when its last event has been launched. The function then takes a list of their
            tensors before the inputs, which have no other owner.

    Raises:
        Unsupported: events cannot be written as code.
    """

    def __init__(
        self,
        events: Sequence[Launch | Operation],
        places: Mapping[Buffer, Place],
        inputs: Sequence[Buffer | None],
        outputs: Sequence[View | None],
        device: torch.device,
        gives_back: bool = False,
    ) -> None:
        self._places, self._device = places, device
        self._stream = torch._C._cuda_getCurrentRawStream(device.index)
        self._sizes: dict[int, int] = {}  # of what the places take in each workspace
        for buffer, (workspace, offset) in places.items():
            self._sizes[workspace] = max(self._sizes.get(workspace, 0), offset + aligned(buffer))
        self._inputs = {buffer: f"in{i}" for i, buffer in enumerate(inputs) if buffer is not None}
        made: dict[Buffer, set[View]] = {}
        for view in filter(None, outputs):
            made.setdefault(view.buffer, set()).add(view)
        self._outputs = {buffer: f"out{i}" for i, buffer in enumerate(made)}
        self._whole = {buffer: _whole_of(buffer, views) for buffer, views in made.items()}
        if any(
            (len(views) > 1 and self._whole[buffer] in views) or buffer in self._inputs
            for buffer, views in made.items()
        ):
            raise Unsupported("an output shares its memory")
        self._unmade = dict(self._whole)  # outputs that no line makes yet
        self._constants: dict[str, Any] = {}  # values by name
        self._unbound: dict[str, Any] = {}  # by name what becomes one by `_value`
        self._parts: dict[int, list[_TensorMap | _TensorAt]] = {}  # by workspace
        self._made: dict[int, OrderedDict[int, list[Any]]] = {}  # what they are, by workspace and its address
        self._number = itertools.count()
        self._pointers: dict[str, str] = {}  # tensors of the call whose address the code has asked for
        self._lines: list[str] = []
        unused = self._last_uses(events) if gives_back else {}
        for at, event in enumerate(events):
            if isinstance(event, Launch):
                self._launch(event)
            else:
                self._operation(event)
            self._lines += [f"workspaces[{workspace}] = None" for workspace in unused.get(at, ())]
        for view in list(self._unmade.values()):
            self._of_the_call(view)
        self._result = "".join(f"{None if view is None else self._tensor(view)}, " for view in outputs)
        self._arguments = [*(["workspaces"] if gives_back else []), *(f"in{i}" for i in range(len(inputs)))]

    def bind(
        self, *bases: int, output: torch.Tensor | None = None, stream: int | None = None
    ) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The function for workspaces at these addresses. While it runs the caller holds them.

        Args:
            output: what the function writes and returns, the only output; by default new tensors at each call.
            stream: that it launches kernels on, as an integer; by default that of the recording. GEMMs are on that of the call.
        """
        from fastdeit.kernels.runtime.launch import bind_context

        bind_context(self._device.index)
        with torch.inference_mode(False), torch.no_grad():  # tensors that may be written to in either mode
            made = {at: self._parts_at(at, base) for at, base in ((_NOWHERE, 0), *enumerate(bases))}
        stream = self._stream if stream is None else stream
        values = {name: self._value(value, bases, made, stream) for name, value in self._unbound.items()}
        functions: dict[str, Any] = {name: getattr(torch, name) for name in FUNCTIONS}
        functions["__builtins__"] = builtins  # PyTorch imports from within the code where a dispatch mode looks on
        # What Inductor's code calls too: on the current device, in half the time of torch.empty_strided.
        functions["empty"] = _guards._empty_strided_cuda if output is None else lambda *_: output
        return FunctionType(self._code, self._constants | values | functions, "replay")

    # ---- writing

    def _last_uses(self, events: Sequence[Launch | Operation]) -> dict[int, list[int]]:
        """The workspaces that are no longer touched after an event, by its number."""
        last = {}
        for at, event in enumerate(events):
            for view in views_of(event):
                if (place := self._places.get(view.buffer)) is not None:
                    last[place.workspace] = at
        unused: dict[int, list[int]] = {}
        for workspace, at in last.items():
            unused.setdefault(at, []).append(workspace)
        return unused

    @functools.cached_property
    def _code(self) -> CodeType:
        body = "\n".join(f"    {line}" for line in (*self._lines, f"return ({self._result})"))
        module = compile(f"def replay({', '.join(self._arguments)}):\n{body}\n", "<fastdeit plan>", "exec")
        return next(constant for constant in module.co_consts if isinstance(constant, CodeType))

    def _constant(self, value: Any) -> str:
        name = f"c{next(self._number)}"
        parts = value if type(value) is tuple else (value,) if type(value) is _Made else ()
        unbound = any(part is _STREAM or type(part) in (Place, _Made) for part in parts)
        (self._unbound if unbound else self._constants)[name] = value
        return name

    def _part(self, part: _TensorMap | _TensorAt) -> _Made:
        parts = self._parts.setdefault(part.place.workspace, [])
        parts.append(part)
        return _Made(part.place.workspace, len(parts) - 1)

    def _launch(self, event: Launch) -> None:
        from fastdeit.kernels.runtime.raw_launch import raw_launcher

        launcher = raw_launcher(event.made)
        if launcher is None:
            raise Unsupported(f"{event.made.kernel.__name__} needs memory of its own")
        parts: list[str] = []
        constants: list[Any] = [*launcher.grid, _STREAM, *launcher.leading]
        for position, arg in enumerate((*event.args, *event.made.constexprs)):
            if isinstance(arg, Descriptor):
                constants.append(self._tensor_map(arg, launcher.maps[position]))
            elif isinstance(arg, View) and (name := self._of_the_call(arg)) is not None:
                parts += [f"*{self._constant(tuple(constants))}", self._pointer(name, arg.offset)]
                constants = []
            else:
                constants.append(self._address(arg) if isinstance(arg, View) else arg)
        parts += [f"*{self._constant(tuple(constants))}"] if constants else []
        self._lines.append(f"{self._constant(launcher.run)}({', '.join(parts)})")

    def _operation(self, event: Operation) -> None:
        args = [self._operand(arg) for arg in event.args]
        args += [f"{name}={self._constant(value)}" for name, value in event.options]
        out = self._operand(event.out)
        if event.kind.endswith("_"):
            self._lines.append(f"{out}.{event.kind}({', '.join(args)})")
        else:
            self._lines.append(f"{event.kind}({', '.join([*args, f'out={out}'])})")

    def _operand(self, arg: Any) -> str:
        if isinstance(arg, View):
            return self._tensor(arg)
        if isinstance(arg, tuple):
            return f"[{', '.join(map(self._operand, arg))}]"
        return self._constant(arg)

    def _tensor(self, view: View) -> str:
        name = self._of_the_call(view)
        if name is None:
            address = self._address(view)
            if isinstance(address, int):
                return self._constant(tensor_at(address, view, self._device))
            return self._constant(self._part(_TensorAt(address, view)))
        if self._whole.get(view.buffer) == view:
            return name
        place = f"{name}.storage_offset() + {view.offset // view.dtype.itemsize}"
        return f"{name}.as_strided({self._constant(view.shape)}, {self._constant(view.strides)}, {place})"

    def _of_the_call(self, view: View) -> str | None:
        """The variable whose memory a view is in, None where the view's address is known before the call."""
        buffer = view.buffer
        if (whole := self._unmade.pop(buffer, None)) is not None:
            arguments = ", ".join(map(self._constant, (whole.shape, whole.strides, whole.dtype)))
            self._lines.append(f"{self._outputs[buffer]} = empty({arguments})")
        return self._inputs.get(buffer) or self._outputs.get(buffer)

    def _pointer(self, name: str, offset: int) -> str:
        if name not in self._pointers:
            self._pointers[name] = f"{name}_address"
            self._lines.append(f"{name}_address = {name}.data_ptr()")
        return self._pointers[name] if offset == 0 else f"{self._pointers[name]} + {offset}"

    def _address(self, view: View) -> "int | Place":
        if view.buffer.address is not None:
            return view.buffer.address + view.offset
        place = self._places[view.buffer]
        return place._replace(offset=place.offset + view.offset)

    def _tensor_map(self, descriptor: Descriptor, like: Any) -> _Made:
        if self._of_the_call(descriptor.view) is not None:
            raise Unsupported("a tensor descriptor is of an input or an output")
        address = self._address(descriptor.view)
        place = Place(_NOWHERE, address) if isinstance(address, int) else address
        return self._part(_TensorMap(place, descriptor, like))

    # ---- binding

    def _value(self, value: Any, bases: tuple[int, ...], made: dict[int, list[Any]], stream: int) -> Any:
        if type(value) is _Made:
            return made[value.workspace][value.number]
        arguments: list[Any] = []
        for item in value:
            if type(item) is Place:
                arguments.append(bases[item.workspace] + item.offset)
            elif type(item) is _Made:
                arguments += made[item.workspace][item.number]
            elif item is _STREAM:
                arguments.append(stream)
            else:
                arguments.append(item)
        return tuple(arguments)

    def _parts_at(self, workspace: int, base: int) -> list[Any]:
        """The tensors, and a descriptor's arguments, in a workspace at this address."""
        known = self._made.setdefault(workspace, OrderedDict())
        if base not in known:
            parts = self._parts.get(workspace, [])
            dtypes = {part.view.dtype for part in parts if isinstance(part, _TensorAt)}
            size = self._sizes.get(workspace, 0)
            memory = {dtype: bytes_at(base, size, self._device).view(dtype) for dtype in dtypes}
            while len(known) >= MOST_ADDRESSES:
                known.popitem(last=False)
            known[base] = [self._part_at(part, base, memory) for part in parts]
        known.move_to_end(base)
        return known[base]

    def _part_at(self, part: _TensorMap | _TensorAt, base: int, memory: dict[torch.dtype, torch.Tensor]) -> Any:
        from fastdeit.kernels.runtime.raw_launch import tensor_map_arguments

        if isinstance(part, _TensorAt):
            return view_of(memory[part.view.dtype], part.place.offset, part.view)
        shape, strides = part.descriptor.shape, part.descriptor.strides
        return tensor_map_arguments(base + part.place.offset, shape, strides, part.like)


def _whole_of(buffer: Buffer, views: Iterable[View]) -> View:
    """The view that fills a buffer of which these are views: one of them, or one of a single dimension."""
    view = next(iter(views))
    count = buffer.nbytes // view.dtype.itemsize
    if view.offset == 0 and math.prod(view.shape) == count:
        return view
    return View(buffer, 0, view.dtype, (count,), (1,))
