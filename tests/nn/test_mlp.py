"""The MLP drop-in against timm's."""

import pytest
import torch
from timm.layers import Mlp as TimmMlp
from timm.layers import get_act_layer
from torch import nn

from fastdeit.blocks.checklist import activation_name
from fastdeit.nn import Mlp
from fastdeit.testing import assert_as_accurate_as_eager


def pair(**kwargs):
    torch.manual_seed(0)
    fused, timms = Mlp(16, 24, **kwargs), TimmMlp(16, 24, **kwargs)
    fused.load_state_dict(timms.state_dict())
    return fused.eval(), timms.eval()


class TanhGelu(nn.GELU):
    def __init__(self):
        super().__init__(approximate="tanh")


def tanh_gelu():
    return nn.GELU(approximate="tanh")


@pytest.mark.parametrize(
    "act_layer",
    [nn.GELU, tanh_gelu, nn.SiLU, nn.ReLU, *map(get_act_layer, ("gelu", "gelu_tanh", "quick_gelu"))],
    ids=lambda layer: layer.__name__,
)
@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"bias": (True, False), "out_features": 8, "drop": 0.5}])
def test_the_fused_forward_is_as_accurate_as_timms(kernels_stood_in, act_layer, kwargs):
    fused, timms = pair(act_layer=act_layer, **kwargs)
    names = [name for name, _ in timms.named_parameters()]

    def forward_of(module):
        return lambda x, *weights: torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    x = 3 * torch.randn(2, 5, 16)
    assert_as_accurate_as_eager(forward_of(fused), forward_of(timms), x, *timms.parameters(), backend="auto")
    assert kernels_stood_in == {"mlp": 1}


def test_each_gelu_is_told_from_the_others():
    activations = [nn.GELU(), tanh_gelu(), *(get_act_layer(n)() for n in ("gelu", "gelu_tanh", "quick_gelu"))]
    assert [activation_name(a) for a in activations] == ["gelu", "gelu_tanh", "gelu", "gelu_tanh", "quick_gelu"]
    assert [activation_name(a) for a in (nn.Hardswish(), nn.Identity(), TanhGelu())] == [None, None, None]


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"act_layer": nn.Hardswish}, "the activation is Hardswish()"),
        ({"norm_layer": nn.LayerNorm}, "norm is a LayerNorm"),
        ({"act_layer": TanhGelu}, "the activation is TanhGelu(approximate='tanh')"),
    ],
)
def test_variants_without_a_kernel_are_timms(kernels_stood_in, kwargs, reason):
    fused, timms = pair(**kwargs)
    x = torch.randn(2, 5, 16)
    assert fused.why_not_fused(x) == reason
    assert torch.equal(fused(x), timms(x))
    assert not kernels_stood_in


def test_convolutions_are_timms(kernels_stood_in):
    fused, timms = pair(use_conv=True)
    x = torch.randn(2, 16, 3, 3)
    assert fused.why_not_fused(x) == "a projection is a Conv2d"
    assert torch.equal(fused(x), timms(x))


def test_active_dropout_between_the_layers_is_timms_and_after_them_is_called(kernels_stood_in):
    x = torch.ones(2, 5, 16)
    for drop, calls in (((0.5, 0.0), {}), ((0.0, 0.5), {"mlp": 1})):
        kernels_stood_in.clear()
        results = []
        for module in pair(drop=drop):
            torch.manual_seed(3)
            results.append(module.train()(x))
        torch.testing.assert_close(*results)
        assert kernels_stood_in == calls
