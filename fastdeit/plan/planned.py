"""Runs of ops without gradients from plans: recorded at the second call of their kind, repeated from the third on."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards

from fastdeit import backends
from fastdeit.blocks.snapshot import KEY, made_from
from fastdeit.plan.code import Program, Unsupported
from fastdeit.plan.graphs import AutomaticGraph
from fastdeit.plan.surroundings import key_of, nothing_called, why_not_plannable
from fastdeit.plan.tape import Launch, Tape
from fastdeit.plan.workspace import lifetimes, packed, views_of

MOST_KEYS = 16  # of a model, the last used
MOST_ADDRESSES = 4  # of a plan's workspace to which its code is bound, the last used
_SEEN = "called once"
_FACTS = (attrgetter("dtype"), attrgetter("shape"), Tensor.stride, attrgetter("device"))


class Plan:
    """The launches of one run, repeated for another input.

    Args:
        tape: the recording, not refused.
        parameters: all tensors that it may have read beside its input.
        output: what the run gave.

    Raises:
        Unsupported: it cannot be repeated; the text says why.
    """

    def __init__(self, tape: Tape, parameters: list[Tensor], output: Tensor) -> None:
        out = tape.view(output)
        if tape.refused is not None:
            raise Unsupported(tape.refused)
        if out.buffer.input is not None or out.buffer.address is not None:
            raise Unsupported("the output is in the memory of an input or a parameter")
        if out.offset or not output.is_contiguous() or output.untyped_storage().nbytes() != output.nbytes:
            raise Unsupported("the output shares its memory")
        lives = lifetimes(tape.events)
        lives.pop(out.buffer, None)
        offsets, self._bytes = packed(lives)
        with torch.inference_mode(False), torch.no_grad():
            self._program = Program(tape.events, offsets, [out], output.device)
        read = {view.buffer.address for event in tape.events for view in views_of(event)}
        self._parameters = [p for p in parameters if p.untyped_storage().data_ptr() in read]
        self._addresses = list(map(Tensor.data_ptr, self._parameters))
        self._found, self._guard = _facts(self._parameters), _guard(self._parameters)
        launches = [event.made.kernel for event in tape.events if isinstance(event, Launch)]
        self._kernels = list({id(kernel): kernel for kernel in launches}.values())
        self._device = output.device
        self._bound: OrderedDict[int, Callable[[Tensor], tuple[Tensor, ...]]] = OrderedDict()
        self._binding = threading.Lock()
        self._output = output.shape, output.dtype
        self.graph = AutomaticGraph()

    def still_holds(self) -> bool:
        """Whether every parameter is where and what it was, which no one is told of when its `data` is replaced."""
        if any(kernel.pre_run_hooks for kernel in self._kernels):
            return False
        if list(map(Tensor.data_ptr, self._parameters)) != self._addresses:
            return False
        # The guard compares with the dispatch keys of where it was made too: in inference mode it fails outside of it.
        return self._guard.check(*self._parameters) or _facts(self._parameters) == self._found

    def __call__(self, x: Tensor) -> Tensor:
        return self.graph.run(self, x)

    def launch(self, x: Tensor) -> Tensor:
        """The output, a new tensor, by a launch after the other."""
        workspace = torch.empty(self._bytes, dtype=torch.uint8, device=self._device)
        address = workspace.data_ptr()
        (out,) = (self._bound.get(address) or self._bind(address))(x)
        return out

    def fixed(self, stream: int) -> tuple[Callable[[Tensor], object], Tensor, Tensor]:
        """The launches for memory that is no one else's: a function of the input, the output that it writes, and a workspace."""
        shape, dtype = self._output
        out = torch.empty(shape, dtype=dtype, device=self._device)
        workspace = torch.empty(self._bytes, dtype=torch.uint8, device=self._device)
        return self._program.bind(workspace.data_ptr(), out, stream), out, workspace

    def _bind(self, address: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
        with self._binding:
            run = self._program.bind(address)
            while len(self._bound) >= MOST_ADDRESSES:
                self._bound.popitem(last=False)
            self._bound[address] = run
        return run


def _facts(tensors: list[Tensor]) -> tuple[list[Any], ...]:
    """What a change of `data` may change beside the address."""
    return tuple(list(map(fact, tensors)) for fact in _FACTS)


def _guard(tensors: list[Tensor]) -> Any:
    """Compares the same in a sixth of the time: Dynamo's check of dtype, device, shape and strides, among others."""
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


_Run = Callable[[Tensor], Tensor | None]


class Plans:
    """Those of one module, for one answer of `looked_at`.

    Attributes:
        entries: by key a plan, or in words what stands in the place of one.
    """

    def __init__(self) -> None:
        self.entries: OrderedDict[tuple, Plan | str] = OrderedDict()
        self.recording = threading.Lock()
        self._changing = threading.Lock()

    def find(self, key: tuple) -> Plan | str | None:
        entry = self.entries.get(key)
        if type(entry) is Plan and not entry.still_holds():
            with self._changing:
                self.entries.clear()
            return None
        return entry

    def put(self, key: tuple, entry: Plan | str) -> None:
        with self._changing:
            while len(self.entries) >= MOST_KEYS and key not in self.entries:
                self.entries.popitem(last=False)
            self.entries[key] = entry

    def record(self, key: tuple, root: nn.Module, run: _Run, x: Tensor) -> Tensor | None:
        """run(x). What is kept is its plan, or the reason why there is none."""
        parameters = [*root.parameters(), *root.buffers()]
        tape = Tape(parameters, [x])
        with nothing_called(tape), torch._C._AutoDispatchBelowAutograd(), tape:
            out = run(x)
        if out is None:
            self.put(key, "timm's code runs around everything")
            return None
        try:
            self.put(key, Plan(tape, parameters, out))
        except Unsupported as reason:
            self.put(key, str(reason))
        return out


def described(module: nn.Module) -> list[str]:
    """A line for each kind of call that a module has had since it last changed: its input, and whether there is a plan."""
    record = module.__dict__.get(KEY)
    plans = None if record is None or record.made is None else record.made[1]
    if not isinstance(plans, Plans):
        return []
    lines = []
    for (shape, _, dtype, *_), entry in list(plans.entries.items()):
        state = (
            f"planned, {entry.graph.state}"
            if isinstance(entry, Plan)
            else entry
            if entry is _SEEN
            else f"not planned: {entry}"
        )
        lines.append(f"{' x '.join(map(str, shape))} {backends.dtype_name(dtype)}: {state}")
    return lines


def planned(root: Any, answer: tuple, run: _Run, x: Tensor, why_called: Callable[[], str | None]) -> Tensor | None:
    """run(x), from a plan where there is one.

    Args:
        root: the module that holds all parameters which `run` reads.
        answer: what `looked_at(root)` gave; `run` depends on nothing else of the modules.
        run: gives a new tensor, or None, and has no other effect.
        x: its only input.
        why_called: why `run` calls modules, so that it is not recorded; None if it launches alone.
    """
    if torch.compiler.is_compiling() or why_not_plannable(x) is not None:
        return run(x)
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in root.parameters())):
        return run(x)
    plans: Plans = made_from(root, answer, Plans)
    key = key_of(x)
    entry = plans.find(key)
    if type(entry) is Plan:
        return entry(x)
    if entry is None:
        plans.put(key, why_called() or _SEEN)
    elif entry is _SEEN and plans.recording.acquire(blocking=False):
        try:
            return plans.record(key, root, run, x)
        finally:
            plans.recording.release()
    return run(x)
