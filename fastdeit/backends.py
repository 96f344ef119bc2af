"""Which implementation an op runs: the Triton kernels or the plain PyTorch reference, and why."""

import contextlib
import os
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from fastdeit import refusals
from fastdeit.kernels.runtime.observer import under_dispatch_mode

BACKENDS = ("auto", "triton", "reference")
_MINIMUM_CAPABILITY = (8, 0)
_HAS_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # since PyTorch 2.9
_LOW_PRECISION = (torch.float16, torch.bfloat16)
KERNEL_DTYPES = (*_LOW_PRECISION, torch.float32)
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

# A plain global: a ContextVar would break full-graph compilation. Backward follows the choice that forward made.
_backend = "auto"
_supposes_gpu = False
_takes_all = False


def set_backend(name: str) -> None:
    """Sets what the ops run from now on, in every thread.

    Args:
        name: "auto" (Triton kernels where they can run, the reference elsewhere), "triton" (kernels; an error where they cannot
            run) or "reference" (plain PyTorch everywhere).

    Raises:
        ValueError: name is none of these.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    _backend = name


def get_backend() -> str:
    """The name that `set_backend` or `use_backend` last chose."""
    return _backend


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend(name)` for the length of a with statement. A backward pass follows the choice of its forward.

    A recomputation of `torch.utils.checkpoint` is a forward pass inside backward, and PyTorch restores autocast there but not this
    choice. So put the backward pass inside the with statement too, or the with statement into the checkpointed function.
    """
    previous = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


@contextlib.contextmanager
def supposed_gpu() -> Iterator[None]:
    """Inside, `why_reference` treats tensors on a CPU as on a supported GPU: for explanations, where no op runs, and for
    `kernels.launch.cpu_launches`, which executes the kernels."""
    global _supposes_gpu
    previous, _supposes_gpu = _supposes_gpu, True
    try:
        yield
    finally:
        _supposes_gpu = previous


@contextlib.contextmanager
def kernels_for_all_tensors() -> Iterator[None]:
    """Inside, neither device nor dtype makes an op fall back: for tools that record launches and make none."""
    global _takes_all
    previous, _takes_all = _takes_all, True
    try:
        yield
    finally:
        _takes_all = previous


def on_gpu(x: Tensor) -> bool:
    """Whether x is on a GPU, or supposed to be."""
    return x.is_cuda or _supposes_gpu


def why_reference(x: Tensor, *, products: bool = False, kernels: tuple[str, ...] = ()) -> str | None:
    """None when the kernels run on tensors like x, else why the reference does.

    Args:
        x: the op's main input; its device and dtype decide.
        products: the op multiplies matrices, in `matmul_dtype(x)`. In IEEE fp32 those have no matrix instructions, so on a GPU
            they are left to the libraries unless `torch.backends.cuda.matmul` allows TF32.
        kernels: subjects (folders of kernels) that the op uses: one of them may have been refused on this machine.

    Raises:
        RuntimeError: the backend "triton" is asked for and cannot run on x.
    """
    if _backend == "reference":
        return "the backend is set to reference"
    if in_functional_transform():
        return "inside a torch.func transform"
    reason = None
    if not _takes_all:
        on_a_gpu = x.is_cuda or _supposes_gpu
        reason = _why_not_on_gpu(x, products) if on_a_gpu else _why_not_interpreted(x)
    if reason is None and refusals.refused:
        reason = refusals.why_refused(*kernels)
    return reason if reason is None else refuse(reason)


def settings(x: Tensor, products: bool = True) -> tuple | None:
    """What `why_reference` and the ops' checks read beside their arguments, for tensors like x, and the grad mode.

    None where a call must not rest on an earlier one: inside a torch.func transform, and once a kernel was refused.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None or refusals.refused:
        return None
    kind = "cuda" if x.is_cuda else _autocast_device(x)  # no call on a GPU
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    tf32 = products and autocast is None and x.dtype is torch.float32 and _tf32_allowed()
    return _backend, _supposes_gpu, _takes_all, autocast, tf32, torch.is_grad_enabled(), refusals.generation


def refuse(reason: str) -> str:
    """reason, for which an op's kernels cannot run.

    Raises:
        RuntimeError: the backend is "triton", which allows no reference.
    """
    if _backend == "triton":
        raise RuntimeError(f"backend 'triton' cannot run here: {reason}. Use backend 'auto' or 'reference'.")
    return reason


def _why_not_on_gpu(x: Tensor, products: bool) -> str | None:
    dtype = x.dtype
    if products and dtype not in _LOW_PRECISION:
        dtype = matmul_dtype(x)
    if dtype not in _LOW_PRECISION:
        if dtype is not torch.float32:
            return f"{dtype_name(dtype)} input"
        if products and not _tf32_allowed():
            return "float32 matrix products run on the libraries unless TF32 is allowed"
    return _why_not_this_gpu(x.get_device()) if x.is_cuda else None


def _constant_while_tracing(function):
    """As `torch.compiler.assume_constant_result`, which would import Dynamo and Triton at every start."""
    function._dynamo_marked_constant = True
    return function


@_constant_while_tracing  # Dynamo guards the stack of transforms itself
def in_functional_transform() -> bool:
    """Whether torch.func's grad, vmap or another of its transforms surrounds the call."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product of x runs in: under autocast the low precision that PyTorch's own products take."""
    kind = "cuda" if x.is_cuda else _autocast_device(x)  # no call on a GPU
    if torch.is_autocast_enabled(kind) and x.dtype in KERNEL_DTYPES:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _autocast_device(x: Tensor) -> str:
    """The device whose autocast x is under. Meta tensors, which have none, are judged under any: a machine without CUDA has no
    autocast of its."""
    if x.is_meta:
        return "cuda" if torch.is_autocast_enabled("cuda") else "cpu"
    return x.device.type


def check_multiplied(x: Tensor, name: str, tensor: Tensor) -> None:
    """Raises TypeError where PyTorch's matrix product of x would refuse a weight or bias: of another dtype, with autocast off."""
    kind = _autocast_device(x)
    if tensor.dtype != x.dtype and (x.is_meta or not torch.is_autocast_enabled(kind)):
        raise TypeError(f"{name}: expected {x.dtype} as x has, or autocast, got {tensor.dtype}")


@_constant_while_tracing
def _why_not_this_gpu(index: int) -> str | None:
    return _capability_is_too_low(index)


@lru_cache  # apart, since Dynamo looks into a cached function and warns, even where its result is constant
def _capability_is_too_low(index: int) -> str | None:
    if torch.version.hip is not None:
        return "AMD GPUs are not supported"
    capability = torch.cuda.get_device_capability(index)
    if capability < _MINIMUM_CAPABILITY:
        return "compute capability {}.{} is below {}.{}".format(*capability, *_MINIMUM_CAPABILITY)
    return None


@_constant_while_tracing  # Dynamo guards the switch itself
def _tf32_allowed() -> bool:
    if _HAS_PRECISION:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.backends.cuda.matmul.allow_tf32


def _why_not_interpreted(x: Tensor) -> str | None:
    """The interpreter is far slower than PyTorch: it runs only when asked for, by the backend "triton" and its own switch."""
    if _backend != "triton" or x.device.type != "cpu":
        return f"tensors on {x.device.type}"
    if not interpreter_active():
        return "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1 before the first import)"
    if x.dtype not in KERNEL_DTYPES:
        return f"{dtype_name(x.dtype)} input"
    return None


def interpreter_active() -> bool:
    """Whether Triton's interpreter stands in for the GPU (TRITON_INTERPRET=1, Triton's own switch)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def registered_path(*tensors: Tensor | None) -> bool:
    """Whether a call must go through the op registered with torch.library rather than straight to the launchers.

    True while Dynamo traces, under any dispatch mode (FakeTensorMode, make_fx, FlopCounterMode), for tensor subclasses, and for
    tensors with the negative bit (the imaginary part of a conjugate), which the dispatcher resolves on the way.
    """
    if torch.compiler.is_compiling() or under_dispatch_mode():
        return True
    for t in tensors:  # noqa: SIM110, a generator costs a call for each tensor
        if t is not None and (type(t) not in _PLAIN_TENSORS or t.is_neg()):
            return True
    return False


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to record a call with these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name as users write it, such as "float32"."""
    return str(dtype).removeprefix("torch.")
