"""Stand-in for facebookresearch/dinov2's files of layers, which are found by their names: the same arithmetic, other words."""

import torch
import torch.nn.functional as F
from torch import nn


class LayerScale(nn.Module):
    def __init__(self, width, init_values=0.5, inplace=False):
        super().__init__()
        self.inplace, self.gamma = inplace, nn.Parameter(torch.full((width,), init_values))

    def forward(self, x):
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class Mlp(nn.Module):
    def __init__(self, width, drop=0.0):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """Its dropout of attention weights is a probability, before June 2025 a module."""

    def __init__(self, width, num_heads, attn_drop=0.0, drop=0.0, as_module=False):
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        self.qkv, self.proj, self.proj_drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(drop)
        self.attn_drop = nn.Dropout(attn_drop) if as_module else attn_drop

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.attn_drop if isinstance(self.attn_drop, float) else self.attn_drop.p
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=rate if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class MemEffAttention(Attention):
    def forward(self, x, attn_bias=None):
        assert attn_bias is None
        return super().forward(x)


class Block(nn.Module):
    def __init__(self, width, num_heads, attn_drop=0.0, drop=0.0, drop_path=0.0, as_module=False, scaled=True):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = MemEffAttention(width, num_heads, attn_drop, drop, as_module), Mlp(width, drop)
        self.ls1, self.ls2 = (LayerScale(width) if scaled else nn.Identity() for _ in range(2))
        self.sample_drop_ratio = drop_path

    def forward(self, x):
        for scale, branch, norm in ((self.ls1, self.attn, self.norm1), (self.ls2, self.mlp, self.norm2)):
            kept = torch.randperm(len(x)) if self.training and self.sample_drop_ratio else range(len(x))
            kept = torch.as_tensor(kept)[: max(1, int(len(x) * (1 - self.training * self.sample_drop_ratio)))]
            x = x.index_add(0, kept, scale(branch(norm(x[kept]))), alpha=len(x) / len(kept))
        return x


class NestedTensorBlock(Block):
    def forward(self, x):
        return [super(NestedTensorBlock, self).forward(y) for y in x] if isinstance(x, list) else super().forward(x)
