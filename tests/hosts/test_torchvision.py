"""torchvision's VisionTransformer."""

import copy

import pytest
import torch
from torch import nn

import fastdeit

vision_transformer = pytest.importorskip("torchvision.models.vision_transformer", reason="needs torchvision")
BRANCHES = ("add_layer_norm_attention", "add_layer_norm_mlp")


@pytest.fixture
def make(hosts):
    def make(layers=2, **options):
        torch.manual_seed(0)
        sizes = dict(image_size=16, patch_size=8, num_layers=layers, num_heads=1, hidden_dim=32, mlp_dim=48)
        return hosts.shaken(vision_transformer.VisionTransformer(**sizes, num_classes=5, **options))

    return make


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("train", [False, True])
def test_a_step_is_as_accurate_as_torchvisions(hosts, make, kernels_stood_in, train):
    model = make().train(train)
    accelerated = hosts.assert_as_accurate(model, X)
    assert not hosts.why_not(accelerated) and len(hosts.blocks_of(accelerated)) == 2
    assert {name: kernels_stood_in[name] for name in BRANCHES} == dict.fromkeys(BRANCHES, 2)


def test_kernels_are_as_accurate_as_torchvisions_forward(hosts, make):
    hosts.assert_kernels_as_accurate(make(layers=1), X[:1])


def test_state_calls_and_copies_stay_torchvisions(hosts, make):
    hosts.assert_state_is_kept(make(), X)


@pytest.mark.parametrize("part", ["self_attention", "mlp.1", "dropout"])
def test_hooks_are_called(hosts, make, kernels_stood_in, part):
    name = f"encoder.layers.encoder_layer_1.{part}"
    if part == "dropout":  # the block calls it where a hook is on it
        model, seen = fastdeit.accelerate(make()), []
        model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
        hosts.output(model, X)
        assert seen == [1] and not hosts.why_not(model)
    elif part == "self_attention":  # it gives a tuple
        model, seen = fastdeit.accelerate(make()), []
        model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
        hosts.output(model, X)
        assert seen == [1] and not hosts.why_not(model)
        assert hosts.notes(model) == {"a part of it is called: a hook is registered on its MultiheadAttention"}
    else:
        model, stock = fastdeit.accelerate(make()), make()
        for either in (model, stock):
            either.get_submodule(name).register_forward_hook(lambda module, args, out: out * 2)
        torch.testing.assert_close(hosts.output(model, X), hosts.output(stock, X))
        assert hosts.notes(model) == {"a part of it is called: a hook is registered on its GELU"}


def test_training_and_checkpoints_agree(hosts, make, kernels_stood_in):
    hosts.assert_training_agrees(make(), X)


@pytest.mark.one_graph
def test_it_compiles_to_one_graph(hosts, make, kernels_stood_in):
    hosts.assert_compiles_whole(make(layers=1), X)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
def test_active_dropout_draws_torchvisions_masks(hosts, make, kernels_stood_in, name):
    stock = make(**{name: 0.3}).train()
    accelerated = fastdeit.accelerate(copy.deepcopy(stock))
    assert hosts.notes(accelerated) == {"a part of it is called: dropout is active"}
    torch.testing.assert_close(hosts.step(accelerated, X), hosts.step(stock, X))
    assert not hosts.notes(accelerated.eval())


def _of_another_width(block):
    block.self_attention = nn.MultiheadAttention(32, 1, batch_first=True, kdim=16, vdim=16)


CHANGES = {
    "dropout is active": lambda block: setattr(block.self_attention, "dropout", 0.1),
    "its tokens come before the batch": lambda block: setattr(block.self_attention, "batch_first", False),
    "keys or values have another width": _of_another_width,
    "keys and values are added to those of the tokens": lambda block: setattr(
        block.self_attention, "add_zero_attn", True
    ),
    "the activation is Tanh()": lambda block: block.mlp.__setitem__(1, nn.Tanh()),
    "a Sequential is called": lambda block: setattr(block, "mlp", nn.Sequential(*block.mlp)),
    "its out_proj is a Bilinear, whose forward PyTorch's attention leaves out": lambda block: setattr(
        block.self_attention, "out_proj", nn.Bilinear(32, 32, 32)
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_part_that_is_not_standard_is_called(hosts, make, kernels_stood_in, reason):
    model = fastdeit.accelerate(make(layers=1)).train()
    assert not hosts.notes(model)
    CHANGES[reason](model.encoder.layers[0])
    assert hosts.notes(model) == {f"a part of it is called: {reason}"}


def test_a_norm_that_is_not_standard_runs_torchvisions_code(hosts, make, kernels_stood_in):
    model = fastdeit.accelerate(make(layers=1))
    model.encoder.layers[0].ln_1 = nn.Identity()
    assert hosts.why_not(model) == {"a norm is a Identity that is not accelerated"}


@pytest.mark.parametrize("kind", ["stand-in", "PEFT", "torchao"])
def test_adapters_and_quantized_weights_leave_the_mlps_projections_called(hosts, make, kernels_stood_in, kind):
    hosts.assert_adapters_act(make(), kind, X, "mlp.0")
    assert kernels_stood_in["add_layer_norm_attention"] == 2 and kernels_stood_in["add_layer_norm_mlp"] == 0


def test_peft_on_attention_is_called(hosts, make, kernels_stood_in):
    """Its adapter merges the packed weights for the time of a call of PyTorch's attention."""
    model = hosts.assert_adapters_act(make(), "PEFT", X, "self_attention")
    assert hosts.notes(model) == {"a part of it is called: a MultiheadAttention is called"}
    assert kernels_stood_in["add_layer_norm_attention"] == 0 and kernels_stood_in["add_layer_norm_mlp"] == 2


def test_an_adapter_that_pytorchs_attention_leaves_out_stays_so(hosts, make, kernels_stood_in):
    stock = hosts.adapt(make(), "stand-in", "out_proj")
    for layer in stock.encoder.layers:
        out_proj = layer.self_attention.out_proj
        out_proj.weight, out_proj.bias = out_proj.base.weight, out_proj.base.bias
    accelerated = fastdeit.accelerate(copy.deepcopy(stock))
    torch.testing.assert_close(accelerated(X), stock(X))


def test_other_attributes_of_a_version_are_a_reason_and_no_error(hosts, make, kernels_stood_in):
    model = fastdeit.accelerate(make(layers=1))
    model.encoder.layers[0].attention = model.encoder.layers[0].self_attention
    del model.encoder.layers[0].self_attention
    assert hosts.why_not(model) == {"this version of torchvision keeps its parts elsewhere: 'self_attention'"}


def test_a_derived_block_and_an_excluded_part_are_left_alone(hosts, make, kernels_stood_in):
    class Mine(vision_transformer.EncoderBlock):
        def forward(self, input):
            return input

    model = make()
    model.encoder.layers[1].__class__ = Mine
    fastdeit.accelerate(model, exclude=["encoder.layers.encoder_layer_0.mlp"])
    rows = fastdeit.explain(model).as_dict()
    assert "derived from EncoderBlock" in rows["encoder.layers.encoder_layer_1"]["reason"]
    assert rows["encoder.layers.encoder_layer_0"]["reason"] == "a part of it is called: its MLPBlock is excluded"


def test_lean_memory_is_for_its_blocks_too(hosts, make):
    model = fastdeit.accelerate(make(), memory="lean")
    assert [block.memory for block in hosts.blocks_of(model)] == ["lean"] * 2
    fastdeit.restore(model)
    assert not any("memory" in module.__dict__ for module in model.modules())
