"""Fused operations. Each has a reference in plain PyTorch, `<op>_reference`, in the same file."""

from fastdeit.ops.add_layer_norm_attention_op import add_layer_norm_attention, add_layer_norm_attention_reference
from fastdeit.ops.add_layer_norm_mlp_op import add_layer_norm_mlp, add_layer_norm_mlp_reference
from fastdeit.ops.add_layer_norm_quantize_op import (
    add_layer_norm_quantize,
    add_layer_norm_quantize_reference,
)
from fastdeit.ops.attention_op import attention, attention_qkv, attention_qkv_reference, attention_reference
from fastdeit.ops.attention_quantize_op import (
    attention_qkv_quantize,
    attention_qkv_quantize_reference,
    attention_quantize,
    attention_quantize_reference,
)
from fastdeit.ops.augment_op import augment, augment_reference
from fastdeit.ops.distillation_cross_entropy_op import (
    distillation_cross_entropy,
    distillation_cross_entropy_reference,
)
from fastdeit.ops.layer_norm_mlp_op import layer_norm_mlp, layer_norm_mlp_reference
from fastdeit.ops.layer_norm_op import add_layer_norm, add_layer_norm_reference, layer_norm, layer_norm_reference
from fastdeit.ops.linear_op import linear, linear_reference
from fastdeit.ops.mlp_op import mlp, mlp_reference
from fastdeit.ops.patch_embedding_op import patch_embedding, patch_embedding_reference
from fastdeit.ops.quantized_linear_op import quantized_linear, quantized_linear_reference
from fastdeit.ops.rescale_op import rescale, rescale_reference

__all__ = [
    "add_layer_norm",
    "add_layer_norm_attention",
    "add_layer_norm_attention_reference",
    "add_layer_norm_mlp",
    "add_layer_norm_mlp_reference",
    "add_layer_norm_quantize",
    "add_layer_norm_quantize_reference",
    "add_layer_norm_reference",
    "attention",
    "attention_qkv",
    "attention_qkv_quantize",
    "attention_qkv_quantize_reference",
    "attention_qkv_reference",
    "attention_quantize",
    "attention_quantize_reference",
    "attention_reference",
    "augment",
    "augment_reference",
    "distillation_cross_entropy",
    "distillation_cross_entropy_reference",
    "layer_norm",
    "layer_norm_mlp",
    "layer_norm_mlp_reference",
    "layer_norm_reference",
    "linear",
    "linear_reference",
    "mlp",
    "mlp_reference",
    "patch_embedding",
    "patch_embedding_reference",
    "quantized_linear",
    "quantized_linear_reference",
    "rescale",
    "rescale_reference",
]
