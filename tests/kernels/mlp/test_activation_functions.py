"""The activation functions on every low-precision number there is."""

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastdeit import testing
from fastdeit.kernels.mlp import activation_functions
from fastdeit.kernels.mlp.activation import activation_backward, activation_forward
from fastdeit.ops.mlp_op import ACTIVATIONS

DEVICE = testing.kernel_device()
DTYPES = (torch.float16, torch.bfloat16)


def every_finite(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    return numbers[numbers.isfinite()].to(DEVICE)


def derivative(x, activation):
    x = x.double().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[activation](x).sum(), x)[0]


def ulp(x):
    """The distance from each number to the next of larger magnitude."""
    following = torch.nextafter(x, torch.full_like(x, math.inf).copysign(x))
    return torch.where(following.isfinite(), (following.double() - x.double()).abs(), 0.0)


def is_within_one_ulp(got, exact):
    """The contract's rule for pointwise functions: 1 ulp from the correctly rounded result, or 1e-6."""
    correct = exact.to(got.dtype)
    error = (got.double() - correct.double()).abs()
    same_infinity = got == correct
    return bool((same_infinity | (error <= ulp(correct).clamp(min=1e-6))).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_value_is_within_one_ulp(activation, dtype):
    x = every_finite(dtype)
    assert len(x) > 63000
    assert is_within_one_ulp(activation_forward(x, activation), ACTIVATIONS[activation](x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_derivative_is_within_one_ulp(activation, dtype):
    x = every_finite(dtype).reshape(4, -1)
    slope, value, _ = activation_backward(torch.ones_like(x), x, activation)
    assert is_within_one_ulp(slope, derivative(x, activation))
    assert torch.equal(value, activation_forward(x, activation))  # recomputed in backward, the same bits


ULP = tl.constexpr(2.0**-23)


@triton.jit
def reciprocal_one_ulp_up(x):
    return (1.0 / x) * (1.0 + ULP)


@triton.jit
def reciprocal_one_ulp_down(x):
    return (1.0 / x) * (1.0 - ULP)


@triton.jit
def reciprocal_far_off(x):
    return (1.0 / x) * (1.0 + 65536.0 * ULP)


@pytest.mark.skipif(triton.knobs.runtime.interpret is False, reason="a compiled kernel has the instruction itself")
@pytest.mark.parametrize("reciprocal", [reciprocal_one_ulp_up, reciprocal_one_ulp_down])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rule_holds_with_the_approximate_reciprocal_of_a_gpu(dtype, reciprocal, monkeypatch):
    """`rcp.approx` errs by at most 1 ulp; the interpreter's division does not."""
    monkeypatch.setattr(activation_functions, "_reciprocal", reciprocal)
    x = every_finite(dtype).reshape(4, -1)
    assert is_within_one_ulp(activation_forward(x, "gelu"), F.gelu(x.double()))
    slope, _, _ = activation_backward(torch.ones_like(x), x, "gelu", needs_h=False)
    assert is_within_one_ulp(slope, derivative(x, "gelu"))


@pytest.mark.skipif(triton.knobs.runtime.interpret is False, reason="a compiled kernel has the instruction itself")
def test_the_kernels_take_the_reciprocal_that_is_tested(monkeypatch):
    monkeypatch.setattr(activation_functions, "_reciprocal", reciprocal_far_off)
    x = every_finite(torch.float16)
    assert not is_within_one_ulp(activation_forward(x, "gelu"), F.gelu(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", ["gelu_tanh", "quick_gelu"])
def test_the_rule_rejects_the_cheaper_gelus(other, dtype):
    x = every_finite(dtype)
    assert not is_within_one_ulp(activation_forward(x, other), F.gelu(x.double()))
    assert not is_within_one_ulp(ACTIVATIONS[other](x.double()).to(dtype), F.gelu(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_misrounded_share_is_at_most_twice_pytorchs(activation, dtype):
    x = torch.randn(200_000, device=DEVICE).to(dtype)
    correct = ACTIVATIONS[activation](x.double()).to(dtype)
    share = (activation_forward(x, activation) != correct).double().mean().item()
    pytorchs = (ACTIVATIONS[activation](x) != correct).double().mean().item()
    assert share <= 2 * pytorchs, (share, pytorchs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_values(activation):
    """What PyTorch's functions give on a GPU; its vectorised GELU on a CPU has NaN at infinity too."""
    x = torch.tensor([[math.inf, -math.inf, math.nan, 0.0]], device=DEVICE)
    slope, value, _ = activation_backward(torch.ones_like(x), x, activation)
    below = 0.0 if activation == "relu" else math.nan  # -inf times a gate of 0
    expected = torch.tensor([[math.inf, below, math.nan, 0.0]], device=DEVICE)
    torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
    assert slope[0, 2].isnan() or activation == "relu"  # whose derivative at NaN is PyTorch's 1
    assert slope[0, 3] == derivative(x[:, 3:], activation)


def test_fp32_gelu_is_closer_than_the_stated_error():
    x = torch.linspace(-12, 12, 100_001, device=DEVICE)
    assert (activation_forward(x, "gelu").double() - F.gelu(x.double())).abs().max() < 1.2e-6
