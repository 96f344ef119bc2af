"""Which modules of which libraries have a fused class. A library is looked up only after a program has imported it."""

import importlib
import sys

from torch import nn

from fastdeit.blocks.adapters.huggingface_layers import LAYERS
from fastdeit.blocks.fused_module import FUSED_CLASSES
from fastdeit.nn.unknown_attention import why_not_standard

# The host's file -> ours that has the fused classes for it, and their names there.
_HOSTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "timm.models.cait": ("fastdeit.nn.cait", ("LayerScaleBlock", "LayerScaleBlockClassAttn")),
    "clip.model": ("fastdeit.nn.clip", ("ResidualAttentionBlock", "LayerNorm")),
    "dinov2.layers.block": ("fastdeit.nn.dinov2", ("Block", "NestedTensorBlock")),
    "models": ("fastdeit.nn.deit_distilled", ("DistilledVisionTransformer",)),
    "models_v2": ("fastdeit.nn.deit_blocks", ("Block", "LayerScaleBlock")),
    "open_clip.transformer": ("fastdeit.nn.open_clip", ("ResidualAttentionBlock", "LayerNorm", "LayerNormFp32")),
    "src.models.vision_transformer": ("fastdeit.nn.ijepa", ("Block",)),
    "torchvision.models.vision_transformer": ("fastdeit.nn.torchvision", ("EncoderBlock",)),
    "vision_transformer": ("fastdeit.nn.dino", ("Block",)),
    "vit_pytorch.distill": ("fastdeit.nn.vit_pytorch_distill", ("DistillWrapper",)),
    "vit_pytorch.vit": ("fastdeit.nn.vit_pytorch", ("Transformer", "SimpleTransformer")),
    **{layer.module: ("fastdeit.nn.huggingface", (name,)) for name, layer in LAYERS.items()},
}
# Blocks that are no standard ones, and why.
_OTHERS = {
    ("vision_transformer_pytorch.model", "EncoderBlock"): (
        "its projections multiply by weights of three dimensions (LinearGeneral)"
    ),
}
# Of openai/CLIP, deit, DINO and I-JEPA; other projects have files of these names.
_BESIDE_A_SCRIPT = ("clip.model", "models", "models_v2", "src.models.vision_transformer", "vision_transformer")
_unusable: dict[str, str] = {}  # the host's file -> what its version lacks


def fused_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Source class -> fused class, for all libraries in this process. Those whose classes have other names there have none."""
    importlib.import_module("fastdeit.nn")
    for host, (ours, names) in _HOSTS.items():
        if host not in sys.modules or host in _unusable:
            continue
        try:
            file = importlib.import_module(ours)
            for name in names:
                getattr(file, name)
        except (ImportError, AttributeError) as error:  # a version of the host without these classes
            _unusable[host] = str(error).partition(" (/")[0]  # without the path
    return FUSED_CLASSES


def has_known_name(kind: type[nn.Module]) -> bool:
    """Whether it is known as not standard, or is one of the classes looked for, in a version of its library that is not known."""
    if (kind.__module__, kind.__name__) in _OTHERS or why_not_standard(kind) is not None:
        return True
    return kind.__module__ in _unusable and kind.__name__ in _HOSTS[kind.__module__][1]


def why_no_class(kind: type[nn.Module]) -> str:
    """Why a class has no fused one."""
    if (kind.__module__, kind.__name__) in _OTHERS:
        return _OTHERS[kind.__module__, kind.__name__]
    if (reason := why_not_standard(kind)) is not None:
        return f"no fused class for {kind.__name__}: {reason}"
    lack = None if kind.__module__ in _BESIDE_A_SCRIPT else _unusable.get(kind.__module__)
    version = "" if lack is None else f": this version of {kind.__module__.partition('.')[0]} is not known ({lack})"
    return f"no fused class for {kind.__name__}{version}"
