"""Plans of training steps under DistributedDataParallel. On the fake runtime, in one process: what is looked at is the order."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastdeit.blocks import spans
from fastdeit.plan.training import TrainingPlan
from fastdeit.testing import fake_cuda
from tests.plan.events import KINDS, of_parameters, precision, recorded, unmerged
from tests.plan.models import build, images, needs_plans, only_plan, plan_it, plans
from tests.plan.test_checkpointing import own_work, without_unread
from tests.plan.test_training import outputs_step, unplanned

pytestmark = [pytest.mark.fake_device, needs_plans]


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def launched():
    return sum(fake_cuda.counts()[kind] for kind in KINDS)


def wrapped_model(seen, **options):
    """A model whose buckets are noted as their reduction begins: events until then, and the parameters."""
    model = build(depth=6).train()
    with fake_cuda.moved_data():  # the ranks are compared by what was written to the device
        wrapped = DistributedDataParallel(model, bucket_cap_mb=2, **options)

    def reduce(_, bucket):
        seen.append((launched(), [id(parameter) for parameter in bucket.parameters()]))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, reduce)
    return wrapped


def step(wrapped, x):
    wrapped.zero_grad(set_to_none=True)
    with precision(torch.bfloat16):
        outputs = wrapped(x)
    loss = sum(output.sum() for output in outputs)
    before = launched()
    loss.backward()
    return before, launched()


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
@pytest.mark.filterwarnings("error:Grad strides do not match")
def test_buckets_are_reduced_while_other_spans_run(group, options, monkeypatch):
    monkeypatch.setattr(spans, "MOST_REDUCED_GRADIENTS", 2 << 20)
    seen = []
    wrapped = wrapped_model(seen, **options)
    model, x = wrapped.module, images(wrapped.module)
    with fake_cuda.moved_data():  # and so are the buckets when the second step makes them anew
        plan_it(lambda: step(wrapped, x))
    assert len(only_plan(model)._spans) == 6
    seen.clear()
    limits = []
    planned = recorded(lambda: limits.extend(step(wrapped, x)))
    (start, end), (begun, buckets) = limits, zip(*seen, strict=True)
    assert len(buckets) >= 5 and sum(map(len, buckets)) == len(list(model.parameters()))
    # Of the backward pass: how far it was when each reduction began.
    done = [(count - start) / (end - start) for count in begun]
    assert done == sorted(done) and done[0] < 0.35 and len({share for share in done if share < 0.9}) >= 3
    assert all(parameter.grad is not None for parameter in model.parameters())
    seen.clear()
    ops = unplanned(monkeypatch, lambda: step(wrapped, x))
    assert [bucket for _, bucket in seen] == list(buckets)
    ours = lambda events: [event for event in of_parameters(events, model) if event.kind in ("triton_launch", "gemm")]  # noqa: E731
    assert ours(unmerged(planned, ops)) == ours(ops)
    only_plan(model)


def test_each_bucket_of_checkpointed_blocks_is_reduced_once_a_step(group, monkeypatch):
    """Also in the step that makes their plans by a run of its own."""
    seen = []
    wrapped = wrapped_model(seen)
    model, x = wrapped.module, images(wrapped.module)
    model.set_grad_checkpointing()
    with fake_cuda.moved_data():
        step(wrapped, x)
        for _ in range(3):
            seen.clear()
            step(wrapped, x)
            reduced = [parameter for _, bucket in seen for parameter in bucket]
            assert sorted(reduced) == sorted(map(id, model.parameters()))
        assert [[type(entry) for entry in plans(block)] for block in model.blocks] == [[TrainingPlan]] * 6
        planned = own_work(recorded(lambda: step(wrapped, x)), model)
        expected = without_unread(own_work(unplanned(monkeypatch, lambda: step(wrapped, x)), model))
        assert unmerged(planned, expected) == expected


def test_spans_are_those_of_a_process_group_only_while_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "MOST_REDUCED_GRADIENTS", 2 << 20)
    model = build(depth=4).train()
    x, counts = images(model), []

    def planned_spans():
        plan_it(lambda: outputs_step(model, x, torch.bfloat16))
        ran = []
        with monkeypatch.context() as patch:
            call = TrainingPlan.__call__
            patch.setattr(TrainingPlan, "__call__", lambda plan, x: ran.append(len(plan._spans)) or call(plan, x))
            outputs_step(model, x, torch.bfloat16)
        counts.append(*ran)

    planned_spans()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        planned_spans()
    finally:
        dist.destroy_process_group()
    planned_spans()
    assert counts == [1, 4, 1] and len(plans(model)) == 2
