"""facebookresearch/deit's distilled model and DeiT III's blocks, by stand-ins whose methods are made known as deit's are."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastdeit
from fastdeit.blocks.adapters import deit, known_sources
from fastdeit.nn import hosts as host_table

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NAMES = {"models": "deit_models.py", "models_v2": "deit_models_v2.py"}


def load(name: str):
    """The stand-in under deit's name, as a script that lies beside it imports it."""
    file = importlib.util.spec_from_file_location(name, Path(__file__).with_name(NAMES[name]))
    module = importlib.util.module_from_spec(file)
    sys.modules[name] = module
    file.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files():
    """Both stand-ins, known."""
    kept = {name: sys.modules.pop(name, None) for name in NAMES}
    known, made = dict(deit.KNOWN), {name: load(name) for name in NAMES}
    for name in known:
        kind, method = name.split(".")
        file = made["models" if hasattr(made["models"], kind) else "models_v2"]
        deit.KNOWN[name] = known_sources.source_digest(getattr(file, kind).__dict__[method])
    yield made
    deit.KNOWN.update(known)
    for name, module in kept.items():
        host_table._unusable.pop(name, None)
        sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    for name in ("fastdeit.nn.deit_blocks", "fastdeit.nn.deit_distilled"):
        sys.modules.pop(name, None)


@pytest.fixture
def distilled(files, hosts):
    def make(**options):
        torch.manual_seed(0)
        sizes = dict(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=2, num_classes=5)
        return hosts.shaken(files["models"].DistilledVisionTransformer(**sizes, **options))

    return make


@pytest.fixture(params=["Block", "Layer_scale_init_Block"])
def stack(request, files, hosts):
    def make(depth=2, **options):
        torch.manual_seed(0)
        kind = getattr(files["models_v2"], request.param)
        return hosts.shaken(hosts.Stack(*(kind(64, 2, **options) for _ in range(depth))))

    return make


@pytest.mark.parametrize("train", [False, True])
def test_a_step_of_blocks_is_as_accurate_as_deits(hosts, stack, kernels_stood_in, train):
    accelerated = hosts.assert_as_accurate(stack(drop_path=0.4).train(train), X)
    assert not hosts.why_not(accelerated) and len(hosts.blocks_of(accelerated)) == 2


def test_kernels_are_as_accurate_as_deits_forward(hosts, stack):
    hosts.assert_kernels_as_accurate(stack(depth=1), X[:1])


def test_state_and_copies_of_blocks_stay_deits(hosts, stack):
    hosts.assert_state_is_kept(stack(), X)


def test_hooks_in_blocks_are_called(hosts, stack, kernels_stood_in):
    hosts.assert_hooks_are_called(stack(), "blocks.1.norm2", X)


def test_training_and_checkpoints_of_blocks_agree(hosts, stack, kernels_stood_in):
    hosts.assert_training_agrees(stack(), X)


CHANGES = {
    "a norm is a Identity that is not accelerated": lambda block: setattr(block, "norm2", nn.Identity()),
    "this version of models_v2 keeps its parts elsewhere: 'drop_path'": lambda block: delattr(block, "drop_path"),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_is_not_standard_is_left_alone(hosts, stack, kernels_stood_in, reason):
    model = fastdeit.accelerate(stack(depth=1))
    assert not hosts.why_not(model)
    CHANGES[reason](model.blocks[0])
    assert hosts.why_not(model) == {reason}


@pytest.mark.parametrize("change", ["scale", "class", "hook"])
def test_another_attention_is_called(hosts, stack, kernels_stood_in, change):
    model = stack(depth=1)
    attn = model.blocks[0].attn
    if change == "scale":
        attn.scale = 1.0
    elif change == "class":
        plain = type(attn)
        attn.__class__ = type("Doubled", (plain,), {"forward": lambda self, x: 2 * plain.forward(self, x)})
    else:
        attn.register_forward_hook(lambda module, args, out: 3 * out)
    accelerated = fastdeit.accelerate(copy.deepcopy(model))
    kernels_stood_in.clear()
    torch.testing.assert_close(accelerated(X), model(X))
    assert not kernels_stood_in["add_layer_norm_attention"]
    assert kernels_stood_in["add_layer_norm_mlp"] + kernels_stood_in["mlp"] == 1


class BothHeads(nn.Module):
    """The two logits that the distilled model gives in training, in one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        out = self.model(x)
        return torch.cat(out) if self.training else out


@pytest.mark.parametrize("train", [False, True])
def test_the_distilled_model_is_fused_as_a_whole(hosts, distilled, kernels_stood_in, train):
    model = distilled(drop_path_rate=0.4 if train else 0.0).train(train)
    accelerated = hosts.assert_as_accurate(BothHeads(model).train(train), X)
    rows = {row.name: row for row in fastdeit.explain(accelerated.model)}
    assert all(row.fused for name, row in rows.items() if not name.startswith("head"))
    assert (
        kernels_stood_in["patch_embedding"] == 1 and kernels_stood_in["attention_qkv"] == 1
    )  # the last block's prefix


def test_what_timms_forward_does_and_deits_does_not_is_left_out(hosts, distilled, kernels_stood_in):
    """Its constructor is timm's, and takes a rate at which timm's forward drops patches."""
    model = BothHeads(distilled(patch_drop_rate=0.5)).train()
    hosts.assert_as_accurate(model, X)
    assert kernels_stood_in["attention_qkv"]


def test_the_distilled_models_state_stays_deits(distilled):
    model = distilled()
    keys, stock = list(model.state_dict()), model(X)
    fastdeit.accelerate(model)
    assert list(model.state_dict()) == keys and torch.equal(model(X), stock)
    assert torch.equal(copy.deepcopy(model)(X), stock)
    assert type(fastdeit.restore(model)).__module__ == "models" and torch.equal(model(X), stock)


def test_a_forward_that_ends_in_the_class_s_keeps_the_model_fused(distilled, kernels_stood_in):
    """Such as Accelerate's wrapper puts on an instance."""
    model = fastdeit.accelerate(distilled())
    model.forward = lambda x: type(model).forward(model, x)
    model(X)
    assert kernels_stood_in["attention_qkv"] == 1


def test_what_is_in_a_blocks_place_is_called_and_a_replaced_method_is_kept(distilled, kernels_stood_in):
    model = distilled()
    model.blocks[1] = nn.Identity()
    accelerated = fastdeit.accelerate(copy.deepcopy(model))
    torch.testing.assert_close(accelerated(X), model(X))
    accelerated.forward_features = lambda x: (x.new_ones(len(x), 64),) * 2
    ones = torch.ones(2, 64)
    torch.testing.assert_close(accelerated(X), (model.head(ones) + model.head_dist(ones)) / 2)


def test_files_of_the_same_names_are_left_alone(hosts, monkeypatch):
    """Another project's `models`, and another version of deit's: their blocks run their own code."""
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name))
        monkeypatch.delitem(host_table._unusable, name, raising=False)
    for ours in ("fastdeit.nn.deit_blocks", "fastdeit.nn.deit_distilled"):
        monkeypatch.delitem(sys.modules, ours, raising=False)
    known = dict.fromkeys(deit.KNOWN, "0" * 16)
    monkeypatch.setattr(deit, "KNOWN", known)
    other = load("models_v2")
    model = hosts.Stack(other.Block(64, 2))
    fastdeit.accelerate(model)
    assert type(model.blocks[0]) is other.Block and type(model.blocks[0].mlp) is fastdeit.nn.Mlp
    assert host_table.why_no_class(other.Block) == "no fused class for Block"
    assert known_sources.source_digest(print) is None


def test_layout_and_comments_do_not_change_a_digest(tmp_path):
    texts = (
        "def f(x):\n    return x + 1\n",
        "def f(x):\n  # more\n\n  return x + 1  # one\n",
        "def f(x):\n    return x + 2\n",
    )
    digests = []
    for number, text in enumerate(texts):
        path = tmp_path / f"f{number}.py"
        path.write_text(text)
        names: dict = {}
        exec(compile(text, str(path), "exec"), names)
        digests.append(known_sources.source_digest(names["f"]))
    assert digests[0] == digests[1] != digests[2] and digests[0] is not None
