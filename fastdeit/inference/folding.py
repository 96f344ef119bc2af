"""Parameters and constants folded into weights, in float64.

LayerNorm       W (gamma x + beta) + b  =  (W gamma) x + (W beta + b)
LayerScale      gamma (W x + b)         =  (gamma W) x + gamma b
attention       the scale of the logits goes into W and b of the queries
uint8 images    W (level / 255 - mean) / std + b, as a product with level - 128, which every dtype holds exactly
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit.ops.patch_embedding_op import CENTRE


class Layer(NamedTuple):
    """W (O, ...) and b (O,) of a projection."""

    weight: Tensor
    bias: Tensor


class Apart(NamedTuple):
    """A LayerNorm's parameters where they are not folded, else nothing."""

    weight: Tensor | None = None
    bias: Tensor | None = None


def double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def joined(layers: Sequence[Layer]) -> Layer:
    """Projections of the same input as one."""
    weights, biases = zip(*layers, strict=True)
    return Layer(torch.cat(weights), torch.cat(biases))


def with_scale_in_queries(qkv: Layer, queries: int, scale: float) -> Layer:
    """The first `queries` outputs of a projection multiplied by the scale of the logits."""
    factor = torch.ones_like(qkv.bias)
    factor[:queries] = scale
    return Layer(qkv.weight * factor[:, None], qkv.bias * factor)


def into_following(
    norm: tuple[Tensor | None, Tensor | None], layers: Sequence[Layer], held_in: torch.dtype | None
) -> tuple[list[Layer], Apart]:
    """A LayerNorm's parameters in the layers that read its output.

    Where `held_in` loses what is folded, the layers as they are, and the parameters.
    """
    weight, bias = (None if parameter is None else double(parameter) for parameter in norm)
    folded = [
        Layer(
            layer.weight if weight is None else layer.weight * weight,
            layer.bias if bias is None else layer.bias + layer.weight @ bias,
        )
        for layer in layers
    ]
    if all(_holds(held_in, layer) for layer in folded):
        return folded, Apart()
    return list(layers), Apart(weight, bias)


def into_preceding(gamma: Tensor | None, layer: Layer, held_in: torch.dtype | None) -> tuple[Layer, Tensor | None]:
    """LayerScale in the layer whose output it multiplies; where `held_in` loses what is folded, both as they are."""
    if gamma is None:
        return layer, None
    gamma = double(gamma)
    folded = Layer(layer.weight * gamma[:, None], layer.bias * gamma)
    return (folded, None) if _holds(held_in, folded) else (layer, gamma)


def mean_of_both(first: Layer, second: Layer) -> Layer:
    """The mean of two heads' logits, as one layer of both tokens side by side."""
    return Layer(torch.cat((first.weight, second.weight), 1) / 2, (first.bias + second.bias) / 2)


def for_levels(layer: Layer, mean: Sequence[float], std: Sequence[float]) -> Layer:
    """A patch embedding (O, K, P, Q) of normalised images as one of levels less CENTRE."""
    weight, bias = layer
    means, deviations = (torch.tensor(values, dtype=torch.float64, device=weight.device) for values in (mean, std))
    bias = bias + torch.einsum("okpq,k->o", weight, (CENTRE / 255 - means) / deviations)
    return Layer(weight / (255 * deviations)[:, None, None], bias)


def _holds(dtype: torch.dtype | None, layer: Layer) -> bool:
    """Whether the dtype holds each row of a weight, and the bias, to the relative precision of its normal numbers."""
    if dtype is None:
        return True
    for rows in (layer.weight, layer.bias[None]):
        error = (rows.to(dtype).double() - rows).norm(dim=-1)
        if not bool((error <= torch.finfo(dtype).eps / 2 * rows.norm(dim=-1)).all()):  # nor is an infinity within it
            return False
    return True
