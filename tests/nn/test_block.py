"""The fused block against timm's: numbers, random numbers, dtypes, and what it keeps."""

import pytest
import torch
from timm.layers import DiffAttention, DropPath, LayerScale, SwiGLU
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from fastdeit import backends
from fastdeit.blocks.drop_path import drop_path_scale
from fastdeit.blocks.run import PendingResidual, run_block
from fastdeit.blocks.snapshot import looked_at
from fastdeit.nn import Block, TorchLayerNorm
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

FUSED = {"add_layer_norm_attention": 1, "add_layer_norm_mlp": 1}


def pair(dim=32, heads=2, **kwargs):
    """The fused block and timm's with the same weights."""
    kwargs = {"qkv_bias": True, **kwargs}
    fused, timms = Block(dim, heads, **kwargs), TimmBlock(dim, heads, **kwargs)
    with torch.no_grad():
        for parameter in timms.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and LayerScale away from their initial values
    fused.load_state_dict(timms.state_dict())
    return fused, timms


def assert_block_as_accurate_as_timms(fused, timms, x, backend="auto"):
    names = [name for name, _ in timms.named_parameters()]

    def forward_of(module):
        return lambda x, *weights: torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    assert_as_accurate_as_eager(forward_of(fused), forward_of(timms), x, *timms.parameters(), backend=backend)


@pytest.mark.parametrize("init_values", [None, 0.5])
@pytest.mark.parametrize("kwargs", [{}, {"qkv_bias": False, "proj_bias": False}, {"norm_layer": nn.LayerNorm}])
def test_the_fused_forward_is_as_accurate_as_timms(kernels_stood_in, init_values, kwargs):
    fused, timms = pair(init_values=init_values, **kwargs)
    assert_block_as_accurate_as_timms(fused, timms, torch.randn(2, 5, 32))
    assert kernels_stood_in == FUSED


@pytest.mark.parametrize("init_values", [None, 0.5])
def test_kernels_are_as_accurate_as_timms_forward(init_values):
    form = kernel_device(), kernel_dtypes(products=True)[0]
    fused, timms = (block.to(*form) for block in pair(64, 2, init_values=init_values))
    x = torch.randn(2, 5, 64).to(*form)
    with backends.use_backend("triton"):
        assert [m.why_not_fused(x) for m in (fused, fused.attn, fused.mlp)] == [None] * 3
    assert_block_as_accurate_as_timms(fused, timms, x, backend="triton")


@pytest.mark.parametrize("init_values", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_draws_timms_masks_and_leaves_timms_generator(kernels_stood_in, init_values, dtype):
    fused, timms = pair(init_values=init_values, drop_path=0.4)
    x = torch.randn(16, 5, 32, dtype=dtype)
    results = []
    for block in (fused.to(dtype), timms.to(dtype)):
        torch.manual_seed(3)
        results.append((block(x) - x, torch.get_rng_state()))
    (got, state), (expected, timms_state) = results
    assert torch.equal(state, timms_state)
    dropped = (expected == 0).flatten(1).all(1)  # both branches
    assert 0 < dropped.sum() < 16
    assert torch.equal((got == 0).flatten(1).all(1), dropped)
    if dtype is torch.float32:
        torch.testing.assert_close(got, expected)
    assert kernels_stood_in == FUSED


@pytest.mark.parametrize("init_values", [None, 0.5])
def test_under_autocast_drop_path_draws_on_the_tensors_that_timm_draws_on(kernels_stood_in, monkeypatch, init_values):
    draw, drawn = torch.Tensor.bernoulli_, []

    def recorded(self, *args):
        drawn.append((self.shape, self.dtype, self.device, args))
        return draw(self, *args)

    monkeypatch.setattr(torch.Tensor, "bernoulli_", recorded)
    for module in pair(init_values=init_values, drop_path=0.4):
        with torch.autocast("cpu", torch.bfloat16):
            module(torch.randn(3, 5, 32))
    assert drawn[:2] == drawn[2:]
    assert drawn[0][1] is (torch.bfloat16 if init_values is None else torch.float32)  # LayerScale is not autocast


@pytest.mark.parametrize("init_values", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate, scales", [(0.4, True), (0.4, False), (1.0, True)])
def test_what_takes_the_place_of_the_last_layer_scale_and_drop_path_is_theirs_bit_for_bit(
    init_values, dtype, rate, scales
):
    fused, _ = pair(init_values=init_values, drop_path=rate)
    fused.to(dtype).drop_path2.scale_by_keep = scales
    description, verdict = looked_at(fused)
    x = torch.randn(16, 5, 32, dtype=dtype, requires_grad=True)
    results = []
    for tail in (None, "a test"):
        torch.manual_seed(3)
        options = dict(attention_fused=True, defer=False)
        pending = run_block(description, verdict._replace(tail=tail), PendingResidual(x), **options)
        out = pending.x + pending.branch
        gradients = torch.autograd.grad(out.square().sum(), [x, *fused.parameters()])
        results.append((out, torch.get_rng_state(), *gradients))
    assert verdict.tail is None and all(map(torch.equal, *results))


def test_the_drop_path_factor_is_exact_in_float32():
    branch = torch.zeros(64, 5, 8, dtype=torch.bfloat16)
    scale = drop_path_scale(DropPath(0.1), branch, None)
    assert set(scale.tolist()) == {0.0, (torch.ones(()) / 0.9).item()}  # bfloat16 would give 1.109375
    unscaled = drop_path_scale(DropPath(0.1, scale_by_keep=False), branch, None)
    assert set(unscaled.tolist()) == {0.0, 1.0}
    assert drop_path_scale(DropPath(0.1).eval(), branch, None) is None
    assert drop_path_scale(DropPath(1.0), branch, None).eq(0).all()


@pytest.mark.parametrize("rates", [{"proj_drop": 0.3}, {"attn_drop": 0.3}])
def test_active_dropout_gives_timms_numbers(kernels_stood_in, rates):
    """Between the layers it runs timm's code; after proj and fc2 the module itself is called."""
    fused, timms = pair(drop_path=0.2, **rates)
    fused.attn.fused_attn = timms.attn.fused_attn = False  # PyTorch's fused attention draws elsewhere
    results = []
    for block in (fused, timms):
        torch.manual_seed(3)
        results.append(block(torch.ones(4, 5, 32)))
    torch.testing.assert_close(*results)


def test_dropout_does_not_hinder_fusion_in_evaluation(kernels_stood_in):
    fused, timms = pair(drop_path=0.2, proj_drop=0.3, attn_drop=0.3)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(fused.eval()(x), timms.eval()(x))
    assert kernels_stood_in == FUSED


@pytest.mark.parametrize("init_values", [None, 0.5])
def test_autocast_keeps_the_residual_stream_in_float32(kernels_stood_in, init_values):
    fused, timms = pair(init_values=init_values)
    x = torch.randn(2, 5, 32)
    exact = timms.double()(x.double())
    timms.float()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fused(x), timms(x)
    assert got.dtype is expected.dtype is torch.float32
    assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max()
    assert kernels_stood_in == FUSED


def test_timms_attention_and_mlp_get_what_timms_norms_give(kernels_stood_in, monkeypatch):
    from fastdeit import ops

    dtypes = []

    def recorded(op):
        return lambda *args, **kwargs: dtypes.append(kwargs["out_dtype"]) or op(*args, **kwargs)

    for name in ("layer_norm", "add_layer_norm"):
        monkeypatch.setattr(ops, name, recorded(getattr(ops, name)))
    fused, _ = pair()
    fused.attn.qkv.register_forward_hook(lambda *_: None)
    fused.mlp.fc1.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        fused(torch.randn(2, 5, 32))
    assert dtypes == [None, None]


@pytest.mark.parametrize("given", [{"attn_mask": torch.ones(5, 5).tril().bool()}, {"is_causal": True}])
def test_masks_reach_timms_attention_and_the_rest_stays_fused(kernels_stood_in, given):
    fused, timms = pair()
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(fused(x, **given), timms(x, **given))
    assert kernels_stood_in == {"layer_norm": 1, "add_layer_norm_mlp": 1}


@pytest.mark.parametrize("kwargs", [{"attn_layer": DiffAttention}, {"mlp_layer": SwiGLU}, {"qk_norm": True}])
def test_other_attention_and_mlp_classes_run_inside_a_fused_block(kernels_stood_in, kwargs):
    fused, timms = pair(**kwargs)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(fused.eval()(x), timms.eval()(x))
    assert kernels_stood_in["add_layer_norm"] + kernels_stood_in["add_layer_norm_mlp"] == 1


def test_what_a_custom_attention_returns_is_added_as_pytorch_adds(kernels_stood_in):
    class Pooled(nn.Module):
        def forward(self, x, attn_mask=None, is_causal=False):
            return x.mean(1, keepdim=True)

    fused, timms = pair(init_values=0.5)
    fused.attn = timms.attn = Pooled()
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(fused(x), timms(x))


class Doubled(nn.Module):
    """A scale of a class that no host has, with a parameter that LayerScale has too."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((32,), 0.3))

    def forward(self, x):
        return 2 * self.gamma * x


@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (lambda b: setattr(b, "norm1", nn.BatchNorm1d(5)), "a norm is a BatchNorm1d that is not accelerated"),
        (
            lambda b: setattr(b, "ls1", LayerScale(32, inplace=True)),
            "its LayerScale is a LayerScale that works in place",
        ),
        (lambda b: setattr(b, "ls1", Doubled()), "its LayerScale is a Doubled"),
        (lambda b: setattr(b, "drop_path1", nn.Dropout(0.1)), "its drop path is a Dropout"),
        (lambda b: b.ls1.to(torch.float64), r"a LayerScale is in torch.float64, the input in torch.float32"),
        (lambda b: setattr(b, "norm2", TorchLayerNorm((5, 32))), "it normalises over 2 dimensions"),
    ],
)
def test_reasons_to_step_aside(kernels_stood_in, replace, reason):
    block = Block(32, 2, init_values=0.5)
    replace(block)
    assert block.why_not_fused(torch.randn(2, 5, 32)) == reason


def test_a_scale_of_an_unknown_class_is_called(kernels_stood_in):
    fused, timms = pair(init_values=0.5)
    fused.ls1, fused.ls2, timms.ls1, timms.ls2 = (Doubled() for _ in range(4))
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(fused(x), timms(x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_nothing_is_kept_without_grad(request, context, backend):
    if backend == "auto":
        request.getfixturevalue("kernels_stood_in")
    fused = Block(64, 2, init_values=0.5)
    kept = []
    with backends.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t), context():
        y = fused(torch.randn(2, 5, 64))
    assert y.grad_fn is None and not y.requires_grad
    assert kept == []


def test_no_input_is_written_to(kernels_stood_in):
    fused, _ = pair(init_values=0.5)
    x = torch.randn(2, 5, 32)
    before = x.clone()
    fused(x)
    assert torch.equal(x, before)


def test_an_empty_batch_gives_an_empty_result(kernels_stood_in):
    fused, _ = pair()
    x = torch.randn(0, 5, 32, requires_grad=True)
    fused(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not any(p.grad.any() for p in fused.parameters())


def test_checkpointing_replays_the_same_masks(kernels_stood_in):
    from torch.utils.checkpoint import checkpoint

    fused, _ = pair(drop_path=0.5)
    gradients = []
    for run in (fused, lambda x: checkpoint(fused, x, use_reentrant=False)):
        x = torch.ones(8, 5, 32, requires_grad=True)
        torch.manual_seed(3)
        run(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("gamma", [1e-7, 0.0, 3.0])
def test_a_small_layer_scale_survives_fp16(gamma):
    """Folded into weights as it is, it would leave fp16's range: timm multiplies in fp32."""
    fused, timms = (block.to(kernel_device()) for block in pair(64, 2, init_values=1.0, drop_path=0.3))
    with torch.no_grad():
        for block in (fused, timms):
            block.ls1.gamma.mul_(gamma)
            block.ls2.gamma.mul_(gamma)
    x = torch.zeros(3, 5, 64, device=kernel_device())  # so that the branches are not rounded away
    x[..., 0] = 1e-3
    results = []
    for block, backend in ((fused, "triton"), (timms, "reference")):
        torch.manual_seed(3)
        with backends.use_backend(backend), torch.autocast(x.device.type, torch.float16):
            out = block(x) - x
        out.sum().backward()
        results.append((out, block.ls1.gamma.grad, block.attn.proj.weight.grad))
    roundings = 0.0, 0.0, 2.0**-25  # timm's gradient of a weight is rounded to fp16
    for got, expected, rounding in zip(*results, roundings, strict=True):
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * expected.abs().max().item() + rounding)
