"""Code bound to addresses of the workspaces, where its tensors and tensor maps are made."""

import builtins
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch._C import _dynamo

from fastdeit.plan.code import FUNCTIONS, NOWHERE, STREAM, Code, Made, Place, TensorAt, TensorMap
from fastdeit.plan.tape import Buffer, Launch, Operation, View
from fastdeit.plan.workspace import aligned, bytes_at, view_of

_guards: Any = _dynamo.guards  # whose types name some of it
MOST_ADDRESSES = 8  # of a workspace, the last used, of which tensors and descriptors are kept


class Program:
    """Code for a function of the inputs' tensors that returns the outputs, bound to one address of each workspace at a time.

    It is written when it is first bound, so that a recording does not wait for it.

    Args:
        events: in their order. They, inputs and outputs can be written as code: see `code.why_not_code`.
        places: of the buffers in the workspaces.
        inputs: buffers of tensors that each call is given; None for one that is not read.
        outputs: contiguous views that fill their buffers, or parts of one that do not overlap; each call makes the buffers anew. A
            view may come twice; None gives None.
        device: of everything.
        gives_back: each workspace is given back when its last event has been launched. The function then takes a list of their
            tensors before the inputs, which have no other owner.
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
        self._unwritten: tuple = events, inputs, outputs, gives_back
        self._made: dict[int, OrderedDict[int, list[Any]]] = {}  # of `Code.parts`, by workspace and its address

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
            made = {at: self._parts_at(at, base) for at, base in ((NOWHERE, 0), *enumerate(bases))}
        stream = self._stream if stream is None else stream
        values = {name: self._value(value, bases, made, stream) for name, value in self._written.unbound.items()}
        functions: dict[str, Any] = {name: getattr(torch, name) for name in FUNCTIONS}
        functions["__builtins__"] = builtins  # PyTorch imports from within the code where a dispatch mode looks on
        # What Inductor's code calls too: on the current device, in half the time of torch.empty_strided.
        functions["empty"] = _guards._empty_strided_cuda if output is None else lambda *_: output
        return FunctionType(self._written.code, self._written.constants | values | functions, "replay")

    @functools.cached_property
    def _written(self) -> "Code":
        written = Code(self._places, self._device, *self._unwritten)
        self._unwritten = ()
        return written

    def _value(self, value: Any, bases: tuple[int, ...], made: dict[int, list[Any]], stream: int) -> Any:
        if type(value) is Made:
            return made[value.workspace][value.number]
        arguments: list[Any] = []
        for item in value:
            if type(item) is Place:
                arguments.append(bases[item.workspace] + item.offset)
            elif type(item) is Made:
                arguments += made[item.workspace][item.number]
            elif item is STREAM:
                arguments.append(stream)
            elif type(item) is tuple:
                arguments.append(self._value(item, bases, made, stream))
            else:
                arguments.append(item)
        return tuple(arguments)

    def _parts_at(self, workspace: int, base: int) -> list[Any]:
        """The tensors, and a descriptor's arguments, in a workspace at this address."""
        known = self._made.setdefault(workspace, OrderedDict())
        if base not in known:
            parts = self._written.parts.get(workspace, [])
            dtypes = {part.view.dtype for part in parts if isinstance(part, TensorAt)}
            size = self._sizes.get(workspace, 0)
            memory = {dtype: bytes_at(base, size, self._device).view(dtype) for dtype in dtypes}
            while len(known) >= MOST_ADDRESSES:
                known.popitem(last=False)
            known[base] = [self._part_at(part, base, memory) for part in parts]
        known.move_to_end(base)
        return known[base]

    def _part_at(self, part: TensorMap | TensorAt, base: int, memory: dict[torch.dtype, torch.Tensor]) -> Any:
        from fastdeit.kernels.runtime.raw_launch import tensor_map_arguments

        if isinstance(part, TensorAt):
            return view_of(memory[part.view.dtype], part.place.offset, part.view)
        shape, strides = part.descriptor.shape, part.descriptor.strides
        return tensor_map_arguments(base + part.place.offset, shape, strides, part.like)
