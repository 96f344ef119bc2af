"""Branches that run on a subset of a stream's samples: arguments, and plain PyTorch for what the kernels do with slots.

`slots` (B,) is a permutation: a sample's place among those that a branch keeps, from `kept` on for a sample that it drops.
"""

from typing import Any

import torch
from torch import Tensor

from fastdeit.ops.layer_norm_op import add_layer_norm_reference, layer_norm_reference


def samples_of(slots: Tensor, kept: int) -> Tensor:
    """The samples (kept,) int64 that a branch keeps, in the order of their places."""
    return slots.argsort()[:kept]


def gathered(x: Tensor, slots: Tensor, kept: int) -> Tensor:
    """The samples of x (B, ...) that a branch keeps, (kept, ...)."""
    return x.index_select(0, samples_of(slots, kept))


def spread(branch: Tensor, slots: Tensor) -> Tensor:
    """A branch's (kept, ...) at the places of its samples among all, (B, ...), and 0 for those that it drops."""
    zeros = branch.new_zeros((len(slots), *branch.shape[1:]))
    return zeros.index_copy(0, samples_of(slots, len(branch)), branch)


def head_reference(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    drop_path_scale: Tensor | None = None,
    branch_slots: Tensor | None = None,
    slots: Tensor | None = None,
    kept: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference of a branch op's head in plain PyTorch: x after the addition, and its samples that have slots, normalised."""
    norm = norm_weight, norm_bias, eps
    if branch is not None and branch_slots is not None:
        branch = spread(branch, branch_slots)
    if slots is None or kept is None:
        if branch is None:
            return x, layer_norm_reference(x, *norm)
        return add_layer_norm_reference(x, branch, *norm, drop_path_scale=drop_path_scale)
    if branch is not None:
        x, _ = add_layer_norm_reference(x, branch, None, None, eps, drop_path_scale=drop_path_scale)
    return x, layer_norm_reference(gathered(x, slots, kept), *norm)


def check_slots(x: Any, branch: Any, branch_slots: Any, slots: Any, kept: Any) -> None:
    """Slots and number of samples of the branch that is added to x and of the one after it. The slots' values are not looked at.

    Raises:
        TypeError, ValueError: they do not fit x, the branch or each other.
    """
    for name, given in (("branch_slots", branch_slots), ("slots", slots)):
        if given is None:
            continue
        if not isinstance(given, Tensor) or given.dtype is not torch.int64:
            raise TypeError(f"{name}: expected an int64 tensor, got {getattr(given, 'dtype', type(given).__name__)}")
        if given.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x has, got {given.device}")
        if x.dim() < 2 or given.shape != x.shape[:1] or not given.is_contiguous():
            raise ValueError(
                f"{name}: expected one contiguous slot per sample of x {tuple(x.shape)}, got shape {tuple(given.shape)}"
            )
    if branch_slots is not None:
        if branch is None:
            raise ValueError("branch_slots: expected None without a branch, got a tensor")
        if isinstance(branch, Tensor) and branch.dim() and not 1 <= branch.shape[0] <= x.shape[0]:
            raise ValueError(f"branch: expected 1 to {x.shape[0]} samples with branch_slots, got {branch.shape[0]}")
    if (slots is None) != (kept is None):
        raise ValueError(f"kept: expected a number with slots, and None without, got {kept!r}")
    if kept is None:
        return
    if isinstance(kept, bool) or not isinstance(kept, (int, torch.SymInt)):
        raise TypeError(f"kept: expected an int, got {type(kept).__name__}")
    if not 1 <= kept <= x.shape[0]:
        raise ValueError(f"kept: expected 1 to {x.shape[0]}, the samples of x, got {kept}")
