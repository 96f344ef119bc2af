"""timm's CaiT: LayerScale, stochastic depth and additions are fused around its talking heads."""

import copy

import pytest
import timm
import torch
from torch import nn

import fastdeit

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make(hosts):
    def make(depth=2, **options):
        torch.manual_seed(0)
        sizes = dict(img_size=32, num_classes=5, embed_dim=64, num_heads=2)
        return hosts.shaken(timm.create_model("cait_xxs24_224", depth=depth, **sizes, **options))

    return make


@pytest.mark.parametrize("train", [False, True])
def test_a_step_is_as_accurate_as_timms(hosts, make, kernels_stood_in, train):
    """In training both draw the same masks of stochastic depth."""
    accelerated = hosts.assert_as_accurate(make(drop_path_rate=0.4).train(train), X)
    assert not hosts.why_not(accelerated) and len(hosts.blocks_of(accelerated)) == 4
    assert kernels_stood_in["add_layer_norm"] == 4  # what attention gives is scaled and added in the norm's kernel
    assert kernels_stood_in["attention_qkv"] == 2  # the class token's query alone


def test_kernels_are_as_accurate_as_timms_forward(hosts, make):
    hosts.assert_kernels_as_accurate(make(depth=1, depth_token_only=1), X[:1])


def test_state_calls_and_copies_stay_timms(hosts, make):
    hosts.assert_state_is_kept(make(), X)


def test_a_hook_on_a_part_that_is_called_leaves_the_block_fused(hosts, make, kernels_stood_in):
    stock = make()
    accelerated = fastdeit.accelerate(copy.deepcopy(stock))
    results = []
    for model in (stock, accelerated):
        for part in ("attn", "mlp"):
            model.blocks[1].get_submodule(part).register_forward_hook(lambda module, args, out: out * 2)
        results.append(hosts.output(model, X))
    torch.testing.assert_close(*results)
    assert not hosts.why_not(accelerated)


def test_training_and_checkpoints_agree(hosts, make, kernels_stood_in):
    hosts.assert_training_agrees(make(), X)


@pytest.mark.one_graph
def test_it_compiles_to_one_graph(hosts, make, kernels_stood_in):
    hosts.assert_compiles_whole(make(depth=1, depth_token_only=1), X, backend="eager")


def test_it_compiles_to_one_graph_on_a_cpu(hosts, make):
    """With any version of PyTorch: what decides that timm's code runs is traced."""
    torch.compiler.reset()
    model = fastdeit.accelerate(make(depth=1, depth_token_only=1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(hosts.output(compiled, X), hosts.output(fastdeit.restore(copy.deepcopy(model)), X))
    torch.compiler.reset()


CHANGES = {
    "a weight is a NoneType": lambda block: setattr(block, "gamma_1", None),
    "its drop path is a Dropout": lambda block: setattr(block, "drop_path", nn.Dropout()),
    "a norm is a Identity that is not accelerated": lambda block: setattr(block, "norm2", nn.Identity()),
    "this version of timm keeps its parts elsewhere: 'drop_path'": lambda block: delattr(block, "drop_path"),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_is_not_standard_is_left_alone(hosts, make, kernels_stood_in, reason):
    model = fastdeit.accelerate(make(depth=1)).train()
    assert not hosts.why_not(model)
    CHANGES[reason](model.blocks[0])
    assert hosts.why_not(model) == {reason}


def _another_attention(block):
    block.attn.__class__ = type("Mine", (type(block.attn),), {})


CHANGES_OF_THE_CLASS_TOKEN = {
    "a Mine is called": _another_attention,
    "fused_attn is off": lambda block: setattr(block.attn, "fused_attn", False),
    "a projection is a Identity": lambda block: setattr(block.attn, "v", nn.Identity()),
    "a hook is registered on its ClassAttn": lambda block: block.attn.register_forward_hook(lambda *_: None),
    "a hook is registered on its GELU": lambda block: block.mlp.act.register_forward_hook(lambda *_: None),
    "dropout is active": lambda block: setattr(block.attn.attn_drop.train(), "p", 0.5),
    "this version of timm keeps its parts elsewhere: 'proj'": lambda block: delattr(block.attn, "proj"),
}


@pytest.mark.parametrize("reason", CHANGES_OF_THE_CLASS_TOKEN)
def test_a_class_attention_that_is_not_standard_is_left_alone(hosts, make, kernels_stood_in, reason):
    model = fastdeit.accelerate(make(depth=1))
    CHANGES_OF_THE_CLASS_TOKEN[reason](model.blocks_token_only[1])
    assert hosts.why_not(model) == {reason}
    if "proj'" not in reason and "active" not in reason:
        torch.testing.assert_close(model(X), fastdeit.restore(copy.deepcopy(model))(X))


def test_a_class_token_of_another_class_is_timms(make, kernels_stood_in):
    class Tagged(torch.Tensor):
        pass

    block = fastdeit.accelerate(make(depth=1)).blocks_token_only[0]
    tokens, token = torch.randn(1, 4, 64), torch.randn(1, 1, 64)
    got = block(x=tokens, x_cls=token.as_subclass(Tagged))
    assert type(got) is Tagged and not kernels_stood_in["attention_qkv"]
    torch.testing.assert_close(got.as_subclass(torch.Tensor), block(tokens, token))
    assert kernels_stood_in["attention_qkv"] == 1


def test_layer_scale_in_another_dtype_than_the_stream_is_left_alone(make, kernels_stood_in):
    (block,) = fastdeit.accelerate(make(depth=1)).blocks
    tokens = torch.zeros(1, 4, 64)
    assert block.why_not_fused(tokens) is None
    block.gamma_1.data = block.gamma_1.data.half()
    assert block.why_not_fused(tokens) == "a LayerScale is in torch.float16, the input in torch.float32"
