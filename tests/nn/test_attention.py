"""The attention drop-in against timm's."""

import inspect

import pytest
import torch
from timm.layers import Attention as TimmAttention
from torch import nn

from fastdeit import backends
from fastdeit.kernels.attention.config import SDPA_PREFERRED, Shapes
from fastdeit.nn import Attention
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes


def pair(dim=32, heads=2, **kwargs):
    torch.manual_seed(0)
    fused, timms = Attention(dim, heads, **kwargs), TimmAttention(dim, heads, **kwargs)
    fused.load_state_dict(timms.state_dict())
    return fused.eval(), timms.eval()


def assert_as_accurate_as_timms(fused, timms, x, backend):
    names = [name for name, _ in timms.named_parameters()]

    def forward_of(module):
        return lambda x, *weights: torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    assert_as_accurate_as_eager(forward_of(fused), forward_of(timms), x, *timms.parameters(), backend=backend)


@pytest.mark.parametrize(
    "kwargs", [{}, {"qkv_bias": True}, {"proj_bias": False}, {"attn_head_dim": 24}, {"dim_out": 16}, {"attn_drop": 0.5}]
)
def test_the_fused_forward_is_as_accurate_as_timms(kernels_stood_in, kwargs):
    assert_as_accurate_as_timms(*pair(**kwargs), torch.randn(2, 5, 32), "auto")
    assert kernels_stood_in == {"attention": 1}


def test_the_kernel_is_as_accurate_as_timms_forward():
    form = kernel_device(), kernel_dtypes(products=True)[0]
    fused, timms = (module.to(*form) for module in pair(dim=64, heads=2, qkv_bias=True))
    x = torch.randn(1, 5, 64).to(*form)
    with backends.use_backend("triton"):
        assert fused.why_not_fused(x) is None
    assert_as_accurate_as_timms(fused, timms, x, "triton")


needs_gates = pytest.mark.skipif(
    "gated" not in inspect.signature(TimmAttention).parameters, reason="this version of timm has no gates"
)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"qk_norm": True, "norm_layer": nn.LayerNorm}, "queries and keys, or the output, are normalised"),
        ({"scale_norm": True, "norm_layer": nn.LayerNorm}, "queries and keys, or the output, are normalised"),
        pytest.param({"gated": True}, "its output is gated", marks=needs_gates),
    ],
)
def test_variants_without_a_kernel_are_timms(kernels_stood_in, kwargs, reason):
    fused, timms = pair(**kwargs)
    x = torch.randn(2, 5, 32)
    assert fused.why_not_fused(x) == reason
    assert torch.equal(fused(x), timms(x))


def test_masks_active_dropout_and_explicit_maps_are_timms(kernels_stood_in):
    fused, timms = pair(attn_drop=0.5)
    x, mask = torch.randn(2, 5, 32), torch.zeros(5, 5)
    assert fused.why_not_fused(x, mask) == "an attention mask"
    assert torch.equal(fused(x, mask), timms(x, mask))
    assert fused.why_not_fused(x, None, True) == "causal attention"
    assert torch.equal(fused(x, is_causal=True), timms(x, is_causal=True))
    assert fused.train().why_not_fused(x) == "dropout is active"
    fused.eval().fused_attn = False
    assert fused.why_not_fused(x) == "fused_attn is off"
    assert not kernels_stood_in


def test_dropout_after_the_projection_is_drawn_as_timm_draws_it(kernels_stood_in):
    fused, timms = pair(proj_drop=0.5)
    results = []
    for module in (fused.train(), timms.train()):
        torch.manual_seed(3)
        results.append(module(torch.ones(2, 5, 32)))
    torch.testing.assert_close(*results)
    assert kernels_stood_in == {"attention": 1}


def test_a_head_dimension_without_a_kernel_is_named():
    module, x = Attention(32, 2), torch.randn(1, 5, 32)
    with backends.supposed_gpu():
        assert "head dimension 16 is none of" in module.why_not_fused(x)
    with backends.use_backend("triton"), pytest.raises(RuntimeError, match="head dimension 16 is none of"):
        module(x)


def test_a_size_that_is_handed_over_is_timms_and_named(kernels_stood_in, monkeypatch):
    monkeypatch.setitem(SDPA_PREFERRED, 90, (Shapes(32, range(1, 17), range(1, 16), True),))
    module = Attention(64, num_heads=2)
    assert "measured faster at 9 tokens and batch times heads 4" in module.why_not_fused(torch.randn(2, 9, 64))
    module(torch.randn(2, 9, 64))
    assert not kernels_stood_in
    module(torch.randn(2, 17, 64))
    assert kernels_stood_in["attention"] == 1
