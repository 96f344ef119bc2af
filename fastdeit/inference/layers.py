"""The parts of an optimized model. Their tensors are buffers: nothing in them is trained."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit import ops


class Linear(nn.Module):
    """x W^T + b in the dtype of the residual stream."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """(..., C) -> (..., O), of the layer's outputs those in `rows`."""
        return F.linear(x, self.weight[rows], self.bias[rows])


class Norm(nn.Module):
    """The residual addition and the LayerNorm after it, whose weight and bias are in the layers that follow, or here."""

    def __init__(self, eps: float, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, branch: Tensor | None, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + gamma * branch (B, N, C), and its normalised tokens."""
        if branch is None:
            return x, ops.layer_norm(x, self.weight, self.bias, self.eps)
        return ops.add_layer_norm(x, branch, self.weight, self.bias, self.eps, gamma=gamma)


class Embedding(nn.Module):
    """Images to tokens."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        positions: Tensor | None,
        class_token: Tensor | None,
        more_tokens: Tensor | None,
    ) -> None:
        super().__init__()
        tensors = dict(weight=weight, bias=bias, positions=positions, class_token=class_token, more_tokens=more_tokens)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, images: Tensor) -> Tensor:
        """(B, K, H, W) -> (B, N, C)."""
        images = images if images.dtype == torch.uint8 else images.to(self.weight.dtype)
        return ops.patch_embedding(images, self.weight, self.bias, self.positions, self.class_token, self.more_tokens)


class Block(nn.Module):
    """A transformer block, up to its last residual addition, which is the next block's."""

    def __init__(self, num_heads: int, head_dim: int, activation: str) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.activation = num_heads, head_dim, activation
        self.norm1: Norm
        self.qkv: Linear
        self.proj: Linear
        self.norm2: Norm
        self.fc1: Linear
        self.fc2: Linear
        self.register_buffer("gamma1", None)
        self.register_buffer("gamma2", None)

    def forward(
        self, x: Tensor, branch: Tensor | None, gamma: Tensor | None, keep: int | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and what is still to be added to it, of the first `keep` tokens if that is given."""
        x, y = self.norm1(x, branch, gamma)
        if keep is None:
            mixed = ops.attention(self.qkv(y), self.num_heads, scale=1.0)
        else:
            x, mixed = x[:, :keep], self._prefix_attention(y, keep)
        x, y = self.norm2(x, self.proj(mixed), self.gamma1)
        return x, self._mlp(y)

    def _prefix_attention(self, y: Tensor, keep: int) -> Tensor:
        heads, width = (self.num_heads, self.head_dim), self.num_heads * self.head_dim
        q = self.qkv(y[:, :keep], slice(0, width)).unflatten(-1, heads)
        k, v = self.qkv(y, slice(width, None)).unflatten(-1, (2, *heads)).unbind(2)
        return ops.attention_qkv(q, k, v, scale=1.0).flatten(2)

    def _mlp(self, y: Tensor) -> Tensor:
        return ops.mlp(y, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, activation=self.activation)
