"""The parts of an optimized model. Their tensors are buffers: nothing in them is trained."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit import ops
from fastdeit.inference import architecture

Weights = Mapping[str, Tensor | None]  # of a module, by the names of its buffers


def under(weights: Weights, prefix: str) -> dict[str, Tensor | None]:
    """Those whose names begin with prefix and a dot, by what follows that."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in weights.items() if name.startswith(start)}


class Linear(nn.Module):
    """x W^T + b in the dtype of the residual stream.

    Args:
        weights: `weight` (O, C) and `bias` (O,).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.register_buffer("weight", weights["weight"])
        self.register_buffer("bias", weights["bias"])

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """(..., C) -> (..., O), of the layer's outputs those in `rows`."""
        return F.linear(x, self.weight[rows], self.bias[rows])


class Norm(nn.Module):
    """The residual addition and the LayerNorm after it.

    Args:
        eps: added to the variance.
        weights: `weight` (C,) and `bias` (C,), empty where the layers that follow have them.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, eps: float, weights: Weights) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weights.get("weight"))
        self.register_buffer("bias", weights.get("bias"))

    def forward(self, x: Tensor, branch: Tensor | None, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + gamma * branch (B, N, C), and its normalised tokens."""
        if branch is None:
            return x, ops.layer_norm(x, self.weight, self.bias, self.eps)
        return ops.add_layer_norm(x, branch, self.weight, self.bias, self.eps, gamma=gamma)


class Embedding(nn.Module):
    """Images to tokens.

    Args:
        weights: `weight` and `bias`, and where there are any `positions`, `class_token` and `more_tokens`, as
            `ops.patch_embedding` takes them.
    """

    weight: Tensor
    bias: Tensor
    positions: Tensor | None
    class_token: Tensor | None
    more_tokens: Tensor | None

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for name in ("weight", "bias", "positions", "class_token", "more_tokens"):
            self.register_buffer(name, weights.get(name))

    def forward(self, images: Tensor) -> Tensor:
        """(B, K, H, W) -> (B, N, C)."""
        images = images if images.dtype == torch.uint8 else images.to(self.weight.dtype)
        return ops.patch_embedding(images, self.weight, self.bias, self.positions, self.class_token, self.more_tokens)


class Block(nn.Module):
    """A transformer block, up to its last residual addition, which is the next block's.

    Args:
        architecture: its own.
        weights: of its parts, as `norm1.weight`; `gamma1` and `gamma2` (C,) where the layers before them do not have them.
    """

    norm1: Norm
    qkv: Linear
    proj: Linear
    norm2: Norm
    fc1: Linear
    fc2: Linear
    gamma1: Tensor | None
    gamma2: Tensor | None

    def __init__(self, architecture: architecture.Block, weights: Weights) -> None:
        super().__init__()
        self.num_heads, self.head_dim = architecture.num_heads, architecture.head_dim
        self.activation = architecture.activation
        for norm, eps in zip(("norm1", "norm2"), architecture.eps, strict=True):
            setattr(self, norm, Norm(eps, under(weights, norm)))
        for layer in ("qkv", "proj", "fc1", "fc2"):
            setattr(self, layer, Linear(under(weights, layer)))
        for scale in ("gamma1", "gamma2"):
            self.register_buffer(scale, weights.get(scale))

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
