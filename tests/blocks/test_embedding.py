"""A model makes its tokens with the fused op unless something would be skipped by it, or would notice."""

import copy
import functools

import pytest
import timm.layers
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import fastdeit
from fastdeit import backends, testing
from fastdeit.blocks.embedding import embed, why_not_embedding, why_not_embedding_call

DEVICE = testing.kernel_device()
SMALL = dict(img_size=(16, 24), patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3)
KINDS = {
    "plain": (VisionTransformer, {}),
    "registers": (VisionTransformer, dict(reg_tokens=2)),
    "registers without positions": (VisionTransformer, dict(reg_tokens=2, no_embed_class=True)),
    "no positions": (VisionTransformer, dict(pos_embed="none")),
    "no bias": (VisionTransformer, dict(pre_norm=True)),
    "images that patches do not fill": (VisionTransformer, dict(img_size=(17, 30))),
    "distilled": (VisionTransformerDistilled, {}),
    "active dropout": (VisionTransformerDistilled, dict(pos_drop_rate=0.5)),
}


def why_not_embedded(model, x):
    return why_not_embedding(model) or why_not_embedding_call(model, x)


def build(cls=VisionTransformer, **options):
    torch.manual_seed(0)
    model = cls(**{**SMALL, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return fastdeit.accelerate(model)


def images(model, dtype=torch.float32):
    return torch.randn(2, 3, *model.patch_embed.img_size, dtype=dtype)


def by_timm(model, x):
    return model._pos_embed(model.patch_embed(x))


def tokens_and_gradients(model, make, x):
    torch.manual_seed(1)
    model.zero_grad()
    tokens = make(x)
    (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum().backward()
    return [tokens.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_gradients_are_timms(kernels_stood_in, kind):
    cls, options = KINDS[kind]
    model = build(cls, **options).train()
    x = images(model)
    assert why_not_embedded(model, x) is None
    got = tokens_and_gradients(model, lambda x: embed(model, x), x)
    expected = tokens_and_gradients(model, lambda x: by_timm(model, x), x)
    assert len(got) == len(expected) > 2 and all(map(torch.equal, got, expected))
    assert kernels_stood_in["patch_embedding"] == 1


SETTINGS = {
    "fp32": (torch.float32, None),
    "autocast fp16": (torch.float32, torch.float16),
    "autocast bf16": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, None),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "active dropout"])
def test_the_kernels_are_as_accurate_as_timm(kind, setting):
    (cls, options), (dtype, autocast) = KINDS[kind], SETTINGS[setting]
    model = build(cls, **options).to(DEVICE, dtype)
    x = images(model).to(DEVICE, dtype)

    def outcome(model, make, x, autocast=None):
        model.zero_grad()
        with torch.autocast(DEVICE.type, dtype=autocast, enabled=autocast is not None):
            tokens = make(model, x)
        upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
        tokens.backward(upstream.to(DEVICE, tokens.dtype))
        return {"tokens": tokens.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    oracle = outcome(copy.deepcopy(model).double(), by_timm, x.double())
    eager = outcome(copy.deepcopy(model), by_timm, x, autocast)
    with backends.use_backend("triton"), testing.poisoned_memory():
        got = outcome(model, embed, x, autocast)
    assert got.keys() == oracle.keys() > {"tokens"}
    for name, expected in oracle.items():
        testing.assert_close_to_oracle(name, got[name], expected, eager[name], expected.abs().max().item())


def lora(model):
    class Projection(nn.Conv2d):
        pass

    model.patch_embed.proj.__class__ = Projection


def parametrized(model):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    torch.nn.utils.parametrize.register_parametrization(model.patch_embed.proj, "weight", Doubled())


class Weight(nn.Parameter):
    pass


CHANGES = {
    "hook on patch_embed": lambda m: m.patch_embed.register_forward_hook(lambda *_: None),
    "hook on the convolution": lambda m: m.patch_embed.proj.register_forward_pre_hook(lambda *_: None),
    "hook on the norm": lambda m: m.patch_embed.norm.register_full_backward_hook(lambda *_: None),
    "another forward": lambda m: setattr(m.patch_embed, "forward", functools.partial(m.patch_embed.forward)),
    "a class of its own": lora,
    "a parametrized weight": parametrized,
    "another kind of weight": lambda m: setattr(m.patch_embed.proj, "weight", Weight(m.patch_embed.proj.weight.data)),
    "another kind of token": lambda m: setattr(m, "cls_token", Weight(m.cls_token.data)),
    "a norm": lambda m: setattr(m.patch_embed, "norm", nn.LayerNorm(32)),
    "a norm in the grid": lambda m: setattr(m.patch_embed, "flatten", False),
    "overlapping patches": lambda m: setattr(m.patch_embed.proj, "stride", (4, 4)),
    "images of any size": lambda m: setattr(m, "dynamic_img_size", True),
    "padded images": lambda m: setattr(m.patch_embed, "dynamic_img_pad", True),
    "another embedding": lambda m: setattr(m, "patch_embed", nn.Flatten()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_be_skipped_is_called(kernels_stood_in, change):
    model = build()
    x = images(model)
    assert why_not_embedded(model, x) is None
    CHANGES[change](model)
    assert why_not_embedded(model, x)


@pytest.mark.parametrize("where", [(timm.layers.PatchEmbed, "forward"), (nn.Conv2d, "forward")])
def test_a_replaced_forward_is_called(kernels_stood_in, monkeypatch, where):
    model = build()
    owner, name = where
    monkeypatch.setattr(owner, name, getattr(owner, name).__get__(model.patch_embed))
    assert "was replaced" in why_not_embedded(model, images(model))


def test_a_hook_sees_timms_patches(kernels_stood_in):
    model = build().eval()
    x = images(model)
    expected = model(x)
    seen = []
    model.patch_embed.proj.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    assert torch.equal(model(x), expected) and seen == [(2, 32, 2, 3)]
    assert kernels_stood_in["patch_embedding"] == 1


def test_images_of_another_size_or_dtype_fail_as_in_timm(kernels_stood_in):
    model = build()
    with pytest.raises(AssertionError, match="Input height"):
        model(torch.randn(1, 3, 24, 24))
    with pytest.raises(RuntimeError, match=r"[tT]ype"):
        model(images(model, torch.float64))
    assert not kernels_stood_in["patch_embedding"]


def test_it_runs_though_the_blocks_are_not_all_fused(kernels_stood_in):
    model = fastdeit.accelerate(fastdeit.restore(build()), exclude=["blocks.*"]).eval()
    x = images(model)
    got = model(x)
    assert kernels_stood_in == {"patch_embedding": 1, "layer_norm": 1}
    torch.testing.assert_close(got, fastdeit.restore(model)(x))


def test_parameters_of_a_functional_call_are_used(kernels_stood_in):
    model = build().eval()
    x = images(model)
    parameters = {name: 2 * p.detach() for name, p in model.named_parameters() if "block" not in name}
    got = torch.func.functional_call(model, parameters, x)
    assert kernels_stood_in["patch_embedding"] == 1
    torch.testing.assert_close(got, torch.func.functional_call(fastdeit.restore(model), parameters, x))


def test_positions_that_are_a_buffer_are_added(kernels_stood_in):
    model = build().eval()
    positions = model.pos_embed.detach()
    del model.pos_embed
    model.register_buffer("pos_embed", positions)
    x = images(model)
    got = model(x)
    assert kernels_stood_in["patch_embedding"] == 1
    torch.testing.assert_close(got, fastdeit.restore(model)(x))


@pytest.mark.parametrize("name", ["cls_token", "pos_embed"])
def test_a_token_or_position_of_each_image_is_added_by_timms_code(kernels_stood_in, name):
    model = build().eval()
    setattr(model, name, torch.nn.Parameter(torch.randn(2, *getattr(model, name).shape[1:])))
    x = images(model)
    got = model(x)
    assert "not one for all images" in why_not_embedded(model, x)
    torch.testing.assert_close(got, fastdeit.restore(model)(x))


def test_explain_has_a_row_for_the_projection(kernels_stood_in):
    model = build()

    def row():
        return next(row for row in fastdeit.explain(model) if row.name == "patch_embed.proj")

    assert (row().kind, row().fused, row().reason) == ("Conv2d", True, "")
    model.patch_embed.register_forward_hook(lambda *_: None)
    assert not row().fused and row().reason == "a hook is registered on its PatchEmbed"
    model.global_pool = "avg"  # the model calls what timm's calls
    assert not row().fused


def test_it_takes_little_time(in_module_calls, kernels_stood_in):
    model = build()
    x = images(model)
    assert why_not_embedded(model, x) is None
    assert in_module_calls(lambda: why_not_embedding_call(model, x)) <= 5
