"""Stand-in for facebookresearch/deit's models.py, which is found by the name `models`: the same arithmetic, other words."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn


class DistilledVisionTransformer(VisionTransformer):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        width, patches = self.embed_dim, self.patch_embed.num_patches
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + patches, width))
        self.head_dist = nn.Linear(width, self.num_classes)

    def forward_features(self, x):
        x = self.patch_embed(x)
        first = torch.cat((self.cls_token, self.dist_token), 1).expand(x.shape[0], -1, -1)
        x = self.pos_drop(torch.cat((first, x), 1) + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, :2].unbind(1)

    def forward(self, x):
        tokens = self.forward_features(x)
        both = self.head(tokens[0]), self.head_dist(tokens[1])
        return both if self.training else sum(both) / 2
