"""The parts of an optimized model. Their tensors are buffers: nothing in them is trained."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit import ops
from fastdeit.inference import architecture

LAYERS = ("qkv", "proj", "fc1", "fc2")  # of a block
Weights = Mapping[str, Tensor | None]  # of a module, by the names of its buffers


def under(weights: Weights, prefix: str) -> dict[str, Tensor | None]:
    """The entries whose names begin with prefix and a dot, by the rest of their names."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in weights.items() if name.startswith(start)}


class Tokens(NamedTuple):
    """Normalised tokens in 8 bits."""

    values: Tensor  # (B, N, C)
    scale: Tensor  # (B, N) float32


class Linear(nn.Module):
    """x W^T + b in the dtype of the residual stream.

    Args:
        weights: `weight` (O, C) and `bias` (O,).
    """

    format: torch.dtype | None = None
    weight: Tensor
    bias: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.register_buffer("weight", weights["weight"])
        self.register_buffer("bias", weights["bias"])

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """(..., C) -> (..., O), of the layer's outputs those in `rows`."""
        return F.linear(x, self.weight[rows], self.bias[rows])

    def received(self, x: Tensor) -> Tensor:
        """What comes out of attention as the layer takes it."""
        return x

    def activated(self, x: Tensor, activation: str, following: "Linear | QuantizedLinear") -> Tensor:
        """The activation of the layer's output, as the following layer takes it."""
        options = _written_for(following, self.bias.dtype)
        return ops.rescale(self(x), activation=activation, **options)


class QuantizedLinear(nn.Module):
    """x W^T + b of 8-bit operands, in the dtype of the residual stream.

    Args:
        weights: `weight` (O, C) of an 8-bit dtype; `scale` (O,) float32, what one step of its rows, times one of x, is worth;
            `bias` (O,); `input_scale` (1,) float32 where x has one scale that calibration found, else each token brings its own.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    input_scale: Tensor | None

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for name in ("weight", "scale", "bias"):
            self.register_buffer(name, weights[name])
        self.register_buffer("input_scale", weights.get("input_scale"))

    @property
    def format(self) -> torch.dtype:
        """The format of weight and x."""
        return self.weight.dtype

    def forward(self, x: Tensor | Tokens, rows: slice = slice(None)) -> Tensor:
        """(..., C) -> (..., O), of the layer's outputs those in `rows`."""
        return self._product(x, rows, out_dtype=self.bias.dtype)

    def received(self, x: Tensor) -> Tensor:
        """What comes out of attention as the layer takes it."""
        return ops.rescale(x, scale=self.input_scale, out_dtype=self.format)

    def activated(self, x: Tensor | Tokens, activation: str, following: "Linear | QuantizedLinear") -> Tensor:
        """The activation of the layer's output, as the following layer takes it."""
        options = _written_for(following, self.bias.dtype)
        return self._product(x, slice(None), activation=activation, **options)

    def _product(self, x: Tensor | Tokens, rows: slice, **options: Any) -> Tensor:
        values, row_scale = (x.values, x.scale) if isinstance(x, Tokens) else (x, None)
        weights = self.weight[rows], self.scale[rows], self.bias[rows]
        return ops.quantized_linear(values, row_scale, *weights, **options)


def _written_for(following: Linear | QuantizedLinear, stream: torch.dtype) -> dict[str, Any]:
    if isinstance(following, QuantizedLinear):
        return dict(scale=following.input_scale, out_dtype=following.format)
    return dict(out_dtype=stream)


def make_linear(weights: Weights) -> Linear | QuantizedLinear:
    """The layer that these weights are of."""
    return QuantizedLinear(weights) if "scale" in weights else Linear(weights)


def first_tokens(y: Tensor | Tokens, keep: int) -> Any:
    """The first `keep` of tokens (B, N, C)."""
    return Tokens(y.values[:, :keep], y.scale[:, :keep]) if isinstance(y, Tokens) else y[:, :keep]


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

    def forward(
        self, x: Tensor, branch: Tensor | None, gamma: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Any]:
        """x + gamma * branch (B, N, C), and its normalised tokens, `Tokens` where an 8-bit dtype is given."""
        if dtype is not None:
            given = (x, branch, self.weight, self.bias, self.eps)
            x, values, scale = ops.add_layer_norm_quantize(*given, gamma=gamma, dtype=dtype)
            return x, Tokens(values, scale)
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

    Attributes:
        tap: called with the name of each layer and its input, of a float dtype; returns what the layer takes in its place.
    """

    norm1: Norm
    qkv: Linear | QuantizedLinear
    proj: Linear | QuantizedLinear
    norm2: Norm
    fc1: Linear | QuantizedLinear
    fc2: Linear | QuantizedLinear
    gamma1: Tensor | None
    gamma2: Tensor | None

    def __init__(self, architecture: architecture.Block, weights: Weights) -> None:
        super().__init__()
        self.num_heads, self.head_dim = architecture.num_heads, architecture.head_dim
        self.activation = architecture.activation
        self.tap: Callable[[str, Tensor], Tensor] | None = None
        for norm, eps in zip(("norm1", "norm2"), architecture.eps, strict=True):
            setattr(self, norm, Norm(eps, under(weights, norm)))
        for layer in LAYERS:
            setattr(self, layer, make_linear(under(weights, layer)))
        for scale in ("gamma1", "gamma2"):
            self.register_buffer(scale, weights.get(scale))

    def forward(
        self, x: Tensor, branch: Tensor | None, gamma: Tensor | None, keep: int | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and what is still to be added to it, of the first `keep` tokens if that is given."""
        x, y = self.norm1(x, branch, gamma, self.qkv.format)
        y = self._tapped("qkv", y)
        if keep is not None:
            x = x[:, :keep]
        x, y = self.norm2(x, self.proj(self._attended(y, keep)), self.gamma1, self.fc1.format)
        y = self._tapped("fc1", y)
        return x, self._mlp(y)

    def _tapped(self, layer: str, x: Any) -> Any:
        return x if self.tap is None else self.tap(layer, x)

    def _attended(self, y: Tensor | Tokens, keep: int | None) -> Tensor:
        """What comes out of attention, as proj takes it."""
        given: tuple[Any, ...] = (self.qkv(y), self.num_heads) if keep is None else self._prefix_qkv(y, keep)
        attention: Callable[..., Tensor] = ops.attention if keep is None else ops.attention_qkv
        attention_quantize: Callable[..., Tensor] = (
            ops.attention_quantize if keep is None else ops.attention_qkv_quantize
        )
        if isinstance(self.proj, QuantizedLinear) and self.tap is None:
            return attention_quantize(*given, self.proj.input_scale, scale=1.0, dtype=self.proj.format).flatten(2)
        return self.proj.received(self._tapped("proj", attention(*given, scale=1.0).flatten(2)))

    def _prefix_qkv(self, y: Tensor | Tokens, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        heads, width = (self.num_heads, self.head_dim), self.num_heads * self.head_dim
        q = self.qkv(first_tokens(y, keep), slice(0, width)).unflatten(-1, heads)
        k, v = self.qkv(y, slice(width, None)).unflatten(-1, (2, *heads)).unbind(2)
        return q, k, v

    def _mlp(self, y: Any) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if fc1.format is None and fc2.format is None and self.tap is None:
            return ops.mlp(y, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=self.activation)
        hidden = fc1.activated(y, self.activation, fc2)
        return fc2(self._tapped("fc2", hidden))
