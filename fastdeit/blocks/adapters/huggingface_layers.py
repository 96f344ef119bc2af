"""The layers of Hugging Face transformers that are standard pre-norm blocks, by name: no import of transformers.

Versions 5 and 4.57 keep the parts of a layer in different places: each layer has a layout for either.
"""

from typing import NamedTuple


class Layout(NamedTuple):
    """Where a layer keeps its parts: paths from the layer, and names of attributes.

    Attributes:
        parameters: of the layer's forward after `self`. A version whose layer takes others may return something else, too.
        classes: by path, what the class there is called after the prefix that a model's classes have in common; two names where
            either does.
        norms: in front of attention and of the MLP.
        attention: the module called for the first branch, and `core` the one in it with its attributes and projections.
        qkv: names of the projections in `core`.
        proj: the output projection.
        head_dim, num_heads: attributes of `core`.
        scaling: attribute of `core`, None if the logits are always divided by the root of head_dim.
        dropout: attribute or child of `core` for attention weights.
        mlp: the module called for the second branch, and `others` those called after it.
        fc1, activation, fc2: of the MLP.
        out_dropouts: after each branch, None if there is none.
        others: modules that are called beside `attention`, `core` and `mlp`.
        layer_scales: LayerScale's modules.
        drop_path: stochastic depth.
        own_scales: LayerScale's parameters, where they are the layer's.
        added: module and attribute that say whether something is added to the logits, None if nothing ever is.
        config_dropout: what `core` reads from its config in place of `dropout`.
        in_a_tuple: the layer returns its tokens in a tuple.
    """

    parameters: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]
    norms: tuple[str, str]
    attention: str
    core: str
    qkv: tuple[str, str, str]
    proj: str
    head_dim: str
    num_heads: str
    scaling: str | None
    dropout: str
    mlp: str
    fc1: str
    activation: str
    fc2: str
    out_dropouts: tuple[str | None, str | None] = (None, None)
    others: tuple[str, ...] = ()
    layer_scales: tuple[str, str] | None = None
    drop_path: str | None = None
    own_scales: tuple[str, str] | None = None
    added: tuple[str, str] | None = None
    config_dropout: str | None = None
    in_a_tuple: bool = False


class Layer(NamedTuple):
    """A class of layers: the file that it is in, what its classes' names begin with, and the layouts that it may have."""

    module: str
    prefix: str
    layouts: tuple[Layout, ...]


_VIT = Layout(
    parameters=("hidden_states", "attention_mask", "kwargs"),
    classes={"attention": ("Attention",), "mlp": ("MLP",)},
    norms=("layernorm_before", "layernorm_after"),
    attention="attention",
    core="attention",
    qkv=("q_proj", "k_proj", "v_proj"),
    proj="attention.o_proj",
    head_dim="head_dim",
    num_heads="num_attention_heads",
    scaling="scaling",
    dropout="attention_dropout",
    mlp="mlp",
    fc1="mlp.fc1",
    activation="mlp.activation_fn",
    fc2="mlp.fc2",
    out_dropouts=("dropout", "dropout"),
)
_DINO = _VIT._replace(
    norms=("norm1", "norm2"),
    out_dropouts=(None, None),
    layer_scales=("layer_scale1", "layer_scale2"),
    drop_path="drop_path",
)
_BEIT = _VIT._replace(
    parameters=("hidden_states", "attention_mask", "interpolate_pos_encoding", "resolution", "kwargs"),
    drop_path="drop_path",
    own_scales=("lambda_1", "lambda_2"),
    added=("", "relative_position_bias"),
)
_CLIP = _VIT._replace(
    classes={"self_attn": ("Attention",), "mlp": ("MLP",)},
    norms=("layer_norm1", "layer_norm2"),
    attention="self_attn",
    core="self_attn",
    proj="self_attn.out_proj",
    num_heads="num_heads",
    scaling="scale",
    dropout="dropout",
    out_dropouts=(None, None),
)

# Of version 4.57, whose attention is in two modules, and ViT's MLP in two others.
_VIT_4 = Layout(
    parameters=("hidden_states", "head_mask"),
    classes={
        "attention": ("Attention",),
        "attention.attention": ("SelfAttention",),
        "attention.output": ("SelfOutput",),
        "intermediate": ("Intermediate",),
        "output": ("Output",),
    },
    norms=_VIT.norms,
    attention="attention",
    core="attention.attention",
    qkv=("query", "key", "value"),
    proj="attention.output.dense",
    head_dim="attention_head_size",
    num_heads="num_attention_heads",
    scaling="scaling",
    dropout="dropout_prob",
    mlp="intermediate",
    fc1="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    fc2="output.dense",
    out_dropouts=("attention.output.dropout", "output.dropout"),
    others=("attention.output", "output"),
)
_DINO_4 = _VIT_4._replace(
    classes={path: _VIT_4.classes[path] for path in ("attention", "attention.attention", "attention.output")}
    | {"mlp": ("MLP",)},
    norms=_DINO.norms,
    mlp="mlp",
    fc1="mlp.fc1",
    activation="mlp.activation",
    fc2="mlp.fc2",
    out_dropouts=("attention.output.dropout", None),
    others=("attention.output",),
    layer_scales=_DINO.layer_scales,
    drop_path=_DINO.drop_path,
)
_BEIT_4 = _VIT_4._replace(
    parameters=(
        *_VIT_4.parameters,
        "output_attentions",
        "relative_position_bias",
        "interpolate_pos_encoding",
        "resolution",
    ),
    classes=_VIT_4.classes | {"attention.attention": ("SelfAttention", "SdpaSelfAttention")},
    scaling=None,
    dropout="dropout",
    drop_path=_BEIT.drop_path,
    own_scales=_BEIT.own_scales,
    added=("attention.attention", "has_relative_position_bias"),
    config_dropout="attention_probs_dropout_prob",
    in_a_tuple=True,
)
_YOLOS = _VIT_4._replace(parameters=("hidden_states", "kwargs"))  # of version 5 too, which has not moved its parts
_CLIP_4 = _CLIP._replace(
    parameters=("hidden_states", "attention_mask", "causal_attention_mask", "output_attentions"),
    in_a_tuple=True,
)


def _layer(folder: str, prefix: str, *layouts: Layout) -> Layer:
    return Layer(f"transformers.models.{folder}.modeling_{folder}", prefix, layouts)


LAYERS = {
    "ViTLayer": _layer("vit", "ViT", _VIT, _VIT_4),
    "DeiTLayer": _layer("deit", "DeiT", _VIT, _VIT_4),
    "ViTMAELayer": _layer("vit_mae", "ViTMAE", _VIT, _VIT_4),
    "ViTMSNLayer": _layer("vit_msn", "ViTMSN", _VIT, _VIT_4),
    "IJepaLayer": _layer("ijepa", "IJepa", _VIT, _VIT_4),
    "Dinov2Layer": _layer("dinov2", "Dinov2", _DINO, _DINO_4),
    "Dinov2WithRegistersLayer": _layer("dinov2_with_registers", "Dinov2WithRegisters", _DINO, _DINO_4),
    "BeitLayer": _layer("beit", "Beit", _BEIT, _BEIT_4),
    "CLIPEncoderLayer": _layer("clip", "CLIP", _CLIP, _CLIP_4),
    "SiglipEncoderLayer": _layer("siglip", "Siglip", _CLIP),
    "AltCLIPEncoderLayer": _layer("altclip", "AltCLIP", _CLIP),
    "ChineseCLIPVisionLayer": _layer("chinese_clip", "ChineseCLIPVision", _CLIP),
    "CLIPSegEncoderLayer": _layer("clipseg", "CLIPSeg", _CLIP),
    "MetaClip2EncoderLayer": _layer("metaclip_2", "MetaClip2", _CLIP, _CLIP_4),
    "Tipsv2VisionLayer": _layer("tipsv2", "Tipsv2Vision", _DINO),
    "YolosLayer": _layer("yolos", "Yolos", _YOLOS, _VIT_4),
    "ASTLayer": _layer("audio_spectrogram_transformer", "AST", _VIT, _VIT_4),
    "VivitLayer": _layer("vivit", "Vivit", _VIT, _VIT_4),
}
