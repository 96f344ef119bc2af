"""Stand-in for openai/CLIP's clip/model.py, found by its name: the same arithmetic, other words."""

from collections import OrderedDict

from torch import nn


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * (1.702 * x).sigmoid()


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads, attn_mask=None):
        super().__init__()
        self.attn, self.attn_mask = nn.MultiheadAttention(width, heads), attn_mask
        self.ln_1, self.ln_2 = LayerNorm(width), LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 2 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(2 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def attention(self, x):
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def forward(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """Tokens come before the batch in its blocks."""

    def __init__(self, width=64, depth=2, heads=2):
        super().__init__()
        self.conv1, self.ln_pre, self.ln_post = nn.Conv2d(3, width, 8, 8), LayerNorm(width), LayerNorm(width)
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(width, heads) for _ in range(depth)))

    def forward(self, x):
        x = self.ln_pre(self.conv1(x).flatten(2).mT)
        return self.ln_post(self.resblocks(x.transpose(0, 1)).transpose(0, 1)[:, 0])


def rounded(model, dtype):
    """The model in dtype but for the norms, whose parameters stay float32: what CLIP does for a GPU with float16."""
    for module in model.modules():
        if not isinstance(module, nn.LayerNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model
