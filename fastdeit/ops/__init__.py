"""Fused operations. Each has a plain PyTorch twin, `<op>_reference`, beside it in its file."""

from fastdeit.ops.layer_norm import add_layer_norm, add_layer_norm_reference, layer_norm, layer_norm_reference

__all__ = ["add_layer_norm", "add_layer_norm_reference", "layer_norm", "layer_norm_reference"]
