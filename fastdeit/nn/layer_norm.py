"""LayerNorm for timm's class and for PyTorch's own, which differ in state."""

import timm.layers
import torch
from torch import Tensor, nn

from fastdeit import ops
from fastdeit.nn.eligibility import FusedModule, forward_of, why_not_plain_call, why_not_plain_weights
from fastdeit.ops.layer_norm import why_reference

_TIMM_FORWARD = forward_of(timm.layers.LayerNorm)
_TORCH_FORWARD = forward_of(nn.LayerNorm)


def _why_not_state(norm: nn.Module) -> str | None:
    """None if the op has what this module, of either class, normalises with."""
    if len(norm.normalized_shape) != 1:
        return f"it normalises over {len(norm.normalized_shape)} dimensions"
    parameters = norm._parameters
    return why_not_plain_weights(parameters["weight"], parameters["bias"]) if norm.elementwise_affine else None


class LayerNorm(FusedModule, timm.layers.LayerNorm):
    """timm.layers.LayerNorm (Ba, Kiros and Hinton 2016, eq. 4) on the fused kernel, over the last dimension.

    Args:
        num_channels: C, the size of the last dimension.
        eps: added to the variance.
        affine: whether there are a weight and a bias, each (C,).

    `forward` takes (..., C) and returns the same shape, in float32 under CUDA autocast, else in the input's dtype.
    """

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why `forward(x)` would run timm's code, None if it would run the kernel."""
        return why_not_plain_call(x) or why_reference(x) or self.why_not_inlined()

    def why_not_inlined(self) -> str | None:
        """The same for a caller that has looked at x, at the kernel's reasons and at this module's hooks."""
        if timm.layers.LayerNorm.forward is not _TIMM_FORWARD:
            return "the forward of timm's LayerNorm was replaced"
        if self._fast_norm:
            return "timm's fast norm is on"
        return _why_not_state(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.why_not_fused(x) is not None:
            return super().forward(x)
        return ops.layer_norm(x, self._parameters["weight"], self._parameters["bias"], self.eps)


class TorchLayerNorm(FusedModule, nn.LayerNorm):
    """torch.nn.LayerNorm on the fused kernel, with PyTorch's constructor; otherwise as `LayerNorm`."""

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why `forward(x)` would run PyTorch's code, None if it would run the kernel."""
        return why_not_plain_call(x) or why_reference(x) or self.why_not_inlined()

    def why_not_inlined(self) -> str | None:
        """The same for a caller that has looked at x, at the kernel's reasons and at this module's hooks."""
        if nn.LayerNorm.forward is not _TORCH_FORWARD:
            return "the forward of torch.nn.LayerNorm was replaced"
        return _why_not_state(self)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            return self._traced(x)
        if self.why_not_fused(x) is not None:
            return super().forward(x)
        return ops.layer_norm(x, self._parameters["weight"], self._parameters["bias"], self.eps)

    def _traced(self, x):
        """Asks the tracer again about PyTorch's class: torch.fx keeps those whole, by their module's name."""
        self.__class__ = nn.LayerNorm
        try:
            return x.tracer.call_module(self, self.forward, (x,), {})
        finally:
            self.__class__ = TorchLayerNorm
