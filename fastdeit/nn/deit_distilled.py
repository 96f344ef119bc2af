"""The distilled model of facebookresearch/deit's models.py."""

import sys

import torch
from torch import Tensor

from fastdeit.blocks.adapters.deit import describe_distilled, register
from fastdeit.blocks.call_rules import why_global_hook, why_not_plain_call, why_not_trunk_call
from fastdeit.blocks.embedding import embed, why_not_embedding_call
from fastdeit.blocks.run import run_trunk
from fastdeit.blocks.snapshot import looked_at
from fastdeit.nn.vision_transformer import FusedTrunk

_file = sys.modules["models"]
register(_file, "DistilledVisionTransformer.forward", "DistilledVisionTransformer.forward_features")


class DistilledVisionTransformer(FusedTrunk, _file.DistilledVisionTransformer, source=_file.DistilledVisionTransformer):
    """models.DistilledVisionTransformer (Touvron et al. 2021, section 4) with deit's constructor.

    `forward` takes (B, 3, H, W) and returns both heads' logits (B, num_classes) in training, their mean in evaluation. Tokens,
    residual additions and the last block are fused as in `fastdeit.nn.VisionTransformerDistilled`.
    """

    describe = describe_distilled

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not isinstance(self, FusedTrunk):  # a bound method that someone kept from before `restore`
            return type(self).forward(self, x)
        description, (verdict, embedding) = looked_at(self)
        if (why_not_plain_call(x) or verdict.model or why_global_hook()) is not None:
            return super(FusedTrunk, self).forward(x)
        if embedding is None and why_not_embedding_call(self, x) is None:
            tokens = embed(self, x)
        else:
            patches = self.patch_embed(x)
            prefix = [token.expand(len(patches), -1, -1) for token in (self.cls_token, self.dist_token)]
            tokens = self.pos_drop(torch.cat((*prefix, patches), dim=1) + self.pos_embed)
        reason = why_not_plain_call(tokens) or verdict.norm or verdict.block or why_not_trunk_call(verdict, tokens)
        if reason is None:
            tokens = run_trunk(description, verdict, tokens)
        else:
            for block in self.blocks:
                tokens = block(tokens)
            tokens = self.norm(tokens)
        logits, logits_dist = self.head(tokens[:, 0]), self.head_dist(tokens[:, 1])
        return (logits, logits_dist) if self.training else (logits + logits_dist) / 2
