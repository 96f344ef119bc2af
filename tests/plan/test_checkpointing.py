"""Blocks that PyTorch checkpoints run from plans, forward and in the recomputation. On the fake runtime."""

import contextlib
import functools
import gc
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, set_checkpoint_early_stop

import fastdeit
from fastdeit.blocks.snapshot import KEY
from fastdeit.plan import planned as planning
from fastdeit.plan.planned import Plan, described
from fastdeit.plan.span import SpanPlan
from fastdeit.plan.training import TrainingPlan
from tests.plan import models as whole_models
from tests.plan.events import (
    WithoutPlans,
    dataflow,
    of_parameters,
    precision,
    recorded,
    requested_bytes,
    reset_peak,
    unmerged,
)
from tests.plan.models import needs_plans, plan_it, plans
from tests.plan.test_blocks import (
    block_and_tokens,
    blocks_of,
    build,
    called,
    hugging_faces,
    output,
    planned_kinds,
    step,
)
from tests.plan.test_training import Looks, keep_apart, unplanned

pytestmark = [pytest.mark.fake_device, needs_plans]


def checkpointed_model(name="ViT", memory="usual", reentrant=False, **options):
    model = build(name, memory=memory).train()
    if name.startswith("timm"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant, **options})
    return model


def without_unread(events, memory="usual"):
    """Without what nothing reads: the products with which the recomputation of a block ends, right before its backward. Of lean
    memory's MLP backward reads the input alone."""
    kept = list(events)
    for at in reversed(range(1, len(kept) - 1)):
        before, event, after = kept[at - 1 : at + 2]
        backward = after.kind == "gemm" or after.name == "fold_forward_kernel"
        if "activation_forward" in before.name and event.kind == "gemm" and backward:
            del kept[at - (2 if memory == "lean" else 0) : at + 1]
    return kept


def without_casts(events):
    """Without the casts to bf16, of which one moves: autograd casts what enters a block's last addition before it asks for what the
    block has saved, a plan afterwards."""
    kept = [event for event in events if "bfloat16_copy" not in event.name]
    return kept, len(events) - len(kept)


def as_ops(planned, ops):
    """`without_casts` of a plan's events, in which launches that stand for two are split."""
    kept, casts = without_casts(planned)
    return unmerged(kept, without_casts(ops)[0]), casts


def ops_step(monkeypatch, call):
    """The events of call() without plans, after one that compiles kernels."""
    unplanned(monkeypatch, call)
    return unplanned(monkeypatch, call)


def in_each(blocks, x):
    for block in blocks:
        x = checkpoint(functools.partial(called, block), x, use_reentrant=False)
    return x


def in_one(blocks, x):
    return checkpoint(lambda y: functools.reduce(lambda z, block: called(block, z), blocks, y), x, use_reentrant=False)


def nested(blocks, x):
    return checkpoint(lambda y: in_each(blocks, y).sin(), x, use_reentrant=False)


def without_early_stop(blocks, x):
    with set_checkpoint_early_stop(False):
        return in_each(blocks, x)


def inside_save_on_cpu(blocks, x):
    with torch.autograd.graph.save_on_cpu():
        return in_each(blocks, x)


RUNS = {  # with the number of products that the recomputation leaves out
    "each": (in_each, 2),
    "no early stop": (without_early_stop, 0),
    "both in one": (in_one, 1),
    "nested": (nested, 2),
    "saved on the CPU around": (inside_save_on_cpu, 2),
}


def gradients(run, blocks, x, autocast=None, retain=False):
    with precision(autocast):
        made = run(blocks, x)
    wanted, given = [x, *(p for block in blocks for p in block.parameters())], torch.ones_like(made)
    first = torch.autograd.grad(made, wanted, given, retain_graph=retain)
    return made, first, torch.autograd.grad(made, wanted, given) if retain else None


@pytest.mark.parametrize("retain", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("run", RUNS)
def test_a_plan_launches_what_the_ops_launch_on_the_same_tensors(run, retain, monkeypatch):
    model, (forward, unread) = build("ViT", torch.bfloat16), RUNS[run]
    blocks, x = blocks_of(model), torch.zeros(2, 17, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    keep_apart(monkeypatch)
    for _ in range(2):
        gradients(forward, blocks, x)
    assert planned_kinds(model) == [[TrainingPlan]] * 2
    planned = recorded(lambda: gradients(forward, blocks, x, retain=retain))
    monkeypatch.undo()
    with WithoutPlans():
        ops = recorded(lambda: gradients(forward, blocks, x, retain=retain))
    expected = without_unread(ops)
    assert len(ops) - len(expected) == unread * (2 if retain else 1)
    assert dataflow(planned) == dataflow(expected)
    assert of_parameters(planned, model) == of_parameters(expected, model)


def images_step(model, call=None):
    """A step of a timm model, called as `call` says."""
    model.zero_grad(set_to_none=True)
    x = whole_models.images(model)
    with precision(torch.bfloat16):
        outputs = model(x) if call is None else call(model, x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(output.square().sum() for output in outputs).backward()


def whole(model, x):
    return checkpoint(model, x, use_reentrant=False)


MODELS = {
    "transformers": ("ViT", "usual"),
    "timm": ("timm", "usual"),
    "lean": ("ViT", "lean"),
    "LayerScale": ("timm with LayerScale", "usual"),
    "drop path": ("timm with drop path", "usual"),
    "both": ("timm with both", "usual"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_step_launches_what_the_ops_launch(case, monkeypatch):
    name, memory = MODELS[case]
    model = checkpointed_model(name, memory)
    one = functools.partial(step, model)
    plan_it(one)
    assert planned_kinds(model) == [[TrainingPlan]] * 2
    assert {line.rpartition(": ")[2] for block in blocks_of(model) for line in described(block)} == {"planned"}
    offset, starts = torch.cuda.default_generators[0].get_offset, []
    starts.append(offset())
    planned = of_parameters(recorded(one), model)
    starts.append(offset())
    ops = of_parameters(unplanned(monkeypatch, one), model)
    expected = without_unread(ops, memory)
    assert as_ops(planned, expected) == without_casts(expected)
    assert offset() - starts[1] == starts[1] - starts[0] and (starts[1] > starts[0]) is (case in ("drop path", "both"))


def test_the_blocks_of_a_model_that_is_planned_as_a_whole_otherwise(monkeypatch):
    model = whole_models.build().train()
    model.set_grad_checkpointing()
    plan_it(lambda: images_step(model))
    assert planned_kinds(model) == [[TrainingPlan]] * 2
    planned = of_parameters(recorded(lambda: images_step(model)), model)
    ops = without_unread(of_parameters(ops_step(monkeypatch, lambda: images_step(model)), model))
    assert as_ops(planned, ops) == without_casts(ops)


@pytest.mark.parametrize("drop_path", ["mask", "skip"])
def test_the_recomputation_of_a_whole_model_draws_what_forward_drew(drop_path, monkeypatch):
    model = whole_models.build(drop_path_rate=0.6, drop_path=drop_path, depth=3).train()
    generator = torch.cuda.default_generators[0]

    def drawn(call):
        before = generator.get_offset()
        call()
        return generator.get_offset() - before

    one = functools.partial(images_step, model, whole)
    counts = [drawn(one) for _ in range(3)]  # the second rehearses
    assert len(set(counts)) == 1 and counts[0] > 0
    assert [type(entry) for entry in plans(model)] == [TrainingPlan]
    planned = own_work(recorded(one), model)
    ops = own_work(ops_step(monkeypatch, one), model)
    planned = unmerged(planned, ops)
    unread = next(at for at, pair in enumerate(zip(planned, ops, strict=False)) if pair[0] != pair[1])
    assert [event.name for event in ops[unread : unread + 2]] == ["fold_forward_kernel", HEADS]
    assert planned == ops[:unread] + ops[unread + 2 :]


HEADS = "cublasLtMatmul tn 1000x2x192 type 14"  # the product that gives both heads' logits


def own_work(events, model):
    """Kernels and products, without what PyTorch's operations launch."""
    return [event for event in of_parameters(events, model) if event.kind in ("triton_launch", "gemm")]


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_first_steps_launch_what_the_ops_launch(reentrant, monkeypatch):
    model = checkpointed_model(reentrant=reentrant)
    one = functools.partial(step, model)
    ops = of_parameters(ops_step(monkeypatch, one), model)
    steps = [of_parameters(recorded(one), model) for _ in range(4)]
    assert planned_kinds(model) == ([[Plan, TrainingPlan]] if reentrant else [[TrainingPlan]]) * 2
    assert steps[0] == ops
    if reentrant:  # one call without gradients, and one with them inside of the backward pass
        assert [unmerged(events, ops) for events in steps[1:]] == [ops] * 3
        return
    expected = without_unread(ops)
    assert as_ops(steps[2], expected) == as_ops(steps[3], expected) == without_casts(expected)
    # At the second step each block is rehearsed before it runs.
    rehearsed = iter(steps[1])
    assert all(any(event == other for other in rehearsed) for event in steps[2]) and len(steps[1]) > len(steps[2])


def test_a_forward_pass_between_another_one_and_its_backward_pass(monkeypatch):
    """The second forward pass makes the plans. The first one ran by ops, and so does its recomputation."""

    def interleaved():
        losses = []

        def forward():
            with precision(torch.bfloat16):
                losses.append(output(model).square().sum())

        for _ in range(2):
            forward()
        model.zero_grad(set_to_none=True)
        return [own_work(recorded(loss.backward), model) for loss in losses]  # without additions to gradients

    model = checkpointed_model()
    with monkeypatch.context() as patch:
        patch.setattr(planning, "why_not_plannable", lambda _: "a test")
        interleaved()
        first, second = interleaved()
    assert len(without_unread(second)) == len(second) - 2
    for _ in range(2):
        found = interleaved()
        assert planned_kinds(model) == [[TrainingPlan]] * 2
        expected = [first, without_unread(second)]
        assert [unmerged(*pair) for pair in zip(found, expected, strict=True)] == expected
        first = without_unread(first)  # by then there are plans


def checkpointed_block():
    """A block with a plan, its input, and a function that calls it in a checkpoint."""
    block, x = block_and_tokens("ViT", torch.bfloat16)
    for _ in range(2):
        gradients(in_each, [block], x)
    assert [type(entry) for entry in plans(block)] == [TrainingPlan]
    return block, x, functools.partial(in_each, [block])


CHANGES_BETWEEN = {
    "nothing": lambda block: None,
    "another mode": lambda block: block.eval() and None,
    "other plans": lambda block: block.__dict__[KEY].made[1].kinds.clear(),
    "an attribute": lambda block: setattr(block, "of_the_user", 1),
    "a dispatch mode": lambda block: Looks(),
    "another backend": lambda block: fastdeit.use_backend("triton"),
}


@pytest.mark.parametrize("change", CHANGES_BETWEEN)
def test_the_recomputation_runs_from_the_plan_of_its_forward_pass(change):
    block, x, call = checkpointed_block()

    def backward(made):
        return recorded(lambda: torch.autograd.grad(made, [x, *block.parameters()], torch.ones_like(made)))

    expected, made = of_parameters(backward(call(x)), block), call(x)
    with CHANGES_BETWEEN[change](block) or contextlib.nullcontext():
        assert of_parameters(backward(made), block) == expected


def test_a_parameter_may_be_frozen_before_the_recomputation():
    block, x, call = checkpointed_block()
    made, frozen = call(x), block.mlp.fc1.weight.requires_grad_(False)
    made.sum().backward()
    assert frozen.grad is None and x.grad is not None


def test_calls_of_one_block_inside_of_a_checkpoint_repeat_each_their_own():
    block, x, _ = checkpointed_block()
    ran = []

    def twice(x):
        with torch.device("cuda"):  # by ops
            x = called(block, x)
        return called(block, x)

    with pytest.MonkeyPatch.context() as patch:
        for method in ("__call__", "recompute"):
            original = getattr(TrainingPlan, method)
            patch.setattr(TrainingPlan, method, lambda *args, run=original, name=method: ran.append(name) or run(*args))
        made = checkpoint(twice, x, use_reentrant=False)
        for retain in (True, False):
            made.sum().backward(retain_graph=retain)
    assert ran == ["__call__", "recompute", "recompute"]


def test_tokens_may_come_back_at_an_address_that_is_not_aligned(monkeypatch):
    _, x, call = checkpointed_block()
    seen, run = [], SpanPlan.recompute
    monkeypatch.setattr(SpanPlan, "recompute", lambda plan, x: seen.append(x.data_ptr() % 16) or run(plan, x))

    def elsewhere(packed):
        return x.new_empty(packed.numel() + 1)[1:].view_as(packed).copy_(packed).requires_grad_()

    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach(), elsewhere):
        made = call(x)
    made.sum().backward()
    assert seen == [0]


def test_a_recomputation_that_is_not_of_its_forward_pass_is_noticed():
    """PyTorch itself compares nothing here."""
    block, x, _ = checkpointed_block()
    with torch.device("cuda"):
        other = blocks_of(fastdeit.accelerate(hugging_faces(intermediate_size=384).bfloat16()))[1]
    for _ in range(2):
        gradients(in_each, [other], x)
    assert [type(entry) for entry in plans(other)] == [TrainingPlan]

    def backward(forward, recomputation):
        calls = []

        def first_one_then_the_other(x):
            calls.append(x)
            return functools.reduce(lambda y, each: called(each, y), forward if len(calls) == 1 else recomputation, x)

        checkpoint(first_one_then_the_other, x, use_reentrant=False, determinism_check="none").sum().backward()

    with pytest.raises(RuntimeError, match="ViTLayer runs fused in the recomputation, but did not in the forward pass"):
        backward([block], [other])
    with pytest.raises(RuntimeError, match="the recomputation of a block differs from its forward pass"):
        backward([block, other], [other, block])


def keeping_products():
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


def on_the_cpu(block, x):
    with torch.autograd.graph.save_on_cpu():
        return called(block, x)


LOOKED_ON = {
    "selective": lambda block, x: checkpoint(
        functools.partial(called, block), x, use_reentrant=False, context_fn=keeping_products
    ),
    "debugged": lambda block, x: checkpoint(functools.partial(called, block), x, use_reentrant=False, debug=True),
    "saved on the CPU inside": lambda block, x: checkpoint(
        functools.partial(on_the_cpu, block), x, use_reentrant=False
    ),
    "not contiguous": lambda block, x: in_each([block], x.transpose(1, 2).contiguous().transpose(1, 2)),
}


@pytest.mark.parametrize("call", LOOKED_ON)
def test_where_something_else_looks_on_the_ops_run(call, monkeypatch):
    block, x, _ = checkpointed_block()
    for method in ("__call__", "recompute"):
        monkeypatch.setattr(TrainingPlan, method, lambda *_: pytest.fail("the plan ran"))
    for _ in range(3):
        made = LOOKED_ON[call](block, x)
        torch.autograd.grad(made, [x, *block.parameters()], torch.ones_like(made))


def test_a_plan_of_tokens_that_are_not_contiguous_does_not_run_in_a_checkpoint(monkeypatch):
    block, x = block_and_tokens("ViT", torch.bfloat16)
    transposed = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for _ in range(2):
        torch.autograd.grad(called(block, transposed), transposed, torch.ones_like(x))
    assert [type(entry) for entry in plans(block)] == [TrainingPlan]
    monkeypatch.setattr(TrainingPlan, "__call__", lambda *_: pytest.fail("the plan ran"))
    in_each([block], transposed).sum().backward()


def test_contiguous_tokens_may_come_back_with_other_strides():
    def in_copies(blocks, x):
        copy = functools.partial(torch.clone, memory_format=torch.contiguous_format)
        with torch.autograd.graph.saved_tensors_hooks(copy, lambda packed: packed):
            return in_each(blocks, x)

    block, _ = block_and_tokens("ViT", torch.bfloat16)
    x = torch.zeros(1, 20, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)[:, :17]
    for _ in range(3):
        gradients(in_copies, [block], x)
    assert x.is_contiguous() and x.stride() != x.clone(memory_format=torch.contiguous_format).stride()
    assert [type(entry) for entry in plans(block)] == [TrainingPlan]


@pytest.mark.parametrize("forward", [in_each, in_one])
def test_backward_alone_has_the_workspaces_of_a_recomputation(forward, monkeypatch):
    """So that it gives each back before it is through."""
    block, x, _ = checkpointed_block()
    owners, backward = [], SpanPlan.backward

    def watched(plan, saved, received):
        owners.extend((each._use_count(), sys.getrefcount(each)) for each in saved)
        return backward(plan, saved, received)

    monkeypatch.setattr(SpanPlan, "backward", watched)
    gradients(forward, [block], x)
    assert owners == [(1, 3)] * len(owners) and len(owners) == 3  # by the list, and by the two names here


def test_tokens_that_are_not_contiguous_say_so():
    block, x = block_and_tokens("ViT", torch.bfloat16)
    for _ in range(3):
        gradients(lambda blocks, x: LOOKED_ON["not contiguous"](block, x), [block], x)
    assert plans(block) == ["checkpointed tokens that are not contiguous"]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_nothing_is_rehearsed_in_anomaly_mode_or_inside_a_backward_pass():
    block, x = block_and_tokens("ViT", torch.bfloat16)
    call = functools.partial(in_each, [block])
    for _ in range(3):
        with torch.autograd.detect_anomaly():
            call(x).sum().backward()
    assert plans(block) == []
    for _ in range(3):  # the outer checkpoint's recomputation calls the inner one with gradients for the first time
        checkpoint(call, x, use_reentrant=True).sum().backward()
    assert [type(entry) for entry in plans(block)] == [Plan, str] and "called once" in described(block)[1]


def test_hooks_on_parameters_see_the_gradients_of_steps_alone():
    model, seen = checkpointed_model(), []
    weight = blocks_of(model)[0].mlp.fc1.weight
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.shape))
    for steps in range(1, 4):
        step(model)
        assert seen == [weight.shape] * steps
    assert planned_kinds(model) == [[TrainingPlan]] * 2
    model, seen = checkpointed_model(), []
    weight = blocks_of(model)[0].mlp.fc1.weight
    weight.register_hook(lambda gradient: seen.append(gradient.shape))
    for steps in range(1, 4):
        step(model)
        assert seen == [weight.shape] * steps
    assert plans(blocks_of(model)[0]) == ["a hook is registered on a parameter"]


def test_hooks_on_tokens_see_the_gradients_of_steps_alone():
    block, x = block_and_tokens("ViT", torch.bfloat16)
    tokens, seen = x.sin(), []
    tokens.register_hook(lambda gradient: seen.append(gradient.shape))
    for steps in range(1, 4):
        torch.autograd.grad(in_each([block], tokens), x, torch.ones_like(x), retain_graph=True)
        assert seen == [x.shape] * steps
    assert [type(entry) for entry in plans(block)] == [TrainingPlan]


MOST_MEMORY = {1: 1.03, 64: 1.01}  # of a step from plans, and of the one that rehearses, times that of the ops


@pytest.mark.parametrize("batch", MOST_MEMORY)
@pytest.mark.parametrize("dtype, autocast", [(None, torch.bfloat16), (torch.bfloat16, None)])
def test_a_step_takes_no_more_memory_than_the_ops(dtype, autocast, batch, monkeypatch):
    model = whole_models.build(dtype=dtype, depth=12, img_size=224).train()
    model.set_grad_checkpointing()
    x = torch.zeros(batch, 3, 224, 224, device="cuda", dtype=dtype)

    def peak():
        model.zero_grad(set_to_none=True)
        reset_peak()
        before = requested_bytes()
        with precision(autocast):
            outputs = model(x)
        sum(output.square().sum() for output in outputs).backward()
        return requested_bytes("peak") - before

    peak()
    gc.collect()
    at_rest = requested_bytes()
    rehearsed, planned = peak(), peak()
    assert planned_kinds(model) == [[TrainingPlan]] * 12 and requested_bytes() == at_rest
    monkeypatch.setattr(planning, "why_not_plannable", lambda _: "a test")
    ops = peak()
    assert max(rehearsed, planned) <= MOST_MEMORY[batch] * ops
