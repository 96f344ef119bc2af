"""The LayerNorm drop-ins against the classes that they stand in for."""

import pytest
import timm.layers
import torch
from torch import nn

from fastdeit import backends
from fastdeit.nn import LayerNorm, TorchLayerNorm
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

PAIRS = [(LayerNorm, timm.layers.LayerNorm), (TorchLayerNorm, nn.LayerNorm)]


@pytest.mark.parametrize(("fused", "source"), PAIRS)
@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_the_kernel_runs_and_is_as_accurate_as_the_source_class(fused, source, dtype):
    module = fused(48).to(kernel_device())
    x = torch.randn(3, 2, 48, dtype=dtype, device=kernel_device())
    weight, bias = torch.randn(2, 48, dtype=dtype, device=kernel_device())
    with backends.use_backend("triton"):
        assert module.why_not_fused(x) is None

    def forward(cls):
        norm = cls(48)
        return lambda x, w, b: torch.func.functional_call(norm, {"weight": w, "bias": b}, (x,))

    assert_as_accurate_as_eager(forward(fused), forward(source), x, weight, bias)


@pytest.mark.parametrize(("fused", "source"), PAIRS)
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_without_weights_it_only_normalises(kernels_stood_in, fused, source, eps):
    flag = "affine" if fused is LayerNorm else "elementwise_affine"
    x = 1e-2 * torch.randn(3, 8)
    assert torch.equal(fused(8, eps=eps, **{flag: False})(x), source(8, eps=eps, **{flag: False})(x))
    assert kernels_stood_in == {"layer_norm": 1}


def test_a_norm_over_two_dimensions_is_pytorchs(kernels_stood_in):
    norm = TorchLayerNorm((4, 8))
    assert norm.why_not_fused(torch.randn(2, 4, 8)) == "it normalises over 2 dimensions"
    assert norm(torch.randn(2, 4, 8)).shape == (2, 4, 8)
    assert not kernels_stood_in


def test_timms_fast_norm_is_timms(kernels_stood_in):
    norm = LayerNorm(8)
    norm._fast_norm = True
    assert norm.why_not_fused(torch.randn(2, 8)) == "timm's fast norm is on"


def test_a_bias_free_norm_is_fused(kernels_stood_in):
    norm, expected = TorchLayerNorm(8, bias=False), nn.LayerNorm(8, bias=False)
    x = torch.randn(2, 8)
    assert torch.equal(norm(x), expected(x))
    assert kernels_stood_in == {"layer_norm": 1}


def test_a_last_dimension_that_does_not_fit_is_named():
    norm = LayerNorm(8)
    with backends.use_backend("triton"), pytest.raises(ValueError, match=r"weight: expected shape \(9,\)"):
        norm(torch.randn(2, 9))
