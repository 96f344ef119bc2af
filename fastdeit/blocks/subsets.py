"""Stochastic depth that computes only what it keeps: each residual branch runs on a random subset of the samples, of fixed size.

    x[samples] += B / kept * branch(x[samples]),    kept = round(B (1 - p))

(Huang et al. 2016, with subsets of fixed size as in Oquab et al. 2023, "DINOv2", appendix.) A sample is in the subset with
probability kept / B, so the expectation equals that of a mask per sample with the same probability.
"""

from typing import NamedTuple

import timm.layers
import torch
from torch import Tensor, nn

from fastdeit.blocks import spec


class Subset(NamedTuple):
    """The samples that a branch runs on.

    Attributes:
        slots: (B,) int64, a permutation: a sample's place in the branch, from `kept` on for a sample that is dropped.
        kept: how many samples the branch runs on.
        scale: (B,) float32, B / kept, by which its output is multiplied, or None.
    """

    slots: Tensor
    kept: int
    scale: Tensor | None


def drop_rate(drop_path: nn.Module) -> float:
    """The share that stochastic depth drops in the mode that it is in."""
    if not isinstance(drop_path, timm.layers.DropPath) or not drop_path.training:
        return 0.0
    return drop_path.drop_prob or 0.0


def runs_on_subsets(block: spec.Block) -> bool:
    """Whether a block is to skip samples, and one of its branches drops any. Stochastic depth of another class stays as it is."""
    if block.drop_path != "skip":
        return False
    drops = [branch.drop_path for branch in block.branches]
    return all(type(drop) in (nn.Identity, timm.layers.DropPath) for drop in drops) and any(map(drop_rate, drops))


def kept_samples(batch: int, rate: float) -> int:
    """Samples that a branch runs on.

    Raises:
        ValueError: none would be left.
    """
    kept = round(batch * (1 - rate))
    if kept < 1:
        raise ValueError(
            f"drop_path: with 'skip', a rate of {rate:g} leaves none of {batch} samples to run a branch on; expected a lower "
            "rate, larger batches or 'mask'"
        )
    return kept


def draw_subset(drop_path: nn.Module, x: Tensor) -> Subset | None:
    """Draws the samples of x (B, N, C) that a branch runs on; None where they are all.

    The random numbers are those of the generator of x's device, as for a mask: a seed before the step decides them, checkpointing
    repeats them, and the replay of a CUDA graph draws new ones. The number of samples does not depend on them.
    """
    rate, batch = drop_rate(drop_path), x.shape[0]
    if rate == 0.0 or batch == 0:
        return None
    kept = kept_samples(batch, rate)
    if kept == batch:
        return None
    slots = torch.rand(batch, device=x.device).argsort()
    scale = x.new_full((batch,), batch / kept, dtype=torch.float32) if drop_path.scale_by_keep else None
    return Subset(slots, kept, scale)
