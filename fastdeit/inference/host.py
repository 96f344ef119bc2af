"""A model that is to be optimized: what it consists of, and its folded weights."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

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
from fastdeit.inference.folding import (
    Apart,
    Layer,
    double,
    for_levels,
    into_following,
    into_preceding,
    joined,
    mean_of_both,
    with_scale_in_queries,
)
from fastdeit.nn.vision_transformer import FusedTrunk
from fastdeit.swap import accelerate, restore

_NOTHING_IN_EVALUATION = (nn.Identity, nn.Dropout, timm.layers.PatchDropout, type(None))


class Normalisation(NamedTuple):
    """Normalisation of images in [0, 1]: (x - mean) / std for each channel."""

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
        self.model: Any = accelerate(restore(copy.deepcopy(model, memo=shared))).eval()
        reason = _why_not(self.model)
        if reason is not None:
            raise ValueError(f"model: {type(model).__name__} is not fused as a whole: {reason}")
        self.trunk: spec.Trunk = looked_at(self.model)[0]
        self.blocks = [_parts(block) for block in self.trunk.blocks.values()]
        self.device: torch.device = cast(nn.Linear, self.model.head).weight.device

    def architecture(self) -> Architecture:
        names = {id(module): name for name, module in self.model.named_modules()}
        blocks = []
        for first, attention, second, mlp in self.blocks:
            qkv, proj, fc1, fc2 = (names[id(layer.module)] for layer in _layers(attention, mlp))
            eps = _eps(first.norm), _eps(second.norm)
            sizes = attention.num_heads, attention.head_dim
            blocks.append(Block(*sizes, cast(str, mlp.activation), eps, (qkv, proj, fc1, fc2)))
        embedding, before = self.model.patch_embed, self._norm_before()
        return Architecture(
            img_size=tuple(embedding.img_size),
            in_chans=embedding.proj.in_channels,
            prefix=self.trunk.prefix,
            eps=_eps(self.trunk.norm),
            eps_before=None if before is None else before.eps,
            classes=self.model.head.out_features,
            blocks=tuple(blocks),
        )

    def has_distillation_head(self) -> bool:
        return isinstance(getattr(self.model, "head_dist", None), nn.Linear)

    def weights(
        self, levels: Normalisation | None, readout: str, held_in: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Folded weights, float64, by the names of `OptimizedModel`'s buffers; one layer at a time, since they are large.

        Args:
            levels: of uint8 images, None for normalised ones.
            readout: one of READOUTS that the model's heads allow.
            held_in: a dtype that must hold the folded weights as well as the plain ones. What it does not, such as float16 a weight
                times a LayerScale of 1e-6, stays apart: a `gamma`, or a norm's weight and bias, among the folded weights.
        """
        yield from _present("embedding", self._embedding(levels))
        if (before := self._norm_before()) is not None:
            yield from _present("norm_before", {"weight": double(before.weight), "bias": double(before.bias)})
        for index, (first, attention, second, mlp) in enumerate(self.blocks):
            qkv, proj, fc1, fc2 = map(_read, _layers(attention, mlp))
            if isinstance(attention.qkv, tuple):
                qkv = joined([_read(layer) for layer in attention.qkv])
            qkv = with_scale_in_queries(qkv, attention.num_heads * attention.head_dim, attention.head_dim**-0.5)
            weights: dict[str, Tensor | None] = {}
            for norm, after, layer in (("norm1", "qkv", qkv), ("norm2", "fc1", fc1)):
                branch = first if norm == "norm1" else second
                (folded,), apart = into_following(_parameters(branch.norm), [layer], held_in)
                weights |= {**_named(after, folded), **_named(norm, apart)}
            for scale, source, layer, branch in (("gamma1", "proj", proj, first), ("gamma2", "fc2", fc2, second)):
                folded, gamma = into_preceding(branch.layer_scale._parameters.get(branch.gamma), layer, held_in)
                weights |= {**_named(source, folded), scale: gamma}
            yield from _present(f"blocks.{index}", weights)
        names = {"class": "head", "distillation": "head_dist"}
        names = {name: head for name, head in names.items() if readout not in names or name == readout}
        heads = [_read(spec.Affine(getattr(self.model, head))) for head in names.values()]
        heads, apart = into_following(_parameters(self.trunk.norm), heads, held_in)
        if readout == "mean":  # one product of both tokens side by side
            heads, names = [mean_of_both(*heads)], {"mean": ""}
        for name, layer in zip(names, heads, strict=True):
            yield from _present("heads", _named(name, layer))
        yield from _present("norm", apart._asdict())

    def _embedding(self, levels: Normalisation | None) -> dict[str, Tensor | None]:
        layer = _read(spec.Affine(self.model.patch_embed.proj))
        if levels is not None:
            layer = for_levels(layer, *levels)
        names = ("positions", "class_token", "more_tokens")
        added = (None if t is None else double(t) for t in added_tokens(self.model))
        return {**layer._asdict(), **dict(zip(names, added, strict=True))}

    def _norm_before(self) -> nn.LayerNorm | None:
        norm = getattr(self.model, "norm_pre", None)
        return norm if isinstance(norm, nn.LayerNorm) else None


def _why_not(model: Any) -> str | None:
    """Why a part of the model, in evaluation mode, would fall back and cannot be folded."""
    if not isinstance(model, FusedTrunk):
        return (
            "only blocks or layers of it are"
            if isinstance(model, FusedModule)
            else "it is no vision transformer of those known"
        )
    trunk, (verdict, embedding, _) = looked_at(cast(nn.Module, model))
    reason = verdict.model or why_global_hook() or why_not_bypassed((cast(nn.Module, model),)) or embedding
    reason = reason or verdict.norm or verdict.block
    for name, judged in zip(trunk.blocks, verdict.blocks, strict=False):
        parts = (*judged.parts, *judged.called, *judged.out_dropouts, judged.pruned)
        inner = next((part for part in parts if part is not None), None)
        reason = reason or (None if inner is None else f"block {name}: {inner}")
    if reason is not None:
        return reason
    for name, block in trunk.blocks.items():
        if [type(branch.body) for branch in block.branches] != [spec.Attention, spec.Mlp]:
            return f"block {name} is not attention and an MLP"
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


def _parts(block: Any) -> tuple[spec.Branch, spec.Attention, spec.Branch, spec.Mlp]:
    """The parts of a block for which `_why_not` gives no reason."""
    first, second = block.branches
    return first, first.body, second, second.body


def _layers(attention: spec.Attention, mlp: spec.Mlp) -> tuple[spec.Affine, ...]:
    """The layers qkv (of separate projections the first), proj, fc1 and fc2."""
    qkv = attention.qkv if isinstance(attention.qkv, spec.Affine) else attention.qkv[0]
    return qkv, attention.proj, mlp.fc1, mlp.fc2


def _eps(norm: spec.Affine) -> float:
    return cast(nn.LayerNorm, norm.module).eps


def _parameters(layer: spec.Affine) -> tuple[Tensor | None, Tensor | None]:
    parameters = layer.module._parameters
    return parameters[layer.weight], parameters[layer.bias]


def _read(layer: spec.Affine) -> Layer:
    weight, bias = _parameters(layer)
    assert weight is not None  # `_why_not` has checked it
    return Layer(double(weight), weight.new_zeros(len(weight)).double() if bias is None else double(bias))


def _named(prefix: str, tensors: Layer | Apart) -> dict[str, Tensor | None]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors._asdict().items()}


def _present(prefix: str, weights: Mapping[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        if tensor is not None:
            yield f"{prefix}.{name}" if prefix else name, tensor
