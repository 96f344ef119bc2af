"""Blocks that end in LayerScale: PyTorch's sum for its gradient takes memory of its own. On the fake runtime."""

import functools

import pytest
import timm
import torch

import fastdeit
from fastdeit.plan import planned as planning
from fastdeit.plan.span import sums_first
from fastdeit.plan.tape import Buffer, Operation, View
from fastdeit.plan.training import TrainingPlan
from tests.plan.events import WithoutPlans, dataflow, precision, recorded, requested_bytes, reset_peak
from tests.plan.models import needs_plans, plan_it, plans
from tests.plan.test_blocks import block_and_tokens, called, hugging_faces, planned_kinds
from tests.plan.test_training import keep_apart

pytestmark = [pytest.mark.fake_device, needs_plans]

SIZES = dict(num_hidden_layers=6, image_size=96)
MODELS = {
    "BEiT": functools.partial(hugging_faces, "BeitConfig", "BeitModel", drop_path_rate=0.0, **SIZES),
    "DINOv2": functools.partial(hugging_faces, "Dinov2Config", "Dinov2Model", **SIZES),
    "timm": functools.partial(
        timm.create_model, "vit_tiny_patch16_224", global_pool="avg", depth=6, img_size=96, init_values=0.1
    ),
}
MOST_MEMORY = {"BEiT": 1.02, "DINOv2": 1.01, "timm": 1.01}  # times that of the ops


@pytest.mark.parametrize("dtype, autocast", [(None, torch.bfloat16), (torch.bfloat16, None)])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_takes_no_more_memory_than_the_ops(name, dtype, autocast, monkeypatch):
    with torch.device("cuda"):
        model = fastdeit.accelerate(MODELS[name]().to(dtype).eval())
    x = torch.zeros(64, 3, 96, 96, device="cuda", dtype=dtype or torch.float32)

    def peak():
        model.zero_grad(set_to_none=True)
        reset_peak()
        before = requested_bytes()
        with precision(autocast):
            made = model(x)
        (made if isinstance(made, torch.Tensor) else made[0]).square().sum().backward()  # of a sum alone it is expanded
        return requested_bytes("peak") - before

    plan_it(peak)
    assert planned_kinds(model) == [[TrainingPlan]] * 6
    planned = peak()
    monkeypatch.setattr(planning, "why_not_plannable", lambda _: "a test")
    assert planned <= MOST_MEMORY[name] * peak()


@pytest.mark.parametrize("name", ["DINOv2", "timm with both"])
def test_two_backward_passes_launch_what_the_ops_launch_on_the_same_tensors(name, monkeypatch):
    block, x = block_and_tokens(name, torch.bfloat16)
    keep_apart(monkeypatch)

    def call():
        made = called(block, x)
        wanted, given = [x, *block.parameters()], torch.ones_like(made)
        first = torch.autograd.grad(made, wanted, given, retain_graph=True)
        return first, torch.autograd.grad(made, wanted, given)

    for _ in range(2):
        call()
    (plan,) = plans(block)
    assert type(plan) is TrainingPlan
    planned = recorded(call)
    monkeypatch.undo()
    with WithoutPlans():
        assert dataflow(planned) == dataflow(recorded(call))


def _view(buffer, offset=0):
    return View(buffer, offset, torch.float32, (8,), (1,))


def test_only_a_sum_before_all_launches_whose_gradient_is_through_runs_apart():
    read, gradient, other = Buffer(32), Buffer(64), Buffer(64)
    total, product = Operation("sum", (_view(read), 0), _view(gradient)), Operation("mm", (), _view(other))
    made = [_view(gradient), _view(other)]
    assert sums_first([total, product], made) == 1
    others = Operation("mul", (), _view(read))
    assert sums_first([others, total, others, product], made) == 3
    assert sums_first([others, product], made) == 0
    assert sums_first([product, total], made) == 0
    assert sums_first([total, product, Operation("copy_", (), _view(gradient, 32))], made) == 0
