"""A transformer block as data, whatever library made it: its residual branches, and where their parameters are.

    x = x + drop_path(gamma * body(norm(x)))        for each branch in turn (Dosovitskiy et al. 2021, eqs. 2-3)

A record holds modules and names of parameters, never tensors: weights are read at each call, so that `functional_call`, `.to()` and
sharding work as ever. `checklist` accepts or refuses a record, `run` computes it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

# What an adapter names where its host has no module in that place. A host's module never is this one.
NOTHING = nn.Identity()


@dataclass(frozen=True, slots=True)
class Affine:
    """A module's weight and bias by their names there; of a norm, `module` also has `eps` and `normalized_shape`."""

    module: nn.Module
    weight: str = "weight"
    bias: str = "bias"


@dataclass(frozen=True, slots=True)
class Attention:
    """proj(softmax(q k^T / sqrt(D)) v) (Vaswani et al. 2017, section 3.2.2).

    Attributes:
        qkv: weight (3 * H * D, C), or one projection each for q, k and v with weights (H * D, C).
        proj: weight (C_out, H * D).
        between: modules that the host calls between the projections and that a fused run does not call.
        dropout: the one of the attention weights, among `between`, or the probability that the host would drop with in the mode
            that it is in; it must be inactive.
        out_dropout: after proj; it is called where it is active.
        beyond: what the host computes beyond this, such as "its output is gated"; None if nothing.
    """

    qkv: Affine | tuple[Affine, Affine, Affine]
    proj: Affine
    num_heads: int
    head_dim: int
    between: tuple[nn.Module, ...]
    dropout: nn.Module | float
    out_dropout: nn.Module
    beyond: str | None = None


@dataclass(frozen=True, slots=True)
class Mlp:
    """fc2(act(fc1(x))) (Vaswani et al. 2017, section 3.3); fields as those of `Attention`, and the op's name of the activation."""

    fc1: Affine
    act: nn.Module
    activation: str | None  # None if no op computes it
    fc2: Affine
    between: tuple[nn.Module, ...]
    dropout: nn.Module
    out_dropout: nn.Module
    beyond: str | None = None


@dataclass(frozen=True, slots=True)
class Branch:
    """One residual branch.

    Attributes:
        norm: LayerNorm in front.
        module: the host's attention or MLP.
        body: what module computes, None if that is not known: module is called then.
        layer_scale: LayerScale (Touvron et al. 2021, eq. 4) or Identity; the block itself where it multiplies by a parameter of
            its own.
        drop_path: stochastic depth (Huang et al. 2016) or Identity.
        takes_mask: module is called with the block's attention mask.
        gamma: name of layer_scale's parameter (C,).
        call: how the host calls module, with all that follows up to layer_scale, where that is not module(x).
    """

    norm: Affine
    module: nn.Module
    body: Attention | Mlp | None
    layer_scale: nn.Module
    drop_path: nn.Module
    takes_mask: bool = False
    gamma: str = "gamma"
    call: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Branches in their order.

    Attributes:
        module: the host's block, and `source` its class before it was accelerated.
        memory: what the branches save for backward, "usual" or "lean" (`fastdeit.accelerate`).
        all_fused: its parts are not called alone, as they take or return something else than (B, N, C): where one of them does
            not run fused, the block runs the host's code.
        beyond: what the block has or computes beyond its branches; None if nothing. Its branches may be empty then.
        drop_path: "mask", or "skip": a branch runs only on the samples that stochastic depth keeps.
    """

    module: nn.Module
    source: type[nn.Module]
    branches: tuple[Branch, ...]
    memory: str = "usual"
    all_fused: bool = False
    beyond: str | None = None
    drop_path: str = "mask"


@dataclass(frozen=True, slots=True)
class Trunk:
    """A model's blocks and the norm after them, of which the heads read the first `prefix` tokens.

    Attributes:
        beyond: what else the model does with its tokens, such as pooling them all; None if nothing.
    """

    blocks: dict[str, Block | str]  # by name; a text says what is in the place of a block
    container: nn.Module
    norm: Affine
    prefix: int
    beyond: str | None = None
