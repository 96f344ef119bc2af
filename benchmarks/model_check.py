"""What is timed is right: accelerated models and blocks are held to float64, their results and the gradients of all parameters."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.benchmarks import models
from fastdeit.testing import compare_with_oracle

CHECKED_IMAGES = (
    16  # float64 keeps much for backward; of so many, attention has a small DeiT's tiles for any more of them
)
_LOSS_SCALE = 2.0**14  # as a GradScaler has it: without one, fp16 loses the gradients behind a LayerScale of 1e-6

Loss = Callable[[tuple[Tensor, ...]], Tensor]
Errors = dict[str, tuple[list[float], list[float]]]  # by candidate maximum and root mean square


def check(module: nn.Module, kind: str, x: Tensor, loss: Loss | None, *, input_gradient: bool = False) -> Errors:
    """Holds an accelerated copy to the numerics contract beside the module itself, both with the same drop-path masks.

    Args:
        module: timm's, in the mode and dtype of the kind.
        kind: one of models.KINDS.
        x: its input. Where float64 does not fit into memory, half of its samples, or a half of those.
        loss: a scalar of the results of x's first samples in any dtype, whose gradients are compared; None without training.
        input_gradient: compare that of x too.

    Returns:
        Of fastdeit and timm eager the errors of the results, then of the gradients if there are any, over the largest value in each
        tensor.

    Raises:
        AssertionError: over twice the error of timm's own, in the results or in the gradients.
    """
    while True:
        try:
            return _checked(module, kind, x, loss, input_gradient)
        except torch.OutOfMemoryError:
            if len(x) == 1:
                raise
        x = x[: len(x) // 2]  # out of the handler, which holds what did not fit
        torch.cuda.empty_cache()


def _checked(module: nn.Module, kind: str, x: Tensor, loss: Loss | None, input_gradient: bool) -> Errors:
    scale = _LOSS_SCALE if kind.endswith("fp16") else 1.0

    def evaluate(module: nn.Module, x: Tensor, context) -> tuple[dict, dict]:
        x = x.detach().requires_grad_(input_gradient)
        with _fixed_masks(), torch.set_grad_enabled(loss is not None), context:
            results = models.logits(module(x))
            value = None if loss is None else scale * loss(results)
        named = {f"result {i}": result.detach() for i, result in enumerate(results)}
        if loss is None:
            return named, {}
        wrt = dict(module.named_parameters()) | ({"input": x} if input_gradient else {})
        gradients = torch.autograd.grad(value, list(wrt.values()), allow_unused=True)
        return named, dict(zip(wrt, gradients, strict=True))

    got = evaluate(models.accelerated(module), x, models.autocast(kind))
    eager = evaluate(module, x, models.autocast(kind))
    oracle = evaluate(copy.deepcopy(module).double(), x.double(), contextlib.nullcontext())
    found: Errors = {"fastdeit": ([], []), "timm eager": ([], [])}
    for what, *tensors in zip(("results", "gradients"), got, oracle, eager, strict=True):
        if not tensors[0]:
            continue
        for position, error in enumerate(compare_with_oracle(*tensors)):
            error.check(f"the model's {what}: {('maximum', 'RMS')[position]}")
            found["fastdeit"][position].append(error.fused)
            found["timm eager"][position].append(error.eager)
    return found


def cross_entropy(labels: Tensor) -> Loss:
    """The sum over a model's classifiers."""

    def loss(outputs: tuple[Tensor, ...]) -> Tensor:
        wide = (output.to(torch.promote_types(output.dtype, torch.float32)) for output in outputs)
        return sum(F.cross_entropy(output, labels[: len(output)]) for output in wide)

    return loss


@contextlib.contextmanager
def _fixed_masks() -> Iterator[None]:
    """Stochastic depth draws the same in every dtype: a generator's numbers depend on it."""
    generator = torch.Generator().manual_seed(0)

    def bernoulli_(mask: Tensor, keep: float) -> Tensor:
        return mask.copy_(torch.rand(mask.shape, generator=generator) < keep)

    with mock.patch.object(Tensor, "bernoulli_", bernoulli_):
        yield
