"""torch.compile of an accelerated model: one graph, the registered ops in it, and no compilation per batch size."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastdeit.nn

pytestmark = pytest.mark.one_graph


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def under_autocast(call, dtype):
    def forward(x):
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            return call(x)

    return forward


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_compiled_step_is_as_accurate_as_timms(settings, small, fused_device, dtype):
    """Forward and backward, in training with distillation; what drop path draws under a compiler is the compiler's own."""
    counter = CompileCounterWithBackend("aot_eager")
    timms = small(init_values=0.3).to(fused_device).train()
    timms.set_distilled_training(True)

    def forward(model):
        fused = isinstance(model, fastdeit.nn.VisionTransformerDistilled)
        return under_autocast(torch.compile(model, backend=counter, fullgraph=True) if fused else model, dtype)

    settings.assert_step_as_accurate_as_timms(timms, settings.images(device=fused_device), forward=forward)
    assert counter.frame_count == 1


def test_the_graph_holds_the_registered_ops(settings, small, kernels):
    graphs = []
    model = fastdeit.accelerate(small()).to(kernels, torch.float16).eval()
    call = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    x = settings.images(device=kernels, dtype=torch.float16)
    assert torch.equal(call(x), model(x))
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes]
    assert any("fastdeit" in name for name in targets)
    assert not any(part in name for name in targets for part in ("layer_norm ", "gelu", "scaled_dot_product"))


OPTIONS = {
    "plain": {},
    "layer scale and drop path": dict(init_values=0.3, drop_path_rate=0.3),
    "registers": dict(name="deit_tiny_patch16_224", reg_tokens=2),
    "average pooling": dict(name="deit_tiny_patch16_224", global_pool="avg"),
    "dynamic image size": dict(dynamic_img_size=True),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_batch_sizes_cost_one_recompilation_at_most(settings, small, kernels, options):
    counter = CompileCounterWithBackend("eager")
    model = fastdeit.accelerate(small(depth=1, **OPTIONS[options])).to(kernels, torch.float16).train()
    forward = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (2, 4, 3):
        assert forward(settings.images(batch, device=kernels, dtype=torch.float16)).shape[0] == batch
    assert counter.frame_count <= 2


@pytest.mark.long
@pytest.mark.parametrize(("dynamic", "recompilations"), [(None, 1), (True, 0)])
def test_batch_sizes_of_whole_steps(settings, small, kernels, dynamic, recompilations):
    counter = CompileCounterWithBackend("aot_eager")
    model = fastdeit.accelerate(small(depth=1)).to(kernels, torch.float16)
    forward = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    frames = []
    for batch in (4, 2, 3):
        x = settings.images(batch, device=kernels, dtype=torch.float16)
        got = settings.step(model, forward, x)
        for name, expected in settings.step(model, model, x).items():
            assert torch.equal(got[name], expected), name
        frames.append(counter.frame_count)  # the first call may take two attempts, as timm's model does
    assert frames[-1] - frames[0] == recompilations


def test_a_model_compiled_in_place(settings, small, kernels_stood_in):
    model = fastdeit.accelerate(small().eval())
    expected = model(settings.images())
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(settings.images()), expected)


def test_training_and_evaluation_take_turns_without_compiling_again(settings, small, kernels):
    counter = CompileCounterWithBackend("eager")
    model = fastdeit.accelerate(small(drop_path_rate=0.3)).to(kernels)
    forward = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        model.train()
        forward(settings.images(device=kernels))
        model.eval()
        forward(settings.images(device=kernels))
    assert counter.frame_count == 2


@pytest.mark.gpu
def test_float32_without_autocast_is_one_graph_that_follows_the_switch_of_tf32(settings, small):
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(fastdeit.accelerate(small(depth=1)).cuda(), backend=counter, fullgraph=True)
    x = settings.images(device="cuda")
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Dynamo's about a cached function, for one
            for precision, frames in (("ieee", 1), ("tf32", 2), ("ieee", 2)):
                switch.fp32_precision = precision
                forward(x).sum().backward()
                assert counter.frame_count == frames
    finally:
        switch.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.numeric
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_inductor_gives_the_contracts_numbers(settings, small, mode):
    timms = small(init_values=0.3).cuda()

    def forward(model):
        fused = isinstance(model, fastdeit.nn.VisionTransformerDistilled)
        return under_autocast(torch.compile(model, fullgraph=True, mode=mode) if fused else model, torch.bfloat16)

    settings.assert_step_as_accurate_as_timms(timms, settings.images(device="cuda"), forward=forward)
