"""Blocks whose parameters FSDP2 gathers run from plans. On the fake runtime, with a process group that does nothing."""

import gc
from typing import NamedTuple

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable_state import _insert_module_state, _State
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastdeit
from fastdeit.plan import planned as planning
from fastdeit.plan.planned import Plan
from fastdeit.plan.span import SpanPlan
from fastdeit.plan.training import TrainingPlan
from tests.plan.events import of_parameters, precision, recorded, requested_bytes, reset_peak, unmerged
from tests.plan.models import needs_plans, plan_it, plans
from tests.plan.test_blocks import planned_kinds
from tests.plan.test_training import unplanned

pytestmark = [pytest.mark.fake_device, needs_plans]


@pytest.fixture(autouse=True)
def two_ranks():
    gc.collect()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def sharded(blocks_alone=False, dtype=torch.bfloat16, inside=None, **options):
    with torch.device("cuda"):
        model = fastdeit.accelerate(timm.create_model("deit_tiny_patch16_224", depth=3, img_size=64)).train()
    if inside is not None:
        model.blocks = nn.Sequential(*map(inside, model.blocks))
    mesh = dist.device_mesh.init_device_mesh("cuda", (2,))
    options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return model if blocks_alone else fully_shard(model, mesh=mesh, **options)


def images():
    return torch.zeros(2, 3, 64, 64, device="cuda")


def step(model, autocast=None):
    model.zero_grad(set_to_none=True)
    with precision(autocast):
        out = model(images())
    out.square().sum().backward()


RUNS = {
    "usual": {},
    "in fp32 under autocast": {"dtype": None},
    "kept until backward": {"reshard_after_forward": False},
    "no root": {"blocks_alone": True, "dtype": None},
}


def autocast_of(options):
    return torch.bfloat16 if options.get("dtype", 0) is None else None


@pytest.mark.parametrize("run", RUNS)
def test_every_step_launches_what_the_ops_launch(run, monkeypatch):
    model, autocast = sharded(**RUNS[run]), autocast_of(RUNS[run])
    unplanned(monkeypatch, lambda: step(model, autocast))  # compiles kernels
    first = recorded(lambda: step(model, autocast))
    ops = unplanned(monkeypatch, lambda: step(model, autocast))
    step(model, autocast)  # rehearses
    assert planned_kinds(model) == [[TrainingPlan]] * 3
    assert without_memory(first) == without_memory(ops)
    for _ in range(3):
        assert without_memory(unmerged(recorded(lambda: step(model, autocast)), ops)) == without_memory(ops)


def without_memory(events):
    """Names and sizes of what was launched."""
    return [event._replace(arguments=()) for event in events]


class Holder(NamedTuple):
    """Tensors by name, as `of_parameters` reads them of a module."""

    tensors: dict

    def state_dict(self, keep_vars):
        return self.tensors


def block_step(model):
    x = torch.zeros(2, 17, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    model.blocks(x).square().sum().backward()


def launches_of_passes(call, names, monkeypatch):
    """For each pass of a block's plan in a step, its launches with the names of the block's parameters, and where those were."""
    found = []

    def watched(method):
        def run(plan, *args):
            made = []
            events = recorded(lambda: made.append(method(plan, *args)))
            held = {names[id(parameter)]: parameter for parameter in plan.learned}
            found.append((of_parameters(events, Holder(held)), tuple(p.data_ptr() for p in plan.learned)))
            return made[0]

        return run

    with monkeypatch.context() as patch:
        for method in ("forward", "backward"):
            patch.setattr(SpanPlan, method, watched(getattr(SpanPlan, method)))
        call()
    return found


def named(model):
    """Names of the blocks' parameters by their ids, filled by calls: only then those that blocks read are there."""
    names = {}
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda block, _: names.update({id(parameter): name for name, parameter in block.named_parameters()})
        )
    return names


def test_the_launches_of_each_pass_read_the_parameters_where_they_are(monkeypatch):
    with torch.device("cuda"):
        plain = timm.create_model("deit_tiny_patch16_224", depth=3, img_size=64).train().bfloat16()
    fastdeit.accelerate(plain)
    names = named(plain)
    plan_it(lambda: block_step(plain))
    expected = [events for events, _ in launches_of_passes(lambda: block_step(plain), names, monkeypatch)]
    assert len(expected) == 6
    for events in expected:
        assert any(isinstance(each, tuple) for event in events for each in event.arguments)
    model = sharded(reshard_after_forward=True)
    names = named(model)
    plan_it(lambda: step(model))
    kept, alloc_storage = [], _fsdp_param.alloc_storage

    def elsewhere(tensor):
        kept.append(torch.empty(tensor.nbytes, dtype=torch.uint8, device="cuda"))  # where it would have been
        alloc_storage(tensor)

    monkeypatch.setattr(_fsdp_param, "alloc_storage", elsewhere)
    places = []
    for _ in range(3):
        passes = launches_of_passes(lambda: step(model), names, monkeypatch)
        assert [events for events, _ in passes] == expected
        places += [where for _, where in passes]
    assert len(set(places)) == len(places) == 18


def test_a_forward_pass_without_gradients_reads_the_parameters_where_they_are(monkeypatch):
    model = sharded()

    def call():
        with torch.no_grad():
            model(images())

    unplanned(monkeypatch, call)
    ops = without_memory(unplanned(monkeypatch, call))
    plan_it(call)
    assert planned_kinds(model) == [[Plan]] * 3
    assert without_memory(recorded(call)) == ops
    found, launch = [], Plan.launch

    def watched(plan, x):
        made = []
        events = recorded(lambda: made.append(launch(plan, x)))
        held = {str(number): parameter for number, parameter in enumerate(plan._gathered)}
        found.append(of_parameters(events, Holder(held)))
        return made[0]

    monkeypatch.setattr(Plan, "launch", watched)
    alloc_storage, kept = _fsdp_param.alloc_storage, []
    monkeypatch.setattr(
        _fsdp_param, "alloc_storage", lambda t: kept.append(torch.empty(t.nbytes, device="cuda")) or alloc_storage(t)
    )
    call()
    call()
    assert len(found) == 6 and all(events == found[0] for events in found)
    assert {argument[0] for event in found[0] for argument in event.arguments if isinstance(argument, tuple)} >= {"0"}


def test_gradients_that_are_not_synchronized_accumulate(monkeypatch):
    model = sharded()

    def two_steps():
        model.zero_grad(set_to_none=True)
        for last in (False, True):
            model.set_requires_gradient_sync(last)
            model(images()).square().sum().backward()

    unplanned(monkeypatch, two_steps)
    ops = unplanned(monkeypatch, two_steps)
    plan_it(two_steps)
    assert planned_kinds(model) == [[TrainingPlan]] * 3
    planned = recorded(two_steps)
    assert sorted(without_memory(planned)) == sorted(without_memory(ops))  # a block's gradients are added together
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("outside", [False, True])
def test_checkpointed_blocks(outside, monkeypatch):
    """The checkpoint around the sharded block, which the recomputation gathers again, or inside of what is sharded."""
    model = sharded(inside=None if outside else checkpoint_wrapper)
    model.set_grad_checkpointing(outside)
    unplanned(monkeypatch, lambda: step(model))
    ops = unplanned(monkeypatch, lambda: step(model))
    plan_it(lambda: step(model))
    assert planned_kinds(model) == [[TrainingPlan]] * 3
    missing = without_memory(ops)
    for event in without_memory(recorded(lambda: step(model))):
        missing.remove(event)
    assert [event.kind for event in missing] == ["gemm"] * 3


def test_a_model_that_is_sharded_as_a_whole_has_no_plan_and_others_have():
    with torch.device("cuda"):
        model, other = (
            fastdeit.accelerate(timm.create_model("deit_tiny_patch16_224", depth=2, img_size=64)) for _ in range(2)
        )
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cuda", (2,)))
    for each in (model, other):
        plan_it(lambda each=each: step(each, torch.bfloat16))
    assert not any(isinstance(entry, TrainingPlan) for entry in plans(model))
    assert [type(entry) for entry in plans(other)] == [TrainingPlan]


class Managed(_State):
    pass


def test_nothing_is_planned_beside_an_api_that_is_not_followed():
    with torch.device("cuda"):
        model = fastdeit.accelerate(timm.create_model("deit_tiny_patch16_224", depth=2, img_size=64))
    managed, state = nn.Linear(4, 4), Managed()
    _insert_module_state(managed, state)
    plan_it(lambda: step(model, torch.bfloat16))
    assert not plans(model)


def test_a_step_takes_no_more_memory_than_the_ops(monkeypatch):
    model = sharded()

    def peak():
        model.zero_grad(set_to_none=True)
        reset_peak()
        before = requested_bytes()
        step(model)
        return requested_bytes("peak") - before

    peak()
    rehearsed, planned = peak(), peak()
    assert planned_kinds(model) == [[TrainingPlan]] * 3
    monkeypatch.setattr(planning, "why_not_plannable", lambda _: "a test")
    ops = peak()
    assert planned <= 1.02 * ops and rehearsed <= 1.02 * ops
