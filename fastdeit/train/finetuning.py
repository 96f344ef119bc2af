"""Weights to start from, of another resolution, with other classes or without a distillation token."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from fastdeit.train.checkpoints import check_same_tensors
from fastdeit.train.class_names import class_difference, stored_classes

HEADS = ("head", "head_dist")


def load_for_finetuning(
    model: nn.Module, path: Path, classes: Sequence[str] | None = None, new_head: bool = False
) -> None:
    """Loads a checkpoint of fastdeit, timm or facebookresearch/deit into a vision transformer of another resolution.

    timm interpolates the positions. A head for another number of classes keeps its initial values, and so does what belongs to a
    distillation token that the checkpoint lacks: token, position and head. stderr says so.

    Args:
        model: with its initial weights.
        path: the checkpoint.
        classes: the model's classes by number; compared with those that the checkpoint names, if it does.
        new_head: start the heads anew in any case, and compare no classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is of another model, or its heads are for other classes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"finetune: {path}: no such checkpoint")
    own = model.state_dict()
    try:
        weights = timm.models.load_state_dict(str(path), use_ema=False)
        added = _add_distillation_token(weights, own)
        weights = checkpoint_filter_fn(weights, model)
        assert all(isinstance(value, Tensor) for value in weights.values()), "it holds other things than tensors"
    except Exception as error:  # what is raised depends on the format and on where the file ends
        raise ValueError(f"finetune: {path}: cannot be read as a checkpoint: {error}") from error
    heads = [name for name in own if name.split(".")[0] in HEADS]
    for name in heads:
        if name in weights and (new_head or weights[name].shape != own[name].shape):
            del weights[name]
    kept = [name for name in heads if name not in weights]
    if classes is not None and len(kept) < len(heads):
        _check_classes(path, classes)
    try:
        check_same_tensors({**weights, **{name: own[name] for name in kept}}, own, path)
    except ValueError as error:
        raise ValueError(f"finetune: {error}") from None
    model.load_state_dict(weights, strict=False)
    if added:
        print(
            f"finetune: {path} has no distillation token: dist_token, its position and head_dist start from initial values",
            file=sys.stderr,
            flush=True,
        )
    elif kept:
        print(f"finetune: {', '.join(kept)} start from initial values", file=sys.stderr, flush=True)


def _add_distillation_token(weights: dict[str, Any], own: dict[str, Tensor]) -> bool:
    """Where own has a distillation token and weights has none: puts own's into weights, with its position. Whether that was so."""
    inner = weights.get("model", weights)
    inner = inner.get("state_dict", inner)
    if "dist_token" not in own or "dist_token" in inner or "cls_token" not in inner:
        return False
    inner["dist_token"] = own["dist_token"]
    position = own["pos_embed"][:, 1:2].to(inner["pos_embed"].dtype)
    inner["pos_embed"] = torch.cat([inner["pos_embed"][:, :1], position, inner["pos_embed"][:, 1:]], 1)
    return True


def _check_classes(path: Path, classes: Sequence[str]) -> None:
    """Raises ValueError where path names other classes than those, for heads that are to be taken over."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = stored_classes(file.metadata() or {}, path)
    except SafetensorError:  # one of PyTorch's, which knows of no classes
        return
    except ValueError as error:
        raise ValueError(f"finetune: {error}") from None
    found = class_difference(classes, names) if names is not None else None
    if found is not None:
        raise ValueError(
            f"finetune: {path} has heads for other classes: beside them the data {found}; finetune_new_head true starts heads anew"
        )
