"""Calls inside a function that PyTorch checkpoints: its recomputation must save what its forward pass saved.

Non-reentrant checkpointing hands the tensors that a recomputation saves to the nodes of the forward pass, by their number. So a
module that ran from a plan does so again, from the same one, and one that did not does not. Reentrant checkpointing needs nothing
of this: its forward pass is a call without gradients, and its recomputation one with gradients, whose backward pass follows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import checkpoint as torchs

from fastdeit import backends
from fastdeit.plan.surroundings import place_of
from fastdeit.plan.training import Output, TrainingPlan

_hooks: Any = torch._C._autograd


def _code_of(hooks: Any) -> CodeType | None:
    """The code of the function with which these hooks pack a tensor, None where this version of PyTorch has another."""
    constants = hooks.__init__.__code__.co_consts
    return next((each for each in constants if isinstance(each, CodeType) and each.co_name == "pack_hook"), None)


_FORWARD, _RECOMPUTATION = _code_of(torchs._checkpoint_hook), _code_of(torchs._recomputation_hook)


@dataclass
class Ran:
    """What a module's call ran from: a plan, or the ops.

    Attributes:
        kind: of its input, as its plan needs it.
        stream: the current one, as an integer.
        backend: in force.
        repeats: False in a recomputation whose forward pass made no such call.
    """

    kind: tuple
    stream: int
    backend: str
    plan: TrainingPlan | None = None
    repeats: bool = True

    def recompute(self, x: Tensor) -> Output | None:
        """What the recomputation of its plan gives of x, on the stream of the forward pass.

        The plan's launches are on that stream, and so is the backward pass of its nodes. PyTorch recomputes on the stream of the
        node that needs a saved tensor first. That of an operation on the CPU has none, and runs on the caller's.
        """
        plan = cast(TrainingPlan, self.plan)
        device, now = place_of(x)
        if now == self.stream:
            return plan.recompute(x)
        here, there = torch.cuda.current_stream(device), _stream(self.stream, device)
        there.wait_stream(here)
        x.record_stream(there)
        try:
            with torch.cuda.stream(there):
                made = plan.recompute(x)
        finally:  # PyTorch may stop a recomputation by an exception
            here.wait_stream(there)
        for tensor in made if isinstance(made, tuple) else (made,):
            if tensor is not None:
                tensor.record_stream(here)
        return made


def _stream(handle: int, device: int) -> torch.cuda.Stream:
    """The stream with this handle, an integer; PyTorch makes a new one for that of the default stream."""
    return torch.cuda.ExternalStream(handle, device) if handle else torch.cuda.default_stream(device)


class _Calls(NamedTuple):
    """The calls of modules inside one call of a checkpointed function."""

    ran: dict[Any, list[Ran]]  # by module, in their order
    repeated: dict[tuple, int]  # how many of them, by recomputation and module


# By frame, which is what PyTorch keeps of one call of a checkpointed function.
_calls: WeakKeyDictionary[Any, _Calls] = WeakKeyDictionary()


class Checkpointed(NamedTuple):
    """A call of a checkpointed function.

    Attributes:
        recomputation: its number, if it repeats the call of a forward pass.
    """

    frame: Any
    recomputation: Any = None

    @property
    def recomputes(self) -> bool:
        """Whether it repeats the call of a forward pass."""
        return self.recomputation is not None

    def ran(self, root: Any, x: Tensor) -> Ran:
        """What this call of a module runs from: in a forward pass for the caller to fill in, in a recomputation what the call that
        it repeats ran from. That one is found by its number: settings or the stream may be others by now, or parameters frozen.

        Args:
            root: the module.
            x: its input.

        Raises:
            RuntimeError: it ran from a plan that can no longer run.
        """
        device, stream = place_of(x)
        # Strides are no part of it: contiguous tokens that a hook around the checkpoint saved may come back with others.
        kind = x.shape, x.dtype, device
        calls = _calls.setdefault(self.frame, _Calls({}, {}))
        ran = calls.ran.setdefault(root, [])
        if not self.recomputes:
            ran.append(Ran(kind, stream, backends.get_backend()))
            return ran[-1]
        at = calls.repeated.get((self.recomputation, root), 0)
        calls.repeated[self.recomputation, root] = at + 1
        if at >= len(ran) or ran[at].kind != kind:
            return Ran(kind, stream, backends.get_backend(), repeats=at < len(ran))
        if (plan := ran[at].plan) is not None and not plan.still_holds():
            raise RuntimeError(_why_not_repeated(root, plan))
        return ran[at]


def _why_not_repeated(root: Any, plan: TrainingPlan) -> str:
    """Why a plan can no longer run, and what to do."""
    between = "between the forward pass, which ran from a plan, and its recomputation"
    if plan.reads.hooked():
        return f"checkpointing: a hook of Triton's was registered on a kernel {between}. Register it before the forward pass"
    changed = set(map(id, plan.reads.changed()))
    named = (*root.named_parameters(), *root.named_buffers())
    names = ", ".join(name for name, tensor in named if id(tensor) in changed)
    return (
        f"checkpointing: {names} of {type(root).__name__} got other `data` {between}. Change it in place (`copy_` under "
        "`torch.no_grad()`), or after the backward pass"
    )


def refuse_unrepeated(root: Any) -> None:
    """Raises RuntimeError, for a module that runs fused in a recomputation but did not in the forward pass."""
    raise RuntimeError(
        f"checkpointing: {type(root).__name__} runs fused in the recomputation, but did not in the forward pass, and would save "
        f"other tensors. The backend is now {backends.get_backend()!r}; PyTorch does not restore that of the forward pass. Where "
        "the forward pass ran under fastdeit.use_backend or a hook on all modules, run the backward pass under it too, or call "
        "use_backend inside the checkpointed function"
    )


def checkpointed_call() -> Checkpointed | None:
    """The call of a checkpointed function inside which this is; None under no hook on saved tensors, or under another one."""
    hooks = _hooks._top_saved_tensors_default_hooks(True)
    if hooks is None or _FORWARD is None or _RECOMPUTATION is None:  # one alone would save what the other does not
        return None
    pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])  # PyTorch 2.14 keeps the compiler from one of them
    if not isinstance(pack, FunctionType) or pack.__closure__ is None:
        return None
    inside = dict(zip(pack.__code__.co_freevars, pack.__closure__, strict=True))
    if pack.__code__ is _FORWARD and "frame" in inside:
        return Checkpointed(inside["frame"].cell_contents)
    if pack.__code__ is _RECOMPUTATION and {"target_frame_ref", "gid"} <= inside.keys():
        frame = inside["target_frame_ref"].cell_contents()
        return None if frame is None else Checkpointed(frame, inside["gid"].cell_contents)
    return None


def can_rehearse() -> bool:
    """Whether work may be launched here of which nothing stays: in no capture, and in no backward pass."""
    return torch._C._current_graph_task_id() == -1 and not torch.cuda.is_current_stream_capturing()


@contextmanager
def rehearsing(x: Tensor) -> Iterator[Tensor]:
    """x without its history, for a run forward and backward of which nothing stays: no hook sees what it saves, and the next random
    numbers of x's device are those that would have been drawn without it."""
    generator = torch.cuda.default_generators[x.get_device()]
    state, found = generator.get_state(), []
    while (pair := _hooks._top_saved_tensors_default_hooks(True)) is not None:
        found.append(pair)
        _hooks._pop_saved_tensors_default_hooks()
    try:
        yield x.detach().requires_grad_(x.requires_grad)
    finally:
        for pair in reversed(found):
            _hooks._push_saved_tensors_default_hooks(*pair)
        generator.set_state(state)
