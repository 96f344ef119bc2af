"""An accelerated timm model is the timm model: for every DeiT and DeiT III name, in every setting where the kernels do not run."""

import copy
import io
import pickle

import pytest
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV3

import fastdeit
from fastdeit.nn import FUSED_CLASSES

NAMES = sorted({name for pattern in ("deit_*", "deit3_*") for name in timm.list_models(pattern)})
DISTILLED = [name for name in NAMES if "distilled" in name]


def small(name="deit_tiny_distilled_patch16_224", depth=2, seed=0, **kwargs):
    """The model at its own width, with few blocks and few tokens."""
    torch.manual_seed(seed)
    side = 28 if "patch14" in name else 32
    return timm.create_model(name, img_size=side, depth=depth, num_classes=5, **kwargs)


def images(model, batch=2):
    side = model.patch_embed.img_size[0]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(model, x, seed=7):
    torch.manual_seed(seed)
    out = model(x)
    out = out if isinstance(out, tuple) else (out,)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(sum((o * o).sum() for o in out), list(parameters.values()), allow_unused=True)
    return (*out, *gradients)


def assert_same_bits(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_the_names_are_there():
    assert len(NAMES) >= 16 and len(DISTILLED) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_swapping_back_and_forth_leaves_the_model_what_it_was(name):
    """At full depth; without memory behind the weights, so that the huge ones cost nothing."""
    with torch.device("meta"):
        model = timm.create_model(name)
    classes = [type(m) for m in model.modules()]
    modules = list(model.modules())
    state = model.state_dict(keep_vars=True)
    for swap in (fastdeit.accelerate, fastdeit.restore):
        swap(model)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        after = model.state_dict(keep_vars=True)
        assert list(after) == list(state)
        assert all(after[key] is state[key] for key in state)
        expected = [FUSED_CLASSES.get(c, c) for c in classes] if swap is fastdeit.accelerate else classes
        assert [type(m) for m in model.modules()] == expected
    assert len(model.blocks) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_on_the_cpu_outputs_and_gradients_are_timms_bits(name):
    model = small(name, depth=2 if "large" in name or "huge" in name else 3, drop_path_rate=0.4)
    x = images(model)
    modes = [("train", lambda: model.train()), ("eval", lambda: model.eval())]
    if name in DISTILLED:
        modes.append(("distilled", lambda: model.train().set_distilled_training(True)))
    for _, enter in modes:
        enter()
        expected = outputs_and_gradients(fastdeit.restore(model), x)
        assert_same_bits(outputs_and_gradients(fastdeit.accelerate(model), x), expected)
    assert len(model(x)) == 2 or name not in DISTILLED


def test_optimizer_steps_give_timms_bits():
    results = []
    for swap in (lambda m: m, fastdeit.accelerate):
        model = swap(small(drop_path_rate=0.3))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(images(model)).square().sum().backward()
            optimizer.step()
        results.append(list(model.state_dict().values()))
    assert_same_bits(*results)


def test_an_optimizer_made_before_the_swap_goes_on():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    fastdeit.accelerate(model)
    before = model.blocks[0].attn.qkv.weight.clone()
    model(images(model)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before)


def test_a_deep_copy_is_accelerated_and_independent():
    model = fastdeit.accelerate(small().eval())
    twin = copy.deepcopy(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    fastdeit.restore(twin)
    twin.blocks[0].norm1.weight.data.zero_()
    assert type(model.blocks[0]) in FUSED_CLASSES.values()
    assert model.blocks[0].norm1.weight.ne(0).all()


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_whole_model_can_be_pickled(way):
    model = fastdeit.accelerate(small().eval())
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(loaded(images(model)), model(images(model)))


def test_a_restored_model_pickles_as_timms():
    model = fastdeit.restore(fastdeit.accelerate(small()))
    assert b"fastdeit" not in pickle.dumps(model)


def test_weights_go_both_ways_between_accelerated_and_stock():
    accelerated, stock = fastdeit.accelerate(small(seed=1).eval()), small(seed=2).eval()
    stock.load_state_dict(accelerated.state_dict(), strict=True)
    assert torch.equal(stock(images(stock)), accelerated(images(stock)))
    other = small(seed=3)
    accelerated.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(accelerated(images(other)), other.eval()(images(other)))


def test_timms_checkpoint_saver_writes_what_stock_timm_loads(tmp_path):
    model = fastdeit.accelerate(small(seed=1).eval())
    optimizer = torch.optim.AdamW(model.parameters())
    saver = CheckpointSaver(model, optimizer, model_ema=ModelEmaV3(model), checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    stock = small(seed=2).eval()
    timm.models.load_checkpoint(stock, str(tmp_path / "last.pth.tar"), weights_only=False)
    assert torch.equal(stock(images(stock)), model(images(stock)))


def test_timms_moving_average_follows_an_accelerated_model():
    model = fastdeit.accelerate(small(seed=1))
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model.blocks[0].norm1.weight.fill_(3.0)
    average.update(model)
    assert type(average.module.blocks[0]) is type(model.blocks[0])
    assert average.module.blocks[0].norm1.weight.eq(2.0).all()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_fullgraph_compilation_gives_timms_result(mode):
    model = small(drop_path_rate=0.3)
    model.train(mode == "train").set_distilled_training(True)
    x = images(model)
    expected = outputs_and_gradients(model, x)
    compiled = torch.compile(fastdeit.accelerate(model), fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    out = compiled(x)
    out = out if isinstance(out, tuple) else (out,)
    gradients = torch.autograd.grad(sum((o * o).sum() for o in out), list(model.parameters()), allow_unused=True)
    for got, timms in zip((*out, *gradients), expected, strict=True):
        torch.testing.assert_close(got, timms)


@pytest.mark.one_graph
@pytest.mark.parametrize("init_values", [None, 0.1])
def test_the_fused_path_compiles_to_one_graph(kernels_stood_in, init_values):
    model = fastdeit.accelerate(small("deit_tiny_patch16_224", drop_path_rate=0.3, init_values=init_values).eval())
    x = images(model)
    expected = outputs_and_gradients(model, x)
    kernels_stood_in.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = outputs_and_gradients(compiled, x)
    assert kernels_stood_in["add_layer_norm"]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    model.train()
    outputs_and_gradients(compiled, x)  # with drop path


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_the_fused_path_gives_timms_numbers(kernels_stood_in, name):
    """References in the kernels' place: the block's bookkeeping alone, with drop path and distillation."""
    model = small(name, drop_path_rate=0.4).train()
    if name in DISTILLED:
        model.set_distilled_training(True)
    x = images(model, batch=4)
    expected = outputs_and_gradients(model, x)
    got = outputs_and_gradients(fastdeit.accelerate(model), x)
    assert kernels_stood_in["mlp"] + kernels_stood_in["add_layer_norm_mlp"] == 2
    assert kernels_stood_in["attention_qkv"] + kernels_stood_in["add_layer_norm_attention"] == 2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_and_intermediates_give_timms_numbers(kernels_stood_in):
    model = small(drop_path_rate=0.4).train()
    model.set_grad_checkpointing(True)
    x = images(model, batch=4)
    expected = outputs_and_gradients(model, x)
    for a, b in zip(outputs_and_gradients(fastdeit.accelerate(model), x), expected, strict=True):
        torch.testing.assert_close(a, b)
    model.eval().set_grad_checkpointing(False)
    final, intermediates = model.forward_intermediates(x)
    fastdeit.restore(model)
    timms_final, timms_intermediates = model.forward_intermediates(x)
    for a, b in zip((final, *intermediates), (timms_final, *timms_intermediates), strict=True):
        torch.testing.assert_close(a, b)
