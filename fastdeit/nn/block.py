"""The pre-norm transformer block, fused across its residual additions."""

import functools

from timm.models import vision_transformer
from torch import Tensor

from fastdeit.blocks.adapters.timm import describe_block
from fastdeit.blocks.call_rules import why_global_hook, why_not_attention_call, why_not_block_call, why_not_plain_call
from fastdeit.blocks.checklist import BlockVerdict, judge_block
from fastdeit.blocks.fused_module import FUSED_CLASSES, FusedModule
from fastdeit.blocks.run import PendingResidual, added, host_block_on_subsets, run_block
from fastdeit.blocks.snapshot import looked_at
from fastdeit.blocks.spec import Attention
from fastdeit.blocks.spec import Block as Description
from fastdeit.blocks.subsets import runs_on_subsets
from fastdeit.plan.block import planned_block


class Block(FusedModule, vision_transformer.Block, source=vision_transformer.Block):
    """timm's vision transformer block (Dosovitskiy et al. 2021, eqs. 2-3) with timm's constructor.

        x = x + drop_path1(ls1(attn(norm1(x))))
        x = x + drop_path2(ls2(mlp(norm2(x))))

    LayerScale, stochastic depth, the first addition and norm2 are one kernel. `forward` takes and returns (B, N, C). fastdeit's
    attention and MLP are fused without a call between; those of any other class are called as they are. Under autocast the
    residual stream keeps its dtype, as in timm. Stochastic depth draws timm's masks from the same random numbers.

    Attributes:
        memory: what is saved for backward. "usual": both normalised inputs, qkv, attention's output and the MLP's pre-activation,
            20 of timm's 36 bytes per token and channel under autocast. "lean": not the pre-activation, which backward computes
            again from the MLP's input, 12 bytes.
        drop_path_mode: how stochastic depth drops samples in training. "mask": timm's mask, which multiplies what was computed for
            all. "skip": each branch runs on a random subset of round(B (1 - p)) samples alone.
    """

    memory = "usual"
    drop_path_mode = "mask"
    covers_parts = True
    describe = describe_block

    @functools.wraps(vision_transformer.Block.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for part in self.modules():
            part.__class__ = FUSED_CLASSES.get(type(part), type(part))

    def judge(self, description: Description) -> BlockVerdict:
        return judge_block(description)

    def why_not_fused(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        """Why `forward` would run timm's code around its children, None if it would run the kernels."""
        return _why_not_call(looked_at(self)[1], x)

    def note(self) -> str | None:
        """How it drops samples in training where that is not timm's mask; None where it drops none."""
        drops = (self.drop_path1, self.drop_path2)
        if self.drop_path_mode != "skip" or not any(getattr(drop, "drop_prob", 0.0) for drop in drops):
            return None
        return "in training its branches run only on the samples that stochastic depth keeps"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not isinstance(self, Block):  # a bound method that someone kept from before `restore`
            return type(self).forward(self, x, attn_mask, is_causal)
        answer = description, verdict = looked_at(self)
        subsets = runs_on_subsets(description)
        if subsets and attn_mask is not None:
            raise ValueError(
                "attn_mask: expected None in training with drop_path 'skip', whose branches run on subsets"
            )
        masks = {"attn_mask": attn_mask, "is_causal": is_causal}
        if _why_not_call(verdict, x) is not None:
            return host_block_on_subsets(description, x, masks) if subsets else super().forward(x, attn_mask, is_causal)
        fused = attn_mask is None and not is_causal and _attention_runs(description, x)
        if fused:
            return planned_block(self, answer, x)
        pending = PendingResidual(x)
        return added(run_block(*answer, pending, attention_fused=False, defer=False, call_arguments=masks))

    def forward_deferred(self, pending: PendingResidual) -> PendingResidual:
        """What enters the block through it, with the addition of its last branch left to the caller.

        Raises:
            RuntimeError: the block does not run fused, or its last addition cannot be left; the message says why.
        """
        description, verdict = looked_at(self)
        x = pending.x
        if (reason := _why_not_call(verdict, x) or verdict.deferred) is not None:
            raise RuntimeError(f"forward_deferred: {reason}")
        return run_block(description, verdict, pending, attention_fused=_attention_runs(description, x), defer=True)


def _attention_runs(description: Description, x: Tensor) -> bool:
    body = description.branches[0].body
    return isinstance(body, Attention) and why_not_attention_call(body, x) is None


def _why_not_call(verdict: BlockVerdict, x: Tensor) -> str | None:
    return why_not_plain_call(x) or why_global_hook() or verdict.block or why_not_block_call(verdict, x)
