"""The checklist: every usual block runs without a call of its modules, and what a user puts between is seen at the next call."""

import copy
import functools

import pytest
import timm
import timm.layers
import torch
from torch import nn

from fastdeit import backends
from fastdeit.blocks.call_rules import why_not_attention_call, why_not_block_call, why_not_plain_call
from fastdeit.blocks.snapshot import Snapshot, looked_at
from fastdeit.kernels.attention.config import SDPA_PREFERRED, Shapes
from fastdeit.nn import Block

CHILDREN = [name for name, _ in Block(64, 2).named_modules() if name not in ("attn.proj_drop", "mlp.drop2")]
HOOKS = {
    "forward": lambda m: m.register_forward_hook(print),
    "forward pre": lambda m: m.register_forward_pre_hook(print),
    "backward": lambda m: m.register_full_backward_hook(print),
    "backward pre": lambda m: m.register_full_backward_pre_hook(print),
    "own forward": lambda m: setattr(m, "forward", functools.partial(m.forward)),
    "another's forward": lambda m: setattr(m, "forward", copy.deepcopy(m).forward),
    "compiled": lambda m: m.compile(backend="eager"),
}


@pytest.fixture(autouse=True)
def kernels_run():
    """As on a GPU: neither device nor dtype is in the way."""
    with backends.kernels_for_all_tensors():
        yield


def block(**kwargs) -> Block:
    return Block(64, 2, **{"qkv_bias": True, **kwargs})


def tokens(dtype=torch.float32):
    return torch.randn(2, 5, 64, dtype=dtype)


def all_fused(module, x) -> bool:
    """Whether all of the block runs fused, its last addition left to what follows, without a call of any of its modules."""
    description, verdict = looked_at(module)
    if verdict.deferred is not None or any((*verdict.parts, *verdict.called)):
        return False
    attention = description.branches[0].body
    reason = why_not_plain_call(x) or why_not_block_call(verdict, x) or why_not_attention_call(attention, x)
    return reason is None and all(table[name].dtype is x.dtype for table, name in verdict.last_gamma)


class Norm(nn.LayerNorm):
    pass


class Weight(nn.Parameter):
    pass


USUAL = {
    "plain": lambda: block(),
    "no biases": lambda: block(qkv_bias=False, proj_bias=False),
    "layer scale and drop path": lambda: block(init_values=0.1, drop_path=0.5),
    "PyTorch's LayerNorm": lambda: block(norm_layer=nn.LayerNorm),
    "dropout after the branches": lambda: block(proj_drop=0.0).train(),
    "inactive dropout": lambda: block(proj_drop=0.5, attn_drop=0.5).eval(),
    "tanh GELU": lambda: block(act_layer=functools.partial(nn.GELU, approximate="tanh")),
    "quick GELU": lambda: block(act_layer=timm.layers.get_act_layer("quick_gelu")),
}
UNUSUAL = {
    "query and key norms": lambda: block(qk_norm=True),
    "a norm of the attention's output": lambda: block(scale_attn_norm=True),
    "a norm of the hidden layer": lambda: block(scale_mlp_norm=True),
    "active dropout of attention": lambda: block(attn_drop=0.5).train(),
    "active dropout of the hidden layer": lambda: block(proj_drop=0.5).train(),
    "another activation": lambda: block(act_layer=nn.Tanh),
    "another MLP": lambda: block(mlp_layer=timm.layers.GluMlp),
    "another norm": lambda: block(norm_layer=Norm),
    "a norm without a bias": lambda: block(norm_layer=timm.layers.RmsNorm),
    "head dimension without a kernel": lambda: Block(60, 2),
    "layer scale in place": lambda: scaled_in_place(),
    "layer scale of another dtype": lambda: half_scale(),
}


def scaled_in_place():
    module = block(init_values=0.1)
    module.ls1.inplace = True
    return module


def half_scale():
    module = block(init_values=0.1)
    module.ls2.half()
    return module


@pytest.mark.parametrize("kind", USUAL)
def test_all_of_a_usual_block_runs_fused(kind):
    module = USUAL[kind]()
    assert all_fused(module, tokens())


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_ones_are_left_to_the_others(kind):
    module = UNUSUAL[kind]()
    x = torch.randn(2, 5, 60) if "without" in kind else tokens()
    assert not all_fused(module, x)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("child", CHILDREN)
def test_whatever_is_put_between_is_seen(child, hook):
    module = block(init_values=0.1, drop_path=0.5)
    assert all_fused(module, tokens())
    HOOKS[hook](module.get_submodule(child))
    assert not all_fused(module, tokens())


@pytest.mark.parametrize("name", [name for name, _ in Block(64, 2, qkv_bias=True, init_values=0.1).named_parameters()])
def test_another_kind_of_weight_is_seen(name):
    module = block(init_values=0.1)
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    owner._parameters[leaf] = Weight(owner._parameters[leaf].detach())
    assert not all_fused(module, tokens())


@pytest.mark.parametrize("child", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "ls1", "drop_path2", "attn.q_norm"])
def test_another_class_is_seen(child):
    module = block(init_values=0.1, drop_path=0.5)
    owner = module.get_submodule(child)
    owner.__class__ = type("Other", (type(owner),), {})
    assert not all_fused(module, tokens())


def test_attention_maps_asked_for_are_seen():
    module = block()
    module.attn.fused_attn = False
    assert not all_fused(module, tokens())


@pytest.mark.parametrize("cls", [timm.layers.Mlp, nn.GELU, nn.Dropout, timm.layers.LayerScale, timm.layers.DropPath])
def test_a_replaced_forward_of_a_class_is_seen(monkeypatch, cls):
    module = block(init_values=0.1, drop_path=0.5)
    monkeypatch.setattr(cls, "forward", lambda self, x: x)
    assert not all_fused(module, tokens())


@pytest.mark.parametrize("name", ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("weight", ["weight", "bias"])
def test_a_weight_that_is_no_parameter_is_seen(name, weight):
    """A plain attribute, as of a replica that `DataParallel` makes."""
    module = block()
    owner = module.get_submodule(name)
    tensor = getattr(owner, weight).detach()
    delattr(owner, weight)
    setattr(owner, weight, tensor)
    assert not all_fused(module, tokens())


def test_what_is_handed_over_is_asked_about(monkeypatch):
    monkeypatch.setitem(SDPA_PREFERRED, 90, (Shapes(32, range(1, 9), range(1, 99), True),))
    assert not all_fused(block(), tokens())


def test_the_backend_decides():
    with backends.use_backend("reference"):
        assert not all_fused(block(), tokens())


def test_images_are_no_tokens():
    assert not all_fused(block(), torch.randn(2, 5, 5, 64))


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "drop_path": 0.5}], ids=["DeiT", "DeiT III"])
def test_the_look_at_an_unchanged_model_takes_little_time(in_module_calls, options):
    """Half of the calls of 20 modules a block that it makes unnecessary."""
    blocks = nn.Sequential(*(block(**options) for _ in range(12)))
    snapshot = Snapshot(blocks)
    assert in_module_calls(snapshot.unchanged) <= 10 * len(blocks)


def test_a_block_on_its_own_is_judged_once(monkeypatch, kernels_stood_in):
    module, x = block(), tokens()
    expected = module(x)
    monkeypatch.setattr(Block, "judge", None)
    monkeypatch.setattr(Block, "describe", None)
    assert module(x).equal(expected)
