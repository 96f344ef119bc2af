"""A model small enough for every setting, the two ways to run its fused path here, and what a step of it gives."""

import copy
import types
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import fastdeit
from fastdeit import backends, testing


@pytest.fixture(params=["references in the kernels' place", "kernels"])
def fused_device(request) -> torch.device:
    """Accelerated models on this device take their fused path: ops run their references on the CPU, or the kernels."""
    if request.param != "kernels":
        request.getfixturevalue("kernels_stood_in")
        return torch.device("cpu")
    device = testing.kernel_device()
    if device.type == "cpu":
        backends.set_backend("triton")
    return device


@pytest.fixture
def kernels() -> torch.device:
    """The device that kernels run on here, for what no reference stands in for: a graph with the registered ops in it."""
    device = testing.kernel_device()
    if device.type == "cpu":
        backends.set_backend("triton")
    return device


@pytest.fixture
def small() -> Callable[..., nn.Module]:
    """small(name, **options): timm's model with two narrow blocks and few tokens, no parameter at its initial zero or one."""

    def make(name: str = "deit_tiny_distilled_patch16_224", *, seed: int = 0, **options) -> nn.Module:
        torch.manual_seed(seed)
        sizes = dict(img_size=32, embed_dim=64, num_heads=2, depth=2, num_classes=5)
        model = timm.create_model(name, **{**sizes, **options})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    return make


def images(batch: int = 3, side: int = 32, **options) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(**options)


def step(model: nn.Module, forward: Callable, x: torch.Tensor, *, seed: int = 7) -> dict[str, torch.Tensor]:
    """The outputs of forward(x), and the gradient of every parameter of the model, by name."""
    torch.manual_seed(seed)
    outputs = forward(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.linspace(-1, 1, o.numel()).view(o.shape).to(o) for o in outputs]
    model.zero_grad()
    torch.autograd.backward(outputs, gradients)
    named = {f"output {i}": o.detach().clone() for i, o in enumerate(outputs)}
    return named | {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def assert_step_as_accurate_as_timms(
    timms: nn.Module, x: torch.Tensor, *, forward: Callable[[nn.Module], Callable] = lambda model: model
) -> nn.Module:
    """Accelerates a copy of timm's model and holds one step of it to the contract, against timm's own and float64.

    `forward(model)` gives what is called on x. Returns the accelerated copy.
    """
    accelerated = fastdeit.accelerate(copy.deepcopy(timms))
    exact = copy.deepcopy(timms).double()
    results = [step(model, forward(model), x) for model in (accelerated, timms)]
    oracle = step(exact, exact, x.double())
    for kind in ("output", ""):
        got, eager, expected = (
            {name: t for name, t in result.items() if name.startswith("output") == bool(kind)}
            for result in (*results, oracle)
        )
        testing.assert_model_close_to_oracle(got, expected, eager)
    return accelerated


def why_not_fused(model: nn.Module) -> dict[str, str]:
    """{name: reason} of the accelerated modules that step aside."""
    return {
        name: row["reason"]
        for name, row in fastdeit.explain(model).as_dict().items()
        if not row["fused"] and not row["reason"].startswith("no fused class")
    }


@pytest.fixture
def settings() -> types.SimpleNamespace:
    """The helpers above."""
    return types.SimpleNamespace(
        images=images,
        step=step,
        why_not_fused=why_not_fused,
        assert_step_as_accurate_as_timms=assert_step_as_accurate_as_timms,
    )
