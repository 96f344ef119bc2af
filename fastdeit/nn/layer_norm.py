"""LayerNorm for timm's class and for PyTorch's own, which differ in state."""

from collections.abc import Callable

import timm.layers
import torch
from torch import Tensor, nn

from fastdeit import ops
from fastdeit.nn.eligibility import FusedModule, forward_of, why_not_plain_call, why_not_plain_weights
from fastdeit.ops.layer_norm_op import why_reference


class _FusedLayerNorm(FusedModule):
    """What both have in common: the decision and the fused forward."""

    _source: tuple[type[nn.LayerNorm], Callable | None]  # the class that this one stands in for, and its forward
    _fast_norm = False  # timm's class has a switch of this name

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why `forward(x)` would run the source class's code, None if it would run the kernel."""
        return why_not_plain_call(x) or why_reference(x) or self.why_not_inlined()

    def why_not_inlined(self) -> str | None:
        """The same for a caller that has looked at x, at the kernel's reasons and at this module's hooks."""
        source, forward = self._source
        if source.forward is not forward:
            return f"the forward of {source.__module__}.{source.__name__} was replaced"
        if self._fast_norm:
            return "timm's fast norm is on"
        if len(self.normalized_shape) != 1:
            return f"it normalises over {len(self.normalized_shape)} dimensions"
        return why_not_plain_weights(self._parameters) if self.elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        if self.why_not_fused(x) is not None:
            return super().forward(x)
        parameters = self._parameters
        return ops.layer_norm(x, parameters["weight"], parameters["bias"], self.eps)


class LayerNorm(_FusedLayerNorm, timm.layers.LayerNorm):
    """timm.layers.LayerNorm (Ba, Kiros and Hinton 2016, eq. 4) on the fused kernel, over the last dimension.

    Args:
        num_channels: C, the size of the last dimension.
        eps: added to the variance.
        affine: whether there are a weight and a bias, each (C,).

    `forward` takes (..., C) and returns the same shape, in float32 under CUDA autocast, else in the input's dtype.
    """

    _source = timm.layers.LayerNorm, forward_of(timm.layers.LayerNorm)


class TorchLayerNorm(_FusedLayerNorm, nn.LayerNorm):
    """torch.nn.LayerNorm on the fused kernel, with PyTorch's constructor; otherwise as `LayerNorm`."""

    _source = nn.LayerNorm, forward_of(nn.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        return self._traced(x) if isinstance(x, torch.fx.Proxy) else super().forward(x)

    def _traced(self, x):
        """Asks the tracer again about PyTorch's class: torch.fx keeps those whole, by their module's name."""
        self.__class__ = nn.LayerNorm
        try:
            return x.tracer.call_module(self, self.forward, (x,), {})
        finally:
            self.__class__ = TorchLayerNorm
