"""Fewer launches than were recorded: what the two branches of a block fold, by one launch in the place of the first.

A fold makes of parameters the weights that a branch multiplies by. In training backward reads these too: their memory is taken when
the span begins, and given back by backward, so that they may be made earlier at no cost. What lives within forward alone would take
memory for longer, and is left where it is: a run without gradients, and weights that backward does not read.
"""

from collections.abc import Container, Sequence
from typing import Any

import torch

from fastdeit.plan.tape import Buffer, Launch, Operation, View
from fastdeit.plan.workspace import lifetimes, written


def with_merged_folds(events: Sequence[Launch | Operation], kept: Container[Buffer]) -> list[Launch | Operation]:
    """The events of a forward pass on the current device, in which one launch stands for two that fold, where that is right.

    Args:
        kept: buffers that backward reads.
    """
    from fastdeit.kernels.gemm.folded_weights_kernels import fold_both_forward_kernel
    from fastdeit.kernels.runtime.refusal import KernelRefused

    if torch.cuda.is_current_stream_capturing():  # a kernel that was not run before may have to be loaded
        return list(events)
    made: list[Launch | Operation] = []
    first: Launch | None = None  # a fold that waits for another one
    at = 0  # its place
    known: dict[tuple, Any] = {}  # blocks of one size have one kernel
    for event in events:
        if isinstance(event, Launch) and event.made.kernel is fold_both_forward_kernel:
            if first is not None and _costs_nothing(event, kept) and all(_may_precede(event, e) for e in made[at:]):
                try:
                    merged = _merged(first, event, known)
                except KernelRefused:
                    return list(events)
                if merged is not None:
                    made[at], first = merged, None
                    continue
            first, at = event, len(made)
        made.append(event)
    return made


def _costs_nothing(event: Launch, kept: Container[Buffer]) -> bool:
    """Whether all matrices that a launch makes are kept. Its vectors, biases of a few KB, live from then on."""
    own = lifetimes([event])
    made = (arg for arg in event.args if isinstance(arg, View) and arg.buffer in own)
    return all(len(view.shape) == 1 or view.buffer in kept for view in made)


def _may_precede(event: Launch, other: Launch | Operation) -> bool:
    """Whether a launch may be made before an event that was recorded before it: neither touches what the other writes to."""
    return not (written(event).intersection(other.buffers) or written(other).intersection(event.buffers))


def _merged(first: Launch, second: Launch, known: dict[tuple, Any]) -> Launch | None:
    """One launch for two; None where one kernel cannot do what both do. Remembers launches by what they are described by."""
    from fastdeit.kernels.gemm.folded_weights import of_two_branches
    from fastdeit.kernels.gemm.folded_weights_kernels import fold_four_forward_kernel
    from fastdeit.kernels.runtime.launch import Pointer, described_launch
    from fastdeit.kernels.runtime.raw_launch import aligned_arguments, raw_launcher

    calls = ((each.made.grid, each.args, each.made.constexprs) for each in (first, second))
    if (call := of_two_branches(*calls)) is None:
        return None
    grid, args, constexprs = call
    pointers: list[Any] = []
    for event in (first, second):
        aligned = aligned_arguments(event.made)
        pointers += [Pointer(x.dtype, at in aligned) if isinstance(x, View) else x for at, x in enumerate(event.args)]
    described = (grid, tuple(pointers), constexprs)
    if described not in known:
        num_warps = first.made.compiled.kernel.metadata.num_warps
        known[described] = described_launch(fold_four_forward_kernel, *described, num_warps)
    made = known[described]
    return None if made is None or raw_launcher(made) is None else Launch(made, args)
