"""The MLP op against float64, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdeit import ops
from fastdeit.ops.mlp import ACTIVATIONS
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes


def weights(dtype=torch.float32, channels=16, hidden=24, out=8):
    make = {"dtype": dtype, "device": kernel_device()}
    return [torch.randn(*size, **make) for size in ((hidden, channels), (hidden,), (out, hidden), (out,))]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16)])
def test_as_accurate_as_eager(activation, dtype, shape):
    x = torch.randn(shape, dtype=dtype, device=kernel_device())
    assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, x, *weights(dtype), activation=activation, backend="auto")


def test_biases_are_optional():
    w1, b1, w2, b2 = weights()
    x = torch.randn(3, 16, device=w1.device)
    zero = ops.mlp(x, w1, torch.zeros_like(b1), w2, torch.zeros_like(b2))
    torch.testing.assert_close(ops.mlp(x, w1, None, w2, None), zero)


def test_the_activations_are_pytorchs_and_differ():
    x = torch.linspace(-4, 4, 41, device=kernel_device())[:, None]
    one = torch.ones(1, 1, device=x.device)
    results = [ops.mlp(x, one, None, one, None, activation=name) for name in ("gelu", "gelu_tanh", "quick_gelu")]
    quick = x * torch.sigmoid(1.702 * x)
    for got, expected in zip(results, (nn.GELU()(x), F.gelu(x, approximate="tanh"), quick), strict=True):
        torch.testing.assert_close(got, expected)
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "relu"}, ValueError, "activation: expected one of gelu, gelu_tanh, quick_gelu, got 'relu'"),
        ({"x": torch.ones(3, 16, dtype=torch.long)}, TypeError, "x: expected a floating-point tensor, got torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected shape"),
        ({"x": torch.randn(3, 15)}, ValueError, r"w1: expected shape \(rows, 15\), got \(24, 16\)"),
        ({"w2": torch.randn(8, 23)}, ValueError, r"w2: expected shape \(rows, 24\), got \(8, 23\)"),
        ({"b1": torch.randn(23)}, ValueError, r"b1: expected shape \(24,\), got \(23,\)"),
        ({"w2": None}, TypeError, "w2: expected a floating-point tensor, got NoneType"),
        ({"b2": torch.randn(8, device="meta")}, ValueError, "b2: expected device cpu as x has, got meta"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    w1, b1, w2, b2 = (w.cpu() for w in weights())
    arguments = {"x": torch.randn(3, 16), "w1": w1, "b1": b1, "w2": w2, "b2": b2, **change}
    with pytest.raises(error, match=message):
        ops.mlp(**arguments)
