"""A span of a model's run as one autograd node that records it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fastdeit.blocks.spans import Span
from fastdeit.ops.first_derivative import first_derivative_only
from fastdeit.plan.code import Unsupported, why_not_gradients, why_not_output
from fastdeit.plan.span import SpanPlan, only_reached, received_gradients
from fastdeit.plan.surroundings import nothing_called
from fastdeit.plan.tape import Buffer, Tape, View

_Tensors = Sequence[Tensor | None]
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


class NotFused(Exception):
    """A span's run is not that of the ops."""


class Passing(str):
    """A reason that may not be there at the next call."""


class Recording:
    """A span as it runs at one call, forward and at its first backward pass.

    Its ops make a graph of their own, to which the node passes the gradients.

    Args:
        span: of the model.
        read: all tensors that it may read beside what it is given.
        finish: called with the plan, or with the reason why there is none, once that is known; with None after a backward pass that
            failed.
    """

    def __init__(self, span: Span, read: Sequence[Tensor], finish: Callable[["SpanPlan | str | None"], None]) -> None:
        self._span, self._read, self._finish = span, read, finish
        # Each once, also one that several blocks share: its gradient is the sum over all that the span does with it.
        self._parameters = list({id(p): p for p in span.parameters if p.requires_grad}.values())
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
        self._reached = self._reached_from(outputs)
        if not self._starts:
            self._end([], ())
        return tuple(t if t is None else t.detach() for t in outputs)

    def constant(self, outputs: _Tensors) -> list[Tensor]:
        """The outputs that have no gradient."""
        return [t for t, layout in zip(outputs, self._layouts, strict=True) if layout is None and t is not None]

    def backward(self, gradients: _Tensors) -> _Tensors:
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
            try:
                with nothing_called(self._tape), self._tape:
                    made = torch.autograd.grad(self._starts, wanted, received, **options)
            except BaseException:  # another one may follow, if the graph is retained
                self._finished = True
                self._finish(None)
                raise
            self._end(buffers, made)
        if not options["retain_graph"]:
            self._starts, self._ends = [], []
        each = iter(made)
        return only_reached([end if end is None else next(each) for end in learned], gradients, self._reached)

    def _reached_from(self, outputs: _Tensors) -> list[set[int]] | None:
        """For each output the places, among inputs and parameters, of those that it was computed from; None where one output has a
        gradient, which then comes."""
        if len(self._starts) < 2:
            return None
        ends: list[Any] = [*self._ends, *map(get_gradient_edge, self._parameters)]
        places = {end.node: place for place, end in enumerate(ends) if end is not None}
        return [set() if t is None or t.grad_fn is None else _places_behind(t.grad_fn, places) for t in outputs]

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
            of_plan = [at for at, g in enumerate((*of_inputs, *of_parameters)) if g is not None or at < len(of_inputs)]
            reached = self._reached and [
                {new for new, at in enumerate(of_plan) if at in each} for each in self._reached
            ]
            try:
                plan = SpanPlan(
                    *events,
                    self._given,
                    self._results,
                    gradients,
                    views,
                    learned,
                    reached,
                    self._read,
                    self._device,
                )
            except Unsupported as unsupported:
                reason = str(unsupported)
        self._finish(Passing(reason) if reason and tape.compiled else reason or plan)
        del self._tape


def _places_behind(node: Any, places: dict[Any, int]) -> set[int]:
    """Which of these nodes, by their places, a gradient at a node comes to."""
    seen, found = {node}, [node]
    while found:
        for behind, _ in found.pop().next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                found.append(behind)
    return {places[each] for each in seen & places.keys()}


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
