"""Verifying finds what is wrong, in the layer where it is, and nothing where nothing is."""

import pytest
import timm
import torch

from fastdeit import backends, ops, testing
from fastdeit.ops.attention_op import attention_reference
from fastdeit.verification import KINDS, Pair


def small(name="deit_tiny_distilled_patch16_224", **options):
    sizes = dict(img_size=32, embed_dim=64, num_heads=1, depth=2, num_classes=3)
    return timm.create_model(name, **(sizes | options)).eval()


def images(dtype=torch.float32):
    return torch.randn(2, 3, 32, 32).to(dtype)


def failing(pair):
    return {layer.row.name: layer.failure for layer in pair.verify() if layer.failure}


@pytest.mark.parametrize("setting", ["float32", "bfloat16", "autocast"])
def test_correct_modules_pass_in_every_precision(kernels_stood_in, setting):
    dtype = torch.bfloat16 if setting == "bfloat16" else torch.float32
    pair = Pair(small().to(dtype), images(dtype), torch.bfloat16 if setting == "autocast" else None)
    layers = pair.verify()
    assert [layer.row.name for layer in layers][:3] == ["", "blocks.0", "blocks.0.norm1"] and len(layers) == 12
    assert all(layer.row.fused and not layer.failure and set(layer.errors) == set(KINDS) for layer in layers)
    assert all(0 < layer.share_of_limit <= 1 for layer in layers)
    assert kernels_stood_in["attention"] > 0


def test_kernels_pass():
    backends.set_backend("triton" if testing.kernel_device().type == "cpu" else "auto")
    device = testing.kernel_device()
    pair = Pair(small(depth=1).half().to(device), images(torch.half).to(device))
    layers = pair.verify()
    assert all(layer.row.fused and not layer.failure for layer in layers), layers


def test_a_wrong_forward_is_found_where_it_is(kernels_stood_in, monkeypatch):
    monkeypatch.setattr(ops, "attention", lambda *args, **kwargs: 1.0001 * attention_reference(*args, **kwargs))
    found = failing(Pair(small(), images()))
    assert {"blocks.0.attn", "blocks.1.attn"} <= set(found)
    assert not {"blocks.0.norm1", "blocks.0.mlp", "blocks.1.norm2", "blocks.1.mlp", "norm"} & set(found)
    assert found["blocks.0.attn"].startswith("inference: maximum error")


def test_a_wrong_gradient_is_found_behind_a_right_output(kernels_stood_in, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 1.0001 * gradient

    monkeypatch.setattr(
        ops, "attention", lambda qkv, *args, **kwargs: attention_reference(Wrong.apply(qkv), *args, **kwargs)
    )
    failure = failing(Pair(small(), images()))["blocks.0.attn"]
    assert failure.startswith("gradients: ") and "output" not in failure


def test_a_kernel_that_raises_is_a_failure(kernels_stood_in, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(ops, "attention", broken)
    assert failing(Pair(small(), images()))["blocks.1.attn"] == "RuntimeError: out of resources"


def test_weights_that_are_not_finite_are_not_called_right(kernels_stood_in):
    model = small()
    model.blocks[1].mlp.fc1.weight.data.fill_(float("nan"))
    found = failing(Pair(model, images()))
    assert "timm's own result is not finite" in found["blocks.1.mlp"] and "blocks.0" not in found


def test_the_models_own_weights_and_hooks_stay_as_they_were(kernels_stood_in):
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Pair(model, images()).verify()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert "fastdeit" not in type(model).__module__


def test_a_model_without_anything_to_accelerate_is_refused():
    with pytest.raises(ValueError, match="no part of this ResNet can be accelerated"):
        Pair(timm.create_model("resnet18"), images())
