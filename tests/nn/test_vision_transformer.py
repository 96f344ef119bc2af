"""Whole models: the residual carried between blocks and the last block on prefix tokens alone give timm's numbers."""

import pytest
import timm.layers
import timm.models.deit
import timm.models.vision_transformer
import torch

import fastdeit
from fastdeit.nn import VisionTransformer, VisionTransformerDistilled

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=7)
PLAIN = timm.models.vision_transformer.VisionTransformer
DISTILLED = timm.models.deit.VisionTransformerDistilled
# The last block computes the prefix tokens alone, with an addition and LayerNorm of its own before its queries and after it.
FUSED_CALLS = {"add_layer_norm_attention": 2, "attention_qkv": 1, "add_layer_norm_mlp": 3, "add_layer_norm": 2}
FUSED_CALLS |= {"patch_embedding": 1}
LAYER_SCALE_CALLS = FUSED_CALLS | {"add_layer_norm_mlp": 2, "add_layer_norm": 3, "mlp": 1}

KINDS = {
    "class token": (PLAIN, {}),
    "class and distillation token": (DISTILLED, {}),
    "registers": (PLAIN, dict(reg_tokens=3)),
    "layer scale": (PLAIN, dict(init_values=0.1)),
    "drop path": (DISTILLED, dict(drop_path_rate=0.4)),
    "layer scale and drop path": (PLAIN, dict(init_values=0.1, drop_path_rate=0.4)),
    "no qkv bias": (PLAIN, dict(qkv_bias=False)),
    "norm before the blocks": (PLAIN, dict(pre_norm=True)),
    "position embedding without prefix": (PLAIN, dict(no_embed_class=True)),
    "patch dropout": (PLAIN, dict(patch_drop_rate=0.5)),
    "dropout of positions and head": (PLAIN, dict(pos_drop_rate=0.3, drop_rate=0.0)),
    "odd head dimension": (PLAIN, dict(embed_dim=30)),
}


def build(cls, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = cls(**{**SMALL, **options}).to(dtype).train()
    with torch.no_grad():
        for p in model.parameters():  # zero biases and unit scales would hide mistakes
            p.add_(0.05 * torch.randn_like(p))
    if cls is DISTILLED:
        model.set_distilled_training(True)
    return model


def images(dtype=torch.float64):
    return torch.randn(4, 3, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(model, x):
    torch.manual_seed(5)
    out = model(x)
    out = out if isinstance(out, tuple) else (out,)
    sum((i + 1) * o.square().sum() for i, o in enumerate(out)).backward()
    state = torch.get_rng_state()
    return [*(o.detach() for o in out), *(p.grad for p in model.parameters())], state


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_random_state_are_timms(kernels_stood_in, kind):
    cls, options = KINDS[kind]
    expected, state = outputs_and_gradients(build(cls, **options), images())
    kernels_stood_in.clear()
    got, fused_state = outputs_and_gradients(fastdeit.accelerate(build(cls, **options)), images())
    calls = LAYER_SCALE_CALLS if "init_values" in options else FUSED_CALLS
    assert kernels_stood_in == (calls | {"layer_norm": 1} if "pre_norm" in options else calls)
    assert torch.equal(state, fused_state)
    for a, b in zip(got, expected, strict=True):
        # float64 throughout but for drop path's factor, which is float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


def _norm_before_the_head(model):
    model.fc_norm = torch.nn.LayerNorm(32, dtype=torch.float64)
    with torch.no_grad():
        model.fc_norm.weight.copy_(torch.linspace(0.5, 1.5, 32))


BEFORE_HEADS = {
    "dropout": (PLAIN, lambda m: setattr(m.head_drop, "p", 0.5)),
    "norm": (PLAIN, _norm_before_the_head),
    "hook on the dropout": (PLAIN, lambda m: m.head_drop.register_forward_hook(lambda _, inputs, out: 2 * out)),
    "hook on the norm": (PLAIN, lambda m: m.fc_norm.register_forward_hook(lambda _, inputs, out: 2 * out)),
    "hook on a head": (DISTILLED, lambda m: m.head_dist.register_forward_hook(lambda _, inputs, out: 2 * out)),
}


@pytest.mark.parametrize("change", BEFORE_HEADS)
def test_what_is_between_tokens_and_logits_is_called(kernels_stood_in, change):
    cls, change = BEFORE_HEADS[change]
    plain, fused = build(cls), fastdeit.accelerate(build(cls))
    for model in (plain, fused):
        change(model)
    expected, state = outputs_and_gradients(plain, images())
    kernels_stood_in.clear()
    got, fused_state = outputs_and_gradients(fused, images())
    assert kernels_stood_in == FUSED_CALLS and torch.equal(state, fused_state)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_last_block_projects_queries_of_the_prefix_alone(kernels_stood_in, monkeypatch):
    sizes = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *p: sizes.append(tuple(x.shape[1:])) or linear(x, *p))
    model = fastdeit.accelerate(build(DISTILLED)).eval()
    model(images())
    block = [(18, 32), (18, 32), (18, 32), (18, 128)]  # qkv, proj, fc1, fc2
    pruned = [(2, 32), (18, 32), (2, 32), (2, 32), (2, 128)]  # queries, keys and values, proj, fc1, fc2
    heads = [(32,), (32,)]
    assert sizes == [*block, *block, *pruned, *heads]


class Doubled(torch.nn.Sequential):
    """Blocks with work of its own around them."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.set_grad_checkpointing(),
        lambda m: setattr(m, "forward_head", m.forward_head),
        lambda m: m.blocks.register_forward_hook(lambda *_: None),
        lambda m: m.blocks[1].register_forward_hook(lambda *_: None),
        lambda m: m.blocks[1].drop_path2.register_forward_hook(lambda *_: None),
        lambda m: m.norm.register_forward_hook(lambda *_: None),
        lambda m: fastdeit.accelerate(m, exclude="blocks.1"),
        lambda m: fastdeit.accelerate(m, exclude="norm"),
        lambda m: setattr(m, "global_pool", "avg"),
        lambda m: setattr(m, "norm", torch.nn.Identity()),
        lambda m: setattr(m, "blocks", Doubled(*m.blocks)),
    ],
)
def test_whatever_would_notice_takes_the_plain_path(kernels_stood_in, change):
    model = fastdeit.accelerate(build(PLAIN))
    change(model)
    assert model.why_not_fused(torch.zeros(1, 17, 32)) is not None
    kernels_stood_in.clear()
    got, _ = outputs_and_gradients(model, images())
    assert "attention_qkv" not in kernels_stood_in
    got = [t.clone() for t in got]
    model.zero_grad()
    expected, _ = outputs_and_gradients(fastdeit.restore(model), images())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["attn", "attn.proj", "mlp", "mlp.fc1", "norm2", "ls1"])
def test_hooks_in_the_last_block_see_every_token(kernels_stood_in, name):
    model, seen = fastdeit.accelerate(build(PLAIN)), []
    model.blocks[-1].get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
    model(images())
    assert seen == [17]


@pytest.mark.parametrize("rate", [dict(proj_drop_rate=0.3), dict(attn_drop_rate=0.3)])
def test_dropout_draws_timms_random_numbers(kernels_stood_in, rate):
    expected, state = outputs_and_gradients(build(PLAIN, **rate), images())
    got, fused_state = outputs_and_gradients(fastdeit.accelerate(build(PLAIN, **rate)), images())
    assert torch.equal(state, fused_state)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_features_and_intermediates_are_of_every_token(kernels_stood_in):
    model, timms = fastdeit.accelerate(build(PLAIN)).eval(), build(PLAIN).eval()
    torch.testing.assert_close(model.forward_features(images()), timms.forward_features(images()))
    for a, b in zip(
        model.get_intermediate_layers(images(), n=2), timms.get_intermediate_layers(images(), n=2), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_dynamic_image_size(kernels_stood_in):
    model, timms = (build(PLAIN, dynamic_img_size=True).eval() for _ in range(2))
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    torch.testing.assert_close(fastdeit.accelerate(model)(x), timms(x))
    assert kernels_stood_in == {name: n for name, n in FUSED_CALLS.items() if name != "patch_embedding"}


def test_an_attention_mask_reaches_every_block(kernels_stood_in):
    model, timms = fastdeit.accelerate(build(PLAIN)).eval(), build(PLAIN).eval()
    mask = torch.ones(17, 17).tril().bool()
    torch.testing.assert_close(model(images(), attn_mask=mask), timms(images(), attn_mask=mask))


@pytest.mark.parametrize("cls", [VisionTransformer, VisionTransformerDistilled])
def test_made_directly_it_has_fused_parts_and_timms_state(kernels_stood_in, cls):
    source = {VisionTransformer: PLAIN, VisionTransformerDistilled: DISTILLED}[cls]
    model = cls(**SMALL).eval()
    timms = source(**SMALL).eval()
    timms.load_state_dict(model.state_dict())
    x = images(torch.float32)
    torch.testing.assert_close(model(x), timms(x))
    assert kernels_stood_in == FUSED_CALLS
    assert type(fastdeit.restore(model)) is source
    assert [type(m) for m in model.modules()] == [type(m) for m in timms.modules()]


@pytest.mark.one_graph
def test_compiles_to_one_graph(kernels_stood_in):
    torch.compiler.reset()
    expected, _ = outputs_and_gradients(build(PLAIN, init_values=0.1), images())
    model = fastdeit.accelerate(build(PLAIN, init_values=0.1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    compiled(images()).square().sum().backward()
    for a, b in zip((p.grad for p in model.parameters()), expected[1:], strict=True):
        torch.testing.assert_close(a, b)


def test_explain_has_a_row_for_the_model(kernels_stood_in):
    model = fastdeit.accelerate(build(PLAIN))
    row = next(iter(fastdeit.explain(model)))
    assert (row.name, row.kind, row.fused) == ("", "VisionTransformer", True)
    model.global_pool = "avg"
    assert next(iter(fastdeit.explain(model))).reason == "the pooling reads every token"
