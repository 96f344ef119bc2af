"""The blocks of facebookresearch/dino, ijepa and dinov2, by stand-ins whose methods are made known as theirs are."""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import fastdeit
from fastdeit.blocks.adapters import dino, known_sources
from fastdeit.nn import hosts as host_table

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
PACKAGES = ("src", "src.models", "dinov2", "dinov2.layers")
LAYERS = [f"dinov2.layers.{name}" for name in ("block", "attention", "mlp", "layer_scale")]
# The host's file -> the stand-in, and fastdeit's file for it.
FILES = {
    "vision_transformer": ("dino_models.py", "fastdeit.nn.dino"),
    "src.models.vision_transformer": ("dino_models.py", "fastdeit.nn.ijepa"),
    LAYERS[0]: ("dinov2_layers.py", "fastdeit.nn.dinov2"),
}


def load(name):
    """The stand-in under the host's name."""
    file = importlib.util.spec_from_file_location(name, Path(__file__).with_name(FILES[name][0]))
    module = importlib.util.module_from_spec(file)
    sys.modules.update(dict.fromkeys(LAYERS if name in LAYERS else [name], module))
    sys.modules.update((package, ModuleType(package)) for package in PACKAGES if name.startswith(package + "."))
    file.loader.exec_module(module)
    return module


def digests(module, known):
    """What the known digests would be if the host's methods were those of a stand-in."""
    return {name: known_sources.source_digest(getattr(module, name.split(".")[0]).forward) for name in known}


def forget():
    for _, ours in FILES.values():
        sys.modules.pop(ours, None)
    for name in FILES:
        host_table._unusable.pop(name, None)


@pytest.fixture(scope="module")
def files():
    """The stand-ins, known."""
    names = [*FILES, *LAYERS[1:], *PACKAGES]
    kept = {name: sys.modules.pop(name, None) for name in names}
    known, known_v2 = dict(dino.KNOWN), dict(dino.KNOWN_V2)
    forget()
    made = {name: load(name) for name in FILES}
    dino.KNOWN.update(digests(made["vision_transformer"], known))
    dino.KNOWN_V2.update(digests(made[LAYERS[0]], known_v2))
    yield made
    dino.KNOWN.update(known)
    dino.KNOWN_V2.update(known_v2)
    for name, module in kept.items():
        sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    forget()


@pytest.fixture(params=[*FILES, "Block of DINOv2"])
def host(request, files, hosts):
    """A host's blocks: `make(depth, **options)` and whether they are DINOv2's."""
    second = request.param not in FILES
    name = LAYERS[0] if second else request.param
    kind = getattr(files[name], "NestedTensorBlock" if name == LAYERS[0] and not second else "Block")

    def make(depth=2, **options):
        torch.manual_seed(0)
        return hosts.shaken(hosts.Stack(*(kind(64, 2, **options) for _ in range(depth))))

    return SimpleNamespace(make=make, kind=kind, v2=name == LAYERS[0])


@pytest.mark.parametrize("train", [False, True])
def test_a_step_is_as_accurate_as_the_hosts(hosts, host, kernels_stood_in, train):
    accelerated = hosts.assert_as_accurate(host.make().train(train), X)
    assert not hosts.why_not(accelerated) and len(hosts.blocks_of(accelerated)) == 2
    assert not hosts.notes(accelerated)
    assert kernels_stood_in["add_layer_norm_mlp"] + kernels_stood_in["mlp"]


def test_kernels_are_as_accurate_as_the_hosts_forward(hosts, host):
    hosts.assert_kernels_as_accurate(host.make(depth=1), X[:1])


def test_state_and_copies_stay_the_hosts(hosts, host):
    hosts.assert_state_is_kept(host.make(), X)


def test_hooks_in_blocks_are_called(hosts, host, kernels_stood_in):
    hosts.assert_hooks_are_called(host.make(), "blocks.1.norm2", X)


@pytest.mark.one_graph
def test_blocks_compile_to_one_graph(hosts, host, kernels_stood_in):
    hosts.assert_compiles_whole(host.make(depth=1), X, backend="eager")


PARTS = [
    "attn",
    "attn.qkv",
    "attn.attn_drop",
    "attn.proj",
    "attn.proj_drop",
    "mlp",
    "mlp.act",
    "mlp.drop",
    "drop_path",
    "ls1",
]


@pytest.mark.parametrize("part", PARTS)
def test_hooks_on_parts_are_called(hosts, host, kernels_stood_in, part):
    """Also in evaluation, where the host calls what does nothing."""
    if part in (("drop_path", "attn.attn_drop") if host.v2 else ("ls1",)):
        return  # the host has no such module, or does not call it
    model = host.make(depth=1, drop_path=0.5)
    accelerated = fastdeit.accelerate(copy.deepcopy(model))
    plain = accelerated(X)

    def changed(module, args, out):
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    for either in (model, accelerated):
        either.blocks[0].get_submodule(part).register_forward_hook(changed)
    torch.testing.assert_close(accelerated(X), model(X))
    assert not torch.equal(accelerated(X), plain)


def test_dropout_that_is_inactive_leaves_blocks_fused(hosts, host, kernels_stood_in):
    model = host.make(drop=0.5, attn_drop=0.5)
    accelerated = hosts.assert_as_accurate(model, X)
    assert not hosts.why_not(accelerated) and not hosts.notes(accelerated)


def test_training_and_checkpoints_agree(hosts, host, kernels_stood_in):
    hosts.assert_training_agrees(host.make(), X)


@pytest.mark.parametrize("rate", ["drop", "attn_drop"])
def test_active_dropout_is_the_hosts(hosts, host, kernels_stood_in, rate):
    model = host.make(**{rate: 0.5}).train()
    got, expected = hosts.step(fastdeit.accelerate(copy.deepcopy(model)), X), hosts.step(model, X)
    torch.testing.assert_close(got, expected)
    assert not torch.equal(got["output"], hosts.step(model.eval(), X)["output"])


def test_active_stochastic_depth_is_the_hosts(hosts, host, kernels_stood_in):
    model = host.make(drop_path=0.5)
    accelerated = fastdeit.accelerate(copy.deepcopy(model))
    assert not hosts.why_not(accelerated)  # in evaluation it does nothing
    torch.testing.assert_close(accelerated(X), model(X))
    accelerated.train(), model.train()
    assert hosts.why_not(accelerated) == ({"its stochastic depth is active"} if host.v2 else set())
    states = []
    for either in (accelerated, model):
        torch.manual_seed(3)
        either(X)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.testing.assert_close(hosts.step(accelerated, X), hosts.step(model, X))
    assert not torch.equal(hosts.step(model, X)["output"], hosts.step(model.eval(), X)["output"])


def change_scale(block):
    block.attn.scale = 1.0


def change_class(block):
    plain = type(block.attn)
    block.attn.__class__ = type("Other", (plain,), {"forward": lambda self, x: plain.forward(self, -x)})


def change_mlp(block):
    block.mlp = nn.Sequential(nn.Linear(64, 64), nn.Tanh())


@pytest.mark.parametrize("change", [change_scale, change_class, change_mlp])
def test_another_part_is_called(hosts, host, kernels_stood_in, change):
    model = host.make(depth=1)
    change(model.blocks[0])
    accelerated = fastdeit.accelerate(copy.deepcopy(model))
    torch.testing.assert_close(accelerated(X), model(X))
    (note,) = hosts.notes(accelerated)
    assert "a part of it is called" in note
    other = "add_layer_norm_attention" if change is change_mlp else "add_layer_norm_mlp"
    assert kernels_stood_in[other] + kernels_stood_in[other.removeprefix("add_layer_norm_")]


def test_attention_maps_are_the_hosts(hosts, files, kernels_stood_in):
    torch.manual_seed(0)
    block = hosts.shaken(files["vision_transformer"].Block(64, 2))
    x = torch.randn(2, 5, 64)
    accelerated = fastdeit.accelerate(nn.Sequential(copy.deepcopy(block)))[0]
    for call in (lambda b: b(x, return_attention=True), lambda b: b(x, True)):
        assert torch.equal(call(accelerated), call(block)) and call(block).shape == (2, 2, 5, 5)
    assert "return_attention" in accelerated.why_not_fused(x, return_attention=True)
    torch.testing.assert_close(accelerated(x, return_attention=False), block(x))


def test_of_dinov2_nested_tensors_are_the_hosts_and_layer_scale_may_be_missing(hosts, files, kernels_stood_in):
    torch.manual_seed(0)
    block = hosts.shaken(files[LAYERS[0]].NestedTensorBlock(64, 2, as_module=True, scaled=False))
    accelerated = fastdeit.accelerate(nn.Sequential(copy.deepcopy(block)))[0]
    short, long = torch.randn(2, 5, 64), torch.randn(2, 7, 64)
    for got, expected in zip(accelerated([short, long]), block([short, long]), strict=True):
        torch.testing.assert_close(got, expected)
    assert "list" in accelerated.why_not_fused([short, long]) and accelerated.why_not_fused(short) is None
    torch.testing.assert_close(accelerated(short), block(short))


def test_files_of_the_same_names_are_left_alone(hosts, monkeypatch):
    """Another project's file, and a version that is not known: their blocks run their own code."""
    for name in (*FILES, *LAYERS, *PACKAGES):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name))
    for _, ours in FILES.values():
        monkeypatch.delitem(sys.modules, ours, raising=False)
    monkeypatch.setattr(host_table, "_unusable", {})
    for known in ("KNOWN", "KNOWN_V2"):
        monkeypatch.setattr(dino, known, dict.fromkeys(getattr(dino, known), "0" * 16))
    for name in FILES:
        kind = load(name).Block
        with pytest.warns(UserWarning, match="only LayerNorms"):
            model = fastdeit.accelerate(hosts.Stack(kind(64, 2)))
        assert type(model.blocks[0]) is kind
        reason = host_table.why_no_class(kind)
        assert ("(Block.forward is not that of facebookresearch/dinov2)" in reason) == (name == LAYERS[0])
