"""Layers of Hugging Face transformers, as attributes of this module by transformers' names: `fastdeit.nn.huggingface.ViTLayer`.

Each class is made at its first access, which imports its file of transformers.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdeit.blocks.adapters.huggingface import describe_layer, layer_class, layout_of, part, why_collected
from fastdeit.blocks.adapters.huggingface_layers import LAYERS
from fastdeit.nn.host_block import HostBlock

# Arguments that a model passes on to its layers, which ignore them; BEiT's layers use two for their bias alone.
_FOR_THE_MODEL = ("num_items_in_batch", "output_hidden_states", "return_dict", "interpolate_pos_encoding", "resolution")
_OWN_ATTENTION = {"sdpa": sdpa_attention_forward, "eager": None}


class _Layer(HostBlock):
    """A standard pre-norm layer. `forward` takes and returns (B, N, C).

    Masks and other arguments, the collection of attentions, attention implementations other than "sdpa" and "eager", and active
    attention dropout run transformers' code. Gradient checkpointing is transformers', around the fused forward.
    """

    tokens_name = "hidden_states"
    describe_parts = describe_layer

    def why_not_arguments(self, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
        layout = layout_of(self)
        config = part(self, layout.core).config
        name = config._attn_implementation
        if name not in _OWN_ATTENTION or ALL_ATTENTION_FUNCTIONS.get(name) is not _OWN_ATTENTION[name]:
            return f'its attention is {name!r}, not transformers\' "sdpa" or "eager"'
        if self.training and layout.config_dropout is not None and getattr(config, layout.config_dropout) != 0.0:
            return "dropout is active"
        given = layout.parameters[
            1 : len(args) + 1
        ]  # the Dynamo of PyTorch 2.8 does not trace `zip` with `strict=False`
        named = {name: args[i] for i, name in enumerate(given)} | dict(kwargs)
        for_the_layer = {key: value for key, value in named.items() if key not in _FOR_THE_MODEL}
        return why_collected(self) or super().why_not_arguments((), for_the_layer)

    def finish(self, tokens: Tensor) -> Any:
        return (tokens,) if layout_of(self).in_a_tuple else tokens


def __getattr__(name: str) -> type[nn.Module]:
    if name not in LAYERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    source = layer_class(name)
    body = {"__module__": __name__, "__doc__": f"{source.__module__}.{name}, fused; as `_Layer`."}
    made = globals()[name] = type(_Layer)(name, (_Layer, source), body, source=source)
    return made
