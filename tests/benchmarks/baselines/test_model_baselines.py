"""Other libraries' models with timm's weights: the names by which weights go over, and what is not there."""

import pytest
import timm
import torch

from fastdeit.benchmarks.baselines.model_baselines import HfDeit, hf_deit, hf_weights
from fastdeit.benchmarks.timing import NotInstalled


def model(name="deit_tiny_distilled_patch16_224"):
    return timm.create_model(name, img_size=32, embed_dim=32, num_heads=2, depth=2, num_classes=5).eval()


def test_every_weight_goes_over_once():
    weights = model().state_dict()
    there = hf_weights(weights, 2)
    assert sum(t.numel() for t in there.values()) == sum(t.numel() for t in weights.values())
    packed = torch.cat([there[f"deit.layers.1.attention.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(packed, weights["blocks.1.attn.qkv.weight"])
    assert torch.equal(there["distillation_classifier.bias"], weights["head_dist.bias"])


def test_without_transformers_it_says_so(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NotInstalled):
        HfDeit(model())(torch.randn(1, 3, 32, 32))


def test_their_logits_are_timms():
    pytest.importorskip("transformers")
    images = torch.randn(2, 3, 32, 32)
    ours = model()
    with torch.no_grad():
        torch.testing.assert_close(hf_deit(ours)(images).logits, ours(images))


def test_a_model_without_a_distillation_head_is_refused():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="expected a distilled DeiT, got VisionTransformer"):
        hf_deit(model("deit_tiny_patch16_224"))
