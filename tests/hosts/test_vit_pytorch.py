"""vit-pytorch's ViT, SimpleViT, and DistillableViT in its wrapper."""

import copy

import pytest
import torch
from torch import nn

import fastdeit

vit_pytorch = pytest.importorskip("vit_pytorch", reason="needs vit-pytorch")
from vit_pytorch.distill import DistillableViT, DistillWrapper  # noqa: E402

MODELS = {"ViT": vit_pytorch.ViT, "SimpleViT": vit_pytorch.SimpleViT, "DistillableViT": DistillableViT}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make(hosts):
    def make(name="ViT", depth=2, **options):
        torch.manual_seed(0)
        sizes = dict(image_size=16, patch_size=8, num_classes=5, dim=32, heads=1, mlp_dim=48, dim_head=32)
        if name != "SimpleViT":
            options = {"dim_head": 64, **options}  # one head of the tokens' width would have no output projection
        return hosts.shaken(MODELS[name](**{**sizes, "depth": depth, **options}))

    return make


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["ViT", "SimpleViT"])
def test_a_step_is_as_accurate_as_vit_pytorchs(hosts, make, kernels_stood_in, name, train):
    accelerated = hosts.assert_as_accurate(make(name).train(train), X)
    assert not hosts.why_not(accelerated) and len(hosts.blocks_of(accelerated)) == 1
    assert kernels_stood_in["add_layer_norm_attention"] == kernels_stood_in["add_layer_norm_mlp"] == 2


def test_kernels_are_as_accurate_as_vit_pytorchs_forward(hosts, make):
    hosts.assert_kernels_as_accurate(make(depth=1), X[:1])


@pytest.mark.parametrize("name", ["ViT", "SimpleViT"])
def test_state_calls_and_copies_stay_vit_pytorchs(hosts, make, name):
    hosts.assert_state_is_kept(make(name), X)


@pytest.mark.parametrize("part", ["0", "0.to_qkv", "0.attend", "1", "1.net.2"])
def test_hooks_are_called(hosts, make, kernels_stood_in, part):
    hosts.assert_hooks_are_called(make(), f"transformer.layers.1.{part}", X)


def test_training_and_checkpoints_agree(hosts, make, kernels_stood_in):
    hosts.assert_training_agrees(make(), X)


@pytest.mark.one_graph
def test_it_compiles_to_one_graph(hosts, make, kernels_stood_in):
    hosts.assert_compiles_whole(make(depth=1), X, backend="eager")


def test_the_wrapper_distills_into_an_accelerated_student(hosts, make, kernels_stood_in):
    """The wrapper runs the student's transformer itself, on its tokens and one of its own."""
    losses = []
    for accelerated in (True, False):
        student, teacher = make("DistillableViT").train(), nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
        torch.manual_seed(3)
        wrapper = DistillWrapper(student=student, teacher=hosts.shaken(teacher), temperature=3, alpha=0.5)
        wrapper = fastdeit.accelerate(wrapper) if accelerated else wrapper
        loss = wrapper(X, torch.tensor([0, 3]))
        loss.backward()
        gradients = {name: p.grad for name, p in wrapper.named_parameters() if p.grad is not None}
        losses.append((loss, gradients))
    (ours, our_gradients), (theirs, gradients) = losses
    assert kernels_stood_in["add_layer_norm_attention"] == 2
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradients, gradients)


@pytest.fixture
def losses_stood_in(monkeypatch):
    """The op of the loss runs on the CPU, by its reference. Lists the options of its calls."""
    from fastdeit import ops
    from fastdeit.nn import vit_pytorch_distill

    calls, op = [], ops.distillation_cross_entropy
    monkeypatch.setattr(vit_pytorch_distill, "why_reference", lambda *tensors: None)
    monkeypatch.setattr(
        ops, "distillation_cross_entropy", lambda *heads, **options: calls.append(options) or op(*heads, **options)
    )
    return calls


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("given", [{}, {"temperature": 2.0, "alpha": 0.25}])
def test_the_wrappers_loss_is_one_op(make, losses_stood_in, hard, given):
    results = []
    for accelerated in (True, False):
        student, teacher = make("DistillableViT", depth=1).train(), nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
        torch.manual_seed(3)
        options = dict(temperature=3, alpha=0.5, hard=hard)
        wrapper = DistillWrapper(student=student, teacher=teacher, **options).double()
        wrapper = fastdeit.accelerate(wrapper) if accelerated else wrapper
        loss = wrapper(X.double(), torch.tensor([0, 3]), **given)
        loss.backward()
        results.append((loss, {name: p.grad for name, p in wrapper.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*results)
    (call,) = losses_stood_in
    assert call["kind"] == ("hard" if hard else "soft") and call["tau"] == given.get("temperature", 3)


def test_what_the_op_does_not_take_is_vit_pytorchs_loss(make, losses_stood_in):
    student, teacher = make("DistillableViT", depth=1), nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    wrapper = DistillWrapper(student=student, teacher=teacher)
    stock = wrapper(X, torch.tensor([0, 3]), alpha=1.5)
    accelerated = fastdeit.accelerate(wrapper)
    assert accelerated(X, torch.tensor([0, 3]), alpha=1.5).equal(stock) and not losses_stood_in
    assert type(fastdeit.restore(wrapper)) is DistillWrapper


CHANGES = {
    "dropout is active": lambda attn, mlp: setattr(attn.dropout, "p", 0.1),
    "its logits are scaled by 1.0": lambda attn, mlp: setattr(attn, "scale", 1.0),
    "its weights are made by a Sigmoid": lambda attn, mlp: setattr(attn, "attend", nn.Sigmoid()),
    "the activation is Tanh()": lambda attn, mlp: mlp.net.__setitem__(2, nn.Tanh()),
    "a norm is a Identity that is not accelerated": lambda attn, mlp: setattr(attn, "norm", nn.Identity()),
    "this version of vit_pytorch keeps its parts elsewhere: 'to_qkv'": lambda attn, mlp: delattr(attn, "to_qkv"),
    "this version of vit_pytorch keeps its parts elsewhere: not enough values to unpack (expected 6, got 5)": (
        lambda attn, mlp: mlp.net.__delitem__(3)
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_is_not_standard_is_left_alone(hosts, make, kernels_stood_in, reason):
    model = fastdeit.accelerate(make(depth=1)).train()
    assert not hosts.why_not(model)
    CHANGES[reason](*model.transformer.layers[0])
    assert hosts.why_not(model) == {reason}


@pytest.mark.parametrize("kind", ["stand-in", "PEFT", "torchao"])
def test_adapters_and_quantized_weights_leave_the_layers_fused(hosts, make, kernels_stood_in, kind):
    hosts.assert_adapters_act(make(), kind, X, "to_qkv")
    assert kernels_stood_in["attention"] == 2 and kernels_stood_in["add_layer_norm_mlp"] == 2


def test_one_head_of_the_tokens_width_has_no_output_projection(hosts, make, kernels_stood_in):
    accelerated = hosts.assert_as_accurate(make(dim_head=32), X)
    assert hosts.notes(accelerated) == {"its projections are called: a projection is a Identity"}
    assert kernels_stood_in["attention"] == 2


def test_active_dropout_runs_vit_pytorchs_code(hosts, make, kernels_stood_in):
    stock = make(dropout=0.3).train()
    accelerated = fastdeit.accelerate(copy.deepcopy(stock))
    torch.testing.assert_close(hosts.step(accelerated, X), hosts.step(stock, X))
    assert hosts.why_not(accelerated) == {"dropout is active"}


def test_layers_of_another_kind_are_named(hosts, make, kernels_stood_in):
    model = fastdeit.accelerate(make())
    model.transformer.layers[1][1] = nn.Identity()
    assert hosts.why_not(model) == {"its layers are not of the usual kind: Attention and Identity"}
    model.transformer.layers = nn.ModuleList()
    assert hosts.why_not(model) == {"it has no layers"}
