"""A span of a model's run as one autograd node: one that records it, then one that runs the plan."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd.graph import get_gradient_edge

from fastdeit.blocks.spans import Span
from fastdeit.ops.first_derivative import first_derivative_only
from fastdeit.plan.bound import Bound
from fastdeit.plan.code import Place, Unsupported, why_not_code, why_not_gradients, why_not_output
from fastdeit.plan.program import Program
from fastdeit.plan.reads import Reads
from fastdeit.plan.surroundings import nothing_called
from fastdeit.plan.tape import Buffer, Tape, View
from fastdeit.plan.workspace import Allocation, early_and_late, lifetimes, packed, packed_into, stacked

_Tensors = Sequence[Tensor | None]
_Layout = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a contiguous tensor
_MOST_SAVED = 4  # allocations of a span for what forward leaves to backward: one more costs both passes microseconds
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


class NotFused(Exception):
    """A span's run is not that of the ops."""


class Recording:
    """A span as it runs at one call, forward and at its first backward pass.

    Its ops make a graph of their own, to which the node passes the gradients.

    Args:
        span: of the model.
        read: all tensors that it may read beside what it is given.
        finish: called with the plan, or with the reason why there is none, once that is known.
    """

    def __init__(self, span: Span, read: Sequence[Tensor], finish: Callable[["SpanPlan | str"], None]) -> None:
        self._span, self._read, self._finish = span, read, finish
        self._parameters = [parameter for parameter in span.parameters if parameter.requires_grad]
        self._finished = False  # whether the first backward pass is over

    def __call__(self, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        """The span's outputs.

        Raises:
            NotFused: there are none, and nothing has happened.
        """
        return _Recorded.apply(self, *given, *self._parameters)

    def forward(self, tensors: _Tensors) -> tuple[Tensor | None, ...]:
        given = [t if t is None else _without_history(t) for t in self._given_of(tensors)]
        self._device = next(t.device for t in given if t is not None)
        self._tape = Tape(self._read, [t for t in given if t is not None], differentiated=True)
        with torch.enable_grad(), nothing_called(self._tape), self._tape:
            outputs = self._span.run(*given)
        if outputs is None:
            raise NotFused
        self._events = len(self._tape.events)
        self._given, self._results = self._views(given), self._views(outputs)
        self._refused = _why_not_outputs(self._results, outputs)
        # What the graph does not need of the tensors is given back as it is without a recording.
        self._layouts = [(t.shape, t.dtype) if t is not None and t.requires_grad else None for t in outputs]
        self._starts = [get_gradient_edge(t) for t in outputs if t is not None and t.requires_grad]
        self._ends = [get_gradient_edge(t) if t is not None and t.requires_grad else None for t in given]
        if not self._starts:
            self._end([], ())
        return tuple(t if t is None else t.detach() for t in outputs)

    def constant(self, outputs: _Tensors) -> list[Tensor]:
        """The outputs that have no gradient."""
        return [t for t, layout in zip(outputs, self._layouts, strict=True) if layout is None and t is not None]

    def backward(self, gradients: _Tensors) -> list[Tensor | None]:
        received = [t for t in received_gradients(gradients, self._layouts, self._device) if t is not None]
        learned = [*self._ends, *self._parameters]
        wanted: Any = [each for each in learned if each is not None]
        options = dict(retain_graph=_keeps_graph(), allow_unused=True)
        if self._finished:  # a second backward pass
            made = torch.autograd.grad(self._starts, wanted, received, **options)
        else:
            known: set[int] = set()
            for i, gradient in enumerate(received):  # so that each has an address of its own
                received[i] = gradient.clone() if gradient.data_ptr() in known else gradient
                known.add(received[i].data_ptr())
            buffers = self._tape.receive(received)
            with nothing_called(self._tape), self._tape:
                made = torch.autograd.grad(self._starts, wanted, received, **options)
            self._end(buffers, made)
        if not options["retain_graph"]:
            self._starts, self._ends = [], []
        each = iter(made)
        return [end if end is None else next(each) for end in learned]

    def _given_of(self, tensors: _Tensors) -> _Tensors:
        return tensors[: len(tensors) - len(self._parameters)]

    def _views(self, tensors: _Tensors) -> list[View | None]:
        return [t if t is None else self._tape.view(t) for t in tensors]

    def _end(self, received: list[Buffer], made: Sequence[Tensor | None]) -> None:
        """Makes the plan, once, from the gradients' buffers that backward received and the gradients that it returned."""
        tape, self._finished = self._tape, True
        each_received, each_made = iter(received), iter(made)
        gradients = [layout if layout is None else next(each_received) for layout in self._layouts]
        of_inputs = [end if end is None else next(each_made) for end in self._ends]
        of_parameters = list(each_made)
        learned = [p for p, g in zip(self._parameters, of_parameters, strict=False) if g is not None]
        made = [*of_inputs, *(g for g in of_parameters if g is not None)]
        views = [t if t is None else tape.view(t) for t in made]
        reason = tape.refused or self._refused or why_not_gradients(views, made)
        if reason is None:
            events = tape.events[: self._events], tape.events[self._events :]
            try:
                plan = SpanPlan(
                    *events, self._given, self._results, gradients, views, learned, self._read, self._device
                )
            except Unsupported as unsupported:
                reason = str(unsupported)
        self._finish(reason or plan)
        del self._tape


def _why_not_outputs(views: Sequence[View | None], tensors: _Tensors) -> str | None:
    for view, tensor in zip(views, tensors, strict=True):
        if view is not None and tensor is not None and (reason := why_not_output(view, tensor)) is not None:
            return reason
    return None


class _WithoutHistory(torch.autograd.Function):
    """(tensor without a gradient, tensor to differentiate by) -> the first one as if computed from the second.

    Its node holds no memory, as a leaf would.
    """

    @staticmethod
    def forward(ctx, tensor, leaf):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError  # differentiation ends here


def _without_history(tensor: Tensor) -> Tensor:
    """A tensor on the same memory without its history; a leaf if it needs a gradient."""
    if not tensor.requires_grad:
        return tensor.detach()
    with torch.enable_grad():
        return _WithoutHistory.apply(tensor.detach(), torch.empty(0, requires_grad=True))


class _Recorded(torch.autograd.Function):
    """(recording, *inputs, *parameters) -> outputs."""

    @staticmethod
    def forward(ctx, recording, *tensors):
        outputs = recording.forward(tensors)
        ctx.recording = recording
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*recording.constant(outputs))
        ctx.save_for_backward(torch.empty(0))  # so that a second backward pass fails as ever
        return outputs

    @staticmethod
    @first_derivative_only
    def backward(ctx, *gradients):
        ctx.saved_tensors  # noqa: B018
        return None, *ctx.recording.backward(gradients)


class SpanPlan:
    """A span's launches, forward and backward.

    What backward reads lies in workspaces that the node holds; backward gives back each once it was read for the last time. What
    lives within one pass lies in others: in backward in two, of which one goes when less than half is needed.

    Args:
        first, second: events of forward and of backward.
        given, results: forward's.
        gradients: buffers of the results' that backward is given; None for a result that has none.
        made: backward's: gradients of what is given and of the parameters.
        learned: those parameters.
        read: all tensors that the events may read beside what is given.

    Attributes:
        events: both passes'.

    Raises:
        Unsupported: it cannot be repeated; the text says why.
    """

    def __init__(
        self,
        first: list,
        second: list,
        given: Sequence[View | None],
        results: Sequence[View | None],
        gradients: Sequence[Buffer | None],
        made: Sequence[View | None],
        learned: Sequence[Tensor],
        read: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self.events, self.learned, self.device = [*first, *second], tuple(learned), device
        self.layouts = [
            None if buffer is None or view is None else (view.shape, view.dtype)
            for buffer, view in zip(gradients, results, strict=True)
        ]
        again = {buffer for event in second for buffer in event.buffers}
        self.inputs_read = [i for i, view in enumerate(given) if view is not None and view.buffer in again]
        self.results_read = [i for i, view in enumerate(results) if view is not None and view.buffer in again]
        self.saved = Reads(second, read).parameters
        self.addresses = [parameter.untyped_storage().data_ptr() for parameter in self.saved]
        in_forward, in_backward = lifetimes(first), lifetimes(second)
        for view in filter(None, (*results, *made)):
            in_forward.pop(view.buffer, None)
            in_backward.pop(view.buffer, None)
        kept = {buffer: last for buffer, (_, last) in in_backward.items() if buffer in in_forward}
        saved = stacked(kept, _MOST_SAVED)
        inputs = [view if view is None else view.buffer for view in given]
        outputs = [view if view is None else view.buffer for view in results]
        received = [*gradients, *(inputs[i] for i in self.inputs_read), *(outputs[i] for i in self.results_read)]
        passing = packed({buffer: life for buffer, life in in_forward.items() if buffer not in kept})
        self.saved_sizes, self._passing_size = [each.size for each in saved], passing.size
        self._forward = _bound(first, _places(*saved, passing), inputs, results, device)
        for code in ((first, inputs, results), (second, received, made)):
            if (reason := why_not_code(*code)) is not None:
                raise Unsupported(reason)
        # Made when needed first, so that a recording does not wait for them.
        later = {buffer: life for buffer, life in in_backward.items() if buffer not in kept}
        self._make_backward = functools.partial(_backward_after, saved, kept, later, second, received, made, device)
        self._make_repeatable = functools.partial(_backward_in, saved, later, second, received, made, device)

    def __call__(self, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        return _apply(self, *unwrap_dead_wrappers(given), *self.learned)

    def forward(self, saved: list[Tensor], given: _Tensors) -> tuple[Tensor | None, ...]:
        passing = self._empty(self._passing_size)
        return self._forward.at(*map(Tensor.data_ptr, saved), passing.data_ptr())(*given)

    def backward(self, saved: list[Tensor], received: _Tensors) -> tuple[Tensor | None, ...]:
        """The gradients. Takes the tensors from the list, unless another backward pass is to follow."""
        if _keeps_graph():
            workspaces, code = list(saved), self.repeatable
        else:
            workspaces, code = saved, self.once
        workspaces += map(self._empty, code.sizes)
        return code.bound.at(*map(Tensor.data_ptr, workspaces))(workspaces, *received)

    @functools.cached_property
    def once(self) -> "_Backward":
        """Backward after which there is no other: what is read for the last time leaves its place to others."""
        return self._make_backward()

    @functools.cached_property
    def repeatable(self) -> "_Backward":
        """Backward that writes over nothing which it reads; few steps need it."""
        return self._make_repeatable()

    def allocate(self) -> list[Tensor]:
        """Memory for what forward leaves to backward."""
        return list(map(self._empty, self.saved_sizes))

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)


class _Backward(NamedTuple):
    """Backward's code, and the sizes of its allocations beside those of what forward left."""

    bound: Bound
    sizes: list[int]


def _backward_after(saved: list[Allocation], kept: dict[Buffer, int], later: dict, *rest: Any) -> _Backward:
    """Backward with its own buffers in the place of those kept for it, after the last event that reads them, where they fit."""
    inside, others = packed_into(later, {buffer: (0, last) for buffer, last in kept.items()}, saved)
    shared = [Allocation({**each.offsets, **more}, each.size) for each, more in zip(saved, inside, strict=True)]
    return _backward_in(shared, others, *rest)


def _backward_in(
    saved: list[Allocation], rest: dict, events: list, received: list, made: Sequence[View | None], device: torch.device
) -> _Backward:
    """Backward with those buffers in allocations of their own."""
    passing = [packed(lives) for lives in early_and_late(rest)]
    bound = _bound(events, _places(*saved, *passing), received, made, device, gives_back=True)
    return _Backward(bound, [each.size for each in passing])


def _places(*allocations: Allocation) -> dict[Buffer, Place]:
    return {
        buffer: Place(number, offset)
        for number, allocation in enumerate(allocations)
        for buffer, offset in allocation.offsets.items()
    }


def _bound(events: list, places: dict, inputs: list, outputs: Sequence[View | None], device, **options: bool) -> Bound:
    with torch.inference_mode(False), torch.no_grad():
        return Bound(Program(events, places, inputs, outputs, device, **options))


class _Planned(torch.autograd.Function):
    """(plan, *inputs, *parameters) -> outputs."""

    @staticmethod
    def forward(ctx, plan, *tensors):
        given = tensors[: len(tensors) - len(plan.learned)]
        ctx.workspaces = plan.allocate()
        results = plan.forward(ctx.workspaces, given)
        ctx.plan = plan
        # Kept until backward has read them, where someone gives a parameter other data.
        ctx.storages = list(map(Tensor.untyped_storage, plan.saved))
        ctx.set_materialize_grads(False)
        constant = [t for t, layout in zip(results, plan.layouts, strict=True) if layout is None and t is not None]
        ctx.mark_non_differentiable(*constant)
        read = [given[i] for i in plan.inputs_read] + [results[i] for i in plan.results_read]
        ctx.save_for_backward(*read, *plan.saved)
        return results

    @staticmethod
    @first_derivative_only
    def backward(ctx, *gradients):
        plan = ctx.plan
        read = list(ctx.saved_tensors)
        if list(map(torch.UntypedStorage.data_ptr, ctx.storages)) != plan.addresses:
            raise RuntimeError("the memory of a parameter was given back or moved between forward and backward")
        received = received_gradients(gradients, plan.layouts, plan.device)
        made = plan.backward(ctx.workspaces, received + read[: len(read) - len(plan.saved)])
        if not _keeps_graph():
            ctx.storages = None
        return None, *made


# What `Function.apply` calls once it has looked at each of its arguments; the parameters are those of the recording.
_apply: Any = super(torch.autograd.Function, _Planned).apply


def received_gradients(
    gradients: _Tensors, layouts: Sequence[_Layout | None], device: torch.device
) -> list[Tensor | None]:
    """Gradients as launches read them: contiguous and aligned, zeros for one that is missing; None where there is no layout."""
    received: list[Tensor | None] = []
    for gradient, layout in zip(gradients, layouts, strict=True):
        if layout is None:
            gradient = None
        elif gradient is None:
            gradient = torch.zeros(layout[0], dtype=layout[1], device=device)
        else:
            gradient = gradient.resolve_neg().contiguous()
            if gradient.data_ptr() % 16:
                gradient = gradient.clone()
        received.append(gradient)
    return received
