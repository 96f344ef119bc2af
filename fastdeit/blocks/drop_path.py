"""timm's stochastic depth by its operations, without a call of its module: drawn by the same random numbers, in the same order."""

from typing import Any

import torch
from torch import Tensor, nn


def dropped_path(drop_path: Any, branch: Tensor) -> Tensor:
    """drop_path(branch), bit for bit."""
    mask = _mask(drop_path, branch, branch.dtype)
    if mask is None:
        return branch
    keep = 1 - drop_path.drop_prob
    return branch * (mask.div_(keep) if keep > 0.0 and drop_path.scale_by_keep else mask)


def drop_path_scale(drop_path: Any, branch: Tensor, gamma: Tensor | None) -> Tensor | None:
    """Stochastic depth's factor per sample, (B,) float32: 0, or 1/keep in full precision. None if it does nothing.

    The mask is drawn by timm's operations on a tensor of the shape and dtype that timm would draw it for (the branch after
    LayerScale), so that it and the generator's state afterwards are timm's.
    """
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    mask = _mask(drop_path, branch, dtype)
    if mask is None:
        return None
    keep = 1 - drop_path.drop_prob
    scale = mask.to(torch.float32).reshape(-1)
    return scale / keep if keep > 0.0 and drop_path.scale_by_keep else scale


def _mask(drop_path: Any, branch: Tensor, dtype: torch.dtype) -> Tensor | None:
    """1 for each sample that is kept and 0 for the others, (B, 1, ...); None if stochastic depth does nothing."""
    if type(drop_path) is nn.Identity or drop_path.drop_prob == 0.0 or not drop_path.training:
        return None
    mask = branch.new_empty((branch.shape[0],) + (1,) * (branch.dim() - 1), dtype=dtype)
    return mask.bernoulli_(1 - drop_path.drop_prob)
