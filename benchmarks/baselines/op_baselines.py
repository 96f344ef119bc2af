"""What people use otherwise, as candidates: functions on the same arguments as fastdeit's op."""

import importlib
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdeit.benchmarks.timing import NotInstalled

SDPA_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def imported(name: str, attribute: str):
    """An optional library's function, or `NotInstalled`."""
    try:
        return getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise NotInstalled(name) from error


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed (B, N, 3 * H * D) as three (B, N, H, D) views."""
    return qkv.unflatten(-1, (3, heads, -1)).unbind(2)


def compiled(function: Callable, mode: str | None = None) -> Callable:
    """torch.compile at its best: one case has one shape, so it may specialise on it."""
    return torch.compile(function, dynamic=False, mode=mode)


def autotuned(function: Callable) -> Callable:
    """torch.compile's max-autotune. Its own graphs cannot be captured in ours, which replace them."""
    return compiled(function, "max-autotune-no-cudagraphs")


def soon_set_up(candidates: dict[str, Callable]) -> dict[str, Callable]:
    """Without those that try out kernels for minutes before their first call."""
    return {name: function for name, function in candidates.items() if not name.endswith("max-autotune")}


def sdpa(backend: SDPBackend | None, heads: int) -> Callable[[Tensor], Tensor]:
    """timm's attention around `scaled_dot_product_attention`, held to one backend, or PyTorch's choice for None."""

    def attention(qkv: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in split_heads(qkv, heads))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return attention


def flex_attention(heads: int) -> Callable[[Tensor], Tensor]:
    flex = compiled(imported("torch.nn.attention.flex_attention", "flex_attention"))

    def attention(qkv: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in split_heads(qkv, heads))
        return flex(q, k, v).transpose(1, 2).flatten(2)

    return attention


def flash_attn(heads: int) -> Callable[[Tensor], Tensor]:
    def attention(qkv: Tensor) -> Tensor:
        packed = imported("flash_attn", "flash_attn_qkvpacked_func")
        return packed(qkv.unflatten(-1, (3, heads, -1))).flatten(2)

    return attention


def xformers(heads: int) -> Callable[[Tensor], Tensor]:
    def attention(qkv: Tensor) -> Tensor:
        efficient = imported("xformers.ops", "memory_efficient_attention")
        return efficient(*split_heads(qkv, heads)).flatten(2)

    return attention


def liger_add_layer_norm(out_dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    """PyTorch's addition and Liger-Kernel's LayerNorm, which takes none."""

    def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        layer_norm = imported("liger_kernel.transformers.functional", "liger_layer_norm")
        x = x + branch
        return x, layer_norm(x, weight, bias, 1e-6).to(out_dtype)

    return add_layer_norm


def forward(function: Callable[..., Any], inputs: int) -> Callable[..., tuple]:
    """The candidate that runs function forward alone; the arguments after the first `inputs` are upstream gradients."""

    def run(*arguments):
        with torch.no_grad():
            return _tuple(function(*arguments[:inputs]))

    return run


def backward(function: Callable[..., Any], inputs: int) -> Callable[..., tuple]:
    """The candidate that runs backward alone: each set of arguments passes forward once, while warming up."""
    graphs: dict[int, tuple] = {}

    def run(*arguments):
        # A compiled backward otherwise reuses the memory of what forward saved, and refuses to run twice.
        with torch._functorch.config.patch(donated_buffer=False):
            key = id(arguments[0])
            if key not in graphs:
                graphs[key] = _forward_with_gradients(function, arguments, inputs)
            outputs, wrt = graphs[key]
            return torch.autograd.grad(outputs, wrt, arguments[inputs:], retain_graph=True)

    return run


def both(function: Callable[..., Any], inputs: int) -> Callable[..., tuple]:
    """The candidate that runs forward and backward; its results are the outputs, then the gradients."""

    def run(*arguments):
        outputs, wrt = _forward_with_gradients(function, arguments, inputs)
        gradients = torch.autograd.grad(outputs, wrt, arguments[inputs:])
        return (*(output.detach() for output in outputs), *gradients)

    return run


def _forward_with_gradients(function, arguments, inputs):
    wrt = [a.requires_grad_() for a in arguments[:inputs] if _is_float(a)]
    return _tuple(function(*arguments[:inputs])), wrt


def _tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


DIRECTIONS = {"forward": forward, "backward": backward, "both": both}
COMPARED_SAMPLES = 2


def oracle(direction: str, reference: Callable, inputs: int, shared: Collection[int] = ()) -> Callable[..., list]:
    """What candidates of a direction should return, by the reference in float64 on the first samples of the same arguments.

    Args:
        direction, reference, inputs: as for the candidates.
        shared: arguments that all samples have in common, as weights; their gradients are compared only where the batch has no more
            samples than are looked at.
    """

    def expected(*arguments):
        def exact(index, value):
            value = value if index in shared else value[:COMPARED_SAMPLES]
            return value.detach().double() if _is_float(value) else value

        whole = len(arguments[0]) <= COMPARED_SAMPLES
        small = [exact(i, a) if isinstance(a, Tensor) else a for i, a in enumerate(arguments)]
        results = list(DIRECTIONS[direction](reference, inputs)(*small))
        wrt = [i for i, a in enumerate(arguments[:inputs]) if _is_float(a)]
        first = len(results) - len(wrt)
        if direction != "forward" and not whole:
            for position, index in enumerate(wrt):
                if index in shared:
                    results[first + position] = None
        return [None if r is None else r.detach() for r in results]

    return expected
