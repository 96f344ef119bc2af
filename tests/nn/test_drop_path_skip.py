"""Stochastic depth that runs branches on subsets of the samples: the same numbers as plain PyTorch, and the mask's expectation."""

import itertools

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastdeit
from fastdeit import backends, ops
from fastdeit.blocks.run import PendingResidual, settled
from fastdeit.blocks.subsets import draw_subset, kept_samples
from fastdeit.nn import Block
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

RATE, BATCH = 0.25, 8


def pair(dim=32, heads=2, rate=RATE, **kwargs):
    """A block that skips, and timm's with the same weights."""
    kwargs = {"qkv_bias": True, "drop_path": rate, **kwargs}
    fused, timms = Block(dim, heads, **kwargs), TimmBlock(dim, heads, **kwargs)
    with torch.no_grad():
        for parameter in timms.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fused.load_state_dict(timms.state_dict())
    fused.drop_path_mode = "skip"
    return fused, timms


def reference(block, x, rate=RATE):
    """What skipping means, by timm's modules and PyTorch's indexing, with the same draws."""
    for norm, body, scale in ((block.norm1, block.attn, block.ls1), (block.norm2, block.mlp, block.ls2)):
        batch = x.shape[0]
        kept = round(batch * (1 - rate))
        slots = torch.rand(batch, device=x.device).argsort()
        chosen = slots < kept
        rows = torch.zeros_like(x)
        rows[chosen] = (scale(body(norm(x[chosen]))) * (batch / kept)).to(x.dtype)
        x = x + rows
    return x


def seeded(forward):
    def call(*args):
        torch.manual_seed(7)
        return forward(*args)

    return call


@pytest.mark.parametrize("init_values", [None, 0.5])
def test_a_block_computes_what_the_reference_does(init_values):
    """On a CPU: timm's modules, called for the subset."""
    fused, timms = pair(init_values=init_values)
    x = torch.randn(BATCH, 5, 32)
    torch.testing.assert_close(seeded(fused)(x), seeded(lambda x: reference(timms, x))(x))


@pytest.mark.parametrize("init_values", [None, 0.5])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_numbers_and_gradients_are_as_accurate_as_the_references(request, init_values, backend):
    form = (
        (kernel_device(), kernel_dtypes(products=True)[0])
        if backend == "triton"
        else (torch.device("cpu"), torch.float32)
    )
    if backend == "auto":
        request.getfixturevalue("kernels_stood_in")
    fused, timms = (block.to(*form) for block in pair(64, 2, init_values=init_values))
    names = [name for name, _ in timms.named_parameters()]

    def forward_of(module, run):
        def forward(x, *weights):
            with torch.nn.utils.stateless._reparametrize_module(module, dict(zip(names, weights, strict=True))):
                return run(x)

        return seeded(forward)

    x = torch.randn(BATCH, 5, 64).to(*form)
    if backend == "triton":
        with backends.use_backend("triton"):
            assert fused.why_not_fused(x) is None
    assert_as_accurate_as_eager(
        forward_of(fused, fused),
        forward_of(timms, lambda x: reference(timms, x)),
        x,
        *timms.parameters(),
        backend=backend,
    )


def test_only_the_kept_samples_are_computed(kernels_stood_in, monkeypatch):
    fused, _ = pair()
    batches = []
    for name in ("add_layer_norm_attention", "add_layer_norm_mlp"):
        op = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *args, op=op, **options: [batches.append(len(y)) or y for y in op(*args, **options)]
        )
    fused(torch.randn(BATCH, 5, 32))
    assert batches == [8, 6] * 2  # the stream, and the branch's output
    fused.eval()(torch.randn(BATCH, 5, 32))
    assert batches == [8, 6] * 2 + [8, 8] * 2


def test_a_drop_path_that_does_not_scale():
    subset = draw_subset(DropPath(RATE, scale_by_keep=False), torch.randn(BATCH, 5, 32))
    assert subset is not None and subset.kept == 6 and subset.scale is None


def test_arithmetic_shrinks_by_the_rate():
    """By PyTorch's counter."""
    fused, timms = pair()
    x = torch.randn(BATCH, 5, 32, requires_grad=True)

    def flops(block):
        with FlopCounterMode(display=False) as counter:
            block(x).sum().backward()
        return counter.get_total_flops()

    assert flops(fused) == flops(timms) * (1 - RATE)


def outcomes(block, x):
    """Of one sample, the exact expectation over both branches' being kept or not, of the output and of the gradients of its sum."""
    keep, parameters = 1 - RATE, list(block.parameters())
    mean, gradients = torch.zeros_like(x), [torch.zeros_like(p) for p in parameters]
    for first, second in itertools.product((0, 1), repeat=2):
        probability = (keep if first else RATE) * (keep if second else RATE)
        out = x + first / keep * block.attn(block.norm1(x))
        out = out + second / keep * block.mlp(block.norm2(out))
        found = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        mean += probability * out.detach()
        for total, gradient in zip(gradients, found, strict=True):
            total += 0 if gradient is None else probability * gradient
    return mean, gradients


@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_over_ten_thousand_draws_output_and_gradients_have_the_exact_expectation(mode):
    """The sample fills a batch of 200, 50 times: within five standard errors, as those of timm's mask are."""
    fused, timms = pair(dim=16)
    fused.drop_path_mode = mode
    sample = torch.randn(1, 3, 16)
    mean, gradients = outcomes(timms, sample)
    outputs, found = [], []
    for _ in range(50):
        out = fused(sample.expand(200, -1, -1))
        found.append(torch.autograd.grad(out.square().sum() / 200, list(fused.parameters())))
        outputs.append(out.detach().mean(0, keepdim=True))
    for expected, draws in ((mean, outputs), *zip(gradients, map(list, zip(*found, strict=True)), strict=True)):
        draws = torch.stack(draws).double()
        error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - expected).abs() <= 5 * error + 1e-5).all()


def test_every_sample_is_as_likely_and_subsets_differ():
    drop, x = DropPath(0.25), torch.zeros(8, 1, 1)
    counts, seen = torch.zeros(8), set()
    for _ in range(10_000):
        slots, kept, scale = draw_subset(drop, x)
        assert kept == 6 and (scale == torch.tensor(8 / 6)).all() and scale.shape == (8,)
        counts += slots < kept
        seen.add(tuple((slots < kept).tolist()))
    assert len(seen) == 28  # 8 over 6
    assert ((counts - 7500).abs() < 5 * (10_000 * 0.75 * 0.25) ** 0.5).all()


def test_the_sum_is_in_the_streams_dtype_under_autocast():
    x, branch = torch.randn(4, 2, 8), torch.randn(2, 2, 8).bfloat16()
    slots = torch.tensor([2, 1, 3, 0])
    found = settled(PendingResidual(x, branch, drop_path_scale=torch.full((4,), 2.0), slots=slots))
    assert found.dtype is torch.float32 and torch.equal(found[[0, 2]], x[[0, 2]])
    torch.testing.assert_close(found[[3, 1]], x[[3, 1]] + 2 * branch.float())


def model(rate=RATE, drop_path="skip", depth=3, **kwargs):
    torch.manual_seed(0)
    made = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, depth=depth, num_classes=3, drop_path_rate=rate, **kwargs
    )
    return fastdeit.accelerate(made, drop_path=drop_path)


def gradients_of(made, images):
    torch.manual_seed(11)
    made.zero_grad()
    out = made(images)
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in made.named_parameters()}


def test_a_fused_model_computes_what_its_blocks_do_one_by_one(kernels_stood_in):
    """The last block for the prefix tokens alone."""
    made, images = model(0.5), torch.randn(8, 3, 32, 32)
    with backends.use_backend("reference"):
        expected, gradients = gradients_of(made, images)
    kernels_stood_in.clear()
    found, others = gradients_of(made, images)
    assert kernels_stood_in["patch_embedding"] == 1 and kernels_stood_in["attention_qkv"] == 1
    torch.testing.assert_close(found, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5)


def test_checkpointing_repeats_the_draws():
    made, images = model(0.5), torch.randn(8, 3, 32, 32)
    out, gradients = gradients_of(made, images)
    made.set_grad_checkpointing(True)
    again, others = gradients_of(made, images)
    assert torch.equal(out, again) and all(torch.equal(others[name], g) for name, g in gradients.items())
    torch.manual_seed(12)
    assert not torch.equal(made(images), out)


def test_without_a_rate_or_in_evaluation_nothing_is_drawn():
    images = torch.randn(4, 3, 32, 32)
    for made in (model(0.0), model(0.5).eval()):
        state = torch.get_rng_state()
        with torch.no_grad():
            found = made(images)
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(found, fastdeit.restore(made)(images).detach())


def test_the_choice_can_be_changed_and_undone():
    made = model(0.5)
    assert all(block.drop_path_mode == "skip" for block in made.blocks)
    fastdeit.accelerate(made, exclude="blocks.0", drop_path="skip")
    assert "drop_path_mode" not in made.blocks[0].__dict__ and made.blocks[1].drop_path_mode == "skip"
    fastdeit.accelerate(made)
    assert all("drop_path_mode" not in block.__dict__ for block in made.blocks)
    fastdeit.restore(fastdeit.accelerate(made, drop_path="skip"))
    assert all("drop_path_mode" not in block.__dict__ for block in made.blocks)


def test_explain_says_so(kernels_stood_in):
    made = model(0.5)
    notes = {row.name: row.reason for row in fastdeit.explain(made) if row.kind == "Block"}
    assert notes["blocks.0"] == "" and "only on the samples that stochastic depth keeps" in notes["blocks.1"]
    assert "stochastic depth keeps" not in str(fastdeit.explain(fastdeit.accelerate(made)))


def test_a_model_may_be_compiled():
    fused, timms = pair(dim=16)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    x = torch.randn(BATCH, 5, 16)
    torch.testing.assert_close(seeded(compiled)(x), seeded(lambda x: reference(timms, x))(x))


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: model(drop_path="drop"), "drop_path: expected one of mask, skip, got 'drop'"),
        (
            lambda: fastdeit.accelerate(nn.LayerNorm(4), drop_path="skip"),
            "'skip' is for timm's vision transformer blocks",
        ),
        (lambda: model(1.0)(torch.randn(4, 3, 32, 32)), "a rate of 1 leaves none of 4 samples"),
        (lambda: model(0.9)(torch.randn(4, 3, 32, 32)), "a rate of 0.9 leaves none of 4 samples"),
        (lambda: pair()[0](torch.randn(8, 5, 32), attn_mask=torch.ones(5, 5)), "attn_mask: expected None in training"),
        (lambda: kept_samples(10, 0.96), "expected a lower rate, larger batches or 'mask'"),
    ],
)
def test_what_cannot_be_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.gpu
def test_a_step_is_recorded_as_a_graph_and_replayed_with_other_subsets():
    made, images = model(0.5).cuda(), torch.randn(8, 3, 32, 32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert made.why_not_embedded(images) is None
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def step():
        made.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            out = made(images)
        out.float().square().sum().backward()
        return out

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        out = step()
    for _ in range(2):
        graph.replay()
    assert out.shape == (8, 3) and out.is_cuda


@pytest.mark.gpu
@pytest.mark.numeric
def test_replays_draw_anew():
    made, images = model(0.5).cuda(), torch.randn(8, 3, 32, 32, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.stream(stream):
        made(images)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        out = made(images)
    found = []
    for _ in range(4):
        graph.replay()
        found.append(out.clone())
    assert any(not torch.equal(found[0], other) for other in found[1:])
