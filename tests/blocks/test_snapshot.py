"""Whatever changes about the modules of a block is noticed before the next call; a copy is looked at anew."""

import copy
import gc
import pickle
import weakref
from typing import ClassVar

import pytest
import timm.layers
import torch
from torch import nn

from fastdeit.blocks import snapshot as snapshots
from fastdeit.blocks.snapshot import HOST_METHODS, KEY, OWN_METHODS, Snapshot, looked_at
from fastdeit.nn import Attention, Block

# Tables that no rule reads: of hooks on state_dict, and what belongs to hooks that the other tables have.
UNREAD = ("state_dict", "_with_kwargs", "_always_called")


def block() -> Block:
    return Block(64, 2, qkv_bias=True, init_values=0.1, drop_path=0.3)


def mutations(module: nn.Module):
    """(description, do, undo) for every attribute, entry, class and parameter of one module."""
    state = module.__dict__
    for key, value in list(state.items()):
        if not isinstance(value, dict):
            other = "another" if value != "another" else 1
            yield key, lambda k=key, o=other: state.__setitem__(k, o), lambda k=key, v=value: state.__setitem__(k, v)
            yield f"no {key}", lambda k=key: state.pop(k), lambda k=key, v=value: state.__setitem__(k, v)
            continue
        if any(part in key for part in UNREAD):
            continue
        new = object()
        yield f"{key}: an entry more", lambda v=value, n=new: v.__setitem__(n, print), lambda v=value, n=new: v.pop(n)
        larger = type(value)({**value, "z": 1})
        yield key, lambda k=key, t=larger: state.__setitem__(k, t), lambda k=key, v=value: state.__setitem__(k, v)
        for name, entry in list(value.items()):
            if isinstance(entry, torch.Tensor):
                other = nn.Parameter(entry.detach().clone())
            else:
                other = copy.deepcopy(entry) if isinstance(entry, nn.Module) else 3
            put = lambda v=value, n=name, o=other: v.__setitem__(n, o)  # noqa: E731
            yield f"{key}: another {name}", put, lambda v=value, n=name, e=entry: v.__setitem__(n, e)
    yield "a forward of its own", lambda: state.__setitem__("forward", print), lambda: state.pop("forward")
    cls = type(module)
    yield (
        "class",
        lambda: setattr(module, "__class__", type("Sub", (cls,), {})),
        lambda: setattr(module, "__class__", cls),
    )


@pytest.fixture(params=["by versions of dicts", "by what they hold"])
def compared(request, monkeypatch):
    """How a snapshot finds changes: on Python 3.10 and 3.11 in two ways, of which later versions have one."""
    if request.param == "by what they hold":
        monkeypatch.setattr(snapshots, "_version", None)
    elif snapshots._version is None:
        pytest.skip("dicts have no tested version here")


def test_every_change_of_every_module_of_a_block_is_noticed(compared):
    module = block()
    looked_at(module)
    missed, tried = [], 0
    for name, part in list(module.named_modules()):
        for what, do, undo in list(mutations(part)):
            snapshot = Snapshot(module)
            assert snapshot.unchanged(), (name, what)
            do()
            tried += 1
            if snapshot.unchanged():
                missed.append((name, what))
            undo()
            if "entry more" not in what and not what.startswith("no "):  # what comes back last is in another order
                assert snapshot.unchanged() and snapshot.unchanged(), (name, what)
    assert missed == [] and tried > 400


def test_dicts_of_an_unchanged_version_are_not_looked_into(monkeypatch):
    if snapshots._version is None:
        pytest.skip("dicts have no tested version here")
    module, looked = block(), []
    snapshot = Snapshot(module)
    monkeypatch.setattr(snapshots, "eq", lambda a, b: looked.append(1) or a == b)
    for _ in range(3):
        assert snapshot.unchanged()
    assert len(looked) == len(snapshot.states)
    module.attn.eval()
    assert not snapshot.unchanged()
    module.attn.train()
    looked.clear()
    for _ in range(3):
        assert snapshot.unchanged()
    assert len(looked) == len(snapshot.states)


class Table(dict):
    """A dict whose values are not those that it holds."""

    given: ClassVar[dict] = {}

    def values(self):
        return self.given.values()


def test_dicts_of_other_kinds_are_looked_into(monkeypatch):
    module = block()
    module.attn.__dict__["_parameters"] = Table(module.attn._parameters, more=None)
    monkeypatch.setattr(Table, "given", {"weight": torch.ones(1)})
    snapshot = Snapshot(module)
    assert snapshot.unchanged()
    Table.given.clear()
    assert not snapshot.unchanged()


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_replaces_another_is_noticed(kind):
    module = block()
    handle = getattr(module.attn, f"register_{kind}")(lambda *_: None)
    snapshot = Snapshot(module)
    handle.remove()
    assert not snapshot.unchanged()
    getattr(module.attn, f"register_{kind}")(lambda *_: None)
    assert not snapshot.unchanged()


@pytest.mark.parametrize(
    ("cls", "name"), [key for key in OWN_METHODS if key not in HOST_METHODS], ids=lambda x: getattr(x, "__name__", x)
)
def test_a_replaced_method_of_a_known_class_is_noticed(monkeypatch, cls, name):
    snapshot = Snapshot(block())
    monkeypatch.setattr(cls, name, lambda self, *args: args[0])
    assert not snapshot.unchanged()


def test_an_attribute_that_is_a_tensor_counts_as_changed_when_it_is_another():
    module = block()
    module.scale = torch.ones(3)
    snapshot = Snapshot(module)
    assert snapshot.unchanged()
    module.scale = torch.ones(3)
    assert not snapshot.unchanged()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_a_copy_is_looked_at_anew(make):
    module = block()
    looked_at(module)
    module.attn.fused_attn = False
    other = make(module)
    other.__dict__["_modules"] = dict(other._modules)
    other._modules["attn"] = copy.deepcopy(module.attn)
    other.attn.fused_attn = True
    assert looked_at(other)[1].parts[0] is None
    assert looked_at(module)[1].parts[0] == "fused_attn is off"


def test_a_module_that_was_looked_at_is_freed():
    module = block()
    looked_at(module)
    assert KEY in module.__dict__
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_what_is_put_back_is_seen_too():
    module = Attention(64, 2)
    assert looked_at(module)[1] == (None, None)
    qkv, module.qkv = module.qkv, timm.layers.Mlp(64)
    assert looked_at(module)[1] == (None, "a projection is a Mlp")
    module.qkv = qkv
    assert looked_at(module)[1] == (None, None)
