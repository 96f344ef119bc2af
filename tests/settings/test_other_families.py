"""Models that are no VisionTransformer: their standard parts are fused, the rest is untouched, and both give timm's numbers."""

import pytest
import timm
import torch

import fastdeit

NARROW = dict(num_classes=5, depth=1, embed_dim=64, num_heads=2)
# name -> options that make it small, and the kinds that are fused in it.
FAMILIES = {
    "cait_xxs24_224": (
        dict(img_size=32, **NARROW),
        {"LayerScaleBlock", "LayerScaleBlockClassAttn", "LayerNorm", "Mlp"},
    ),
    "beit_base_patch16_224": (dict(img_size=32, **NARROW), {"LayerNorm", "Mlp"}),
    "beitv2_base_patch16_224": (dict(img_size=32, **NARROW), {"LayerNorm", "Mlp"}),
    "eva02_tiny_patch14_224": (dict(img_size=28, **NARROW), {"LayerNorm"}),
    "vit_base_patch16_rope_reg1_gap_256": (dict(img_size=32, **NARROW), {"LayerNorm", "Mlp"}),
    "swin_tiny_patch4_window7_224": (
        dict(num_classes=5, img_size=16, window_size=2, embed_dim=32, depths=(1, 1), num_heads=(1, 2)),
        {"LayerNorm", "Mlp"},
    ),
    "swinv2_tiny_window8_256": (
        dict(num_classes=5, img_size=16, window_size=2, embed_dim=32, depths=(1, 1), num_heads=(1, 2)),
        {"LayerNorm", "Mlp"},
    ),
    "xcit_nano_12_p16_224": (dict(img_size=32, **NARROW), {"LayerNorm", "Mlp"}),
    "vit_relpos_small_patch16_224": (dict(img_size=32, **NARROW), {"LayerNorm", "Mlp"}),
    "naflexvit_base_patch16_gap": (NARROW, {"Block", "Attention", "LayerNorm", "Mlp"}),
    "pit_ti_224": (
        dict(num_classes=5, img_size=32, base_dims=(32, 32), depth=(1, 1), heads=(1, 2)),
        {"Block", "Attention", "LayerNorm", "Mlp"},
    ),
    "convit_tiny": (dict(img_size=32, **NARROW), {"LayerNorm", "Mlp"}),
}
KERNELS_TOO = ("cait_xxs24_224", "beit_base_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224")


def small(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **FAMILIES[name][0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def assert_faithful(settings, name, device):
    model = small(name).to(device)
    side = FAMILIES[name][0].get("img_size", 32)
    accelerated = settings.assert_step_as_accurate_as_timms(model, settings.images(2, side, device=device))
    rows = list(fastdeit.explain(accelerated))
    assert {row.kind for row in rows if row.fused} == FAMILIES[name][1]
    assert all(row.reason for row in rows if not row.fused)


@pytest.mark.parametrize("name", FAMILIES)
def test_standard_parts_are_fused_and_the_numbers_are_timms(settings, kernels_stood_in, name):
    assert_faithful(settings, name, torch.device("cpu"))


@pytest.mark.parametrize("name", KERNELS_TOO)
def test_kernels_in_another_family(settings, kernels, name):
    assert_faithful(settings, name, kernels)


@pytest.mark.parametrize("name", FAMILIES)
def test_restored_it_is_timms(name):
    model = small(name)
    before = [type(m) for m in model.modules()]
    fastdeit.accelerate(model)
    assert [type(m) for m in model.modules()] != before
    assert [type(m) for m in fastdeit.restore(model).modules()] == before


@pytest.mark.parametrize("name", ["resnet18", "levit_128s", "visformer_tiny", "efficientnet_b0"])
def test_a_model_without_standard_parts_is_untouched(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    before = [type(m) for m in model.modules()]
    fastdeit.accelerate(model)
    assert [type(m) for m in model.modules()] == before
