"""The layers of Hugging Face transformers that are standard pre-norm blocks, by name: no import of transformers."""

from typing import NamedTuple


class Names(NamedTuple):
    """Where a layer keeps its parts: names of children, and of the attention's attributes."""

    norms: tuple[str, str]
    attention: str
    proj: str
    num_heads: str
    scaling: str
    dropout: str  # the probability for attention weights
    out_dropout: str | None  # one module, after each branch
    layer_scales: tuple[str, str] | None = None
    drop_path: str | None = None
    own_scales: tuple[str, str] | None = None  # LayerScale's parameters, where they are the layer's
    added: str | None = None  # what the layer adds to the logits of its attention, None if it has none


class Layer(NamedTuple):
    """A class of layers: the file that it is in, what its attention's and MLP's classes are called, and its names."""

    module: str
    attention: str
    mlp: str
    names: Names


_ATTRIBUTES = ("num_attention_heads", "scaling", "attention_dropout")
_VIT = Names(("layernorm_before", "layernorm_after"), "attention", "o_proj", *_ATTRIBUTES, "dropout")
_DINO = Names(
    ("norm1", "norm2"), "attention", "o_proj", *_ATTRIBUTES, None, ("layer_scale1", "layer_scale2"), "drop_path"
)
_BEIT = _VIT._replace(drop_path="drop_path", own_scales=("lambda_1", "lambda_2"), added="relative_position_bias")
_CLIP = Names(("layer_norm1", "layer_norm2"), "self_attn", "out_proj", "num_heads", "scale", "dropout", None)


def _layer(folder: str, prefix: str, names: Names) -> Layer:
    return Layer(f"transformers.models.{folder}.modeling_{folder}", f"{prefix}Attention", f"{prefix}MLP", names)


LAYERS = {
    "ViTLayer": _layer("vit", "ViT", _VIT),
    "DeiTLayer": _layer("deit", "DeiT", _VIT),
    "ViTMAELayer": _layer("vit_mae", "ViTMAE", _VIT),
    "ViTMSNLayer": _layer("vit_msn", "ViTMSN", _VIT),
    "IJepaLayer": _layer("ijepa", "IJepa", _VIT),
    "Dinov2Layer": _layer("dinov2", "Dinov2", _DINO),
    "Dinov2WithRegistersLayer": _layer("dinov2_with_registers", "Dinov2WithRegisters", _DINO),
    "BeitLayer": _layer("beit", "Beit", _BEIT),
    "CLIPEncoderLayer": _layer("clip", "CLIP", _CLIP),
    "SiglipEncoderLayer": _layer("siglip", "Siglip", _CLIP),
}
