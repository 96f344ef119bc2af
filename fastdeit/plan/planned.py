"""Runs of ops from plans: recorded at the second call of their kind, repeated from the third on."""

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from fastdeit import backends
from fastdeit.blocks.snapshot import KEY, made_from
from fastdeit.blocks.spans import Span
from fastdeit.plan.bound import Bound
from fastdeit.plan.checkpointing import can_rehearse, checkpointed_call, refuse_unrepeated, rehearsing
from fastdeit.plan.code import Place, Unsupported, why_not_code, why_not_output
from fastdeit.plan.graphs import AutomaticGraph
from fastdeit.plan.kinds import MOST_PLANS, SEEN, Kind, Kinds
from fastdeit.plan.program import Program
from fastdeit.plan.reads import Reads
from fastdeit.plan.recording import Passing
from fastdeit.plan.sharding import gathered, managed_otherwise
from fastdeit.plan.surroundings import (
    is_training,
    key_of,
    nothing_called,
    why_not_plannable,
    why_not_recorded,
    why_not_trainable,
)
from fastdeit.plan.tape import Buffer, Tape, View
from fastdeit.plan.training import Attempt, Output, TrainingPlan
from fastdeit.plan.workspace import lifetimes, packed

MOST_ATTEMPTS = 2  # at a recording in which kernels are compiled, or until a backward pass follows that can be recorded
_needs_gradient = attrgetter("requires_grad")


class Plan:
    """The launches of one run, repeated for another input.

    Args:
        tape: the recording.
        parameters: all tensors that it may have read beside its input, but for
        gathered: parameters whose memory is other at each call.
        x: the input.
        output: what the run gave.

    Raises:
        Unsupported: it cannot be repeated; the text says why.
    """

    def __init__(self, tape: Tape, parameters: list[Tensor], gathered: list[Tensor], x: Tensor, output: Output) -> None:
        if isinstance(output, tuple):
            raise Unsupported(f"{len(output)} tensors are returned")
        out = tape.view(output)
        given = [tape.view(tensor).buffer for tensor in (x, *gathered)]
        reason = tape.refused or why_not_output(out, output) or why_not_code(tape.events, given, [out])
        if reason is not None:
            raise Unsupported(reason)
        self._device, self._gathered = output.device, gathered
        self._output = output.shape, output.dtype
        self._make = functools.partial(_in_one_workspace, tape.events, given, out, self._device)
        self.still_holds = Reads(tape.events, parameters).still_hold
        self.graph = AutomaticGraph()
        if any(size > 1 and not stride for size, stride in zip(x.shape, x.stride(), strict=True)):  # expanded images
            self.graph.leave_out("the images share memory, to which nothing can be copied")

    def __call__(self, x: Tensor) -> Tensor:
        return self.graph.run(self, x)

    def launch(self, x: Tensor) -> Tensor:
        """The output, a new tensor, by a launch after the other."""
        bound, size = self._made
        workspace = torch.empty(size, dtype=torch.uint8, device=self._device)
        (out,) = bound.at(workspace.data_ptr())(x, *self._gathered)
        return out

    def receive(self, x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    def fixed(self, stream: int) -> tuple[Callable[[Tensor], object], Tensor, Tensor]:
        """The launches for memory that is no one else's: a function of the input, the output that it writes, and a workspace."""
        shape, dtype = self._output
        bound, size = self._made
        out = torch.empty(shape, dtype=dtype, device=self._device)
        workspace = torch.empty(size, dtype=torch.uint8, device=self._device)
        return bound.fixed(workspace.data_ptr(), out, stream), out, workspace

    @functools.cached_property
    def _made(self) -> tuple[Bound, int]:
        """The launches, and the size of the workspace in which they are: made at the first call, which the recording is not."""
        return self._make()


def _in_one_workspace(events: list, given: list[Buffer], out: View, device: torch.device) -> tuple[Bound, int]:
    lives = lifetimes(events)
    lives.pop(out.buffer, None)
    offsets, size = packed(lives)
    places = {buffer: Place(0, offset) for buffer, offset in offsets.items()}
    with torch.inference_mode(False), torch.no_grad():
        return Bound(Program(events, places, given, [out], device)), size


_Run = Callable[[Tensor], Output | None]
_Spans = Callable[[Tensor], Sequence[Span] | None]


class Plans:
    """The plans of one module, valid for one answer of `looked_at`.

    Attributes:
        kinds: of its calls. The entry of each is a plan, the attempt to make one whose backward pass is still to come, or in words
            what stands in the place of one.
        parameters: the module's.
        gathered: those whose memory is other at each call.
        followed: it is known which those are.
    """

    def __init__(self, root: nn.Module) -> None:
        self.kinds = Kinds()
        self.parameters = list(root.parameters())
        self.gathered, self.followed = gathered(self.parameters), not managed_otherwise()
        moving = set(map(id, self.gathered))
        self._tensors = [*(p for p in self.parameters if id(p) not in moving), *root.buffers()]
        self.recording = threading.Lock()

    def called(self, key: tuple) -> Kind:
        """The kind of a call, with an entry that holds now; None is that of a first call."""
        kind = self.kinds.called(key)
        entry = kind.entry
        if entry is None or isinstance(entry, str):
            return kind
        if isinstance(entry, weakref.ref):
            if entry() is None:
                self._came_to_nothing(kind)
        elif not entry.still_holds():
            self.kinds.clear()
            return self.kinds.called(key)
        return kind

    def record(self, kind: Kind, run: _Run, x: Tensor) -> Output | None:
        """run(x). What is kept is its plan, or the reason why there is none."""
        tape = Tape(self._tensors, [x, *self.gathered])
        with nothing_called(tape), torch._C._AutoDispatchBelowAutograd(), tape:
            out = run(x)
        if out is None:
            kind.entry = "timm's code runs around everything"
            return None
        try:
            kind.entry = Plan(tape, self._tensors, self.gathered, x, out)
        except Unsupported as reason:
            if tape.compiled:
                self._came_to_nothing(kind, str(reason))
            else:
                kind.entry = str(reason)
        return out

    def record_training(self, kind: Kind, spans: Sequence[Span], x: Tensor) -> Output | None:
        """What the spans give of x. The plan is kept after the backward pass."""
        if (reason := why_not_recorded(self.parameters)) is not None:
            kind.entry = reason
            return None
        attempt = Attempt(spans, self._tensors, self.gathered, lambda plan: self._finish(kind, reference, plan))
        reference = weakref.ref(attempt)
        kind.entry = reference
        try:
            return attempt(x)
        except BaseException:  # of which the attempt, then gone, would say that no backward pass follows
            kind.entry = SEEN
            raise

    def rehearse(self, kind: Kind, spans: Sequence[Span], x: Tensor) -> None:
        """Makes the plan at once, by a run forward and backward whose results are thrown away.

        If memory runs out there is none yet, and the ops run, which may need less. The error goes no further: raised by the thread
        of backward passes, which may free it last, it would there end what its traceback holds, such as the hooks of
        checkpointing, which are those of this thread.
        """
        attempts = kind.attempts
        try:
            self._rehearse(kind, spans, x)
        except torch.OutOfMemoryError as error:
            error.__traceback__ = None  # which holds tensors
            kind.attempts = attempts
            self._came_to_nothing(kind, "no memory for the run of its own that makes the plan")

    def _rehearse(self, kind: Kind, spans: Sequence[Span], x: Tensor) -> None:
        with rehearsing(x) as given:
            out = self.record_training(kind, spans, given)
            made = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None and t.requires_grad]
            ends = list(map(get_gradient_edge, made))
            zeros = [t.new_zeros(()).expand(t.shape) for t in made]  # which backward makes tensors of, and gives back
            del out, made
            wanted = [t for t in (given, *self.parameters) if t.requires_grad]
            if ends:
                with torch.autocast("cuda", enabled=False):
                    torch.autograd.grad(ends, wanted, zeros, allow_unused=True)

    def _finish(self, kind: Kind, attempt: weakref.ref, plan: TrainingPlan | str | None) -> None:
        if kind.entry is not attempt:
            return
        if plan is None or isinstance(plan, Passing):
            self._came_to_nothing(kind, plan or "backward passes fail, or find other data in parameters than forward")
        else:
            kind.entry = plan

    def _came_to_nothing(self, kind: Kind, reason: str = "no backward pass follows") -> None:
        """After a recording without a plan: record again, or stop trying for this reason."""
        kind.attempts += 1
        kind.entry = SEEN if kind.attempts < MOST_ATTEMPTS else reason


def described(module: nn.Module) -> list[str]:
    """A line for each kind of call that a module has had since it last changed: its input, and whether there is a plan."""
    record = module.__dict__.get(KEY)
    plans = None if record is None or record.made is None else record.made[1]
    if not isinstance(plans, Plans):
        return []
    lines = []
    for key, kind in plans.kinds:
        shape, _, dtype, *_ = key
        entry, state = kind.entry, f"not planned: {kind.entry}"
        if isinstance(entry, weakref.ref):
            state = "recorded until a backward pass"
        elif isinstance(entry, Plan):
            state = f"planned, {entry.graph.state}"
        elif not isinstance(entry, str):
            state = "planned"
        elif entry is SEEN:
            state = f"not planned: {MOST_PLANS} other kinds have plans" if plans.kinds.full() else entry
        images = f"{' x '.join(map(str, shape))} {backends.dtype_name(dtype)}"
        lines.append(f"{images}{' with gradients' if is_training(key) else ''}: {state}")
    return lines


def planned(
    root: Any,
    answer: tuple,
    run: _Run,
    x: Tensor,
    why_called: Callable[[], str | None],
    spans: _Spans | None = None,
    captured: bool = True,
) -> Output | None:
    """run(x), from a plan where there is one.

    Args:
        root: the module that holds all parameters which `run` reads.
        answer: what `looked_at(root)` gave; `run` depends on nothing else of the modules.
        run: gives a new tensor, several or None, and has no other effect.
        x: its only input.
        why_called: why `run` calls modules, so that it is not recorded; None if it launches alone.
        spans: what do together what `run` does of x, for calls with gradients; None if nothing does.
        captured: the plan may become a graph, which copies x and the output: worth it for a model, not for one of its blocks.
    """
    if torch.compiler.is_compiling():
        return run(x)
    call = checkpointed_call() if spans is not None and torch.is_grad_enabled() and x.is_cuda else None
    ran = None if call is None else call.ran(root, x)
    if ran is not None and ran.plan is not None:  # what its forward pass did, even where something else looks on
        return ran.recompute(x)
    if ran is not None and ran.backend != backends.get_backend():  # which PyTorch does not restore
        with backends.use_backend(ran.backend):
            return run(x)
    if why_not_plannable(x) is not None:
        return run(x)
    plans: Plans = made_from(root, answer, lambda: Plans(root))
    if (plans.gathered and captured) or not plans.followed:  # of sharded models blocks alone have plans
        return run(x)
    needs: tuple[bool, ...] = ()
    if torch.is_grad_enabled() and any(needs := tuple(map(_needs_gradient, (x, *plans.parameters)))):
        if spans is None:
            return run(x)
        if call is not None and ran is not None:
            if not ran.repeats:
                refuse_unrepeated(root)
            if not call.recomputes:
                ran.plan = _rehearsed(plans, key_of(x, needs), spans, x, why_called, True)
            return run(x) if ran.plan is None else ran.plan(x)
        if why_not_trainable() is not None:
            return run(x)
        if plans.gathered:
            plan = _rehearsed(plans, key_of(x, needs), spans, x, why_called, False)
            return run(x) if plan is None else plan(x)
    kind = plans.called(key := key_of(x, needs if any(needs) else ()))
    entry = kind.entry
    if isinstance(entry, (Plan, TrainingPlan)):
        return entry(x) if captured or isinstance(entry, TrainingPlan) else entry.launch(x)
    if entry is None:
        kind.entry = why_called() or SEEN
    elif entry is SEEN and plans.recording.acquire(blocking=False):
        try:
            out = _recorded(plans, kind, run, spans if is_training(key) else None, x)
        finally:
            plans.recording.release()
        if out is not None:
            return out
    return run(x)


def _rehearsed(
    plans: Plans, key: tuple, spans: _Spans, x: Tensor, why_called: Callable[[], str | None], checkpointed: bool
) -> TrainingPlan | None:
    """The plan for a call that is checkpointed or reads gathered parameters, made at the second one; None for the ops.

    It cannot be recorded as others are: the backward pass that follows is of the nodes of this call, not of its recomputation's, or
    reads the parameters elsewhere.
    """
    fits = not checkpointed or x.is_contiguous()
    if torch.is_anomaly_enabled():
        return None
    kind = plans.called(key)
    if kind.entry is None:
        kind.entry = why_called() or (SEEN if fits else "checkpointed tokens that are not contiguous")
    elif kind.entry is SEEN and fits and can_rehearse() and plans.recording.acquire(blocking=False):
        try:
            if plans.kinds.make_room(kind):
                if (made := spans(x)) is None:
                    kind.entry = "timm's code makes the tokens"
                else:
                    plans.rehearse(kind, made, x)
        finally:
            plans.recording.release()
    return kind.entry if isinstance(kind.entry, TrainingPlan) and fits else None


def _recorded(plans: Plans, kind: Kind, run: _Run, spans: _Spans | None, x: Tensor) -> Output | None:
    """Runs x while recording it, span by span where it trains, and returns the output; None where nothing was done."""
    if not plans.kinds.make_room(kind):
        return None
    if spans is None:
        return plans.record(kind, run, x)
    made = spans(x)
    if made is None:
        kind.entry = "timm's code makes the tokens"
        return None
    return plans.record_training(kind, made, x)
