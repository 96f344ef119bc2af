"""The two-layer perceptron of a transformer block."""

import timm.layers
import timm.layers.activations as timm_activations
from torch import Tensor, nn

from fastdeit import ops
from fastdeit.nn.eligibility import (
    FusedModule,
    dropped_out,
    forward_of,
    why_global_hook,
    why_not_bypassed,
    why_not_inactive_dropout,
    why_not_linear,
    why_not_plain_call,
)
from fastdeit.ops.mlp_op import why_reference

_Timms = timm.layers.Mlp
_TIMM_FORWARD = forward_of(_Timms)

_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_ACTIVATIONS = {
    timm_activations.GELU: "gelu",
    timm_activations.GELUTanh: "gelu_tanh",
    timm_activations.QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}
_ACTIVATION_FORWARDS = {kind: forward_of(kind) for kind in (nn.GELU, *_ACTIVATIONS)}


def activation_name(activation: nn.Module) -> str | None:
    """The op's name for an activation module, None for one that it does not know, or whose class was given another forward."""
    kind = type(activation)
    if kind.forward is not _ACTIVATION_FORWARDS.get(kind):
        return None
    return _GELUS.get(activation.approximate) if kind is nn.GELU else _ACTIVATIONS.get(kind)


class Mlp(FusedModule, timm.layers.Mlp):
    """timm.layers.Mlp (Vaswani et al. 2017, section 3.3) on the fused op, with timm's constructor.

    `forward` takes (..., in_features) and returns (..., out_features). Active dropout between the layers, a hidden norm, 1 x 1
    convolutions and activations other than GELU, SiLU and ReLU run timm's code.
    """

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why `forward(x)` would run timm's code, None if it would run the kernels."""
        return why_not_plain_call(x) or why_global_hook() or why_reference(x) or self.why_not_inlined()

    def why_not_inlined(self) -> str | None:
        """The same for a caller that has looked at x, at the kernel's reasons, at global hooks and at this module's own hooks."""
        if _Timms.forward is not _TIMM_FORWARD:
            return "the forward of timm's Mlp was replaced"
        children = self._modules
        fc1, act, drop1, norm, fc2 = (
            children["fc1"],
            children["act"],
            children["drop1"],
            children["norm"],
            children["fc2"],
        )
        if activation_name(act) is None:
            return f"the activation is {act}"
        if type(norm) is not nn.Identity:
            return f"norm is a {type(norm).__name__}"
        return (
            why_not_bypassed((fc1, act, drop1, norm, fc2))
            or why_not_linear(fc1)
            or why_not_linear(fc2)
            or why_not_inactive_dropout(drop1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.why_not_fused(x) is not None:
            return super().forward(x)
        return self.forward_inlined(x)

    def forward_inlined(self, x: Tensor) -> Tensor:
        """The fused forward, for a caller that has asked `why_not_inlined`."""
        children = self._modules
        fc1, fc2 = children["fc1"]._parameters, children["fc2"]._parameters
        activation = activation_name(children["act"])
        out = ops.mlp(x, fc1["weight"], fc1["bias"], fc2["weight"], fc2["bias"], activation=activation)
        return dropped_out(children["drop2"], out)

    def forward_branch(
        self,
        x: Tensor,
        branch: Tensor | None,
        norm: nn.Module,
        *,
        gamma: Tensor | None = None,
        drop_path_scale: Tensor | None = None,
        lean: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """x + drop_path_scale * branch, and gamma * what `forward_inlined` makes of its LayerNorm, in one autograd node.

        For a caller that has asked `why_not_inlined` of this module and of norm. Lean, it computes the pre-activation again.
        """
        children, affine = self._modules, norm._parameters
        fc1, fc2 = children["fc1"]._parameters, children["fc2"]._parameters
        weights = (fc1["weight"], fc1["bias"], fc2["weight"], fc2["bias"])
        options = {"gamma": gamma, "drop_path_scale": drop_path_scale, "lean": lean}
        options["activation"] = activation_name(children["act"])
        x, out = ops.add_layer_norm_mlp(x, branch, affine["weight"], affine["bias"], norm.eps, *weights, **options)
        return x, dropped_out(children["drop2"], out)
