"""The distilled model of facebookresearch/deit's models.py."""

import sys

import torch
from torch import Tensor

from fastdeit.blocks.adapters.deit import describe_distilled, register
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
        tokens = self._prefix_tokens(looked_at(self), x)
        if tokens is None:
            return super(FusedTrunk, self).forward(x)
        logits, logits_dist = self.head(tokens[:, 0]), self.head_dist(tokens[:, 1])
        return (logits, logits_dist) if self.training else (logits + logits_dist) / 2

    def _made_tokens(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        prefix = [token.expand(len(patches), -1, -1) for token in (self.cls_token, self.dist_token)]
        return self.pos_drop(torch.cat((*prefix, patches), dim=1) + self.pos_embed)

    def _before_blocks(self, tokens: Tensor) -> Tensor:
        return tokens

    def _blocks_in_turn(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)
