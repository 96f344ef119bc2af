"""The two-layer perceptron of a transformer block."""

import timm.layers
from torch import Tensor

from fastdeit.blocks.adapters.timm import describe_mlp
from fastdeit.blocks.call_rules import why_global_hook, why_not_mlp_call, why_not_plain_call
from fastdeit.blocks.checklist import why_not_mlp, why_replaced
from fastdeit.blocks.fused_module import FusedModule
from fastdeit.blocks.run import run_mlp
from fastdeit.blocks.snapshot import looked_at
from fastdeit.blocks.spec import Mlp as Description


class Mlp(FusedModule, timm.layers.Mlp, source=timm.layers.Mlp):
    """timm.layers.Mlp (Vaswani et al. 2017, section 3.3) on the fused op, with timm's constructor.

    `forward` takes (..., in_features) and returns (..., out_features). Active dropout between the layers, a hidden norm, 1 x 1
    convolutions and activations other than GELU, SiLU and ReLU run timm's code.
    """

    covers_parts = True
    describe = describe_mlp

    def judge(self, description: Description) -> str | None:
        return why_replaced(timm.layers.Mlp) or why_not_mlp(description)

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why `forward(x)` would run timm's code, None if it would run the kernels."""
        return looked_at(self)[1] or _why_not_call(x)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self, Mlp):  # a bound method that someone kept from before `restore`
            return type(self).forward(self, x)
        description, reason = looked_at(self)
        if reason is not None or _why_not_call(x) is not None:
            return super().forward(x)
        return run_mlp(description, x)


def _why_not_call(x: Tensor) -> str | None:
    return why_not_plain_call(x) or why_global_hook() or why_not_mlp_call(x)
