"""The heads of timm's models on the normalised prefix tokens: products on their weights in the place of calls."""

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from fastdeit import ops
from fastdeit.blocks.checklist import why_called, why_not_bypassed, why_not_linear
from fastdeit.blocks.spec import Affine

Logits = Tensor | tuple[Tensor, ...]


def why_not_heads(model: nn.Module, names: Iterable[str]) -> str | None:
    """Why timm's `forward_head` runs, for a model derived from timm's VisionTransformer with token pooling.

    Args:
        names: of the heads.
    """
    children = model._modules
    norm, dropout = children.get("fc_norm"), children.get("head_drop")
    if norm is not None and (type(norm) is not nn.Identity or why_not_bypassed((norm,)) is not None):
        return "fc_norm is called"
    if dropout is not None and why_called(dropout) is not None:
        return "head_drop is called"
    for name, head in zip(names, _heads(model, names), strict=True):
        reason = why_not_linear(Affine(head)) or why_not_bypassed((head,))
        if reason is not None:
            return f"{name}: {reason}"
    return None


def head_parameters(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    return [parameter for head in _heads(model, names) for parameter in head.parameters()]


def run_heads(model: nn.Module, names: Sequence[str], tokens: Tensor) -> Logits:
    """What `forward_head` gives of tokens (B, prefix, C) where the rule above does not object.

    Returns:
        Logits (B, num_classes): of one head, or the mean of both; in distilled training those of each.
    """
    logits = []
    for head, token in zip(_heads(model, names), tokens[:, : len(names)].unbind(1), strict=True):
        weight, bias = (head._parameters[name] for name in ("weight", "bias"))
        logits.append(cast(Tensor, ops.linear(token, cast(Tensor, weight), bias)))
    if len(logits) == 1:
        return logits[0]
    if model.distilled_training and model.training:
        return tuple(logits)
    of_class, of_distillation = logits
    return (of_class + of_distillation) / 2


def _heads(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    return [cast(nn.Module, model._modules[name]) for name in names]
