"""FLOPs of the branch ops for PyTorch's counter: of the products that they make. Shapes stand for tensors."""

from collections.abc import Sequence
from math import prod

import torch

from fastdeit.ops.branches import GRADIENTS, HEAD_GRADIENTS


def rows_of(x: Sequence[int], kept: int | None) -> int:
    """Rows of the products of a branch on `kept` of the samples of x (B, ..., C), on all if that is None."""
    return prod(x[:-1]) if kept is None else kept * prod(x[1:-1])


def layers_flops(rows: int, weight: Sequence[int], tail_weight: Sequence[int]) -> int:
    """Of a branch's first and last layer in forward."""
    return 2 * rows * (prod(weight) + prod(tail_weight))


def goes_into_head(grad_dtypes: Sequence[torch.dtype | None]) -> bool:
    """Whether backward goes beyond the last layer, of dtypes in the order of GRADIENTS."""
    return any(dtype is not None for dtype in grad_dtypes[: len(HEAD_GRADIENTS)])


def layers_backward_flops(
    rows: int,
    weight: Sequence[int],
    tail_weight: Sequence[int],
    grad_dtypes: Sequence[torch.dtype | None],
    folded: bool,
) -> int:
    """Of both layers in backward. Of a folded LayerNorm the parameters' gradients come from that of the first layer's weight."""
    needed = {name for name, dtype in zip(GRADIENTS, grad_dtypes, strict=True) if dtype is not None}
    of_weight = {"weight", "norm_weight"} if folded else {"weight"}
    of_rows = {"x", "branch"} if folded else {"x", "branch", "norm_weight", "norm_bias"}
    head = bool(needed & of_weight) + bool(needed & of_rows)
    tail = bool(needed & {"tail_weight", "gamma"}) + goes_into_head(grad_dtypes)
    return 2 * rows * (head * prod(weight) + tail * prod(tail_weight))
