"""A model's architecture, and its weights in float64 with everything folded in that a frozen model need not compute again.

LayerNorm       W (gamma x + beta) + b  =  (W gamma) x + (W beta + b)
LayerScale      gamma (W x + b)         =  (gamma W) x + gamma b
attention       the scale of the logits goes into W and b of the queries
uint8 images    W (level / 255 - mean) / std + b, as a product with level - 128, which every dtype holds exactly
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import timm.layers
import torch
from torch import Tensor, nn

from fastdeit.blocks import spec
from fastdeit.blocks.call_rules import why_global_hook
from fastdeit.blocks.checklist import why_not_bypassed, why_not_linear
from fastdeit.blocks.embedding import added_tokens
from fastdeit.blocks.fused_module import FusedModule
from fastdeit.blocks.snapshot import looked_at
from fastdeit.inference.architecture import Architecture, Block
from fastdeit.nn.vision_transformer import FusedTrunk
from fastdeit.ops.patch_embedding_op import CENTRE
from fastdeit.swap import accelerate, restore


class Normalisation(NamedTuple):
    """Of images in [0, 1]: (x - mean) / std for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Host:
    """A model that is to be optimized, described.

    Args:
        model: one that `accelerate` fuses as a whole. It is not changed.

    Raises:
        TypeError: model is not a module.
        ValueError: the model is not fused as a whole, with the reason.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError("model: expected a plain module, got a scripted one, whose forward is already compiled")
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = accelerate(restore(copy.deepcopy(model, memo=shared))).eval()
        if (reason := _why_not(self.model)) is not None:
            raise ValueError(f"model: {type(model).__name__} is not fused as a whole: {reason}")
        self.trunk: spec.Trunk = looked_at(self.model)[0]

    def architecture(self) -> Architecture:
        names = {id(module): name for name, module in self.model.named_modules()}
        blocks = []
        for block in self.trunk.blocks.values():
            attention, mlp = (branch.body for branch in block.branches)
            qkv = attention.qkv if isinstance(attention.qkv, spec.Affine) else attention.qkv[0]
            blocks.append(
                Block(
                    num_heads=attention.num_heads,
                    head_dim=attention.head_dim,
                    activation=mlp.activation,
                    eps=tuple(branch.norm.module.eps for branch in block.branches),
                    names=tuple(names[id(layer.module)] for layer in (qkv, attention.proj, mlp.fc1, mlp.fc2)),
                )
            )
        embedding, before = self.model.patch_embed, self._norm_before()
        return Architecture(
            img_size=tuple(embedding.img_size),
            in_chans=embedding.proj.in_channels,
            prefix=self.trunk.prefix,
            eps=self.trunk.norm.module.eps,
            eps_before=None if before is None else before.eps,
            classes=self.model.head.out_features,
            blocks=tuple(blocks),
        )

    def has_distillation_head(self) -> bool:
        return isinstance(getattr(self.model, "head_dist", None), nn.Linear)

    def weights(
        self, levels: Normalisation | None, readout: str, keeps: Sequence[torch.dtype] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Folded weights, float64, by the names of `OptimizedModel`'s buffers; one layer at a time, since they are large.

        Args:
            levels: of uint8 images, None for normalised ones.
            readout: one of READOUTS that the model's heads allow.
            keeps: dtypes that must hold the folded weights as well as the plain ones. What they do not, such as float16 a weight
                times a LayerScale of 1e-6, stays apart: a `gamma`, or a norm's weight and bias, among the folded weights.
        """
        yield from _present("embedding", _embedding(self.model, levels))
        if (before := self._norm_before()) is not None:
            yield from _present("norm_before", {"weight": _double(before.weight), "bias": _double(before.bias)})
        for index, block in enumerate(self.trunk.blocks.values()):
            yield from _present(f"blocks.{index}", _block(block, keeps))
        names = {"class": "head", "distillation": "head_dist"}
        names = {name: head for name, head in names.items() if readout not in names or name == readout}
        heads = {name: _affine(spec.Affine(getattr(self.model, head))) for name, head in names.items()}
        final = _into_following(self.trunk.norm, "norm", heads, "heads", keeps)
        if readout == "mean":  # one product of both tokens side by side
            weights, biases = ([final.pop(f"heads.{name}.{kind}") / 2 for name in heads] for kind in _KINDS)
            final |= {"heads.mean.weight": torch.cat(weights, 1), "heads.mean.bias": sum(biases)}
        yield from _present("", final)

    def _norm_before(self) -> nn.LayerNorm | None:
        norm = getattr(self.model, "norm_pre", None)
        return norm if isinstance(norm, nn.LayerNorm) else None


def _why_not(model: nn.Module) -> str | None:
    """Why some part of a model in evaluation mode would be called as it is."""
    if not isinstance(model, FusedTrunk):
        return (
            "only blocks or layers of it are"
            if isinstance(model, FusedModule)
            else "it is no vision transformer of those known"
        )
    trunk, (verdict, embedding) = looked_at(model)
    reason = verdict.model or why_global_hook() or why_not_bypassed((model,)) or embedding
    reason = reason or verdict.norm or verdict.block
    for name, judged in zip(trunk.blocks, verdict.blocks, strict=False):
        parts = (*judged.parts, *judged.out_dropouts, judged.pruned)
        inner = next((part for part in parts if part is not None), None)
        reason = reason or (None if inner is None else f"block {name}: {inner}")
    if reason is not None:
        return reason
    skipped = {name: getattr(model, name, None) for name in ("pos_drop", "patch_drop", "fc_norm", "head_drop")}
    for name, module in skipped.items():
        if not isinstance(module, _NOTHING_IN_EVALUATION):
            return f"{name} is a {type(module).__name__}"
    for name in ("head", "head_dist"):
        head = getattr(model, name, None)
        if head is not None or name == "head":
            if not isinstance(head, nn.Linear):
                return f"{name} is a {type(head).__name__}, which gives no logits"
            reason = reason or why_not_bypassed((head,)) or why_not_linear(spec.Affine(head))
    before = getattr(model, "norm_pre", None)
    if not isinstance(before, nn.Identity | nn.LayerNorm | None):
        return f"norm_pre is a {type(before).__name__}"
    return reason or why_not_bypassed(filter(None, (*skipped.values(), before)))


_NOTHING_IN_EVALUATION = (nn.Identity, nn.Dropout, timm.layers.PatchDropout, type(None))


def _present(prefix: str, weights: Mapping[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        if tensor is not None:
            yield f"{prefix}.{name}" if prefix else name, tensor


def _embedding(model: nn.Module, levels: Normalisation | None) -> dict[str, Tensor | None]:
    proj = model.patch_embed.proj
    weight, bias = _double(proj.weight), _bias(proj.bias, proj.weight)
    if levels is not None:
        mean, std = (torch.tensor(values, dtype=torch.float64, device=weight.device) for values in levels)
        bias = bias + torch.einsum("okpq,k->o", weight, (CENTRE / 255 - mean) / std)
        weight = weight / (255 * std)[:, None, None]
    names = ("positions", "class_token", "more_tokens")
    added = {name: _double(tensor) for name, tensor in zip(names, added_tokens(model), strict=True)}
    return {"weight": weight, "bias": bias, **added}


def _block(block: spec.Block, keeps: Sequence[torch.dtype]) -> dict[str, Tensor | None]:
    first, second = block.branches
    attention, mlp = first.body, second.body
    sources = attention.qkv if isinstance(attention.qkv, tuple) else (attention.qkv,)
    weight = torch.cat([_double(_parameters(layer)[0]) for layer in sources])
    bias = torch.cat([_bias(*reversed(_parameters(layer))) for layer in sources])
    queries = attention.num_heads * attention.head_dim
    factor = torch.ones_like(bias)
    factor[:queries] = attention.head_dim**-0.5
    found = _into_following(first.norm, "norm1", {"": (weight * factor[:, None], bias * factor)}, "qkv", keeps)
    fc1 = {"": _affine(mlp.fc1)}
    found |= _into_following(second.norm, "norm2", fc1, "fc1", keeps)
    found |= _into_preceding(first, "gamma1", attention.proj, "proj", keeps)
    return found | _into_preceding(second, "gamma2", mlp.fc2, "fc2", keeps)


def _into_following(
    norm: spec.Affine,
    name: str,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    prefix: str,
    keeps: Sequence[torch.dtype],
) -> dict[str, Tensor | None]:
    """A LayerNorm's parameters folded into the layers that read its output, or both as they are."""
    weight, bias = (None if p is None else _double(p) for p in _parameters(norm))
    folded = {}
    for layer, (w, b) in layers.items():
        folded_bias = b if bias is None else b + w @ bias
        folded[layer] = (w if weight is None else w * weight, folded_bias)
    if not all(_held(*tensors, keeps) for tensors in folded.values()):
        folded, apart = layers, {f"{name}.weight": weight, f"{name}.bias": bias}
    else:
        apart = {}
    named = {f"{prefix}.{layer}".rstrip("."): tensors for layer, tensors in folded.items()}
    found = {f"{layer}.{kind}": t for layer, both in named.items() for kind, t in zip(_KINDS, both, strict=True)}
    return found | apart


def _into_preceding(
    branch: spec.Branch, name: str, layer: spec.Affine, prefix: str, keeps: Sequence[torch.dtype]
) -> dict[str, Tensor | None]:
    """LayerScale folded into the layer whose output it multiplies, or both as they are."""
    weight, bias = _affine(layer)
    gamma = branch.layer_scale._parameters.get(branch.gamma)
    if gamma is None:
        return {f"{prefix}.weight": weight, f"{prefix}.bias": bias}
    gamma = _double(gamma)
    folded = weight * gamma[:, None], bias * gamma
    if _held(*folded, keeps):
        return {f"{prefix}.weight": folded[0], f"{prefix}.bias": folded[1]}
    return {f"{prefix}.weight": weight, f"{prefix}.bias": bias, name: gamma}


_KINDS = ("weight", "bias")


def _held(weight: Tensor, bias: Tensor, keeps: Sequence[torch.dtype]) -> bool:
    """Whether each row of a weight, and its bias, loses no more in these dtypes than a rounding of normal numbers does."""
    for dtype in keeps:
        unit = torch.finfo(dtype).eps / 2
        for rows in (weight, bias[None]):
            error = (rows.to(dtype).double() - rows).norm(dim=-1)
            if not bool((error <= unit * rows.norm(dim=-1)).all()):  # an infinity is not within it either
                return False
    return True


def _parameters(layer: spec.Affine) -> tuple[Tensor | None, Tensor | None]:
    parameters = layer.module._parameters
    return parameters[layer.weight], parameters[layer.bias]


def _affine(layer: spec.Affine) -> tuple[Tensor, Tensor]:
    weight, bias = _parameters(layer)
    return _double(weight), _bias(bias, weight)


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight), dtype=torch.float64) if bias is None else _double(bias)


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()
