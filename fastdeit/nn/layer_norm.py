"""LayerNorm for timm's class and for PyTorch's, which differ in state."""

from typing import ClassVar

import timm.layers
import torch
from torch import Tensor, nn

from fastdeit.blocks.call_rules import why_not_norm_call, why_not_plain_call
from fastdeit.blocks.checklist import why_not_norm
from fastdeit.blocks.fused_module import FusedModule
from fastdeit.blocks.run import run_layer_norm
from fastdeit.blocks.spec import Affine


class FusedLayerNorm(FusedModule):
    """The common part. The checklist runs at every call: without children it costs less than a snapshot's comparison.

    Attributes:
        keeps_dtype: the result is in the input's dtype under autocast too.
    """

    keeps_dtype: ClassVar[bool] = False

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why `forward(x)` would run the source class's code, None if it would run the kernel."""
        return why_not_plain_call(x) or why_not_norm_call(x) or why_not_norm(Affine(self), self.source)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self, FusedLayerNorm):  # a bound method that someone kept from before `restore`
            return type(self).forward(self, x)
        if self.why_not_fused(x) is not None:
            return super().forward(x)
        return run_layer_norm(Affine(self), x, x.dtype if self.keeps_dtype else None)


class LayerNorm(FusedLayerNorm, timm.layers.LayerNorm, source=timm.layers.LayerNorm):
    """timm.layers.LayerNorm (Ba, Kiros and Hinton 2016, eq. 4) on the fused kernel, over the last dimension.

    The constructor is timm's: `num_channels` is C, the size of the last dimension, `eps` is added to the variance, and `affine`
    says whether there are a weight and a bias, each (C,).

    `forward` takes (..., C) and returns the same shape, in float32 under CUDA autocast, else in the input's dtype.
    """


class TorchLayerNorm(FusedLayerNorm, nn.LayerNorm, source=nn.LayerNorm):
    """torch.nn.LayerNorm on the fused kernel, with PyTorch's constructor; otherwise as `LayerNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self, TorchLayerNorm):
            return type(self).forward(self, x)
        return self._traced(x) if isinstance(x, torch.fx.Proxy) else super().forward(x)

    def _traced(self, x):
        """Asks the tracer again, with PyTorch's class: torch.fx does not trace into classes that `torch.nn` defines."""
        self.__class__ = nn.LayerNorm
        try:
            return x.tracer.call_module(self, self.forward, (x,), {})
        finally:
            self.__class__ = TorchLayerNorm
