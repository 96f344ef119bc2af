"""Plans of runs with gradients: a call's spans, recorded one after the other, and the backward pass that follows."""

import functools
from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from fastdeit.blocks.spans import Span
from fastdeit.plan.reads import Reads, places
from fastdeit.plan.recording import NotFused, Recording
from fastdeit.plan.span import SpanPlan

Output = Tensor | tuple[Tensor, ...]


class TrainingPlan:
    """A run of spans, each one autograd node, repeated for other inputs.

    Args:
        spans: in their order.
        read: all tensors that they may read beside their inputs, but for
        gathered: parameters whose memory is other at each call, inputs of the only span.

    Attributes:
        reads: the parameters and kernels on which it depends.
    """

    def __init__(self, spans: Sequence[SpanPlan], read: Sequence[Tensor], gathered: Sequence[Tensor]) -> None:
        self._spans, self._gathered = spans, gathered
        self.reads = Reads([event for span in spans for event in span.events], read)
        self.still_holds = self.reads.still_hold
        for span in spans:
            span.events = []

    def __call__(self, x: Tensor) -> Output | None:
        tensors: tuple[Tensor | None, ...] = (x, *self._gathered)
        for span in self._spans:
            tensors = span(*tensors)
        return _output(tensors)

    def recompute(self, x: Tensor) -> Output | None:
        """As a call, in a recomputation, which PyTorch may stop by an exception once all is saved that backward needs."""
        x = x.contiguous()  # as it was when saved; a hook may have given it back otherwise, at any address
        tensors: tuple[Tensor | None, ...] = (x.clone() if x.data_ptr() % 16 else x, *self._gathered)
        for span in self._spans:
            tensors = span.recompute(*tensors)
        return _output(tensors)


class Attempt:
    """A call that is recorded; autograd's nodes keep it until their backward passes have run.

    Args:
        spans: of the call.
        read: all tensors that they may read beside their inputs, but for
        gathered: parameters whose memory is other at each call. With some there is one span.
        finish: called with the plan, or with the reason why there is none, once that is known; with None where the recording says
            nothing about other calls.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        read: Sequence[Tensor],
        gathered: Sequence[Tensor],
        finish: Callable[[TrainingPlan | str | None], None],
    ) -> None:
        self._spans, self._read, self._gathered, self._finish = spans, read, gathered, finish
        self._places = places(read)
        self._plans: list[SpanPlan | None] = [None] * len(spans)

    def __call__(self, x: Tensor) -> Output | None:
        """The last span's output or outputs, None where the spans may not run."""
        tensors: tuple[Tensor | None, ...] = (x, *map(Tensor.detach, self._gathered))
        try:
            for i, span in enumerate(self._spans):
                tensors = Recording(span, self._read, functools.partial(self._found, i))(*tensors)
        except NotFused:
            self._finish("timm's code runs around everything")
            return None
        return _output(tensors)

    def _found(self, index: int, plan: SpanPlan | str | None) -> None:
        if places(self._read) != self._places:  # what was recorded reads the data that a parameter had then
            plan = None
        if plan is None or isinstance(plan, str):
            self._finish(plan)
            return
        self._plans[index] = plan
        found = [plan for plan in self._plans if plan is not None]
        if len(found) == len(self._plans):
            self._finish(TrainingPlan(found, self._read, self._gathered))


def _output(tensors: tuple[Tensor | None, ...]) -> Output | None:
    """A tensor alone, or the tuple of several."""
    return cast(Output, tensors) if len(tensors) > 1 else tensors[0]
