"""The arguments of `distillation_cross_entropy`: its options, and the checks of its inputs."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit import backends
from fastdeit.ops.arguments import check_strided

KINDS = ("none", "hard", "soft")
BASES = ("cross_entropy", "binary_cross_entropy", "none")
REDUCTIONS = ("mean", "sum", "none")
SOFT_DIVISORS = ("numel", "batch")


class Options(NamedTuple):
    """In the order of the registered ops' arguments."""

    kind: str
    base: str
    alpha: float
    tau: float
    label_smoothing: float
    soft_divisor: str
    reduction: str


def check_options(options: Options) -> None:
    for name, allowed in (
        ("kind", KINDS),
        ("base", BASES),
        ("reduction", REDUCTIONS),
        ("soft_divisor", SOFT_DIVISORS),
    ):
        given = getattr(options, name)
        if given not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {given!r}")
    if options.kind == "none" and options.base == "none":
        raise ValueError("kind, base: expected at least one term, got 'none' for both")
    for name in ("alpha", "tau", "label_smoothing"):
        given = getattr(options, name)
        if isinstance(given, bool) or not isinstance(given, (int, float, torch.SymFloat)):
            raise TypeError(f"{name}: expected a number, got {type(given).__name__}")
    if not 0 <= options.alpha <= 1:
        raise ValueError(f"alpha: expected a weight in [0, 1], got {options.alpha}")
    if not 0 < options.tau < math.inf:
        raise ValueError(f"tau: expected a finite temperature > 0, got {options.tau}")
    if not 0 <= options.label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a value in [0, 1), got {options.label_smoothing}")
    if options.label_smoothing > 0 and options.base != "cross_entropy":
        raise ValueError(f"label_smoothing: expected 0 with base {options.base!r}, got {options.label_smoothing}")


def check_tensors(logits, dist_logits, target, teacher, options: Options) -> None:
    given = dict(logits=logits, dist_logits=dist_logits, target=target, teacher=teacher)
    for name, option, value in (
        ("logits", "base", options.base),
        ("target", "base", options.base),
        ("dist_logits", "kind", options.kind),
        ("teacher", "kind", options.kind),
    ):
        if value == "none" and given[name] is not None:
            raise ValueError(f"{name}: expected None with {option} 'none', got {_described(given[name])}")
        if value != "none" and not isinstance(given[name], Tensor):
            raise TypeError(f"{name}: expected a tensor with {option} {value!r}, got {_described(given[name])}")
        if given[name] is not None:
            check_strided(name, given[name])
    head_name, head = ("dist_logits", dist_logits) if logits is None else ("logits", logits)
    for name, x in (("logits", logits), ("dist_logits", dist_logits)):
        if x is None:
            continue
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"{name}: expected shape (B, C) with at least one class, got {tuple(x.shape)}")
        if x.shape != head.shape:
            raise ValueError(f"{name}: expected the shape of {head_name} {tuple(head.shape)}, got {tuple(x.shape)}")
    for name, labels in (("target", target), ("teacher", teacher)):
        if labels is not None:
            _check_labels(name, labels, head_name, head)
    for name, x in given.items():
        if x is not None and x.device != head.device:
            raise ValueError(f"{name}: expected device {head.device} as {head_name} has, got {x.device}")
    if options.kind == "soft" and not teacher.is_floating_point():
        raise TypeError(f"teacher: expected floating-point logits with kind 'soft', got {teacher.dtype} labels")
    if options.label_smoothing > 0 and target.is_floating_point():
        raise ValueError(f"label_smoothing: expected 0 with soft targets, got {options.label_smoothing}")


def _check_labels(name, labels, head_name, head) -> None:
    if labels.dtype == torch.bool or labels.is_complex():
        raise TypeError(f"{name}: expected integer class indices or floats, got {labels.dtype}")
    if labels.is_floating_point():
        if labels.shape != head.shape:
            raise ValueError(
                f"{name}: expected shape {tuple(head.shape)} to match {head_name}, got {tuple(labels.shape)} of {labels.dtype}"
            )
        if labels.requires_grad:
            raise ValueError(
                f"{name}: it is a constant of the loss; expected a tensor without gradient, got one requiring it"
            )
    elif labels.shape != head.shape[:1]:
        raise ValueError(
            f"{name}: expected one class index per row of {head_name} {tuple(head.shape)}, got shape {tuple(labels.shape)} "
            f"of {labels.dtype}"
        )


def _described(value) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_range(head, target, teacher) -> None:
    """Raises IndexError naming the first class index outside [0, C). Waits for the GPU."""
    if backends.registered_path(head, target, teacher) or backends.in_functional_transform():
        return  # values cannot be looked at
    classes = head.shape[1]
    for name, labels in (("target", target), ("teacher", teacher)):
        if labels is None or labels.is_floating_point():
            continue
        labels = labels.long()
        outside = ((labels < 0) | (labels >= classes)).nonzero()
        if len(outside):
            row = outside[0].item()
            raise IndexError(f"{name}: expected class indices in [0, {classes}), got {labels[row].item()} in row {row}")
