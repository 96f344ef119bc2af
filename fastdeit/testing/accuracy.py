"""The numerics contract: an op's error against float64 is at most twice PyTorch's.

Used by the tests, the benchmarks (which refuse to time a wrong kernel) and by anyone who wants to check an op on their own GPU.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fastdeit.backends import interpreter_active, on_gpu, use_backend

__all__ = [
    "Error",
    "assert_as_accurate_as_eager",
    "assert_close_to_oracle",
    "assert_model_close_to_oracle",
    "compare_with_oracle",
    "interpreter_active",
    "kernel_device",
    "kernel_dtypes",
    "poisoned_memory",
]

ALLOWANCE = 2.0  # times PyTorch's own error, the one tolerance there is
# Of the largest intermediate: what a sum in another order may cost where PyTorch's own error happens to be zero.
_FP32_ULPS = 4
# Of a model's largest value: what the oracle has below it is zero but for its own rounding, as the gradient of the keys' bias is.
_ZERO = 8 * torch.finfo(torch.float64).eps


def kernel_device() -> torch.device:
    """Where kernels run here: the GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kernel_dtypes(*, products: bool = False) -> list[torch.dtype]:
    """The dtypes that kernels are tested in here.

    Args:
        products: of kernels that multiply matrices: on a GPU float32 is the libraries' there.
    """
    if kernel_device().type == "cpu" and not on_gpu(torch.empty(0)):
        return [torch.float32, torch.float16]
    return [*([] if products else [torch.float32]), torch.float16, torch.bfloat16]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty and its relatives return with NaN (integers: -1), so that an element never written shows."""

    def poison(allocate):
        def poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.dtype is torch.bool or tensor.device.type == "meta":
                return tensor
            with torch.no_grad():
                return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

        return poisoned

    with contextlib.ExitStack() as patches:
        for owner, name in (
            *((torch, n) for n in ("empty", "empty_like", "empty_strided")),
            *((Tensor, n) for n in ("new_empty", "new_empty_strided")),
        ):
            patches.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield


def assert_as_accurate_as_eager(
    op: Callable,
    reference: Callable,
    *args: Any,
    eager: Callable | None = None,
    largest_intermediate: float | None = None,
    frozen: Sequence[int] = (),
    backend: str = "triton",
    **kwargs: Any,
) -> dict[str, tuple["Error", "Error"]]:
    """Holds an op's outputs and every gradient to the numerics contract.

    The oracle is the reference in float64. Maximum and root-mean-square error of the op may be at most twice those of PyTorch's
    own ops in the given dtypes, plus the error of rounding the oracle to the output's dtype and, for float32 results, four units
    in the last place of the largest intermediate.

    Args:
        op: called as op(*args, **kwargs) with the given backend in poisoned memory; returns a tensor or a tuple of tensors.
        reference: the same in plain PyTorch, differentiable in float64.
        args: tensors and other arguments. Gradients are taken of every floating-point tensor whose index is not in `frozen`.
        eager: PyTorch's own ops to compare with, by default the reference in the arguments' dtypes.
        largest_intermediate: magnitude of the op's largest intermediate result; by default the largest input, output or gradient.
        frozen: indices of arguments that do not require a gradient.

    Returns:
        Maximum and RMS error of every output and gradient that has elements.
    """

    def evaluate(function, cast, context):
        inputs = [cast(a).detach().clone(memory_format=torch.preserve_format) if _is_float(a) else a for a in args]
        inputs = [_like_strides(new, a) if _is_float(a) else new for new, a in zip(inputs, args, strict=True)]
        keywords = {k: cast(v).detach() if _is_float(v) else v for k, v in kwargs.items()}
        wrt = [i for i, a in enumerate(inputs) if _is_float(a) and i not in frozen]
        for i in wrt:
            inputs[i].requires_grad_()
        with context:
            outputs = function(*inputs, **keywords)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            upstream = [_upstream(o, index).to(o.dtype) for index, o in enumerate(outputs)]
            connected = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
            gradients = ()
            if wrt and connected:
                gradients = torch.autograd.grad(
                    [o for o, _ in connected], [inputs[i] for i in wrt], [g for _, g in connected], allow_unused=True
                )
        names = [f"output {i}" for i in range(len(outputs))] + [f"gradient of argument {i}" for i in wrt]
        return dict(zip(names, (*(o.detach() for o in outputs), *gradients), strict=False))

    def poisoned_backend():
        stack = contextlib.ExitStack()
        stack.enter_context(use_backend(backend))
        stack.enter_context(poisoned_memory())
        return stack

    same = lambda t: t  # noqa: E731
    got = evaluate(op, same, poisoned_backend())
    oracle = evaluate(reference, lambda t: t.double(), contextlib.nullcontext())
    baseline = evaluate(eager or reference, same, use_backend("reference"))
    if largest_intermediate is None:
        tensors = [a for a in (*args, *kwargs.values()) if _is_float(a)]
        largest_intermediate = max([_largest(t) for t in (*tensors, *oracle.values()) if t is not None], default=0.0)
    found = {
        name: assert_close_to_oracle(name, got.get(name), expected, baseline[name], largest_intermediate)
        for name, expected in oracle.items()
    }
    return {name: errors for name, errors in found.items() if errors is not None}


def assert_close_to_oracle(
    name: str, got: Tensor | None, oracle: Tensor | None, eager: Tensor | None, largest_intermediate: float = 0.0
) -> tuple["Error", "Error"] | None:
    """The rule of `assert_as_accurate_as_eager` for one tensor; returns its errors, None for one without elements."""
    if oracle is None:
        assert got is None or not got.any(), f"{name}: expected none, got one"
        return None
    assert got is not None and eager is not None, f"{name}: expected a tensor, got none"
    assert got.shape == oracle.shape, f"{name}: expected shape {tuple(oracle.shape)}, got {tuple(got.shape)}"
    assert got.dtype == eager.dtype, f"{name}: expected {eager.dtype} as PyTorch gives, got {got.dtype}"
    if oracle.numel() == 0:
        return None
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        # What the dtype cannot hold is Inf in PyTorch's result too: that one decides.
        assert torch.equal(test(got), test(eager)), f"{name}: {test.__name__} differs from PyTorch's"
    ulps = _FP32_ULPS * torch.finfo(torch.float32).eps * largest_intermediate if got.dtype == torch.float32 else 0.0
    return _assert_within_allowance(name, _errors(got, oracle, eager), ulps)


def assert_model_close_to_oracle(
    got: Mapping[str, Tensor | None], oracle: Mapping[str, Tensor | None], eager: Mapping[str, Tensor | None]
) -> None:
    """The rule of `assert_as_accurate_as_eager` for all outputs, or all gradients, of a model at once.

    Every tensor's errors are divided by the oracle's largest value in it, and maximum and root-mean-square are taken over all of
    them: a single bias of few elements is too small a sample of rounding errors to compare by itself. A tensor that is zero in
    exact arithmetic, as the gradient of the keys' bias, has no such value: its errors are divided by the largest of all tensors.

    Args:
        got: tensors of the accelerated model by name, as from `named_parameters`; None where there is no gradient.
        oracle: the same of timm's model in float64.
        eager: the same of timm's model in the setting under test. Their dtypes and shapes are what got's must be.
    """
    for kind, error in zip(("maximum", "RMS"), compare_with_oracle(got, oracle, eager), strict=True):
        error.check(f"the model: {kind}")


def compare_with_oracle(
    got: Mapping[str, Tensor | None], oracle: Mapping[str, Tensor | None], eager: Mapping[str, Tensor | None]
) -> tuple["Error", "Error"]:
    """Maximum and root-mean-square errors that `assert_model_close_to_oracle` judges, for the same arguments.

    Raises:
        AssertionError: names, shapes, dtypes or which values are finite are not PyTorch's.
    """
    assert got.keys() == oracle.keys() == eager.keys()
    errors, ulps = [], 0.0
    largest_of_all = max((_largest(tensor) for tensor in oracle.values() if tensor is not None), default=0.0)
    for name, expected in oracle.items():
        ours, theirs = got[name], eager[name]
        if expected is None or not expected.numel():
            assert_close_to_oracle(name, ours, expected, theirs)
            continue
        assert ours is not None and theirs is not None, f"{name}: expected a tensor, got none"
        assert (ours.shape, ours.dtype) == (expected.shape, theirs.dtype), name
        assert torch.isfinite(ours[torch.isfinite(theirs)]).all(), f"{name}: not finite where PyTorch's is"
        largest = _largest(expected)
        if largest <= _ZERO * largest_of_all:
            largest = max(largest_of_all, torch.finfo(torch.float64).tiny)
        errors.append([error.flatten() / largest for error in _errors(ours, expected, theirs)])
        if ours.dtype == torch.float32:
            ulps = _FP32_ULPS * torch.finfo(torch.float32).eps
    return _measured([torch.cat(kind) for kind in zip(*errors, strict=True)], ulps)


def _errors(got: Tensor, oracle: Tensor, eager: Tensor) -> list[Tensor]:
    """Errors of the fused result, of PyTorch's, and of rounding the oracle, element by element where the dtype can hold it."""
    rounded = oracle.to(got.dtype)
    finite = torch.isfinite(eager) & torch.isfinite(rounded)
    return [torch.where(finite, tensor.double() - oracle, 0.0) for tensor in (got, eager, rounded)]


class Error(NamedTuple):
    """Against float64: of the fused result, of PyTorch's own operations, of rounding the oracle, and of sums in another order."""

    fused: float
    eager: float
    rounding: float
    ulps: float

    @property
    def limit(self) -> float:
        """The most that the fused result's may be."""
        return ALLOWANCE * self.eager + self.rounding + self.ulps

    def check(self, name: str) -> None:
        """Raises AssertionError if it is over its limit."""
        assert self.fused <= self.limit, (
            f"{name} error {self.fused:.3e} against float64 is over {self.limit:.3e} "
            f"(PyTorch's own {self.eager:.3e}, rounding {self.rounding:.3e}, fp32 ulps {self.ulps:.3e})"
        )


def _assert_within_allowance(name: str, errors: list[Tensor], ulps: float) -> tuple[Error, Error]:
    measured = _measured(errors, ulps)
    for kind, error in zip(("maximum", "RMS"), measured, strict=True):
        error.check(f"{name}: {kind}")
    return measured


def _measured(errors: list[Tensor], ulps: float) -> tuple[Error, Error]:
    fused, eager, rounding = errors

    def error_by(norm: Callable[[Tensor], Tensor]) -> Error:
        return Error(norm(fused).item(), norm(eager).item(), norm(rounding).item(), ulps)

    return error_by(lambda error: error.abs().max()), error_by(lambda error: error.square().mean().sqrt())


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _like_strides(new: Tensor, like: Tensor) -> Tensor:
    """The values of new in the strides of like, gaps included, so that a strided argument is strided in every dtype."""
    if new.stride() == like.stride():
        return new
    size = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
    buffer = torch.zeros(size, dtype=new.dtype, device=new.device)
    return buffer.as_strided(like.shape, like.stride()).copy_(new)


def _upstream(output: Tensor, index: int) -> Tensor:
    """A random gradient for an output, the same in every dtype: each holds its values exactly."""
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randn(output.shape, generator=generator).bfloat16().to(output.device)


def _largest(t: Tensor) -> float:
    finite = t[torch.isfinite(t)]
    return finite.abs().max().item() if finite.numel() else 0.0
