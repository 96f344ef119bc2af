"""Calls for which memory runs out leave nothing behind, and the next ones are planned. On the fake runtime."""

import gc
from collections import Counter

import pytest
import torch

import fastdeit
from fastdeit.plan import graphs
from fastdeit.plan.planned import described
from fastdeit.plan.training import TrainingPlan
from fastdeit.testing import fake_cuda
from tests.plan import models, test_blocks
from tests.plan.actions import Program, checkpointed, infer, step
from tests.plan.memory import little_memory, memory, use_both_threads, without_old_garbage
from tests.plan.models import needs_plans, plans
from tests.plan.test_blocks import planned_kinds

pytestmark = [pytest.mark.fake_device, needs_plans]

CALLS = {
    "forward": (infer, dict(mode="no_grad")),
    "step": (step, dict(backward="once", zeros="none")),
    "step with the graph retained": (step, dict(backward="twice", zeros="none")),
    "checkpointed model": (step, dict(backward="once", zeros="none", around="checkpoint")),
    "checkpointed blocks": (step, dict(backward="once", zeros="none")),
}
BEFORE = {"op by op": 0, "recorded": 1, "made": 2, "repeated": 3}
ENOUGH = 14400  # KiB, for most of the calls
PLANNED = {"planned", "planned, launched", "gradients are checkpointed"}


def called(program, case):
    """A call in usual circumstances, of which nothing is left: how often it launched what."""
    function, options = CALLS[case]
    try:
        with fake_cuda.record("launch", "triton_launch", "gemm") as events:
            function(program, "two", torch.bfloat16, **options)
    finally:
        program.results, program.x = [], None
        program.model.zero_grad()
    return Counter(event.name for event in events)


def program_of(case):
    program = Program(models.build(drop_path_rate=0.3).train())
    if case == "checkpointed blocks":
        checkpointed(program, True)
    return program


def states(model):
    """What `explain` says of calls of the model and of its blocks."""
    modules = (model, *test_blocks.blocks_of(model))
    return {line.partition(": ")[2].removeprefix("not planned: ") for module in modules for line in described(module)}


def saved_tensor_hooks():
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


@pytest.fixture(autouse=True)
def no_graphs():
    fastdeit.set_graphs("off")
    with without_old_garbage():
        yield
    fastdeit.set_graphs()


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("case", CALLS)
def test_nothing_is_left_and_the_next_calls_are_planned(case, before):
    expected, refused = None, 0
    for small in (128, 1152, 2560, 5120, 8960):
        program = program_of(case)
        for _ in range(BEFORE[before]):
            called(program, case)
        start = memory()
        try:
            with little_memory(small, large=ENOUGH):
                called(program, case)
        except torch.OutOfMemoryError:
            refused += 1
        assert memory() == start, small
        for _ in range(4):
            launched = called(program, case)
        assert states(program.model) <= PLANNED, small
        assert launched == (expected := expected or launched), small
        assert memory() == start, small
    assert refused


@pytest.mark.parametrize("case", CALLS)
def test_a_failed_call_leaves_no_garbage_that_holds_memory_or_hooks(case):
    program = program_of(case)
    called(program, case)
    use_both_threads()
    start = torch.cuda.memory_allocated()
    gc.disable()
    try:
        for small in (128, 256, 384):
            fastdeit.restore(program.model)
            fastdeit.accelerate(program.model)  # so that the ops run
            with little_memory(small, large=ENOUGH), pytest.raises(torch.OutOfMemoryError):
                called(program, case)
            assert saved_tensor_hooks() is None, small
            if case == "forward":  # PyTorch's thread of backward passes may hold something for a while
                assert torch.cuda.memory_allocated() <= start, small
    finally:
        gc.enable()


def test_where_memory_runs_out_in_a_rehearsal_the_ops_run(monkeypatch):
    model = models.build().train()
    program = Program(model)
    checkpointed(program, True)
    ops = [called(program, "checkpointed blocks")]
    grad, failed = torch.autograd.grad, []

    def fail(*args, **kwargs):
        failed.append(args)
        raise torch.OutOfMemoryError("CUDA out of memory")

    start = memory()
    monkeypatch.setattr(torch.autograd, "grad", fail)
    called(program, "checkpointed blocks")  # each block's ops after its rehearsal
    assert len(failed) == 2 and states(model) == {"called once", "gradients are checkpointed"}
    called(program, "checkpointed blocks")
    why = "no memory for the run of its own that makes the plan"
    assert len(failed) == 4 and states(model) == {why, "gradients are checkpointed"}
    failed.clear()
    assert called(program, "checkpointed blocks") == ops[0] and not failed
    assert memory() == start
    monkeypatch.setattr(torch.autograd, "grad", grad)
    torch.nn.init.ones_(model.blocks[0].norm1.weight)
    model.blocks[0].norm1.eps = 1e-3  # what changes is looked at anew
    for _ in range(3):
        called(program, "checkpointed blocks")
    assert planned_kinds(model)[0] == [TrainingPlan]


def test_a_capture_for_which_there_is_no_memory(monkeypatch):
    monkeypatch.setattr(graphs, "_failed", None)
    fastdeit.set_graphs()
    program = Program(models.build().eval())
    for _ in range(5):
        called(program, "forward")
    (plan,) = plans(program.model)
    start = memory()
    with little_memory(3200, large=0):  # enough for the call, and not for cuBLAS's workspace in the capture
        monkeypatch.setattr(graphs, "_side", graphs._side.__wrapped__)  # as on a stream without graphs
        for _ in range(4):
            called(program, "forward")
    assert plan.graph.state.startswith("launched: no graph could be captured (CUDA out of memory")
    assert memory() == start and not torch.cuda.is_current_stream_capturing()
    assert called(program, "forward") and torch.rand(3, device="cuda") is not None
    monkeypatch.setattr(graphs, "_failed", None)
    plan.graph.drop()
    for _ in range(80):
        called(program, "forward")
    assert plan.graph.state == "captured in a graph"
