"""Recorded events as straight-line code: `launcher(*constants, pointer, *constants)`, with Triton 3.7 and newer
`launcher(*constants, (*constants, pointer, *constants))`, and GEMMs into existing tensors.

It is bound to an address of the workspace by the values of its constants.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple, cast

import torch

from fastdeit.plan.tape import Buffer, Descriptor, Launch, Operation, View
from fastdeit.plan.workspace import tensor_at

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


def why_not_code(
    events: Sequence[Launch | Operation], inputs: Sequence[Buffer | None], outputs: Sequence[View | None]
) -> str | None:
    """Why a program cannot do these events, given these inputs, and return these outputs."""
    given, made = set(filter(None, inputs)), _views_of_outputs(outputs)
    if given & made.keys() or any(len(views) > 1 and _whole_of(views) in views for views in made.values()):
        return "an output shares its memory"
    launches = (event for event in events if isinstance(event, Launch))
    described = (arg.view.buffer for launch in launches for arg in launch.args if isinstance(arg, Descriptor))
    if any(buffer in given or buffer in made for buffer in described):
        return "a tensor descriptor is of an input or an output"
    return None


class Place(NamedTuple):
    """Where a buffer, or what a pointer points to, lies in the workspaces of a program."""

    workspace: int
    offset: int  # bytes from its start


class TensorMap(NamedTuple):
    """A tensor descriptor of memory at an offset of a workspace, or at the address `offset` outside all workspaces."""

    place: Place
    descriptor: Descriptor
    like: Any


STREAM = object()  # among the arguments of a launch: where it goes, which is known when the code is bound


class TensorAt(NamedTuple):
    """A tensor in a workspace."""

    place: Place
    view: View


class Made(NamedTuple):
    """One of the two above, by its number in its workspace: made once for each address of the workspace."""

    workspace: int
    number: int


NOWHERE = -1  # in the place of a workspace, for what lies in the memory of parameters


class Code:
    """The code of a program, whose arguments it has.

    Attributes:
        code: of a function.
        constants: global variables of it, by name.
        unbound: those that `Program` makes for each address of the workspaces, by name.
        parts: what they name, by workspace.
    """

    def __init__(
        self,
        places: Mapping[Buffer, Place],
        device: torch.device,
        events: Sequence[Launch | Operation],
        inputs: Sequence[Buffer | None],
        outputs: Sequence[View | None],
        gives_back: bool,
    ) -> None:
        self.constants: dict[str, Any] = {}
        self.unbound: dict[str, Any] = {}
        self.parts: dict[int, list[TensorMap | TensorAt]] = {}
        self._places, self._device = places, device
        self._whole = {buffer: _whole_of(views) for buffer, views in _views_of_outputs(outputs).items()}
        self._unmade = dict(self._whole)  # outputs that no line makes yet
        self._inputs = {buffer: f"in{i}" for i, buffer in enumerate(inputs) if buffer is not None}
        self._outputs = {buffer: f"out{i}" for i, buffer in enumerate(self._whole)}
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
        result = "".join(f"{None if view is None else self._tensor(view)}, " for view in outputs)
        arguments = [*(["workspaces"] if gives_back else []), *(f"in{i}" for i in range(len(inputs)))]
        body = "\n".join(f"    {line}" for line in (*self._lines, f"return ({result})"))
        module = compile(f"def replay({', '.join(arguments)}):\n{body}\n", "<fastdeit plan>", "exec")
        self.code = next(constant for constant in module.co_consts if isinstance(constant, CodeType))

    def _last_uses(self, events: Sequence[Launch | Operation]) -> dict[int, list[int]]:
        """The workspaces that are no longer touched after an event, by its number."""
        last = {}
        for at, event in enumerate(events):
            for buffer in event.buffers:
                if (place := self._places.get(buffer)) is not None:
                    last[place.workspace] = at
        unused: dict[int, list[int]] = {}
        for workspace, at in last.items():
            unused.setdefault(at, []).append(workspace)
        return unused

    def _constant(self, value: Any) -> str:
        name = f"c{next(self._number)}"
        parts = value if type(value) is tuple else (value,) if type(value) is Made else ()
        unbound = any(part is STREAM or type(part) in (Place, Made) for part in parts)
        (self.unbound if unbound else self.constants)[name] = value
        return name

    def _part(self, part: TensorMap | TensorAt) -> Made:
        parts = self.parts.setdefault(part.place.workspace, [])
        parts.append(part)
        return Made(part.place.workspace, len(parts) - 1)

    def _launch(self, event: Launch) -> None:
        from fastdeit.kernels.runtime.raw_launch import RawLauncher, raw_launcher

        launcher = cast(RawLauncher, raw_launcher(event.made))  # else the recording was refused
        run, leading = self._constant(launcher.run), (*launcher.grid, STREAM, *launcher.leading)
        pieces: list[Any] = [[]]  # constants, and between them pointers that the call gives
        for position, arg in enumerate((*event.args, *event.made.constexprs)):
            if isinstance(arg, Descriptor):
                pieces[-1].append(self._tensor_map(arg, launcher.maps[position]))
            elif isinstance(arg, View) and (name := self._of_the_call(arg)) is not None:
                pieces += [self._pointer(name, arg.offset), []]
            else:
                pieces[-1].append(self._address(arg) if isinstance(arg, View) else arg)
        if not launcher.packed:
            self._lines.append(f"{run}({self._spread([[*leading, *pieces[0]], *pieces[1:]])})")
        elif len(pieces) == 1:
            self._lines.append(f"{run}(*{self._constant((*leading, tuple(pieces[0])))})")
        else:
            self._lines.append(f"{run}(*{self._constant(leading)}, ({self._spread(pieces)},))")

    def _spread(self, pieces: list[Any]) -> str:
        """Arguments of a call, some of them lists of constants."""
        return ", ".join(p if isinstance(p, str) else f"*{self._constant(tuple(p))}" for p in pieces if p)

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
            return self._constant(self._part(TensorAt(address, view)))
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

    def _tensor_map(self, descriptor: Descriptor, like: Any) -> Made:
        address = self._address(descriptor.view)
        place = Place(NOWHERE, address) if isinstance(address, int) else address
        return self._part(TensorMap(place, descriptor, like))


def _views_of_outputs(outputs: Iterable[View | None]) -> dict[Buffer, set[View]]:
    views: dict[Buffer, set[View]] = {}
    for view in filter(None, outputs):
        views.setdefault(view.buffer, set()).add(view)
    return views


def _whole_of(views: Iterable[View]) -> View:
    """The view that fills the buffer of which these are views: one of them, or one of a single dimension."""
    view = next(iter(views))
    count = view.buffer.nbytes // view.dtype.itemsize
    if view.offset == 0 and math.prod(view.shape) == count:
        return view
    return View(view.buffer, 0, view.dtype, (count,), (1,))
