"""When a fused module runs its kernels and when timm's forward. `forward` and `explain` ask the same functions.

A fused forward calls functional ops where timm calls child modules. It may do so only if nothing that a user put between would be
skipped: a hook, a replaced forward, a LoRA layer, a quantized weight. These come and go at any time, so nothing is remembered from
call to call; the functions read instance dictionaries, which costs a fraction of nn.Module's attribute access. They return None, or
the reason as a short phrase.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

# Looked up once: these run before every fused call.
_Parameter, _Linear, _Dropout, _Identity = nn.Parameter, nn.Linear, nn.Dropout, nn.Identity
# Set by `fastdeit.accelerate` on what it was told to exclude, so that nothing computes in its place, and on all around it.
EXCLUDED, HOLDS_EXCLUDED = "fastdeit_excluded", "fastdeit_holds_excluded"
_tracing_state = torch._C._get_tracing_state

# In the place of a bias that is a buffer or a plain attribute, as `DataParallel` makes all of a replica's.
MISSING = object()


class FusedModule:
    """Mixed into every drop-in, before timm's class."""

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"torch.jit.script cannot compile the accelerated {type(self).__name__}: call fastdeit.restore(model) first"
        )


def forward_of(cls: type) -> Callable | None:
    """The class's own forward, None if something replaced it before fastdeit was imported."""
    return cls.forward if cls.forward.__module__ == cls.__module__ else None


_LINEAR_FORWARD, _DROPOUT_FORWARD = forward_of(nn.Linear), forward_of(nn.Dropout)


def why_not_plain_call(x: object) -> str | None:
    """Proxies of torch.fx, tensor subclasses and recorders are to see timm's own operations. Transforms are the ops' to notice."""
    if type(x) is not Tensor and not exported(x):
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if _tracing_state() is not None:
        return "torch.jit.trace is recording"
    if forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    return None


def exported(x: object) -> bool:
    """Whether x is what torch.export puts in the place of a tensor or weight. Its graph gets the registered ops."""
    return type(x) is FakeTensor and torch.compiler.is_exporting()


def why_global_hook() -> str | None:
    if (
        module_hooks._global_forward_pre_hooks
        or module_hooks._global_forward_hooks
        or module_hooks._global_backward_pre_hooks
        or module_hooks._global_backward_hooks
    ):
        return "a hook is registered on all modules"
    return None


def why_not_bypassed(children: Iterable[nn.Module | None]) -> str | None:
    """None if computing what these modules compute without calling them skips nothing. Global hooks are `why_global_hook`'s."""
    for child in children:
        state = child.__dict__
        if (
            state["_forward_pre_hooks"]
            or state["_forward_hooks"]
            or state["_backward_pre_hooks"]
            or state["_backward_hooks"]
            or "forward" in state
            or "_compiled_call_impl" in state
            or EXCLUDED in state
        ):
            return _why_not_bypassed(child)
    return None


def _why_not_bypassed(child: nn.Module) -> str:
    if "forward" in child.__dict__:
        return f"its {type(child).__name__} has a forward of its own"
    if "_compiled_call_impl" in child.__dict__:
        return f"its {type(child).__name__} is compiled on its own"
    if EXCLUDED in child.__dict__:
        return f"its {type(child).__name__} is excluded"
    return f"a hook is registered on its {type(child).__name__}"


def why_not_linear(layer: nn.Module) -> str | None:
    """None if layer is PyTorch's own Linear with plain weights: no LoRA, no parametrization, no quantized or sharded tensor."""
    kind = type(layer)
    if kind is not _Linear:  # the quantized one has the same name
        return f"a projection is a {kind.__name__ if kind.__name__ != 'Linear' else f'{kind.__module__}.Linear'}"
    if _Linear.forward is not _LINEAR_FORWARD:
        return "the forward of torch.nn.Linear was replaced"
    return why_not_plain_weights(layer._parameters)


def why_not_plain_weights(parameters: dict[str, Tensor | None]) -> str | None:
    """None if the weight is a plain one and the bias one too, or None. Other tensor classes bring operations of their own."""
    weight, bias = parameters.get("weight"), parameters.get("bias", MISSING)
    if weight is None or bias is MISSING:
        return "a weight is not among its module's parameters"
    kind = type(weight)  # a Tensor is what torch.func.functional_call puts in a parameter's place
    if kind is not _Parameter and kind is not Tensor and not exported(weight):
        return f"a weight is a {kind.__name__}"
    kind = type(bias)
    if kind is _Parameter or kind is Tensor or bias is None or exported(bias):
        return None
    return f"a weight is a {kind.__name__}"


def why_not_inactive_dropout(dropout: nn.Module) -> str | None:
    kind = type(dropout)
    if kind is _Dropout:
        if _Dropout.forward is not _DROPOUT_FORWARD:
            return "the forward of torch.nn.Dropout was replaced"
        return "dropout is active" if dropout.p != 0.0 and dropout.training else None
    return None if kind is _Identity else f"a dropout is a {kind.__name__}"


def dropped_out(dropout: nn.Module, x: Tensor) -> Tensor:
    """dropout(x), without the call where that would give x back: it costs the host as much as a launch."""
    if why_not_inactive_dropout(dropout) is None and why_not_bypassed((dropout,)) is None:
        return x
    return dropout(x)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast runs matrix products in on x's device, None without autocast."""
    kind = "cuda" if x.is_cuda else x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
