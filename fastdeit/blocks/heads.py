"""The heads of timm's models on the normalised prefix tokens: products on their weights in the place of calls."""

from collections.abc import Iterable, Sequence

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
    for name in names:
        reason = why_not_linear(Affine(children[name])) or why_not_bypassed((children[name],))
        if reason is not None:
            return f"{name}: {reason}"
    return None


def head_parameters(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    return [parameter for name in names for parameter in model._modules[name].parameters()]


def run_heads(model: nn.Module, names: Sequence[str], tokens: Tensor) -> Logits:
    """What `forward_head` gives of tokens (B, prefix, C) where the rule above does not object.

    Returns:
        Logits (B, num_classes): the mean over the heads, or of several heads in distilled training those of each.
    """
    logits = []
    for name, token in zip(names, tokens[:, : len(names)].unbind(1), strict=True):
        parameters = model._modules[name]._parameters
        logits.append(ops.linear(token, parameters["weight"], parameters["bias"]))
    if len(logits) == 1:
        return logits[0]
    if model.distilled_training and model.training:
        return tuple(logits)
    return sum(logits[1:], logits[0]) / len(logits)
