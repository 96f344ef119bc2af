"""Where the layers of Hugging Face transformers keep the parts of a block, by the layouts in `huggingface_layers`."""

import importlib
import inspect
from functools import partial
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import nn
from transformers import activations

from fastdeit.blocks.adapters.huggingface_layers import LAYERS, Layer, Layout
from fastdeit.blocks.checklist import (
    PASSIVE_HOOKS,
    acting,
    activation_name,
    register_activation,
    register_layer_scale,
    why_replaced,
)
from fastdeit.blocks.drop_path import register_drop_path
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
register_activation(activations.FastGELUActivation, "gelu_tanh")
register_activation(activations.SiLUActivation, "silu")

try:
    from transformers.utils import output_capturing
except ImportError:  # version 4 puts a forward on each module that it collects from, for the time of the call
    output_capturing = None
else:  # what a call with `output_attentions` or `output_hidden_states` leaves on the modules for good
    PASSIVE_HOOKS.update(
        code
        for code in output_capturing.install_output_capuring_hook.__code__.co_consts
        if isinstance(code, CodeType) and code.co_name == "output_capturing_hook"
    )
# What transformers collects from whole layers, and which of them.
_OF_LAYERS = ("hidden_states", "_hidden_states_layers")


class _Parts:
    """The layout of one kind of layer in this version of transformers, and the classes of its parts."""

    def __init__(self, name: str, layer: Layer) -> None:
        file = importlib.import_module(layer.module)
        self.source = getattr(file, name)
        self.layout = _layout_of(self.source, file, layer)
        self.classes = {
            path: tuple(getattr(file, layer.prefix + end) for end in ends) for path, ends in self.layout.classes.items()
        }
        kinds = [self.source, *(kind for kinds in self.classes.values() for kind in kinds)]
        self.drop_path = None
        if self.layout.drop_path is not None:
            self.drop_path = getattr(file, layer.prefix + "DropPath")
            kinds.append(self.drop_path)
        for kind in kinds:
            register_methods(kind, "forward", host=True)
        if self.drop_path is not None:
            register_drop_path(self.drop_path)
        if self.layout.layer_scales is not None:
            register_layer_scale(getattr(file, layer.prefix + "LayerScale"))


def _layout_of(source: type[nn.Module], file: ModuleType, layer: Layer) -> Layout:
    """The first layout that the file's classes and the layer's arguments fit."""
    arguments = tuple(inspect.signature(source.forward).parameters)[1:]
    for layout in layer.layouts:
        names = [layer.prefix + end for ends in layout.classes.values() for end in ends]
        if layout.parameters == arguments and all(hasattr(file, name) for name in names):
            return layout
    raise ImportError(f"{source.__name__} has other parts, or takes other arguments: {', '.join(arguments)}")


_parts: dict[type[nn.Module], _Parts] = {}


def layer_class(name: str) -> type[nn.Module]:
    """The class of layers of that name in `LAYERS`, whose file is imported, made known to `describe_layer`.

    Raises:
        ImportError, AttributeError: this version of transformers has no such file or class, or one with another layout.
    """
    parts = _Parts(name, LAYERS[name])
    _parts[parts.source] = parts
    return parts.source


def layout_of(module: Any) -> Layout:
    """The layout of a layer's drop-in."""
    return _parts[module.source].layout


def why_collected(layer: Any) -> str | None:
    """Why parts of a layer must be called in this call: transformers collects what they give."""
    if output_capturing is None:
        return None
    collector = output_capturing._active_collector
    if (
        torch.compiler.is_compiling() and not collector.compiling
    ):  # compiled without its model, whose setting cannot be traced
        hooked = any(part(layer, path)._forward_hooks for path in layout_of(layer).classes)
        return "it is compiled alone, with hooks by which transformers collects outputs" if hooked else None
    for name in collector.get() or ():  # the Dynamo of PyTorch 2.8 does not trace `next` with a default
        if name not in _OF_LAYERS:
            return f"transformers collects its {name}"
    return None


def part(layer: Any, path: str) -> Any:
    """The module at a path of children from the layer; the layer itself for an empty one.

    Raises:
        KeyError: there is none.
    """
    module: Any = layer
    for name in path.split(".") if path else ():
        module = module._modules[name]
    return module


def describe_layer(module: nn.Module) -> Block:
    parts = _parts[module.source]
    layout, unknown = parts.layout, _unknown_parts(module, parts)
    attn, mlp = part(module, layout.attention), part(module, layout.mlp)
    attention = None if unknown & {layout.attention, layout.core} else _describe_attention(module, layout)
    perceptron = None if layout.mlp in unknown else _describe_mlp(module, layout)
    drop_path = NOTHING if layout.drop_path is None else acting(part(module, layout.drop_path), parts.drop_path)
    scales: list[nn.Module] = [NOTHING, NOTHING]
    gammas, beyond = layout.own_scales or ("lambda1", "lambda1"), _why_others(module, parts, unknown)
    if layout.layer_scales is not None:
        scales = [part(module, path) for path in layout.layer_scales]
    elif layout.own_scales is not None:
        scales = [module if name in module._parameters else NOTHING for name in gammas]
        for factor in [getattr(module, name) for name, scale in zip(gammas, scales, strict=True) if scale is NOTHING]:
            if factor is not None and factor != 1.0:
                beyond = beyond or f"its branches are scaled by {factor}"
    if layout.added is not None:
        path, name = layout.added
        if getattr(part(module, path), name, None) not in (None, False):
            beyond = "its attention adds a relative position bias"
    norm1, norm2 = (Affine(part(module, path)) for path in layout.norms)
    first = Branch(norm1, attn, attention, scales[0], drop_path, gamma=gammas[0])
    second = Branch(norm2, mlp, perceptron, scales[1], drop_path, gamma=gammas[1])
    return Block(module, parts.source, (first, second), module.memory, all_fused=True, beyond=beyond)


def _unknown_parts(module: nn.Module, parts: _Parts) -> set[str]:
    """Paths of modules that are of another class than transformers gives them."""
    return {path for path, kinds in parts.classes.items() if type(part(module, path)) not in kinds}


def _why_others(module: nn.Module, parts: _Parts, unknown: set[str]) -> str | None:
    """Why modules that are called beside the two of the branches cannot be passed over: `checklist` sees those two alone."""
    layout = parts.layout
    for path in dict.fromkeys((*layout.others, layout.core)):
        if path == layout.attention:
            continue
        kind = type(part(module, path))
        if (reason := f"a {kind.__name__} is called" if path in unknown else why_replaced(kind)) is not None:
            return reason
    return None


def _describe_attention(module: nn.Module, layout: Layout) -> Attention:
    core = part(module, layout.core)
    head_dim, beyond = getattr(core, layout.head_dim), None
    if layout.scaling is not None and getattr(core, layout.scaling) != head_dim**-0.5:
        beyond = f"its logits are scaled by {getattr(core, layout.scaling)}"
    elif getattr(core, "is_causal", False):
        beyond = "its attention is causal"
    q, k, v = (Affine(core._modules[name]) for name in layout.qkv)
    dropout = core._modules.get(layout.dropout)
    between = tuple(part(module, path) for path in (layout.core, *layout.others) if path.startswith(layout.attention))
    if dropout is None:
        dropout = getattr(core, layout.dropout) if core.training else 0.0
    else:
        between = (*between, dropout)
    heads, proj = getattr(core, layout.num_heads), Affine(part(module, layout.proj))
    return Attention((q, k, v), proj, heads, head_dim, between, dropout, _out_dropout(module, layout, 0), beyond)


def _describe_mlp(module: nn.Module, layout: Layout) -> Mlp:
    fc1, act, fc2 = (part(module, path) for path in (layout.fc1, layout.activation, layout.fc2))
    between = tuple(part(module, path) for path in layout.others if not path.startswith(layout.attention))
    out_dropout = _out_dropout(module, layout, 1)
    return Mlp(Affine(fc1), act, activation_name(act), Affine(fc2), between, NOTHING, out_dropout)


def _out_dropout(module: nn.Module, layout: Layout, branch: int) -> nn.Module:
    path = layout.out_dropouts[branch]
    return NOTHING if path is None else part(module, path)
