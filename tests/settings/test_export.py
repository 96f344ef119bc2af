"""Ways out of Python: torch.export through the registered ops, torch.jit, and quantization as PyTorch's DeiT tutorial does it."""

import copy
import io

import pytest
import torch
from torch import nn

import fastdeit
from fastdeit import backends

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def registered_ops(program):
    return [node.target._opname for node in program.graph.nodes if getattr(node.target, "namespace", "") == "fastdeit"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_an_exported_model_holds_the_registered_ops_and_gives_the_models_bits(settings, small, kernels, strict, mode):
    model = fastdeit.accelerate(small(init_values=0.3)).to(kernels, torch.float16).train(mode == "training")
    x = settings.images(device=kernels, dtype=torch.float16)
    program = torch.export.export(model, (x,), strict=strict)
    assert registered_ops(program)
    operators = {str(node.target) for node in program.graph.nodes}
    assert not any(part in name for name in operators for part in ("layer_norm.", "gelu.", "scaled_dot_product"))
    assert torch.equal(program.module()(x), model(x))


def test_an_exported_model_takes_any_batch_size_and_survives_saving(settings, small, kernels):
    model = fastdeit.accelerate(small()).to(kernels, torch.float16).eval()
    x = settings.images(device=kernels, dtype=torch.float16)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    loaded = torch.export.load(io.BytesIO(file.getvalue()))
    assert registered_ops(loaded) == registered_ops(program) != []
    for size in (1, 2, 5):
        x = settings.images(size, device=kernels, dtype=torch.float16)
        assert torch.equal(loaded.module()(x), model(x))


def test_an_export_under_autocast_keeps_its_precision(settings, small, kernels):
    model = fastdeit.accelerate(small()).to(kernels).eval()
    x = settings.images(device=kernels)
    with torch.autocast(kernels.type, torch.bfloat16):
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), model(x))
    assert registered_ops(program)


def test_where_the_kernels_do_not_run_an_export_is_timms(settings, small):
    """The graph then loads where there is no fastdeit."""
    model, x = small().eval(), settings.images()
    graphs = []
    for swap in (fastdeit.restore, fastdeit.accelerate):
        with backends.use_backend("reference"):
            graphs.append([str(node.target) for node in torch.export.export(swap(model), (x,)).graph.nodes])
    assert graphs[0] == graphs[1]


def test_scripting_an_accelerated_model_names_restore(settings, small):
    model = fastdeit.accelerate(small().eval())
    with pytest.raises(RuntimeError, match=r"call fastdeit\.restore\(model\) first"):
        torch.jit.script(model)
    scripted = torch.jit.script(fastdeit.restore(model))
    torch.testing.assert_close(scripted(settings.images()), model(settings.images()))


def test_a_trace_is_of_timms_operations_and_gives_their_bits(settings, small, kernels_stood_in):
    model, x = small().eval(), settings.images()
    expected = model(x)
    traced = torch.jit.trace(fastdeit.accelerate(model), x)
    assert "scaled_dot_product_attention" in str(traced.inlined_graph)
    assert torch.equal(traced(x), expected)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    assert torch.equal(torch.jit.load(io.BytesIO(file.getvalue()))(x), expected)


@pytest.mark.parametrize("accelerated_first", [True, False])
def test_dynamic_quantization_leaves_the_products_to_pytorch(settings, small, kernels_stood_in, accelerated_first):
    """`quantize_dynamic(model, {nn.Linear}, torch.qint8)`: quantized projections are called, around the kernel in attention."""
    timms = small().eval()
    quantize = lambda m: torch.ao.quantization.quantize_dynamic(m, qconfig_spec={nn.Linear}, dtype=torch.qint8)  # noqa: E731
    expected = quantize(copy.deepcopy(timms))
    if accelerated_first:
        got = quantize(fastdeit.accelerate(timms))
    else:
        got = fastdeit.accelerate(quantize(timms))
    x = settings.images()
    rows = fastdeit.explain(got).as_dict()
    reason = "a projection is a torch.ao.nn.quantized.dynamic.modules.linear.Linear"
    for number in (0, 1):
        assert rows[f"blocks.{number}.mlp"] == {"kind": "Mlp", "fused": False, "reason": reason}
        called = f"its projections are called: {reason}"
        assert rows[f"blocks.{number}.attn"] == {"kind": "Attention", "fused": True, "reason": called}
    torch.testing.assert_close(got(x), expected(x))
    assert torch.equal(fastdeit.restore(got)(x), expected(x))


def test_a_quantized_model_is_scripted_after_restore(settings, small):
    """The rest of the tutorial's way: script, save, load."""
    model = torch.ao.quantization.quantize_dynamic(fastdeit.accelerate(small().eval()), {nn.Linear}, torch.qint8)
    with pytest.raises(RuntimeError, match=r"fastdeit\.restore\(model\)"):
        torch.jit.script(model)
    scripted = torch.jit.script(fastdeit.restore(model))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    x = settings.images()
    assert torch.equal(torch.jit.load(io.BytesIO(file.getvalue()))(x), model(x))
