"""The blocks of openai/CLIP, by a stand-in whose methods are made known as theirs are."""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fastdeit
from fastdeit import backends, testing
from fastdeit.blocks.adapters import clip, known_sources
from fastdeit.nn import hosts as host_table

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
NAMES = ("clip", "clip.model", "fastdeit.nn.clip")


def load():
    """The stand-in under CLIP's name."""
    file = importlib.util.spec_from_file_location("clip.model", Path(__file__).with_name("clip_model.py"))
    module = importlib.util.module_from_spec(file)
    sys.modules.update({"clip": ModuleType("clip"), "clip.model": module})
    file.loader.exec_module(module)
    return module


def digest(module, name):
    kind, method = name.split(".")
    return known_sources.source_digest(getattr(getattr(module, kind), method))


@pytest.fixture(scope="module")
def file():
    """The stand-in, known."""
    kept, known = {name: sys.modules.pop(name, None) for name in NAMES}, dict(clip.KNOWN)
    host_table._unusable.pop("clip.model", None)
    module = load()
    clip.KNOWN.update({name: digest(module, name) for name in known})
    yield module
    clip.KNOWN.update(known)
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update({name: module for name, module in kept.items() if module is not None})
    host_table._unusable.pop("clip.model", None)


@pytest.fixture
def make(hosts, file):
    def make(depth=2):
        torch.manual_seed(0)
        return hosts.shaken(file.VisionTransformer(depth=depth))

    return make


@pytest.mark.parametrize("train", [False, True])
def test_a_step_agrees_with_clips(hosts, make, kernels_stood_in, train):
    """CLIP's norms compute in float32 in an oracle too."""
    model = make().train(train)
    accelerated = fastdeit.accelerate(copy.deepcopy(model))
    torch.testing.assert_close(hosts.step(accelerated, X), hosts.step(model, X))
    assert not hosts.why_not(accelerated) and not hosts.notes(accelerated) and len(hosts.blocks_of(accelerated)) == 2
    assert kernels_stood_in["add_layer_norm_attention"] == kernels_stood_in["add_layer_norm_mlp"] == 2
    assert kernels_stood_in["layer_norm"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_are_as_accurate_as_clips_forward(hosts, make, file, dtype):
    """In float16 as CLIP is loaded on a GPU: all but the norms."""
    if dtype not in testing.kernel_dtypes(products=True):
        pytest.skip(f"kernels do not multiply in {dtype} here")
    device, x = testing.kernel_device(), X[:1].to(dtype)
    exact = file.rounded(make(depth=1), torch.float64)(X[:1].double())
    stock = file.rounded(make(depth=1), dtype).to(device)
    accelerated = fastdeit.accelerate(copy.deepcopy(stock))
    with backends.use_backend("triton"):
        assert not hosts.why_not(accelerated)
        out = accelerated(x.to(device))
    errors = [(each.cpu().double() - exact).abs().max() for each in (out, stock(x.to(device)))]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.fake_device
def test_a_norm_keeps_the_dtype_of_its_tokens_under_the_gpus_autocast(file):
    norm, x = fastdeit.accelerate(file.LayerNorm(32).cuda()), torch.zeros(4, 32, dtype=torch.float16, device="cuda")
    assert norm.why_not_fused(x) is None
    with torch.autocast("cuda", torch.float16):
        assert norm(x).dtype is torch.float16


def test_state_calls_and_copies_stay_clips(hosts, make):
    hosts.assert_state_is_kept(make(), X)


@pytest.mark.parametrize("part", ["attn", "ln_1", "mlp", "mlp.gelu"])
def test_hooks_see_the_tokens_before_the_batch(hosts, make, kernels_stood_in, part):
    shapes, results = [], []
    for model in (make(), fastdeit.accelerate(make())):

        def double(module, args, out):
            shapes.append(args[0].shape)
            return (out[0] * 2, None) if part == "attn" else out * 2

        model.get_submodule(f"resblocks.1.{part}").register_forward_hook(double)
        results.append(hosts.output(model, X))
    torch.testing.assert_close(*results)
    assert shapes[0] == shapes[1] and shapes[0][:2] == (4, 2)


@pytest.mark.parametrize("of", ["class", "block"])
def test_a_replaced_attention_method_runs(hosts, file, make, kernels_stood_in, monkeypatch, of):
    model, stock = fastdeit.accelerate(make(depth=1)), make(depth=1)
    assert not hosts.why_not(model)
    if of == "class":
        monkeypatch.setattr(file.ResidualAttentionBlock, "attention", lambda self, x: 0 * x)
    else:
        for either in (model, stock):
            either.resblocks[0].attention = lambda x: 0 * x
    torch.testing.assert_close(hosts.output(model, X), hosts.output(stock, X))
    assert hosts.why_not(model) == {"the block's method `attention` was replaced"}


def test_a_mask_runs_clips_code_and_is_seen_at_any_time(hosts, make, kernels_stood_in):
    model, stock = fastdeit.accelerate(make(depth=1)), make(depth=1)
    plain = hosts.output(model, X)
    for either in (model, stock):
        either.resblocks[0].attn_mask = torch.full((4, 4), -torch.inf).triu(1)
    torch.testing.assert_close(hosts.output(model, X), hosts.output(stock, X))
    assert hosts.why_not(model) == {"it has an attention mask"} and not torch.equal(hosts.output(model, X), plain)
    model.resblocks[0].attn_mask = None
    assert not hosts.why_not(model)


@pytest.mark.parametrize("kind", ["stand-in", "torchao"])
def test_adapters_and_quantized_weights_leave_blocks_fused(hosts, make, kernels_stood_in, kind):
    hosts.assert_adapters_act(make(), kind, X, "c_fc", "c_proj")
    assert kernels_stood_in["add_layer_norm_attention"] == 2


def test_training_and_checkpoints_agree(hosts, make, kernels_stood_in):
    hosts.assert_training_agrees(make(), X)


@pytest.mark.one_graph
def test_it_compiles_to_one_graph(hosts, make, kernels_stood_in):
    model = make(depth=1)
    accelerated = fastdeit.accelerate(copy.deepcopy(model))
    torch.compiler.reset()
    compiled = torch.compile(accelerated, backend="eager", fullgraph=True)
    torch.testing.assert_close(hosts.step(accelerated, X, compiled), hosts.step(model, X))
    torch.compiler.reset()


def test_attention_whose_batch_comes_first_is_not_clips(hosts, make, kernels_stood_in):
    model = fastdeit.accelerate(make(depth=1))
    model.resblocks[0].attn = nn.MultiheadAttention(64, 2, batch_first=True)
    assert hosts.why_not(model) == {"its batch comes before the tokens"}


def test_another_projects_file_of_that_name_is_left_alone(monkeypatch):
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(host_table, "_unusable", {})
    monkeypatch.setattr(clip, "KNOWN", dict.fromkeys(clip.KNOWN, "0" * 16))
    other = load()
    model = fastdeit.accelerate(other.VisionTransformer(depth=1))
    assert type(model.resblocks[0]) is other.ResidualAttentionBlock
    assert host_table.why_no_class(other.ResidualAttentionBlock) == "no fused class for ResidualAttentionBlock"
