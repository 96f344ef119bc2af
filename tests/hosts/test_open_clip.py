"""open_clip's vision and text transformers."""

import copy

import pytest
import torch
from torch import nn

import fastdeit

transformer = pytest.importorskip("open_clip.transformer", reason="needs open_clip_torch")
BRANCHES = ("add_layer_norm_attention", "add_layer_norm_mlp")
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make(hosts):
    def make(layers=2, **options):
        torch.manual_seed(0)
        sizes = dict(image_size=16, patch_size=8, width=32, layers=layers, heads=1, mlp_ratio=2.0, output_dim=5)
        return hosts.shaken(transformer.VisionTransformer(**sizes, **options))

    return make


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, dict(ls_init_value=0.5, act_layer=transformer.QuickGELU), dict(norm_layer=transformer.LayerNormFp32)],
    ids=["default", "LayerScale and QuickGELU", "LayerNormFp32"],
)
def test_a_step_is_as_accurate_as_open_clips(hosts, make, kernels_stood_in, options, train):
    model = make(**options).train(train)
    if "norm_layer" in options:  # it computes in float32 in the oracle too
        accelerated = fastdeit.accelerate(copy.deepcopy(model))
        torch.testing.assert_close(hosts.step(accelerated, X), hosts.step(model, X))
    else:
        accelerated = hosts.assert_as_accurate(model, X)
    assert not hosts.why_not(accelerated) and not hosts.notes(accelerated) and len(hosts.blocks_of(accelerated)) == 2
    assert {name: kernels_stood_in[name] for name in BRANCHES} == dict.fromkeys(BRANCHES, 2)
    assert kernels_stood_in["layer_norm"] == 2  # before the blocks and after them


def test_kernels_are_as_accurate_as_open_clips_forward(hosts, make):
    hosts.assert_kernels_as_accurate(make(layers=1), X[:1])


def test_state_calls_and_copies_stay_open_clips(hosts, make):
    hosts.assert_state_is_kept(make(), X)


@pytest.mark.parametrize("kind", [transformer.LayerNorm, transformer.LayerNormFp32])
def test_a_norm_keeps_the_dtype_of_its_tokens(make, kernels_stood_in, kind):
    stock = kind(32)
    accelerated = fastdeit.accelerate(copy.deepcopy(stock))
    assert type(accelerated) is not kind
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float32, torch.bfloat16):
        if (
            kind is transformer.LayerNorm and dtype is torch.bfloat16
        ):  # outside of autocast, PyTorch refuses mixed dtypes
            context = torch.autocast("cpu", torch.bfloat16)
        else:
            context = torch.autocast("cpu", enabled=False)
        with context:
            out, expected = accelerated(x.to(dtype)), stock(x.to(dtype))
        assert out.dtype is expected.dtype is dtype
        torch.testing.assert_close(out, expected)
    assert kernels_stood_in["layer_norm"] == 2


@pytest.mark.fake_device
@pytest.mark.parametrize("kind", [transformer.LayerNorm, transformer.LayerNormFp32])
def test_a_norm_keeps_the_dtype_of_its_tokens_under_the_gpus_autocast(kind):
    norm, x = fastdeit.accelerate(kind(32).cuda()), torch.zeros(4, 32, dtype=torch.bfloat16, device="cuda")
    assert norm.why_not_fused(x) is None
    with torch.autocast("cuda", torch.bfloat16):
        assert norm(x).dtype is torch.bfloat16


@pytest.mark.parametrize("part", ["attn", "mlp", "mlp.gelu", "ls_1"])
def test_hooks_are_called(hosts, make, kernels_stood_in, part):
    name, results = f"transformer.resblocks.1.{part}", []
    for model in (make(), fastdeit.accelerate(make())):
        double = (lambda module, args, out: (out[0] * 2, None)) if part == "attn" else lambda module, args, out: out * 2
        model.get_submodule(name).register_forward_hook(double)
        results.append(hosts.output(model, X))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("of", ["class", "block"])
def test_a_replaced_attention_method_runs(hosts, make, kernels_stood_in, monkeypatch, of):
    model, stock = fastdeit.accelerate(make(layers=1)), make(layers=1)
    assert not hosts.notes(model)
    if of == "class":
        monkeypatch.setattr(transformer.ResidualAttentionBlock, "attention", lambda self, q_x, **_: 0 * q_x)
    else:
        for either in (model, stock):
            either.transformer.resblocks[0].attention = lambda q_x, **_: 0 * q_x
    torch.testing.assert_close(hosts.output(model, X), hosts.output(stock, X))
    assert hosts.notes(model) == {"a part of it is called: the block's method `attention` was replaced"}


def test_training_and_checkpoints_agree(hosts, make, kernels_stood_in):
    hosts.assert_training_agrees(make(), X)


def test_gradient_checkpointing_agrees(hosts, make, kernels_stood_in):
    stock, accelerated = make().train(), fastdeit.accelerate(make()).train()
    for model in (stock, accelerated):
        model.set_grad_checkpointing()
    torch.testing.assert_close(hosts.step(accelerated, X), hosts.step(stock, X))
    assert kernels_stood_in["add_layer_norm_attention"] == 4  # forward, and again in backward


@pytest.mark.one_graph
def test_it_compiles_to_one_graph(hosts, make, kernels_stood_in):
    hosts.assert_compiles_whole(make(layers=1), X)


def test_a_text_model_runs_open_clips_code_under_its_mask(hosts, kernels_stood_in):
    torch.manual_seed(0)
    sizes = dict(context_length=6, vocab_size=11, width=32, heads=1, layers=2, output_dim=5)
    stock = hosts.shaken(transformer.TextTransformer(**sizes))
    accelerated, text = fastdeit.accelerate(copy.deepcopy(stock)), torch.tensor([[1, 3, 5, 10, 0, 0]])
    torch.testing.assert_close(accelerated(text), stock(text))
    assert len(hosts.blocks_of(accelerated)) == 2
    assert not kernels_stood_in["add_layer_norm_attention"] and kernels_stood_in["layer_norm"] == 5


def test_other_keys_and_values_run_open_clips_code(hosts, kernels_stood_in):
    torch.manual_seed(0)
    stock = hosts.shaken(transformer.ResidualAttentionBlock(32, 1, is_cross_attention=True))
    accelerated = fastdeit.accelerate(copy.deepcopy(stock))
    tokens, others = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    torch.testing.assert_close(accelerated(tokens, others, others), stock(tokens, others, others))
    assert not kernels_stood_in["add_layer_norm_attention"]
    torch.testing.assert_close(accelerated(q_x=tokens), stock(tokens))
    assert kernels_stood_in["add_layer_norm_attention"] == 1


CHANGES = {
    "dropout is active": lambda block: setattr(block.attn, "dropout", 0.1),
    "its tokens come before the batch": lambda block: setattr(block.attn, "batch_first", False),
    "the activation is Tanh()": lambda block: setattr(block.mlp, "gelu", nn.Tanh()),
    "a ModuleList is called": lambda block: setattr(block, "mlp", nn.ModuleList(block.mlp)),
    "a Sequential is called": lambda block: block.mlp.append(nn.Identity()),
    "a Linear is called": lambda block: setattr(block, "attn", nn.Linear(32, 32)),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_part_that_is_not_standard_is_called(hosts, make, kernels_stood_in, reason):
    model = fastdeit.accelerate(make(layers=1)).train()
    assert not hosts.notes(model)
    CHANGES[reason](model.transformer.resblocks[0])
    assert hosts.notes(model) == {f"a part of it is called: {reason}"}


@pytest.mark.parametrize("kind", ["stand-in", "torchao"])
def test_adapters_and_quantized_weights_leave_the_mlps_projections_called(hosts, make, kernels_stood_in, kind):
    hosts.assert_adapters_act(make(), kind, X, "c_fc", "c_proj")
    assert kernels_stood_in["add_layer_norm_attention"] == 2 and kernels_stood_in["add_layer_norm_mlp"] == 0


def test_a_layer_scale_that_works_in_place_is_called(hosts, make, kernels_stood_in):
    model, stock = fastdeit.accelerate(make(layers=1, ls_init_value=0.5)), make(layers=1, ls_init_value=0.5)
    for either in (model, stock):
        either.transformer.resblocks[0].ls_1.inplace = True
    assert hosts.why_not(model) == {"its LayerScale is a LayerScale that works in place"}
    torch.testing.assert_close(hosts.output(model, X), hosts.output(stock, X))


def test_custom_blocks_run_open_clips_code_around_fused_norms(hosts, make, kernels_stood_in):
    stock = make(scale_attn=True)
    accelerated = fastdeit.accelerate(copy.deepcopy(stock))
    torch.testing.assert_close(hosts.output(accelerated, X), hosts.output(stock, X))
    assert not hosts.blocks_of(accelerated) and kernels_stood_in["layer_norm"] == 8
