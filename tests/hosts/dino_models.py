"""Stand-in for the blocks of facebookresearch/dino and ijepa, found by their files' names: the same arithmetic, other words."""

import torch
from torch import nn


class DropPath(nn.Module):
    def __init__(self, drop_prob=None):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.drop_prob or not self.training:
            return x
        kept = 1 - self.drop_prob
        return x / kept * (torch.rand(len(x), 1, 1, dtype=x.dtype) + kept).floor()


class Mlp(nn.Module):
    def __init__(self, width, drop=0.0):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = (
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
            nn.Dropout(drop),
        )

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


MLP = Mlp  # I-JEPA's name for it


class Attention(nn.Module):
    def __init__(self, width, num_heads, attn_drop=0.0, drop=0.0):
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        self.qkv, self.attn_drop = nn.Linear(width, 3 * width), nn.Dropout(attn_drop)
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Dropout(drop)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((self.scale * q @ k.mT).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2))), weights


class Block(nn.Module):
    def __init__(self, width, num_heads, attn_drop=0.0, drop=0.0, drop_path=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, num_heads, attn_drop, drop), Mlp(width, drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x, return_attention=False):
        attended, weights = self.attn(self.norm1(x))
        if return_attention:
            return weights
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))
