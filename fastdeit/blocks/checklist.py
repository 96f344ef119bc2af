"""When a fused run may take the place of a host's modules. Each rule stands here once, and its answer is the reason.

A fused forward calls functional ops where the host calls child modules. It may do so only if nothing that a user put between would
be skipped: a hook, a replaced forward, a LoRA layer, a quantized weight. Rules return None, or the reason as a short phrase. What
they read of modules is compared before every call (`snapshot`); rules on the call itself, in `call_rules`, are asked every time.
"""

from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any, NamedTuple

import timm.layers
import timm.layers.activations as timm_activations
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastdeit.blocks import spec
from fastdeit.blocks.drop_path import DROP_PATHS
from fastdeit.blocks.fused_module import has_own_forward, is_fused
from fastdeit.blocks.snapshot import OWN_METHODS, register_methods

# Marks that `fastdeit.accelerate` leaves on what it was told to exclude and on all around it.
EXCLUDED, HOLDS_EXCLUDED = "fastdeit_excluded", "fastdeit_holds_excluded"
# In the place of a bias that is a buffer or a plain attribute, as `DataParallel` makes all of a replica's.
MISSING = object()
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_ACTIVATIONS = {
    timm_activations.GELU: "gelu",
    timm_activations.GELUTanh: "gelu_tanh",
    timm_activations.QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}
# Classes that hold the weight of a plain projection. Attention's of PyTorch holds the packed one of q, k and v itself.
_PROJECTIONS = (nn.Linear, NonDynamicallyQuantizableLinear, nn.MultiheadAttention)
_LAYER_SCALES: list[type[nn.Module]] = [timm.layers.LayerScale]  # the Dynamo of PyTorch 2.8 does not trace a set
# Code of hooks that do nothing unless their library collects outputs. Its drop-ins ask at each call whether it does.
PASSIVE_HOOKS: set[CodeType] = set()

for _kind in (nn.LayerNorm, nn.Linear, nn.Dropout, nn.GELU, *_ACTIVATIONS):
    register_methods(_kind, "forward")
for _kind in (timm.layers.LayerNorm, timm.layers.LayerScale, timm.layers.DropPath):
    register_methods(_kind, "forward")
register_methods(NonDynamicallyQuantizableLinear, "forward", host=True)
register_methods(nn.MultiheadAttention, "forward", host=True)


def register_activation(kind: type[nn.Module], name: str | Callable[[nn.Module], str | None]) -> None:
    """Makes a host's activation known by the op's name for it, or by what gives that name for a module of its class."""
    register_methods(kind, "forward", host=True)
    _ACTIVATIONS[kind] = name


def register_layer_scale(kind: type[nn.Module]) -> None:
    """Makes known a host's LayerScale, which multiplies by a parameter and does nothing else."""
    register_methods(kind, "forward", host=True)
    _LAYER_SCALES.append(kind)


# ---- modules


def why_not_bypassed(modules: Iterable[nn.Module]) -> str | None:
    """None if computing what these modules compute without calling them skips nothing. Global hooks are `why_global_hook`'s."""
    for module in modules:
        state = module.__dict__
        if "forward" in state and has_own_forward(module):
            return f"its {type(module).__name__} has a forward of its own"
        if "_compiled_call_impl" in state:
            return f"its {type(module).__name__} is compiled on its own"
        if EXCLUDED in state:
            return f"its {type(module).__name__} is excluded"
        if (
            state["_forward_pre_hooks"]
            or any(getattr(hook, "__code__", None) not in PASSIVE_HOOKS for hook in state["_forward_hooks"].values())
            or state["_backward_pre_hooks"]
            or state["_backward_hooks"]
        ):
            return f"a hook is registered on its {type(module).__name__}"
    return None


def why_replaced(kind: type[nn.Module]) -> str | None:
    """None if the class's forward is the one that it was imported with."""
    if kind.forward is not OWN_METHODS.get((kind, "forward")):
        return f"the forward of {kind.__module__}.{kind.__name__} was replaced"
    return None


def exported(x: object) -> bool:
    """Whether x is what torch.export puts in the place of a tensor or weight. Its graph gets the registered ops, unless it is to
    become ONNX, which has none of them."""
    return type(x) is FakeTensor and torch.compiler.is_exporting() and not torch.onnx.is_in_onnx_export()


def why_not_weights(layer: spec.Affine) -> str | None:
    """None if the weight is a plain one and the bias one too, or None. Other tensor classes bring operations of their own."""
    parameters = layer.module._parameters
    weight, bias = parameters.get(layer.weight, MISSING), parameters.get(layer.bias, MISSING)
    if weight is MISSING or weight is None or bias is MISSING:
        return "a weight is not among its module's parameters"
    return why_not_weight(weight) or (None if bias is None else why_not_weight(bias))


def why_not_weight(weight: Tensor) -> str | None:
    """A plain Tensor is what `functional_call` puts in a parameter's place."""
    kind = type(weight)
    return None if kind is nn.Parameter or kind is Tensor or exported(weight) else f"a weight is a {kind.__name__}"


def why_not_linear(layer: spec.Affine) -> str | None:
    """None if it is PyTorch's Linear with plain weights: no LoRA, no parametrization, no quantized or sharded tensor."""
    kind = type(layer.module)
    if kind not in _PROJECTIONS:  # the quantized one has the same name
        return f"a projection is a {kind.__name__ if kind.__name__ != 'Linear' else f'{kind.__module__}.Linear'}"
    return why_replaced(kind) or why_not_weights(layer)


def why_not_inactive_dropout(dropout: nn.Module | float) -> str | None:
    kind = type(dropout)
    if kind is float or kind is int:
        return "dropout is active" if dropout != 0.0 else None
    if kind is nn.Dropout:
        return why_replaced(kind) or ("dropout is active" if dropout.p != 0.0 and dropout.training else None)
    return None if kind is nn.Identity else f"a dropout is a {kind.__name__}"


def why_called(dropout: nn.Module) -> str | None:
    """None if a dropout gives its input back and calling it would do nothing else: the call costs the host as much as a launch."""
    return why_not_inactive_dropout(dropout) or why_not_bypassed((dropout,))


def acting(drop_path: Any, kind: type[nn.Module]) -> nn.Module:
    """A host's own stochastic depth, of class kind, where it does something or a call of it would be seen, else nothing."""
    inactive = type(drop_path) is kind and (not drop_path.drop_prob or not drop_path.training)
    return (
        spec.NOTHING
        if inactive and why_replaced(kind) is None and why_not_bypassed((drop_path,)) is None
        else drop_path
    )


def activation_name(activation: nn.Module) -> str | None:
    """The op's name for an activation module, None for one that it does not know, or whose class was given another forward."""
    kind = type(activation)
    if kind.forward is not OWN_METHODS.get((kind, "forward")):
        return None
    if kind is nn.GELU:
        return _GELUS.get(activation.approximate)
    name = _ACTIVATIONS.get(kind)
    return name if name is None or isinstance(name, str) else name(activation)


def why_not_norm(norm: spec.Affine, source: type[nn.LayerNorm]) -> str | None:
    """Why a LayerNorm, which stands in for one of class `source`, runs that class's code."""
    module = norm.module
    if (reason := why_replaced(source)) is not None:
        return reason
    if getattr(module, "_fast_norm", False):
        return "timm's fast norm is on"
    if len(module.normalized_shape) != 1:
        return f"it normalises over {len(module.normalized_shape)} dimensions"
    return why_not_weights(norm) if module.elementwise_affine else None


def why_not_between_projections(body: spec.Attention) -> str | None:
    """Why what attention does between its projections is the host's code, whatever it is called with."""
    modules = (*(layer.module for layer in _projections(body)), *body.between)
    return body.beyond or why_not_bypassed(modules) or why_not_inactive_dropout(body.dropout)


def why_projections_called(body: spec.Attention | spec.Mlp) -> str | None:
    """Why the projections are called, None if products on their weights may take their place."""
    return _first(map(why_not_linear, _projections(body)))


def _projections(body: spec.Attention | spec.Mlp) -> tuple[spec.Affine, ...]:
    if isinstance(body, spec.Mlp):
        return body.fc1, body.fc2
    return (body.qkv, body.proj) if isinstance(body.qkv, spec.Affine) else (*body.qkv, body.proj)


def why_not_mlp(body: spec.Mlp) -> str | None:
    """Why an MLP runs the host's code, or its projections are called, whatever it is called with."""
    return _why_not_around_projections(body) or why_projections_called(body)


def _why_not_around_projections(body: spec.Mlp) -> str | None:
    """Why an MLP is the host's code even if its projections are called."""
    if body.activation is None:
        return f"the activation is {body.act}"
    modules = (body.fc1.module, body.act, *body.between, body.fc2.module)
    return body.beyond or why_not_bypassed(modules) or why_not_inactive_dropout(body.dropout)


# ---- blocks


Gamma = tuple[dict[str, Tensor], str]  # a module's parameters, and the name of LayerScale's among them


class BlockVerdict(NamedTuple):
    """What the modules of a block allow.

    Attributes:
        block: why the host's code runs around the block's parts, None if norms and residual additions run fused.
        deferred: why the last addition may not be left to what follows the block.
        parts: of each branch, why its module is called, None if it runs fused without a call.
        called: of each branch, why the projections of what is fused are called, None if their weights are read.
        out_dropouts: of each branch, why the dropout after its body is called, None if that would give its input back.
        tail: why the last LayerScale and stochastic depth are called, None if their operations may take their place.
        pruned: why the block may not be run for the first tokens alone.
        gammas: parameters of LayerScale in all branches but the last.
        last_gamma: of the last one, which a deferred addition applies.
    """

    block: str | None
    deferred: str | None
    parts: tuple[str | None, ...]
    called: tuple[str | None, ...]
    out_dropouts: tuple[str | None, ...]
    tail: str | None
    pruned: str | None
    gammas: tuple[Gamma, ...]
    last_gamma: tuple[Gamma, ...]


def _first(reasons: Iterable[str | None]) -> str | None:
    """The first reason there is. The Dynamo of PyTorch 2.8 does not trace `next` with a default."""
    for reason in reasons:
        if reason is not None:
            return reason
    return None


def judge_block(block: spec.Block, for_first: bool = False) -> BlockVerdict:
    """What its modules allow.

    Args:
        for_first: the block runs for its first tokens alone where it runs fused.
    """
    if block.beyond is not None:
        each = (block.beyond,) * len(block.branches)
        return BlockVerdict(block.beyond, block.beyond, each, each, each, block.beyond, block.beyond, (), ())
    *inner, last = block.branches
    reason = why_replaced(block.source)
    for branch in block.branches:
        reason = reason or _why_not_norm_of(branch)
    for branch in inner:
        reason = reason or _why_not_tail(branch, block.module)
    parts = tuple(_why_called(branch) for branch in block.branches)
    called = tuple(None if branch.body is None else why_projections_called(branch.body) for branch in block.branches)
    if block.all_fused:
        reason = reason or _first(parts)
    tail = _why_not_tail(last, block.module)
    deferred = why_not_bypassed((block.module,)) or reason or tail
    dropouts = tuple(None if branch.body is None else why_called(branch.body.out_dropout) for branch in block.branches)
    pruned = _why_not_pruned(block, parts) or called[0]
    if for_first:
        reason = reason or pruned
    return BlockVerdict(reason, deferred, parts, called, dropouts, tail, pruned, _gammas(inner), _gammas([last]))


def _why_not_norm_of(branch: spec.Branch) -> str | None:
    module = branch.norm.module
    if not (is_fused(module) and isinstance(module, nn.LayerNorm)):
        return f"a norm is a {type(module).__name__} that is not accelerated"
    return why_not_bypassed((module,)) or why_not_norm(branch.norm, module.source)


def _why_not_tail(branch: spec.Branch, block: nn.Module) -> str | None:
    """Why LayerScale and stochastic depth are called, and not made part of the residual addition."""
    scale, drop_path, own = branch.layer_scale, branch.drop_path, branch.layer_scale is block
    reason = why_not_bypassed((drop_path,) if own else (scale, drop_path))
    if reason is None and type(scale) is not nn.Identity:
        kind, in_place = type(scale), getattr(scale, "inplace", False)
        if not own and (kind not in _LAYER_SCALES or in_place):
            return f"its LayerScale is a {kind.__name__}{' that works in place' if in_place else ''}"
        gamma = scale._parameters.get(branch.gamma)
        weight = f"a weight is a {type(gamma).__name__}" if gamma is None else why_not_weight(gamma)
        reason = (None if own else why_replaced(kind)) or weight
    if reason is None and type(drop_path) is not nn.Identity:
        if type(drop_path) not in DROP_PATHS:
            return f"its drop path is a {type(drop_path).__name__}"
        reason = why_replaced(type(drop_path))
    return reason


def _gammas(branches: Iterable[spec.Branch]) -> tuple[Gamma, ...]:
    slots = [(branch.layer_scale._parameters, branch.gamma) for branch in branches]
    return tuple((table, name) for table, name in slots if table.get(name) is not None)


def _why_called(branch: spec.Branch) -> str | None:
    body = branch.body
    if body is None:
        return f"a {type(branch.module).__name__} is called"
    kind = getattr(branch.module, "source", type(branch.module))  # a host's own part has no class of ours
    reason = why_not_bypassed((branch.module,)) or why_replaced(kind)
    if isinstance(body, spec.Mlp):
        return reason or _why_not_around_projections(body)
    return reason or why_not_between_projections(body)


def _why_not_pruned(block: spec.Block, parts: tuple[str | None, ...]) -> str | None:
    """A hook would see fewer tokens, and active dropout would draw fewer random numbers than the host's."""
    attention, *others = block.branches
    if not isinstance(attention.body, spec.Attention) or parts[0] is not None:
        return "attention does not run fused"
    reason = why_called(attention.body.out_dropout)
    for branch in others:
        body, module = branch.body, branch.module
        if not isinstance(body, spec.Mlp):
            return f"mlp is a {type(module).__name__}"
        reason = reason or why_not_bypassed((module, *module._modules.values()))
        reason = reason or why_not_inactive_dropout(body.dropout) or why_not_inactive_dropout(body.out_dropout)
    return reason


# ---- models


class TrunkVerdict(NamedTuple):
    """What the modules of a model allow.

    Attributes:
        model: why the model's own code runs around everything.
        norm: why the final norm does not take the last addition.
        block: why the residual is not carried through the blocks: the first that is in the way.
        blocks: each block's own.
        gammas: parameters of LayerScale.
    """

    model: str | None
    norm: str | None
    block: str | None
    blocks: tuple[BlockVerdict, ...]
    gammas: tuple[Gamma, ...]


def judge_trunk(trunk: spec.Trunk) -> TrunkVerdict:
    """What its modules allow."""
    norm = trunk.norm.module
    if type(trunk.container) is not nn.Sequential or not trunk.blocks:
        reason = f"blocks is a {type(trunk.container).__name__}"
    elif not (is_fused(norm) and isinstance(norm, nn.LayerNorm)):
        reason = f"norm is a {type(norm).__name__} that is not accelerated"
    else:
        reason = why_not_bypassed((trunk.container, norm)) or why_not_norm(trunk.norm, norm.source)
    in_the_way, verdicts, gammas = None, [], []
    for name, block in trunk.blocks.items():
        if isinstance(block, str):
            in_the_way = in_the_way or f"block {name} {block}"
            continue
        verdict = judge_block(block)
        verdicts.append(verdict)
        gammas += [*verdict.gammas, *verdict.last_gamma]
        if verdict.deferred is not None:
            in_the_way = in_the_way or f"block {name}: {verdict.deferred}"
    return TrunkVerdict(trunk.beyond, reason, in_the_way, tuple(verdicts), tuple(gammas))
