"""Stochastic depth by the host's operations, without a call of its module: drawn by the same random numbers, in the same order."""

from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

# Classes whose masks are drawn here; all but timm's draw floor(keep + rand). The Dynamo of PyTorch 2.8 does not trace a set.
DROP_PATHS: list[type[nn.Module]] = [timm.layers.DropPath]
_TRIAL_RATE, _TRIAL_SAMPLES = 0.4, 4096


def register_drop_path(kind: type[nn.Module]) -> None:
    """Makes known a host's class, constructed with the probability, if it gives x / keep * floor(keep + rand) on trial."""
    if kind not in DROP_PATHS and _floors(kind):
        DROP_PATHS.append(kind)


@torch.no_grad()
def _floors(kind: type[nn.Module]) -> bool:
    keep = 1 - _TRIAL_RATE
    ours = lambda x: x.div(keep) * _floored(x, x.dtype, keep)  # noqa: E731
    try:
        theirs = kind(_TRIAL_RATE).train()
    except TypeError:  # it is constructed otherwise
        return False
    results = []
    with torch.random.fork_rng(devices=[]):
        for function in (ours, theirs):
            torch.default_generator.manual_seed(0)  # the CPU's alone
            for dtype in (torch.float32, torch.bfloat16):
                # So many that masks drawn in float32 differ: PyTorch 2.14 rounds those for bfloat16, by which one in 150 changes.
                results.append(function(torch.arange(1, _TRIAL_SAMPLES + 1, dtype=dtype, device="cpu").view(-1, 1, 1)))
    return all(map(torch.equal, results[:2], results[2:]))


def dropped_path(drop_path: Any, branch: Tensor) -> Tensor:
    """drop_path(branch), bit for bit."""
    mask = _mask(drop_path, branch, branch.dtype)
    if mask is None:
        return branch
    keep = 1 - drop_path.drop_prob
    if type(drop_path) is not timm.layers.DropPath:
        return branch.div(keep) * mask
    return branch * (mask.div_(keep) if keep > 0.0 and drop_path.scale_by_keep else mask)


def drop_path_scale(drop_path: Any, branch: Tensor, gamma: Tensor | None) -> Tensor | None:
    """Stochastic depth's factor per sample, (B,) float32: 0, or 1/keep in full precision. None if it does nothing.

    The mask is drawn by the host's operations on a tensor of the shape and dtype that the host would draw it for (the branch after
    LayerScale), so that it and the generator's state afterwards are the host's.
    """
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    mask = _mask(drop_path, branch, dtype)
    if mask is None:
        return None
    keep = 1 - drop_path.drop_prob
    scales = type(drop_path) is not timm.layers.DropPath or (keep > 0.0 and drop_path.scale_by_keep)
    scale = mask.to(torch.float32).reshape(-1)
    return scale / keep if scales else scale


def _mask(drop_path: Any, branch: Tensor, dtype: torch.dtype) -> Tensor | None:
    """1 for each sample that is kept and 0 for the others, (B, 1, ...); None if stochastic depth does nothing."""
    if type(drop_path) is nn.Identity or drop_path.drop_prob == 0.0 or not drop_path.training:
        return None
    keep = 1 - drop_path.drop_prob
    if type(drop_path) is timm.layers.DropPath:
        return branch.new_empty((branch.shape[0],) + (1,) * (branch.dim() - 1), dtype=dtype).bernoulli_(keep)
    return _floored(branch, dtype, keep)


def _floored(branch: Tensor, dtype: torch.dtype, keep: float) -> Tensor:
    """As those draw that have the code which timm had until 2021."""
    shape = (branch.shape[0],) + (1,) * (branch.dim() - 1)
    return (torch.rand(shape, dtype=dtype, device=branch.device) + keep).floor_()
