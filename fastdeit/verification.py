"""Whether accelerated modules keep the numerics contract with the weights and on the device that a user has.

Every module gets the input that it has in the library's model and is compared alone, so that an error is seen in its layer.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdeit.explanation import Row
from fastdeit.swap import accelerate, explain
from fastdeit.testing import Error, compare_with_oracle, poisoned_memory

KINDS = ("inference", "output", "gradients")  # forward without and with gradients in mind, and backward


class Layer(NamedTuple):
    """One accelerated module: what runs there, and how far it and timm's are from float64, relative to the largest value."""

    row: Row
    errors: dict[str, tuple[Error, Error]]  # by kind, maximum and root-mean-square
    failure: str  # empty if the contract holds

    @property
    def share_of_limit(self) -> float:
        """The largest of its errors over what is allowed."""
        both = [error for errors in self.errors.values() for error in errors]
        return max((e.fused / e.limit if e.limit else float(e.fused > 0) for e in both), default=0.0)


class Call(NamedTuple):
    """What a module is called with."""

    args: tuple
    kwargs: dict[str, Any]


class Pair:
    """timm's model and an accelerated copy of it with the same weights.

    Args:
        model: timm's, on its device, in its dtype and in evaluation mode.
        images: (B, 3, H, W), on the same device and of the same dtype.
        autocast: the dtype that products run in, None for the model's own.
        exclude: as of `fastdeit.accelerate`.

    Raises:
        ValueError: an exclude pattern matches no module, or nothing of the model can be accelerated.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, autocast: torch.dtype | None = None, exclude: Iterable[str] = ()
    ) -> None:
        self.device, self.autocast_dtype = images.device, autocast
        self.timms, self.accelerated = model, accelerate(copy.deepcopy(model), exclude=exclude)
        self.rows = []
        with self.autocast():
            for row in explain(self.accelerated):
                classes = [type(m.get_submodule(row.name)) for m in (self.timms, self.accelerated)]
                if classes[0] is not classes[1]:
                    self.rows.append(row)
        if not self.rows:
            raise ValueError(f"model: no part of this {type(model).__name__} can be accelerated")
        self.calls = self._calls(images)

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def _calls(self, images: Tensor) -> dict[str, Call]:
        """What each accelerated module gets at its first call in timm's forward pass, by name."""
        calls: dict[str, Call] = {}

        def keep(name: str) -> Callable:
            def hook(module, args, kwargs):
                calls.setdefault(name, Call(_changed(args, Tensor.clone), _changed(kwargs, Tensor.clone)))

            return hook

        handles = [
            self.timms.get_submodule(row.name).register_forward_pre_hook(keep(row.name), with_kwargs=True)
            for row in self.rows
        ]
        try:
            with torch.no_grad(), self.autocast():
                self.timms(images)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def verify(self) -> list[Layer]:
        """Every accelerated module that the forward pass calls, in the model's order."""
        exact = copy.deepcopy(self.timms).double()
        return [self._layer(row, exact) for row in self.rows if row.name in self.calls]

    def _layer(self, row: Row, exact: nn.Module) -> Layer:
        call = self.calls[row.name]
        oracle = evaluate(exact.get_submodule(row.name), _double(call), contextlib.nullcontext)
        eager = evaluate(self.timms.get_submodule(row.name), call, self.autocast)
        errors: dict[str, tuple[Error, Error]] = {}
        try:
            with poisoned_memory():  # so that what a kernel does not write shows
                fused = evaluate(self.accelerated.get_submodule(row.name), call, self.autocast)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # timm's ran: a kernel that does not is what this is to find
            return Layer(row, errors, f"{type(error).__name__}: {error}")
        failures = []
        for kind in KINDS:
            try:
                if not all(bool(t.isfinite().all()) for t in eager[kind].values() if t is not None):
                    raise AssertionError("timm's own result is not finite: nothing can be compared")
                errors[kind] = compare_with_oracle(fused[kind], oracle[kind], eager[kind])
                for name, measured in zip(("maximum", "RMS"), errors[kind], strict=True):
                    measured.check(name)
            except AssertionError as error:
                failures.append(f"{kind}: {error}")
        return Layer(row, errors, "; ".join(failures))


def evaluate(module: nn.Module, call: Call, context: Callable) -> dict[str, dict[str, Tensor | None]]:
    """For each of KINDS, tensors by name: the outputs, and the gradients of floating-point arguments and of parameters.

    The gradient that comes from above is random, the same for every dtype.
    """
    with torch.no_grad(), context():
        inference = outputs_of(module(*call.args, **call.kwargs))
    args = _changed(call.args, lambda t: t.detach().clone().requires_grad_())
    with torch.enable_grad(), context():
        outputs = outputs_of(module(*args, **call.kwargs))
    wanted = wanted_gradients(module, args)
    upstream = [upstream_of(output, index) for index, output in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), upstream, allow_unused=True)
    return {
        "inference": {f"output {i}": o for i, o in enumerate(inference)},
        "output": {f"output {i}": o.detach() for i, o in enumerate(outputs)},
        "gradients": dict(zip(wanted, gradients, strict=True)),
    }


def wanted_gradients(module: nn.Module, args: Sequence) -> dict[str, Tensor]:
    """The arguments and parameters that require a gradient, by name."""
    wanted = {f"argument {i}": a for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad}
    return wanted | {name: p for name, p in module.named_parameters() if p.requires_grad}


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def upstream_of(output: Tensor, index: int) -> Tensor:
    """Random values that every dtype can hold, on the output's device and of its dtype."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(output.shape, generator=generator).bfloat16().to(output)


def _double(call: Call) -> Call:
    return Call(_changed(call.args, Tensor.double), _changed(call.kwargs, Tensor.double))


def _changed(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tuple's or a dictionary's floating-point tensors changed, the rest as it is."""

    def one(value):
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(values, dict):
        return {name: one(value) for name, value in values.items()}
    return tuple(one(value) for value in values)
