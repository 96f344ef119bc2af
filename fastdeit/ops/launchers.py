"""The launchers that ops call, as attributes, each imported at its first use: importing fastdeit does not import Triton."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

_BY_MODULE = {
    "attention.backward": ("attention_backward", "attention_qkv_backward"),
    "attention.forward": (
        "attention_forward",
        "attention_qkv_forward",
        "attention_qkv_quantize",
        "attention_quantize",
    ),
    "augment.apply": ("augment_layer",),
    "augment.tables": ("augment_tables",),
    "embedding.patch_embedding": ("patch_embedding_backward", "patch_embedding_forward"),
    "gemm.folded_weights": ("fold_forward", "fold_rows_backward"),
    "gemm.fused_mlp": ("fused_mlp_forward",),
    "gemm.linear": ("activation_gradient", "linear_forward"),
    "loss.distillation_cross_entropy": ("distillation_cross_entropy_backward", "distillation_cross_entropy_forward"),
    "mlp.activation": ("activation_backward", "activation_forward"),
    "norm.layer_norm": ("layer_norm_backward", "layer_norm_forward"),
    "norm.residual_branch": ("scale_add_backward",),
    "quantization.layer_norm_quantize": ("layer_norm_quantize",),
    "quantization.rescale": ("rescale",),
}
_MODULES = {launcher: module for module, launchers in _BY_MODULE.items() for launcher in launchers}


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    launcher = getattr(import_module(f"fastdeit.kernels.{_MODULES[name]}"), name)
    globals()[name] = launcher  # found without a call from now on
    return launcher
