"""Two launches that fold as one, outside of a plan."""

from collections.abc import Callable, Sequence
from typing import TypeVar
from unittest import mock

Folded = TypeVar("Folded")


def folded_in_one_launch(calls: Sequence[Callable[[], Folded]]) -> list[Folded]:
    """What two calls of `fold_both_forward` give, made by one launch as a plan makes it.

    Raises:
        ValueError: one kernel cannot do both.
    """
    from fastdeit.kernels.gemm import folded_weights
    from fastdeit.kernels.gemm.folded_weights_kernels import fold_four_forward_kernel
    from fastdeit.kernels.runtime.launch import launch

    launches: list[tuple] = []
    with mock.patch.object(folded_weights, "launch", lambda *given: launches.append(given)):
        made = [call() for call in calls]
    (_, *first, num_warps), (_, *second, _) = launches
    call = folded_weights.of_two_branches(tuple(first), tuple(second))
    if call is None:
        raise ValueError("expected two launches of equal tiles, dtypes and missing tensors")
    launch(fold_four_forward_kernel, *call, num_warps)
    return made
