"""What people use otherwise, as candidates: functions on the same arguments as fastdeit's op."""

import importlib
from collections.abc import Callable

import torch
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


def compiled(function: Callable) -> Callable:
    """torch.compile at its best: one case has one shape, so it may specialise on it."""
    return torch.compile(function, dynamic=False)


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


def forward(function: Callable[..., Tensor], inputs: int) -> Callable[..., None]:
    """The candidate that runs function forward alone; the arguments after the first `inputs` are upstream gradients."""

    def run(*arguments):
        with torch.no_grad():
            function(*arguments[:inputs])

    return run


def backward(function: Callable[..., Tensor], inputs: int) -> Callable[..., None]:
    """The candidate that runs backward alone: each set of arguments passes forward once, while warming up."""
    graphs: dict[int, tuple] = {}

    def run(*arguments):
        key = id(arguments[0])
        if key not in graphs:
            graphs[key] = _forward_with_gradients(function, arguments, inputs)
        outputs, wrt = graphs[key]
        torch.autograd.grad(outputs, wrt, arguments[inputs:], retain_graph=True)

    return run


def both(function: Callable[..., Tensor], inputs: int) -> Callable[..., None]:
    """The candidate that runs forward and backward."""

    def run(*arguments):
        outputs, wrt = _forward_with_gradients(function, arguments, inputs)
        torch.autograd.grad(outputs, wrt, arguments[inputs:])

    return run


def _forward_with_gradients(function, arguments, inputs):
    wrt = [a for a in arguments[:inputs] if isinstance(a, Tensor) and a.is_floating_point()]
    for tensor in wrt:
        tensor.requires_grad_()
    outputs = function(*arguments[:inputs])
    return outputs if isinstance(outputs, tuple) else (outputs,), wrt


DIRECTIONS = {"forward": forward, "backward": backward, "both": both}
