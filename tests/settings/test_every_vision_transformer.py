"""Every model of timm's that is a VisionTransformer: what of it is accelerated, and one of each structure against float64."""

import importlib
import re

import pytest
import timm
import torch
from timm.models._registry import _model_to_module
from timm.models.vision_transformer import VisionTransformer

import fastdeit
from fastdeit.nn import FUSED_CLASSES

# One name of each structure -> what of it is fused, at least. B, A, M, L: every Block, Attention, Mlp, LayerNorm; V: the model.
STRUCTURES = {
    "deit_tiny_patch16_224": "VBAML",
    "deit_tiny_distilled_patch16_224": "VBAML",
    "deit3_small_patch16_224": "VBAML",  # LayerScale, no position for the class token
    "vit_base_patch14_dinov2": "VBAML",  # LayerScale
    "vit_base_patch14_reg4_dinov2": "VBAML",  # registers
    "flexivit_small": "VBAML",  # no position for the class token
    "vit_base_patch16_clip_224": "VBAML",  # norm before the blocks
    "vit_base_patch16_clip_quickgelu_224": "VBAML",
    "vit_tiny_r_s16_p8_224": "VBAML",  # tokens from a small ResNet
    "vit_base_mci_224": "VBAML",  # tokens from a convolutional stem
    "vitamin_small_224": "AB",  # tokens from MBConv stages, gated Mlp
    "vit_giant_patch14_dinov2": "VBAL",  # gated Mlp
    "vit_giant_patch14_reg4_dinov2": "VBAL",
    "vit_base_patch16_radio_v3": "BAML",  # no norm after the blocks
    "vit_huge_patch16_radio_v4": "BAML",
    "vit_intern300m_patch14_448": "BAML",
    "vit_base_patch16_gap_224": "BAML",  # averages, or pools by attention: every token is read
    "beit3_base_patch16_224": "BL",
    "eva_large_patch14_196": "BAML",
    "test_vit2": "BAML",
    "test_vit3": "BML",
    "vit_base_patch16_siglip_224": "BAML",
    "vit_base_patch32_siglip_256": "BAML",
    "vit_base_patch32_siglip_gap_256": "BAML",
    "vit_betwixt_patch16_gap_256": "BAML",
    "vit_betwixt_patch16_reg1_gap_256": "BAML",
    "vit_betwixt_patch16_reg4_gap_256": "BAML",
    "vit_base_patch16_reg4_gap_256": "BAML",
    "vit_so150m_patch16_reg4_gap_256": "BAML",
    "vit_so150m_patch16_reg4_map_256": "BAML",
    "vit_dwee_patch16_reg1_gap_256": "BML",  # differential attention
    "vit_base_patch16_rpn_224": "AML",  # norms behind the branches
    "vit_base_patch16_18x2_224": "AML",  # two attentions and two Mlps side by side
    "test_vit4": "AM",  # RMS norms
    "aimv2_1b_patch14_224": "A",  # RMS norms, gated Mlp
    "vit_pwee_patch16_reg1_gap_256": "L",  # attention and Mlp as one product
    "vit_dpwee_patch16_reg1_gap_256": "L",
    "vit_base_patch16_xp_224": "",
}
LETTERS = {"V": "VisionTransformer", "B": "Block", "A": "Attention", "M": "Mlp", "L": "LayerNorm"}
KEEPS_ITS_WIDTH = re.compile("_mci_|^vitamin")  # that of what makes its tokens


def every_name():
    """All names whose module has the class: timm's list does not say which models are of it."""
    modules = {
        m
        for m in set(_model_to_module.values())
        if getattr(importlib.import_module(f"timm.models.{m}"), "VisionTransformer", None) is VisionTransformer
    }
    return [name for name in timm.list_models() if _model_to_module[name] in modules]


def reduced(name, **options):
    """The model with one narrow block and few tokens; all that makes its structure is the name's."""
    patch = re.search(r"(?<=patch)\d+", name)
    sizes = dict(img_size=2 * int(patch[0]) if patch else 32, depth=1, num_classes=5)
    if not KEEPS_ITS_WIDTH.search(name):
        sizes |= dict(embed_dim=96, num_heads=3)
    return timm.create_model(name, **{**sizes, **options})


def structure(model):
    """What the fused code could tell apart, whatever the sizes: two models that agree in it are the same to it."""
    modules = tuple(
        (name, type(module).__name__) for name, module in model.named_modules() if not name.startswith("patch_embed.")
    )
    return (
        modules,
        type(model.patch_embed).__name__,
        model.global_pool,
        min(model.num_prefix_tokens, 2),
        model.no_embed_class,
    )


def test_every_name_has_a_representative():
    with torch.device("meta"):
        known = {structure(reduced(name)) for name in STRUCTURES}
        others = {name: structure(reduced(name)) for name in every_name() if name not in STRUCTURES}
    assert len(others) + len(STRUCTURES) >= 206
    assert len(known) == len(STRUCTURES)
    assert {name for name, found in others.items() if found not in known} == set()


def fused_kinds(model):
    """The letters of what is fused in all its places, and the reason of everything that is not."""
    rows = fastdeit.explain(model).as_dict()
    found = ""
    for letter, kind in LETTERS.items():
        fused = [row["fused"] for row in rows.values() if row["kind"] in (kind, kind + "Distilled")]
        found += letter if fused and all(fused) else ""
    return found, {name: row["reason"] for name, row in rows.items() if not row["fused"]}


def test_every_name_accelerates_and_restores_and_explain_has_a_word_on_each_part(kernels_stood_in):
    """At full width; without memory behind the weights."""
    for name in every_name():
        with torch.device("meta"):
            model = timm.create_model(name, depth=2)
        before = [type(m) for m in model.modules()]
        keys = list(model.state_dict())
        fastdeit.accelerate(model)
        assert [type(m) for m in model.modules()] == [FUSED_CLASSES.get(c, c) for c in before], name
        assert list(model.state_dict()) == keys
        assert all(fused_kinds(model)[1].values()), name
        assert [type(m) for m in fastdeit.restore(model).modules()] == before, name


@pytest.mark.parametrize("name", STRUCTURES)
def test_one_of_each_structure_is_as_accurate_as_timms(settings, fused_device, name):
    torch.manual_seed(0)
    timms = reduced(name).to(fused_device)
    if hasattr(timms, "set_distilled_training"):
        timms.set_distilled_training(True)
    with torch.no_grad():
        for parameter in timms.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    side = timms.patch_embed.img_size[0]
    model = settings.assert_step_as_accurate_as_timms(timms, settings.images(2, side, device=fused_device))
    fused, reasons = fused_kinds(model)
    assert set(fused) >= set(STRUCTURES[name]), reasons
    assert all(reasons.values())
