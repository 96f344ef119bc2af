"""The pre-norm transformer block, fused across its residual additions."""

import functools
from typing import NamedTuple

import timm.layers
import torch
from timm.models import vision_transformer
from torch import Tensor, nn

from fastdeit import ops
from fastdeit.backends import product_dtype
from fastdeit.kernels.attention.config import HANDED_OVER
from fastdeit.nn.attention import Attention
from fastdeit.nn.eligibility import (
    FusedModule,
    autocast_dtype,
    exported,
    forward_of,
    why_global_hook,
    why_not_bypassed,
    why_not_plain_call,
)
from fastdeit.nn.layer_norm import LayerNorm, TorchLayerNorm
from fastdeit.nn.mlp import Mlp
from fastdeit.nn.whole_block import run_whole
from fastdeit.ops.layer_norm_op import why_reference

# Source class -> fused class, of what a block is made of.
PARTS: dict[type[nn.Module], type[nn.Module]] = {
    timm.layers.Attention: Attention,
    timm.layers.Mlp: Mlp,
    timm.layers.LayerNorm: LayerNorm,
    nn.LayerNorm: TorchLayerNorm,
}
_NORMS = {LayerNorm, TorchLayerNorm}
_NOTHING = nn.Identity()
_TIMM_FORWARD = forward_of(vision_transformer.Block)
_LAYER_SCALE_FORWARD, _DROP_PATH_FORWARD = forward_of(timm.layers.LayerScale), forward_of(timm.layers.DropPath)


class Carried(NamedTuple):
    """A residual stream whose last addition is still to be made: x + gamma * scale * branch."""

    x: Tensor  # (B, N, C)
    branch: Tensor | None = None  # (B, N, C), or nothing to add
    gamma: Tensor | None = None  # (C,)
    scale: Tensor | None = None  # (B,)

    @classmethod
    def of(cls, x: Tensor, branch: Tensor, layer_scale: nn.Module, drop_path: nn.Module) -> "Carried":
        """x and a branch behind LayerScale and stochastic depth, either of which may be an Identity."""
        gamma = layer_scale._parameters.get("gamma")
        return cls(x, branch, gamma, drop_path_scale(drop_path, branch, gamma))

    def through(self, norm: nn.Module, part: Attention | Mlp, layer_scale: nn.Module, drop_path: nn.Module, lean: bool):
        """The same after the addition and with what part makes of its LayerNorm, scaled but for the factor per sample, as branch.

        One autograd node. There must be no gamma left to apply, and this one must be `_in_product`.
        """
        gamma = layer_scale._parameters.get("gamma")
        options = {"gamma": gamma, "drop_path_scale": self.scale, "lean": lean}
        x, branch = part.forward_branch(self.x, self.branch, norm, **options)
        return Carried(x, branch, None, drop_path_scale(drop_path, branch, gamma))

    def add_layer_norm(self, norm: nn.Module, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The stream after its addition, and norm's output on it, in one kernel."""
        parameters = norm._parameters
        affine = parameters["weight"], parameters["bias"], norm.eps
        if self.branch is None:
            return self.x, ops.layer_norm(self.x, *affine, out_dtype=out_dtype)
        options = {"gamma": self.gamma, "drop_path_scale": self.scale, "out_dtype": out_dtype}
        return ops.add_layer_norm(self.x, self.branch, *affine, **options)


class Block(FusedModule, vision_transformer.Block):
    """timm's vision transformer block (Dosovitskiy et al. 2021, eqs. 2-3) with timm's constructor.

        x = x + drop_path1(ls1(attn(norm1(x))))
        x = x + drop_path2(ls2(mlp(norm2(x))))

    LayerScale, stochastic depth, the first addition and norm2 are one kernel. `forward` takes and returns (B, N, C). Attention and
    MLP of any class are called as they are; this package's own are fused without a call between. Under autocast the residual stream
    keeps its dtype, as in timm. Stochastic depth draws timm's masks from the same random numbers.

    Attributes:
        memory: what is kept for backward. "usual": both normalised inputs, qkv, attention's output and the MLP's pre-activation,
            20 of timm's 36 bytes a token and channel under autocast. "lean": not the pre-activation, which backward computes
            again from the MLP's input, 12 bytes.
    """

    memory = "usual"

    @functools.wraps(vision_transformer.Block.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for part in self.modules():
            part.__class__ = PARTS.get(type(part), type(part))

    def why_not_fused(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        """Why `forward` would run timm's code around its children, None if it would run the kernels."""
        return why_not_plain_call(x) or why_global_hook() or self._why_not_around_children(x)

    def _why_not_around_children(self, x: Tensor) -> str | None:
        if vision_transformer.Block.forward is not _TIMM_FORWARD:
            return "the forward of timm's Block was replaced"
        children = self._modules
        norm1, norm2 = children["norm1"], children["norm2"]
        ls1, drop_path1 = children["ls1"], children["drop_path1"]
        for norm in (norm1, norm2):
            if type(norm) not in _NORMS:
                return f"a norm is a {type(norm).__name__} that is not accelerated"
        return (
            why_reference(x)
            or norm1.why_not_inlined()
            or norm2.why_not_inlined()
            or why_not_bypassed((norm1, norm2, ls1, drop_path1))
            or _why_not_layer_scale(ls1, x)
            or _why_not_drop_path(drop_path1)
        )

    def why_not_carried(self, x: Tensor) -> str | None:
        """Why a model may not run this block's parts itself and leave its last addition to whatever comes next."""
        children = self._modules
        ls2, drop_path2 = children["ls2"], children["drop_path2"]
        return (
            why_not_bypassed((self, ls2, drop_path2))
            or self._why_not_around_children(x)
            or _why_not_layer_scale(ls2, x)
            or _why_not_drop_path(drop_path2)
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        plain_call = attn_mask is None and not is_causal and why_not_plain_call(x) is None and why_global_hook() is None
        whole = plain_call and run_whole((self,), Block, x)
        if not whole and self.why_not_fused(x, attn_mask, is_causal) is not None:
            return super().forward(x, attn_mask, is_causal)
        last = self.through(Carried(x), attn_mask, is_causal, carry=False, whole=whole)
        return last.x + last.branch

    def through(
        self,
        carried: Carried,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        carry: bool,
        keep: int | None = None,
        whole: bool = False,
    ) -> Carried:
        """What enters the block through it, up to the addition of the MLP's output, which is left to the caller.

        For a caller that has asked `why_not_fused`, or `why_not_carried` if LayerScale and stochastic depth are to be carried.

        Args:
            carried: what enters the block.
            attn_mask, is_causal: handed on to the attention.
            carry: leave the last LayerScale and stochastic depth to the addition too, else call their modules.
            keep: compute the first `keep` tokens alone, which attend to all as ever. Needs a fused `Attention`.
            whole: `run_whole` has found that attention and MLP run fused, so that they need not be asked.
        """
        children = self._modules
        norm1, attn, norm2, mlp = (children[name] for name in ("norm1", "attn", "norm2", "mlp"))
        ls1, drop_path1, ls2, drop_path2 = (children[name] for name in ("ls1", "drop_path1", "ls2", "drop_path2"))
        lean = self.memory == "lean"

        inline = whole or (attn_mask is None and not is_causal and inlines(attn, Attention, carried.x))
        joint = inline and keep is None and carried.gamma is None and not HANDED_OVER
        if joint and _in_product(ls1, carried.x):
            carried = carried.through(norm1, attn, ls1, drop_path1, lean)
        else:
            # Only a fused child's product reads the normalised tokens: it takes them in the dtype that it multiplies in.
            x, tokens = carried.add_layer_norm(norm1, out_dtype=autocast_dtype(carried.x) if inline else None)
            if keep is not None:
                x, branch = x[:, :keep], attn.forward_prefix(tokens, keep)
            elif inline:
                branch = attn.forward_inlined(tokens)
            else:
                branch = attn(tokens, attn_mask=attn_mask, is_causal=is_causal)
            plain = type(branch) is Tensor or exported(branch)
            if plain and branch.shape == x.shape:
                carried = Carried.of(x, branch, ls1, drop_path1)
            else:  # a custom attention's, which PyTorch's addition takes
                carried = Carried(x + drop_path1(ls1(branch)))

        inline = whole or inlines(mlp, Mlp)
        scales = (ls2, drop_path2) if carry else (_NOTHING, _NOTHING)
        if inline and carried.gamma is None and _in_product(scales[0], carried.x):
            carried = carried.through(norm2, mlp, *scales, lean)
            return carried if carry else carried._replace(branch=drop_path2(ls2(carried.branch)))
        x, tokens = carried.add_layer_norm(norm2, out_dtype=autocast_dtype(carried.x) if inline else None)
        branch = mlp.forward_inlined(tokens) if inline else mlp(tokens)
        return Carried.of(x, branch, ls2, drop_path2) if carry else Carried(x, drop_path2(ls2(branch)))


def inlines(module: nn.Module, fused: type[nn.Module], *args) -> bool:
    """Whether a caller may run `module.forward_inlined` in place of the module; args are those of its `why_not_inlined`."""
    return type(module) is fused and not (why_not_bypassed((module,)) or module.why_not_inlined(*args))


def _in_product(layer_scale: nn.Module, x: Tensor) -> bool:
    """Whether LayerScale may be folded into the weight before it. Multiplied by a small gamma, weights leave the range of fp16."""
    return layer_scale._parameters.get("gamma") is None or product_dtype(x) is not torch.float16


def drop_path_scale(drop_path: nn.Module, branch: Tensor, gamma: Tensor | None) -> Tensor | None:
    """Stochastic depth's factor per sample, (B,) float32: 0, or 1/keep in full precision. None if it does nothing.

    The mask is drawn by timm's operations on a tensor of the shape and dtype that timm would draw it for (the branch after
    LayerScale), so that it and the generator's state afterwards are timm's.
    """
    if type(drop_path) is nn.Identity or drop_path.drop_prob == 0.0 or not drop_path.training:
        return None
    keep = 1 - drop_path.drop_prob
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    mask = branch.new_empty((branch.shape[0],) + (1,) * (branch.dim() - 1), dtype=dtype).bernoulli_(keep)
    scale = mask.to(torch.float32).reshape(-1)
    return scale / keep if keep > 0.0 and drop_path.scale_by_keep else scale


def _why_not_layer_scale(scale: nn.Module, x: Tensor) -> str | None:
    if type(scale) is nn.Identity:
        return None
    if type(scale) is not timm.layers.LayerScale or scale.inplace:
        return f"ls1 is a {type(scale).__name__}" + (" that works in place" if getattr(scale, "inplace", False) else "")
    if timm.layers.LayerScale.forward is not _LAYER_SCALE_FORWARD:
        return "the forward of timm's LayerScale was replaced"
    gamma = scale._parameters.get("gamma")
    if type(gamma) is not nn.Parameter and type(gamma) is not Tensor and not exported(gamma):
        return f"a weight is a {type(gamma).__name__}"
    return None if gamma.dtype is x.dtype else f"ls1 is in {gamma.dtype}, the input in {x.dtype}"


def _why_not_drop_path(drop_path: nn.Module) -> str | None:
    if type(drop_path) is nn.Identity:
        return None
    if type(drop_path) is not timm.layers.DropPath:
        return f"drop_path1 is a {type(drop_path).__name__}"
    return None if timm.layers.DropPath.forward is _DROP_PATH_FORWARD else "the forward of timm's DropPath was replaced"
