"""Stand-in for the layers of transformers 4.57: its names, places and arguments, with the least of arithmetic in other words."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer


def attend(q, k, v, bias, dropout, implementation):
    """(B, H, N, D) of each -> (B, N, H * D), and the weights where they were made."""
    if implementation == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, bias, dropout).transpose(1, 2).flatten(2), None
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    weights = F.dropout((logits if bias is None else logits + bias).softmax(-1), dropout)
    return (weights @ v).transpose(1, 2).flatten(2), weights


class OldViTSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.num_attention_heads = config, config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.scaling, self.is_causal = self.attention_head_size**-0.5, False
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))

    def heads(self, x):
        parts = (self.query, self.key, self.value)
        return tuple(part(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for part in parts)

    def forward(self, hidden_states, head_mask=None):
        dropout = self.dropout_prob if self.training else 0.0
        return attend(*self.heads(hidden_states), head_mask, dropout, self.config._attn_implementation)


class OldViTSelfOutput(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense, self.dropout = (
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.Dropout(config.hidden_dropout_prob),
        )

    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.dense(hidden_states))


class OldViTAttention(nn.Module):
    inner = OldViTSelfAttention

    def __init__(self, config):
        super().__init__()
        self.attention, self.output = self.inner(config), OldViTSelfOutput(config)

    def forward(self, hidden_states, head_mask=None):
        return self.output(self.attention(hidden_states, head_mask)[0], hidden_states)


class OldViTIntermediate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states))


class OldViTOutput(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.dense(hidden_states)) + input_tensor


class OldViTLayer(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.attention, self.intermediate = OldViTAttention(config), OldViTIntermediate(config)
        self.output = OldViTOutput(config)
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(config.hidden_size) for _ in range(2))

    def forward(self, hidden_states, head_mask=None):
        hidden_states = self.attention(self.layernorm_before(hidden_states), head_mask) + hidden_states
        return self.output(self.intermediate(self.layernorm_after(hidden_states)), hidden_states)


# DINOv2's


class OldDinoSelfAttention(OldViTSelfAttention):
    pass


class OldDinoSelfOutput(OldViTSelfOutput):
    pass


class OldDinoAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.output = OldDinoSelfAttention(config), OldDinoSelfOutput(config)

    def forward(self, hidden_states, head_mask=None):
        return self.output(self.attention(hidden_states, head_mask)[0], hidden_states)


class OldDinoMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_state):
        return self.fc2(self.activation(self.fc1(hidden_state)))


class OldDinoLayerScale(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden_state):
        return hidden_state * self.lambda1


class OldDinoDropPath(nn.Module):
    def __init__(self, drop_prob=None):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states):
        if not self.training or self.drop_prob == 0.0:
            return hidden_states
        kept = torch.rand(hidden_states.shape[0], 1, 1) >= self.drop_prob
        return hidden_states * kept / (1 - self.drop_prob)


class OldDinoLayer(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention, self.mlp = OldDinoAttention(config), OldDinoMLP(config)
        self.layer_scale1, self.layer_scale2 = OldDinoLayerScale(config), OldDinoLayerScale(config)
        self.drop_path = OldDinoDropPath(config.drop_path_rate) if config.drop_path_rate else nn.Identity()

    def forward(self, hidden_states, head_mask=None):
        branch = self.layer_scale1(self.attention(self.norm1(hidden_states), head_mask))
        hidden_states = self.drop_path(branch) + hidden_states
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states)))) + hidden_states


# BEiT's


class OldBeitSelfAttention(OldViTSelfAttention):
    implementation = "eager"

    def __init__(self, config):
        super().__init__(config)
        del self.dropout_prob, self.scaling, self.is_causal
        self.dropout, self.has_relative_position_bias = nn.Dropout(config.attention_probs_dropout_prob), False

    def forward(
        self,
        hidden_states,
        head_mask=None,
        output_attentions=False,
        relative_position_bias=None,
        interpolate_pos_encoding=False,
        resolution=None,
    ):
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        found = attend(*self.heads(hidden_states), relative_position_bias, dropout, self.implementation)
        return found if output_attentions else found[:1]


class OldBeitSdpaSelfAttention(OldBeitSelfAttention):
    implementation = "sdpa"

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OldBeitSelfOutput(OldViTSelfOutput):
    pass


class OldBeitAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        kinds = {"eager": OldBeitSelfAttention, "sdpa": OldBeitSdpaSelfAttention}
        self.attention, self.output = kinds[config._attn_implementation](config), OldBeitSelfOutput(config)

    def forward(self, hidden_states, *args):
        found = self.attention(hidden_states, *args)
        return (self.output(found[0], hidden_states), *found[1:])


class OldBeitIntermediate(OldViTIntermediate):
    pass


class OldBeitOutput(OldViTSelfOutput):
    def __init__(self, config):
        super().__init__(config)
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.dropout(self.dense(hidden_states))


class OldBeitDropPath(OldDinoDropPath):
    pass


class OldBeitLayer(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.attention, self.intermediate = OldBeitAttention(config), OldBeitIntermediate(config)
        self.output = OldBeitOutput(config)
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(config.hidden_size) for _ in range(2))
        self.drop_path = OldBeitDropPath(config.drop_path_rate) if config.drop_path_rate else nn.Identity()
        self.lambda_1, self.lambda_2 = None, None
        if config.layer_scale_init_value:
            self.lambda_1, self.lambda_2 = (nn.Parameter(torch.ones(config.hidden_size)) for _ in range(2))

    def forward(
        self,
        hidden_states,
        head_mask=None,
        output_attentions=False,
        relative_position_bias=None,
        interpolate_pos_encoding=False,
        resolution=None,
    ):
        options = head_mask, output_attentions, relative_position_bias, interpolate_pos_encoding, resolution
        branch, *others = self.attention(self.layernorm_before(hidden_states), *options)
        hidden_states = self.drop_path(branch if self.lambda_1 is None else self.lambda_1 * branch) + hidden_states
        branch = self.output(self.intermediate(self.layernorm_after(hidden_states)))
        return (self.drop_path(branch if self.lambda_2 is None else self.lambda_2 * branch) + hidden_states, *others)


# CLIP's


class OldCLIPAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.num_heads = config, config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.scale, self.dropout, self.is_causal = self.head_dim**-0.5, 0.0, False
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, hidden_states, attention_mask=None, causal_attention_mask=None, output_attentions=False):
        parts = (self.q_proj, self.k_proj, self.v_proj)
        heads = (part(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        bias = causal_attention_mask if attention_mask is None else attention_mask
        found, weights = attend(*heads, bias, 0.0, self.config._attn_implementation)
        return self.out_proj(found), weights if output_attentions else None


class OldCLIPMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class OldCLIPEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = OldCLIPAttention(config), OldCLIPMLP(config)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
        branch, weights = self.self_attn(
            self.layer_norm1(hidden_states), attention_mask, causal_attention_mask, output_attentions
        )
        hidden_states = hidden_states + branch
        hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return (hidden_states, weights) if output_attentions else (hidden_states,)


class Model(nn.Module):
    """Layers called as their encoders call them."""

    def __init__(self, layer, config, *options):
        super().__init__()
        self.config, self.options = config, options
        self.embed = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, pixel_values):
        hidden_states = self.embed(pixel_values).flatten(2).mT
        for layer in self.layers:
            found = layer(hidden_states, *self.options)
            hidden_states = found[0] if isinstance(found, tuple) else found
        return hidden_states

    def gradient_checkpointing_enable(self):
        for layer in self.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = lambda call, *args: torch.utils.checkpoint.checkpoint(
                call, *args, use_reentrant=False
            )
