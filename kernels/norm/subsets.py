"""Which rows of a residual branch belong to which rows of the stream, where the branch runs on a subset of the samples.

A branch that keeps `kept` of B samples has (kept, TOKENS, C) rows, the stream (B, TOKENS, C). `slots` (B,) is a permutation: a
sample's place among those that the branch keeps, in any order, and from `kept` on for a sample that it drops.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

SUBSET_WIDTHS = (768, 1024)  # of the models that DeiT III trains at rates worth skipping: B at 0.2, L at 0.45


class Subsets(NamedTuple):
    """The samples of the branch that is added to a stream of B samples, and those of the branch that the stream enters next.

    Attributes:
        branch_slots: (B,) int64, contiguous, of the branch that is added; None where it has all samples.
        branch_kept: its samples, B where it has all.
        slots: (B,) int64, contiguous, of the branch after it; None where it has all samples.
        kept: its samples, B where it has all.
    """

    branch_slots: torch.Tensor | None
    branch_kept: int
    slots: torch.Tensor | None
    kept: int

    @property
    def samples(self) -> int:
        """B. At least one of both has slots."""
        slots = self.branch_slots if self.slots is None else self.slots
        assert slots is not None
        return len(slots)


@triton.jit
def row_of_subset(row, inside, slots_ptr, kept, TOKENS):
    """The row of a branch for a row of the stream, and where the branch has it: `inside`, less the samples that it drops.

    row: integers of any shape. inside: of the same, which rows the stream has.
    """
    if slots_ptr is not None:
        sample = row.to(tl.int32) // TOKENS  # a division in 64 bits is a function call; rows fit 32, as a grid does
        slot = tl.load(slots_ptr + sample, inside, other=0).to(tl.int32)
        row += (slot - sample) * TOKENS
        inside = inside & (slot < kept)
    return row, inside
