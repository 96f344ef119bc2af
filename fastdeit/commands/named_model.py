"""The argument MODEL of commands: a model of timm, or a function, of the user or of a library, that returns a model."""

import importlib
import os
import sys
from typing import Any

from torch import nn

HELP = (
    "a timm model name, such as deit_tiny_distilled_patch16_224, or MODULE:FUNCTION, such as torchvision.models:vit_b_16 or "
    "a function of your own that returns a model"
)


def is_path(name: str) -> bool:
    """Whether it is of the form MODULE:FUNCTION; timm's names may start with `hf-hub:`."""
    return ":" in name and not name.startswith("hf-hub:")


def make(name: str, **options: Any) -> nn.Module:
    """The model that MODULE:FUNCTION returns, or timm's model of that name with options.

    FUNCTION is called without arguments; a class of transformers' models with the default configuration. MODULE may lie in the
    present directory.

    Raises:
        ValueError: there is no such module or function, it cannot be called so, or it returns something else.
    """
    if not is_path(name):
        import timm

        return timm.create_model(name, **options)
    path, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"MODEL: expected MODULE:FUNCTION, got {name!r}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise ValueError(f"MODEL: {name} is a {type(function).__name__}, not a function that returns a model")
    config = getattr(function, "config_class", None) if isinstance(function, type) else None
    try:
        model = function() if config is None else function(config())
    except TypeError as error:
        raise ValueError(f"MODEL: {name} cannot be called without arguments: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"MODEL: {name} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def image_side(model: nn.Module) -> int:
    """Pixels per side of the model's images, 224 where it does not say."""
    cfg, config = getattr(model, "pretrained_cfg", None), getattr(model, "config", None)
    side = cfg.get("input_size", (3, 224, 224))[-1] if isinstance(cfg, dict) else getattr(model, "image_size", None)
    side = getattr(config, "image_size", None) if side is None else side
    return side if isinstance(side, int) else 224
