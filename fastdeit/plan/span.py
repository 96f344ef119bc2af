"""A span of a model's run from its plan, as one autograd node."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from fastdeit.ops.first_derivative import first_derivative_only
from fastdeit.plan.bound import Bound
from fastdeit.plan.code import Place, Unsupported, why_not_code
from fastdeit.plan.merging import with_merged_folds
from fastdeit.plan.program import Program
from fastdeit.plan.reads import Reads
from fastdeit.plan.tape import Buffer, Operation, View
from fastdeit.plan.workspace import Allocation, early_and_late, lifetimes, packed, packed_into, stacked, written

_Tensors = Sequence[Tensor | None]
_Layout = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a contiguous tensor
_MOST_SAVED = 4  # allocations of a span for what forward leaves to backward: one more costs both passes microseconds
_PRODUCTS = ("mm", "addmm")
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


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
        reached: for each result the places, among what is given and the parameters, of those that its gradient comes to; None where
            only one result has a gradient.
        read: all tensors that the events may read beside what is given.

    Attributes:
        events: both passes', as recorded and as they are repeated.

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
        reached: list[set[int]] | None,
        read: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self.learned, self.reached, self.device = tuple(learned), reached, device
        self.layouts = [
            None if buffer is None or view is None else (view.shape, view.dtype)
            for buffer, view in zip(gradients, results, strict=True)
        ]
        again = {buffer for event in second for buffer in event.buffers}
        self.events = [*first, *second]
        first = with_merged_folds(first, again)
        self.events += first
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
        self._make_parts = functools.partial(
            _in_two, first, again, _places(*saved, passing), inputs, outputs, results, device
        )
        later = {buffer: life for buffer, life in in_backward.items() if buffer not in kept}
        self._make_backward = functools.partial(_backward_after, saved, kept, later, second, received, made, device)
        self._make_repeatable = functools.partial(_backward_in, saved, later, second, received, made, device)

    def __call__(self, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        return _apply(self, self.forward, *unwrap_dead_wrappers(given), *self.learned)

    def recompute(self, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        """As a call, but all is saved before the launches that make nothing which is: where PyTorch needs no more of the
        recomputation, it stops it there."""
        given, parts = unwrap_dead_wrappers(given), _Parts(self)
        results = _apply(self, parts.first, *given, *self.learned)
        parts.second(given, results)
        return results

    def forward(self, saved: list[Tensor], given: _Tensors) -> tuple[Tensor | None, ...]:
        passing = self.passing()
        return self._forward.at(*map(Tensor.data_ptr, saved), passing.data_ptr())(*given)

    def backward(self, saved: list[Tensor], received: _Tensors) -> tuple[Tensor | None, ...]:
        """The gradients. Takes the tensors from the list, unless another backward pass is to follow."""
        if _keeps_graph():
            return self.repeatable(list(saved), received, self._empty)
        return self.once(saved, received, self._empty)

    @functools.cached_property
    def once(self) -> "_Backward":
        """Backward after which there is no other: what is read for the last time leaves its place to others."""
        return self._make_backward()

    @functools.cached_property
    def repeatable(self) -> "_Backward":
        """Backward that writes over nothing which it reads; few steps need it."""
        return self._make_repeatable()

    @functools.cached_property
    def parts(self) -> tuple[Bound, Bound]:
        """Forward in two: up to the last launch that makes what backward reads, and what follows."""
        return self._make_parts()

    def allocate(self) -> list[Tensor]:
        """Memory for what forward leaves to backward."""
        return list(map(self._empty, self.saved_sizes))

    def passing(self) -> Tensor:
        """Memory for what lives within forward."""
        return self._empty(self._passing_size)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)


class _Parts:
    """One run of a plan's forward in its two parts."""

    def __init__(self, plan: SpanPlan) -> None:
        self._plan = plan

    def first(self, saved: list[Tensor], given: _Tensors) -> tuple[Tensor | None, ...]:
        """The results, some of which the second part fills."""
        self._workspaces = [*saved, self._plan.passing()]
        return self._plan.parts[0].at(*map(Tensor.data_ptr, self._workspaces))(*given)

    def second(self, given: _Tensors, results: _Tensors) -> None:
        made = [t if t is None else t.detach() for t in results]
        with torch.no_grad():
            self._plan.parts[1].at(*map(Tensor.data_ptr, self._workspaces))(*given, *made)


def _in_two(
    events: list, read: set[Buffer], places: dict, inputs: list, outputs: list, results: Sequence[View | None], device
) -> tuple[Bound, Bound]:
    """Forward cut behind the last event that may write to what backward reads of it. The second part writes to given outputs."""
    cut = 1 + max((at for at, event in enumerate(events) if read & written(event)), default=-1)
    second = _bound(events[cut:], places, [*inputs, *outputs], [], device)
    return _bound(events[:cut], places, inputs, results, device), second


class _Backward(NamedTuple):
    """Backward's code, and the sizes of its allocations beside those of what forward left.

    PyTorch's sum for the gradient of a LayerScale takes memory of its own while it runs. So where there is one among the operations
    with which backward begins, they are a part of their own, before memory is taken for the others.

    Attributes:
        before: that part, None where there is none. It gives the gradients that it makes, and None for the others.
        sizes_before: of the allocations that both parts use, and of those of the first one alone.
        bound: what follows, or all.
        sizes: of its allocations.
    """

    before: Bound | None
    sizes_before: tuple[list[int], list[int]]
    bound: Bound
    sizes: list[int]

    def __call__(
        self, workspaces: list[Tensor], received: _Tensors, empty: Callable[[int], Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The gradients. Takes the tensors from the list."""
        if self.before is None:
            workspaces += map(empty, self.sizes)
            return self.bound.at(*map(Tensor.data_ptr, workspaces))(workspaces, *received)
        workspaces += map(empty, self.sizes_before[0])
        alone = list(map(empty, self.sizes_before[1]))
        first = self.before.at(*map(Tensor.data_ptr, (*workspaces, *alone)))(*received)
        del alone
        workspaces += map(empty, self.sizes)
        then = self.bound.at(*map(Tensor.data_ptr, workspaces))(workspaces, *received)
        return tuple(b if a is None else a for a, b in zip(first, then, strict=True))


def _backward_after(saved: list[Allocation], kept: dict[Buffer, int], later: dict, *rest: Any) -> _Backward:
    """Backward with its own buffers in the place of those kept for it, after the last event that reads them, where they fit."""
    inside, others = packed_into(later, {buffer: (0, last) for buffer, last in kept.items()}, saved)
    shared = [Allocation({**each.offsets, **more}, each.size) for each, more in zip(saved, inside, strict=True)]
    return _backward_in(shared, others, *rest)


def _backward_in(
    saved: list[Allocation], rest: dict, events: list, received: list, made: Sequence[View | None], device: torch.device
) -> _Backward:
    """Backward with those buffers in allocations of their own."""
    cut = sums_first(events, made)
    early = {buffer: life for buffer, life in rest.items() if life[1] < cut}
    shared = {buffer: life for buffer, life in rest.items() if life[0] < cut <= life[1]}
    later = {buffer: life for buffer, life in rest.items() if life[0] >= cut}
    both, alone = ([packed(lives)] if lives else [] for lives in (shared, early))
    passing = [packed(lives) for lives in early_and_late(later)]
    before, first = None, {buffer for event in events[:cut] for buffer in event.buffers}
    if cut:
        gradients = [view if view is not None and view.buffer in first else None for view in made]
        before = _bound(events[:cut], _places(*saved, *both, *alone), received, gradients, device)
        made = [None if view is not None and view.buffer in first else view for view in made]
    bound = _bound(events[cut:], _places(*saved, *both, *passing), received, made, device, gives_back=True)
    sizes = [each.size for each in both], [each.size for each in alone]
    return _Backward(before, sizes, bound, [each.size for each in passing])


def sums_first(events: list, made: Sequence[View | None]) -> int:
    """How many operations come before all launches and products, if a sum is among them; 0 where later events touch a gradient that
    they touch."""
    first = list(
        itertools.takewhile(lambda event: isinstance(event, Operation) and event.kind not in _PRODUCTS, events)
    )
    gradients = {view.buffer for view in made if view is not None}
    parts = (first, events[len(first) :])
    early, late = ({buffer for event in part for buffer in event.buffers} & gradients for part in parts)
    return len(first) if any(event.kind == "sum" for event in first) and not early & late else 0


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
    """(plan, its forward, *inputs, *parameters) -> outputs."""

    @staticmethod
    def forward(ctx, plan, forward, *tensors):
        given = tensors[: len(tensors) - len(plan.learned)]
        workspaces = plan.allocate()
        results = forward(workspaces, given)
        ctx.plan = plan
        # Kept until backward has read them, where someone gives a parameter other data.
        ctx.storages = list(map(Tensor.untyped_storage, plan.saved))
        ctx.set_materialize_grads(False)
        constant = [t for t, layout in zip(results, plan.layouts, strict=True) if layout is None and t is not None]
        ctx.mark_non_differentiable(*constant)
        read = [given[i] for i in plan.inputs_read] + [results[i] for i in plan.results_read]
        # What autograd saves lives until the whole node is through, but checkpointing looks at that alone, and keeps none of it.
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        ctx.workspaces, ctx.failed = None if hooked else workspaces, False
        ctx.save_for_backward(*read, *plan.saved, *(workspaces if hooked else ()))
        return results

    @staticmethod
    @first_derivative_only
    def backward(ctx, *gradients):
        plan = ctx.plan
        saved = list(ctx.saved_tensors)
        if list(map(torch.UntypedStorage.data_ptr, ctx.storages)) != plan.addresses:
            raise RuntimeError("the memory of a parameter was given back or moved between forward and backward")
        read = saved[: len(plan.inputs_read) + len(plan.results_read)]
        workspaces = saved[len(read) + len(plan.saved) :] if ctx.workspaces is None else ctx.workspaces
        if ctx.failed:
            raise RuntimeError(
                "Trying to backward through the graph a second time, of which the first one failed and may have written over what "
                "forward saved. Run forward again, or pass retain_graph=True to the first one"
            )
        if [workspace.nbytes for workspace in workspaces] != plan.saved_sizes:
            raise RuntimeError("checkpointing: the recomputation of a block differs from its forward pass")
        del saved  # backward gives back the workspaces, of which there is no other owner now
        received = received_gradients(gradients, plan.layouts, plan.device)
        try:
            made = plan.backward(workspaces, received + read)
        except BaseException:
            ctx.failed = not _keeps_graph() and ctx.workspaces is not None
            raise
        if not _keeps_graph():
            ctx.storages = None
        return None, None, *only_reached(made, gradients, plan.reached)


# What `Function.apply` calls once it has looked at each of its arguments; the parameters are those of the recording.
_apply: Any = super(torch.autograd.Function, _Planned).apply


def only_reached(made: _Tensors, gradients: _Tensors, reached: list[set[int]] | None) -> _Tensors:
    """Gradients, without those that come from outputs alone which have none: PyTorch's optimizers skip a parameter without one.

    Args:
        made: of inputs and parameters.
        gradients: of the outputs. In the place of one that is missing, `made` was computed from zeros.
        reached: as `SpanPlan` has it.
    """
    if reached is None or not any(g is None and places for g, places in zip(gradients, reached, strict=True)):
        return made
    found = set().union(*(places for g, places in zip(gradients, reached, strict=True) if g is not None))
    return [gradient if place in found else None for place, gradient in enumerate(made)]


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
