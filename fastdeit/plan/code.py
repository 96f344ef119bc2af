"""Recorded events as straight-line code: `launcher(*constants, pointer, *constants)` and products into tensors made before.

The code is compiled once. It is bound to an address of the workspace by the values of its constants.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch

from fastdeit.plan.tape import Buffer, Descriptor, Launch, Operation, View
from fastdeit.plan.workspace import tensor_at, views_of


class Unsupported(Exception):
    """Recorded events that cannot be written as code; the text says why."""


class _Address(NamedTuple):
    """A pointer into the workspace, in bytes from its start."""

    offset: int


class _TensorMap(NamedTuple):
    """A descriptor whose tensor lies at an address that is known once the workspace is: encoded when the code is bound."""

    address: "int | _Address"
    descriptor: Descriptor
    like: Any


_STREAM = object()  # among the arguments of a launch: where it goes, which is known when the code is bound


class _TensorAt(NamedTuple):
    """A tensor in the workspace."""

    address: _Address
    view: View


class Program:
    """Code for a function of the inputs' tensors that returns the outputs, bound to one address of the workspace at a time.

    Args:
        events: in their order.
        offsets: of the buffers in the workspace.
        outputs: contiguous views that fill their buffers; each call makes them anew.
        device: of everything.

    Raises:
        Unsupported: events cannot be written as code.
    """

    def __init__(
        self,
        events: Sequence[Launch | Operation],
        offsets: Mapping[Buffer, int],
        outputs: Sequence[View],
        device: torch.device,
    ) -> None:
        self._offsets, self._device = offsets, device
        self._outputs = {view.buffer: i for i, view in enumerate(outputs)}
        self._constants: dict[str, Any] = {}  # by name: the value, or what becomes one by `_value`
        self._number = itertools.count()
        self._pointers: dict[str, str] = {}  # tensors of the call whose address the code has asked for
        self._lines: list[str] = []
        for i, view in enumerate(outputs):
            made = self._constant(view.shape), self._constant(view.dtype)
            self._lines.append(f"out{i} = empty({made[0]}, dtype={made[1]}, device=device)")
        for event in events:
            if isinstance(event, Launch):
                self._launch(event)
            else:
                self._operation(event)
        self.inputs = 1 + max((event_input for event_input in map(self._input, events)), default=-1)
        self._code = self._compiled(len(outputs))

    def bind(
        self, base: int, output: torch.Tensor | None = None, stream: int | None = None
    ) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The function for a workspace at this address. While it runs the caller holds that.

        Args:
            output: what the function writes and returns, the only output; by default new tensors at each call.
            stream: that it launches kernels on, as an integer; by default the current one. GEMMs are on that of the call.
        """
        stream = torch._C._cuda_getCurrentRawStream(self._device.index) if stream is None else stream
        with torch.inference_mode(False):  # so that the tensors may be written to outside of inference mode too
            values = {name: self._value(value, base, stream) for name, value in self._constants.items()}
        made = torch.empty if output is None else lambda *_, **__: output
        names = dict(empty=made, mm=torch.mm, addmm=torch.addmm, device=self._device)
        return FunctionType(self._code, values | names, "replay")

    # ---- writing

    def _compiled(self, outputs: int) -> CodeType:
        inputs = ", ".join(f"in{i}" for i in range(self.inputs))
        result = ", ".join(f"out{i}" for i in range(outputs))
        body = "\n".join(f"    {line}" for line in (*self._lines, f"return ({result},)"))
        module = compile(f"def replay({inputs}):\n{body}\n", "<fastdeit plan>", "exec")
        return next(constant for constant in module.co_consts if isinstance(constant, CodeType))

    def _constant(self, value: Any) -> str:
        name = f"c{next(self._number)}"
        self._constants[name] = value
        return name

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
        args, out = [self._tensor(view) for view in event.args], self._tensor(event.out)
        if event.kind == "copy_":
            self._lines.append(f"{out}.copy_({args[0]})")
        else:
            options = "" if event.out_dtype is None else f"out_dtype={self._constant(event.out_dtype)}, "
            self._lines.append(f"{event.kind}({', '.join(args)}, {options}out={out})")

    def _tensor(self, view: View) -> str:
        name = self._of_the_call(view)
        if name is None:
            address = self._address(view)
            if isinstance(address, int):
                return self._constant(tensor_at(address, view, self._device))
            return self._constant(_TensorAt(address, view))
        place = f"{name}.storage_offset() + {view.offset // view.dtype.itemsize}"
        return f"{name}.as_strided({self._constant(view.shape)}, {self._constant(view.strides)}, {place})"

    def _of_the_call(self, view: View) -> str | None:
        """The variable whose memory a view is in, None where that is known beforehand."""
        if view.buffer.input is not None:
            return f"in{view.buffer.input}"
        output = self._outputs.get(view.buffer)
        return None if output is None else f"out{output}"

    def _pointer(self, name: str, offset: int) -> str:
        if name not in self._pointers:
            self._pointers[name] = f"{name}_address"
            self._lines.append(f"{name}_address = {name}.data_ptr()")
        return self._pointers[name] if offset == 0 else f"{self._pointers[name]} + {offset}"

    def _address(self, view: View) -> "int | _Address":
        if view.buffer.address is not None:
            return view.buffer.address + view.offset
        return _Address(self._offsets[view.buffer] + view.offset)

    def _tensor_map(self, descriptor: Descriptor, like: Any) -> _TensorMap:
        if self._of_the_call(descriptor.view) is not None:
            raise Unsupported("a tensor descriptor is of an input or an output")
        return _TensorMap(self._address(descriptor.view), descriptor, like)

    def _input(self, event: Launch | Operation) -> int:
        return max((view.buffer.input for view in views_of(event) if view.buffer.input is not None), default=-1)

    # ---- binding

    def _value(self, value: Any, base: int, stream: int) -> Any:
        kind = type(value)
        if kind is _Address:
            return base + value.offset
        if kind is _TensorAt:
            return tensor_at(self._value(value.address, base, stream), value.view, self._device)
        if value is _STREAM:
            return stream
        if kind is tuple and any(item is _STREAM or type(item) in (_Address, _TensorMap) for item in value):
            return self._arguments(value, base, stream)
        return value

    def _arguments(self, values: tuple, base: int, stream: int) -> tuple:
        from fastdeit.kernels.runtime.raw_launch import tensor_map_arguments

        made: list[Any] = []
        for value in values:
            if type(value) is _TensorMap:
                shape, strides = value.descriptor.shape, value.descriptor.strides
                made += tensor_map_arguments(self._value(value.address, base, stream), shape, strides, value.like)
            else:
                made.append(self._value(value, base, stream))
        return tuple(made)
