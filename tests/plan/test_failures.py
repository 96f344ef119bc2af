"""Calls and backward passes that fail, for lack of memory for instance, do nothing silently wrong; the next ones are planned."""

import pytest
import torch

from fastdeit.plan.planned import Plans
from fastdeit.plan.recording import Recording
from fastdeit.plan.span import SpanPlan
from fastdeit.plan.training import TrainingPlan
from tests.plan.events import precision
from tests.plan.models import build, images, needs_plans, only_plan, plans

pytestmark = [needs_plans, pytest.mark.fake_device]


def loss(model):
    with precision(torch.bfloat16):
        return model(images(model)).sum()


def fail(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("retain", [False, True])
def test_after_a_backward_pass_that_failed_another_one_needs_the_graph_retained(retain, monkeypatch):
    model = build(depth=1)
    for _ in range(3):
        loss(model).backward()
    only_plan(model)
    made = loss(model)
    with monkeypatch.context() as patch:
        patch.setattr(SpanPlan, "_empty", fail)
        with pytest.raises(torch.OutOfMemoryError):
            made.backward(retain_graph=retain)
    if retain:
        made.backward()
    else:
        with pytest.raises(RuntimeError, match="a second time, of which the first one failed"):
            made.backward()
    model.zero_grad()
    loss(model).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert type(only_plan(model)) is TrainingPlan


def test_recordings_that_fail_forward_are_no_attempts(monkeypatch):
    model = build(depth=1)
    loss(model).backward()
    with monkeypatch.context() as patch:
        patch.setattr(Recording, "forward", fail)
        for _ in range(4):
            with pytest.raises(torch.OutOfMemoryError):
                loss(model)
            assert plans(model) == ["called once"]
    loss(model).backward()
    assert type(only_plan(model)) is TrainingPlan


def test_where_memory_for_a_run_of_its_own_is_lacking_the_ops_run(monkeypatch):
    block = build(depth=1).blocks[0]
    x = torch.zeros(2, 17, block.norm1.weight.numel(), device="cuda", requires_grad=True)

    def step():
        with precision(torch.bfloat16):
            torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()

    step()
    with monkeypatch.context() as patch:
        patch.setattr(Plans, "_rehearse", fail)
        step()
        assert plans(block) == ["called once"]
    step()
    assert [type(entry) for entry in plans(block)] == [TrainingPlan]
