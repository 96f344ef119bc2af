"""Frozen models of the benchmarks: what is timed is held to its contract, here on a CPU, and replayed, on the fake runtime."""

import pytest
import timm
import torch

from fastdeit.benchmarks import frozen_models, timing
from fastdeit.benchmarks.roofline import Ceilings
from fastdeit.cost.models import DEIT

PRECISIONS = pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])


@pytest.fixture
def model():
    made = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=64, num_heads=2, depth=2)
    return made.eval().bfloat16()


@PRECISIONS
def test_a_wrong_model_is_not_timed(model, precision):
    fast, images = frozen_models.optimized(model, precision), torch.randn(4, 3, 32, 32).bfloat16()
    frozen_models.check(model, fast, images)
    wrong = fast.blocks[1].fc2.weight if precision == "bf16" else fast.blocks[1].fc2.scale
    wrong.mul_(8)
    with pytest.raises(AssertionError, match="logits"):
        frozen_models.check(model, fast, images)


@PRECISIONS
def test_candidates_are_those_of_the_precision(model, precision):
    names = list(frozen_models.candidates(model, frozen_models.optimized(model, precision), toy=False))
    assert names[:2] == ["fastdeit", "timm eager"]
    assert (f"timm + torchao {precision} + torch.compile max-autotune" in names) is (precision != "bf16")
    assert {"timm + torch.compile max-autotune", "TensorRT, bf16", "ONNX Runtime, fp16"} <= set(names)


@PRECISIONS
def test_less_work_in_fewer_bits(precision):
    cost, floors = frozen_models.work(DEIT["B"], 256, precision)
    ours, theirs = floors(Ceilings(tflops=600.0, tb_per_s=4.3))
    assert ours < theirs and cost.flops == frozen_models.work(DEIT["B"], 256, "bf16")[0].flops
    if precision != "bf16":
        assert cost.bytes < frozen_models.work(DEIT["B"], 256, "bf16")[0].bytes


@pytest.mark.fake_device
@PRECISIONS
def test_on_a_gpu_it_is_timed_by_replay(model, precision):
    fast, on_gpu = frozen_models.optimized(model, precision).cuda(), model.cuda()
    images = torch.zeros(2, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        rows = timing.measure({"fastdeit": fast, "timm eager": on_gpu}, lambda: (images,), turns=2, profiled=False)
    assert [(row.status, row.timed_by) for row in rows] == [("ok", "graph replay")] * 2
