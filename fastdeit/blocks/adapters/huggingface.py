"""Where the layers of Hugging Face transformers 5 keep the parts of a block, by the names in `huggingface_layers`."""

import importlib
from functools import partial
from types import CodeType
from typing import Any

from torch import nn
from transformers import activations
from transformers.utils import output_capturing

from fastdeit.blocks.adapters.huggingface_layers import LAYERS, Layer, Names
from fastdeit.blocks.checklist import (
    PASSIVE_HOOKS,
    activation_name,
    register_activation,
    register_layer_scale,
    why_not_bypassed,
    why_replaced,
)
from fastdeit.blocks.snapshot import register_methods
from fastdeit.blocks.spec import NOTHING, Affine, Attention, Block, Branch, Mlp


def _gelu(activation: nn.Module) -> str | None:
    """What GELUActivation or GELUTanh computes, whose attribute `act` is PyTorch's function or the same in Python."""
    act = activation.act
    if act is nn.functional.gelu:
        return "gelu"
    tanh = isinstance(act, partial) and act.func is nn.functional.gelu and act.keywords == {"approximate": "tanh"}
    return "gelu_tanh" if tanh and not act.args else None


register_activation(activations.GELUActivation, _gelu)
register_activation(activations.GELUTanh, _gelu)
register_activation(activations.QuickGELUActivation, "quick_gelu")
register_activation(activations.NewGELUActivation, "gelu_tanh")
register_activation(activations.SiLUActivation, "silu")

# What a call with `output_attentions` or `output_hidden_states` leaves on the modules for good.
PASSIVE_HOOKS.update(
    code
    for code in output_capturing.install_output_capuring_hook.__code__.co_consts
    if isinstance(code, CodeType) and code.co_name == "output_capturing_hook"
)
# What transformers collects from whole layers, and which of them.
_OF_LAYERS = ("hidden_states", "_hidden_states_layers")


class _Parts:
    """The classes of one kind of layer and of its parts."""

    def __init__(self, name: str, layer: Layer) -> None:
        file = importlib.import_module(layer.module)
        self.names = layer.names
        self.source = getattr(file, name)
        self.attention = getattr(file, layer.attention)
        self.mlp = getattr(file, layer.mlp)
        for kind in (self.source, self.attention, self.mlp):
            register_methods(kind, "forward", host=True)
        self.drop_path = None
        if layer.names.drop_path is not None:
            self.drop_path = getattr(file, layer.attention.replace("Attention", "DropPath"))
            register_methods(self.drop_path, "forward", host=True)
        if layer.names.layer_scales is not None:
            register_layer_scale(getattr(file, layer.attention.replace("Attention", "LayerScale")))


_parts: dict[type[nn.Module], _Parts] = {}


def layer_class(name: str) -> type[nn.Module]:
    """The class of layers of that name in `LAYERS`, whose file is imported, made known to `describe_layer`.

    Raises:
        ImportError, AttributeError: this version of transformers has no such file or class.
    """
    parts = _Parts(name, LAYERS[name])
    _parts[parts.source] = parts
    return parts.source


def why_collected() -> str | None:
    """Why parts of a layer must be called in this call: transformers collects what they give."""
    collected = output_capturing._active_collector.get()
    if collected is None:
        return None
    parts = (name for name in collected if name not in _OF_LAYERS)
    return next((f"transformers collects its {name}" for name in parts), None)


def describe_layer(module: nn.Module) -> Block:
    children: Any = module._modules
    parts = _parts[module.source]
    names = parts.names
    attn, mlp = children[names.attention], children["mlp"]
    dropout = NOTHING if names.out_dropout is None else children[names.out_dropout]
    attention = _describe_attention(attn, names, dropout) if type(attn) is parts.attention else None
    perceptron = _describe_mlp(mlp, dropout) if type(mlp) is parts.mlp else None
    drop_path = NOTHING if names.drop_path is None else _acting(children[names.drop_path], parts.drop_path)
    scales: list[nn.Module] = [NOTHING, NOTHING]
    gammas, beyond = names.own_scales or ("lambda1", "lambda1"), None
    if names.layer_scales is not None:
        scales = [children[name] for name in names.layer_scales]
    elif names.own_scales is not None:
        scales = [module if name in module._parameters else NOTHING for name in gammas]
        others = (getattr(module, name) for name, scale in zip(gammas, scales, strict=True) if scale is NOTHING)
        beyond = next((f"its branches are scaled by {scale}" for scale in others if scale != 1.0), None)
    if names.added is not None and getattr(module, names.added) is not None:
        beyond = f"its attention adds a {names.added}"
    norm1, norm2 = (Affine(children[name]) for name in names.norms)
    first = Branch(norm1, attn, attention, scales[0], drop_path, gamma=gammas[0])
    second = Branch(norm2, mlp, perceptron, scales[1], drop_path, gamma=gammas[1])
    return Block(module, parts.source, (first, second), module.memory, all_fused=True, beyond=beyond)


def _acting(drop_path: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """transformers' stochastic depth where it does something or a call of it would be seen, else nothing."""
    inactive = type(drop_path) is kind and (drop_path.drop_prob == 0.0 or not drop_path.training)
    return NOTHING if inactive and why_replaced(kind) is None and why_not_bypassed((drop_path,)) is None else drop_path


def _describe_attention(attn: nn.Module, names: Names, out_dropout: nn.Module) -> Attention:
    children, head_dim = attn._modules, attn.head_dim
    beyond = None
    if getattr(attn, names.scaling) != head_dim**-0.5:
        beyond = f"its logits are scaled by {getattr(attn, names.scaling)}"
    elif attn.is_causal:
        beyond = "its attention is causal"
    q, k, v, proj = (Affine(children[name]) for name in ("q_proj", "k_proj", "v_proj", names.proj))
    dropout = getattr(attn, names.dropout) if attn.training else 0.0
    heads = getattr(attn, names.num_heads)
    return Attention((q, k, v), proj, heads, head_dim, (), dropout, out_dropout, beyond)


def _describe_mlp(mlp: nn.Module, out_dropout: nn.Module) -> Mlp:
    children = mlp._modules
    act = children["activation_fn"]
    fc1, fc2 = Affine(children["fc1"]), Affine(children["fc2"])
    return Mlp(fc1, act, activation_name(act), fc2, (), NOTHING, out_dropout)
