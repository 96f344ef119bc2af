"""Candidates return what they compute, so that it can be compared."""

import pytest
import torch

from fastdeit import ops
from fastdeit.benchmarks import models, timing
from fastdeit.benchmarks.baselines import op_baselines as baselines
from fastdeit.cost.view import shape_of


def arguments(batch: int):
    x, upstream = torch.randn(2, batch, 3).unbind()
    return x, torch.randn(4, 3), torch.randn(batch, 4), upstream


@pytest.mark.parametrize("direction, results", [("forward", 1), ("backward", 2), ("both", 3)])
def test_a_direction_gives_outputs_then_gradients(direction, results):
    x, weight, upstream, _ = arguments(2)
    got = baselines.DIRECTIONS[direction](torch.nn.functional.linear, 2)(x, weight, upstream)
    assert len(got) == results and not any(t.requires_grad for t in got)
    exact = baselines.oracle(direction, torch.nn.functional.linear, 2, shared=(1,))(x, weight, upstream)
    for mine, wanted in zip(got, exact, strict=True):
        assert wanted.dtype is torch.float64
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_oracle_looks_at_the_first_samples_and_leaves_out_sums_over_all():
    x, weight, upstream, _ = arguments(5)
    output, dx, dweight = baselines.oracle("both", torch.nn.functional.linear, 2, shared=(1,))(x, weight, upstream)
    assert len(output) == len(dx) == baselines.COMPARED_SAMPLES and dweight is None


def test_backward_alone_runs_again_on_what_a_compiled_forward_kept():
    x, weight, upstream, _ = arguments(2)
    compiled = torch.compile(torch.nn.functional.linear, backend="aot_eager", dynamic=False)
    run = baselines.backward(compiled, 2)
    first, again = run(x, weight, upstream), run(x, weight, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_library_that_is_missing_is_named_when_it_is_called():
    candidate = baselines.liger_add_layer_norm(torch.float32)
    with pytest.raises(timing.NotInstalled, match="liger_kernel"):
        candidate(*(torch.ones(2, 4) for _ in range(4)))


def test_an_accelerated_copy_shares_every_parameter():
    model = models.create("Ti", 224, "train_amp", toy=True)
    fused = models.accelerated(model)
    assert type(fused) is not type(model) and fused is not model
    assert [id(p) for p in fused.parameters()] == [id(p) for p in model.parameters()]


def test_the_floor_of_a_block_is_what_one_more_adds_to_a_model():
    from fastdeit.benchmarks.roofline import Ceilings

    shape = shape_of(models.create("Ti", 224, "inference_bf16", toy=True))
    cost, floors = models.work(shape, 8, "train_amp", block=True)
    fused, compiled = floors(Ceilings(tflops=600.0, tb_per_s=4.0))
    assert cost.flops > 0 and cost.bytes > 0 and 0 < fused <= compiled
    whole, _ = models.work(shape, 8, "train_amp")
    assert whole.flops > cost.flops


def test_attention_peers_agree():
    qkv = torch.randn(2, 5, 3 * 2 * 8)
    torch.testing.assert_close(baselines.sdpa(None, 2)(qkv), ops.attention_reference(qkv, 2))


def test_the_quick_run_waits_for_no_autotuning():
    names = ["fastdeit", "timm eager", "timm + torch.compile", "timm + torch.compile max-autotune"]
    assert list(baselines.soon_set_up(dict.fromkeys(names))) == names[:3]
