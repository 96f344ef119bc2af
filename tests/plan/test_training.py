"""Plans with gradients launch what the ops launch, forward and backward, on the same tensors. On the fake runtime."""

import copy
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdeit
from fastdeit import ops
from fastdeit.blocks import spans
from fastdeit.blocks.snapshot import looked_at
from fastdeit.plan import planned as planning
from fastdeit.plan import span as span_plans
from fastdeit.plan.planned import described
from fastdeit.plan.training import TrainingPlan
from fastdeit.testing import fake_cuda
from tests.plan.changes import CHANGES, replaced_data, transposed_data
from tests.plan.events import (
    KINDS,
    WithoutPlans,
    addresses,
    dataflow,
    of_parameters,
    precision,
    recorded,
    requested_bytes,
    reset_peak,
    unmerged,
)
from tests.plan.models import MODEL, PLAIN, apart, build, images, needs_plans, only_plan, plan_it, plans

pytestmark = [pytest.mark.fake_device, needs_plans]


def step(model, x, autocast=None, set_to_none=True):
    model.zero_grad(set_to_none=set_to_none)
    with precision(autocast):
        outputs = model(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(output.square().sum() for output in outputs)
    loss.backward()  # from contiguous gradients, as a plan receives them


def outputs_step(model, x, autocast=None):
    """Logits, or prefix tokens where the heads are called, and gradients from tensors of their own, all kept by the caller."""
    with precision(autocast):
        made = model._planned(looked_at(model), x)
    made = made if isinstance(made, tuple) else (made,)
    wanted = [p for p in (x, *model.parameters()) if p.requires_grad]
    return made, torch.autograd.grad(made, wanted, list(map(torch.ones_like, made)), allow_unused=True)


def unplanned(monkeypatch, call):
    """The events of call() without plans."""
    with monkeypatch.context() as patch:
        patch.setattr(planning, "why_not_plannable", lambda _: "a test")
        return recorded(call)


def keep_apart(monkeypatch):
    """No two buffers of a plan share memory."""
    monkeypatch.setattr(span_plans, "packed", apart)
    monkeypatch.setattr(span_plans, "packed_into", lambda lives, _, allocations: ([{} for _ in allocations], lives))


def freeze(model, *names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(names))


CASES = {
    "distilled": (MODEL, None, torch.bfloat16, {}),
    "bf16": (MODEL, torch.bfloat16, None, {}),
    "class token": (PLAIN, None, torch.bfloat16, {}),
    "registers": (PLAIN, torch.bfloat16, None, dict(reg_tokens=3)),
    "LayerScale": (PLAIN, None, torch.bfloat16, dict(init_values=0.1)),
    "LayerScale in bf16": (PLAIN, torch.bfloat16, None, dict(init_values=0.1)),
    "fp16": (PLAIN, None, torch.float16, {}),
    "no qkv bias": (PLAIN, None, torch.bfloat16, dict(qkv_bias=False)),
    "drop path": (MODEL, None, torch.bfloat16, dict(drop_path_rate=0.3)),
    "drop path and LayerScale in bf16": (PLAIN, torch.bfloat16, None, dict(drop_path_rate=0.3, init_values=0.1)),
    "LayerScale in fp16": (PLAIN, None, torch.float16, dict(init_values=0.1)),
    "drop path and LayerScale in fp16": (PLAIN, torch.float16, None, dict(drop_path_rate=0.3, init_values=0.1)),
    "drop path that skips": (MODEL, None, torch.bfloat16, dict(drop_path_rate=0.6, drop_path="skip", depth=3)),
    "drop path that skips, and LayerScale": (
        PLAIN,
        None,
        torch.bfloat16,
        dict(drop_path_rate=0.6, drop_path="skip", depth=3, init_values=0.1),
    ),
    "drop path that skips, and LayerScale in fp16": (
        PLAIN,
        torch.float16,
        None,
        dict(drop_path_rate=0.6, drop_path="skip", depth=3, init_values=0.1),
    ),
    "drop path that skips, in bf16": (PLAIN, torch.bfloat16, None, dict(drop_path_rate=0.6, drop_path="skip", depth=3)),
    "lean": (MODEL, None, torch.bfloat16, dict(memory="lean")),
    "frozen blocks": (MODEL, None, torch.bfloat16, {}),
    "frozen biases": (MODEL, torch.bfloat16, None, {}),
    "distilled training": (MODEL, None, torch.bfloat16, {}),
    "distilled training in bf16": (MODEL, torch.bfloat16, None, {}),
    "a head that is called": (MODEL, None, torch.bfloat16, {}),
    "heads alone": (MODEL, torch.bfloat16, None, {}),
}
FROZEN = {
    "frozen blocks": ("blocks.0", "patch", "pos", "cls", "dist"),
    "frozen biases": ("blocks.1.mlp.fc1.b",),
    "heads alone": ("blocks", "patch", "pos", "cls", "dist", "norm"),
}
# Of a step from a plan, times that of the ops, by the batch size. With one image most memory is that of gradients, and a span
# holds its workspaces a little longer than the ops their tensors.
MOST_MEMORY = {1: 1.25, 64: 1.05}
ONE_SPAN = ("distilled", "LayerScale in bf16")  # the others have one for each block


@pytest.mark.parametrize("case", CASES)
def test_a_plan_launches_what_the_ops_launch_on_the_same_tensors(case, monkeypatch):
    name, dtype, autocast, options = CASES[case]
    model = build(name, dtype, **options).train()
    x = images(model)
    freeze(model, *FROZEN.get(case, ("?",)))
    if case.startswith("distilled training"):
        model.set_distilled_training()
    if case == "a head that is called":
        model.head.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(spans, "MOST_GRADIENTS", spans.MOST_GRADIENTS if case in ONE_SPAN else 0)
    keep_apart(monkeypatch)
    offset = torch.cuda.default_generators[0].get_offset
    for _ in range(2):
        outputs_step(model, x, autocast)
    only_plan(model)
    start = offset()
    planned = recorded(lambda: outputs_step(model, x, autocast))
    monkeypatch.undo()
    drawn, start = offset() - start, offset()
    with WithoutPlans():
        ops = recorded(lambda: outputs_step(model, x, autocast))
    planned = unmerged(planned, ops)
    assert len(planned) > (30 if case == "heads alone" else 40) and dataflow(planned) == dataflow(ops)
    assert of_parameters(planned, model) == of_parameters(ops, model)
    assert drawn == offset() - start and (drawn > 0) is ("drop path" in case)


@pytest.mark.parametrize("dtype, autocast", [(None, torch.bfloat16), (torch.bfloat16, None)])
def test_a_step_has_the_launches_of_the_ops(dtype, autocast, monkeypatch):
    model = build(dtype=dtype).train()
    x = images(model)
    plan_it(lambda: step(model, x, autocast))
    only_plan(model)
    planned = recorded(lambda: step(model, x, autocast))
    ops = unplanned(monkeypatch, lambda: step(model, x, autocast))
    assert of_parameters(unmerged(planned, ops), model) == of_parameters(ops, model)


def test_a_model_that_is_not_planned_says_why(monkeypatch):
    model = build(PLAIN, init_values=0.1).train()  # in fp16 LayerScale is not part of a product
    monkeypatch.setattr(ops, "linear", torch.nn.functional.linear)
    plan_it(lambda: step(model, images(model), torch.float16))
    assert described(model) == [
        "2 x 3 x 64 x 64 float32 with gradients: not planned: a matrix product outside of our ops"
    ]


CALLS = pytest.mark.parametrize("calls", [1, 2], ids=["recorded", "planned"])  # before the one that is looked at


@CALLS
def test_backward_twice_needs_the_graph_retained(calls):
    model = build(dtype=torch.bfloat16).train()
    x = images(model)
    for _ in range(calls):
        step(model, x)
    loss = sum(output.sum() for output in model(x))
    first = recorded(lambda: loss.backward(retain_graph=True))
    second = recorded(lambda: loss.backward(retain_graph=True))
    added = [event for event in of_parameters(second, model) if event.kind == "triton_launch"]
    assert (
        added == [event for event in of_parameters(first, model) if event.kind == "triton_launch"] and len(added) > 20
    )
    loss.backward()
    only_plan(model)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@CALLS
def test_a_weight_that_changes_before_the_backward_pass_is_noticed(calls):
    model = build(dtype=torch.bfloat16).train()
    x = images(model)
    for _ in range(calls):
        step(model, x)
    loss = sum(output.sum() for output in model(x))
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    step(model, x)


def planned_loss():
    """A model with a plan, and the loss of a call from it."""
    model = build(dtype=torch.bfloat16).train()
    x = images(model)
    for _ in range(2):
        step(model, x)
    only_plan(model)
    return model, sum(output.sum() for output in model(x))


def is_allocated(address):
    blocks = (block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"])
    return any(
        block["state"] == "active_allocated" and 0 <= address - block["address"] < block["size"] for block in blocks
    )


def test_a_weight_that_gets_other_data_keeps_its_memory_until_backward_has_read_it():
    model, loss = planned_loss()
    weight = model.blocks[0].mlp.fc1.weight
    before = weight.data_ptr()
    weight.data = weight.data.clone()
    assert is_allocated(before)
    loss.backward()
    del loss
    assert not is_allocated(before)


def test_a_weight_whose_memory_is_given_back_before_backward_is_noticed():
    model, loss = planned_loss()
    model.blocks[0].mlp.fc1.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory of a parameter was given back or moved"):
        loss.backward()


def test_a_backward_pass_that_another_may_follow_writes_over_nothing_that_is_kept(monkeypatch):
    model, loss = planned_loss()
    ran = []
    for span in only_plan(model)._spans:
        assert "repeatable" not in vars(span)  # made at its first use
        for name in ("once", "repeatable"):
            bound = getattr(span, name).bound
            monkeypatch.setattr(bound, "at", lambda *a, name=name, at=bound.at: ran.append(name) or at(*a))
    count = len(only_plan(model)._spans)
    loss.backward(retain_graph=True)
    assert ran == ["repeatable"] * count
    loss.backward()
    assert ran[count:] == ["once"] * count


def test_code_is_written_by_the_first_call_that_repeats_it():
    model = build(dtype=torch.bfloat16).train()
    for _ in range(2):
        step(model, images(model))
    spans = only_plan(model)._spans
    assert not any("_written" in vars(span._forward._program) or "once" in vars(span) for span in spans)
    step(model, images(model))
    assert all("_written" in vars(each._program) for span in spans for each in (span._forward, span.once.bound))


def test_gradients_are_received_as_launches_read_them():
    device, layout = torch.device("cuda", 0), ((2, 4, 8), torch.bfloat16)
    shifted = torch.empty(65, device=device, dtype=torch.bfloat16)[1:].view(2, 4, 8)
    transposed = torch.empty(2, 8, 4, device=device, dtype=torch.bfloat16).transpose(1, 2)
    given = [shifted, transposed, None, None, torch.empty(2, 4, 8, device=device, dtype=torch.bfloat16)]
    got = span_plans.received_gradients(given, [layout, layout, layout, None, layout], device)
    assert got[3] is None and got[4] is given[4]
    for gradient in (*got[:3], got[4]):
        assert gradient.is_contiguous() and gradient.data_ptr() % 16 == 0
        assert (gradient.shape, gradient.dtype) == layout


def test_two_calls_before_their_backward_passes_have_memory_of_their_own(monkeypatch):
    def interleaved():
        tokens = [model._planned(looked_at(model), x) for _ in range(2)]
        pairs, wanted = [(each, torch.ones_like(each)) for each in tokens], list(model.parameters())
        return pairs, [torch.autograd.grad(each, wanted, gradient, allow_unused=True) for each, gradient in pairs]

    model = build(dtype=torch.bfloat16).train()
    x = images(model)
    keep_apart(monkeypatch)
    for _ in range(2):
        outputs_step(model, x)
    only_plan(model)
    planned = recorded(interleaved)
    with WithoutPlans():
        ops = recorded(interleaved)
    assert dataflow(planned) == dataflow(ops)


def test_gradients_are_new_tensors():
    model = build().train()
    x = images(model)
    plan_it(lambda: step(model, x, torch.bfloat16))
    only_plan(model)
    grads = []
    for _ in range(2):
        step(model, x, torch.bfloat16)
        grads += [parameter.grad for parameter in model.parameters()]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads)
    assert all(grad.untyped_storage().nbytes() == grad.nbytes for grad in grads)


def test_gradients_accumulate_and_memory_is_given_back():
    model = build().train()
    x = images(model)
    plan_it(lambda: step(model, x, torch.bfloat16))
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        with precision(torch.bfloat16):
            outputs = model(x)
        added = recorded(lambda outputs=outputs: sum(output.sum() for output in outputs).backward())
    sums = [event for event in added if "CUDAFunctor_add" in event.name]
    assert len(sums) >= len(list(model.parameters()))
    del outputs
    assert torch.cuda.memory_allocated() == before


class GivesBack(list):
    """Workspaces: keeps those that are given back, each with the number of events until then."""

    kept: ClassVar = []

    def __setitem__(self, index, value):
        self.kept.append((sum(fake_cuda.counts()[kind] for kind in KINDS), self[index]))
        super().__setitem__(index, value)


def test_workspaces_are_not_touched_once_they_are_given_back(monkeypatch):
    monkeypatch.setattr(spans, "MOST_GRADIENTS", 0)
    model = build(depth=4).train()
    x = images(model)
    plan_it(lambda: step(model, x, torch.bfloat16))
    count = len(only_plan(model)._spans)
    allocate = span_plans.SpanPlan.allocate
    monkeypatch.setattr(span_plans.SpanPlan, "allocate", lambda plan: GivesBack(allocate(plan)))
    monkeypatch.setattr(GivesBack, "kept", [])
    before = sum(fake_cuda.counts()[kind] for kind in KINDS)
    events = recorded(lambda: step(model, x, torch.bfloat16))
    touched = [addresses(event) for event in events]
    assert len(GivesBack.kept) >= 3 * count == 12
    for until, workspace in GivesBack.kept:
        start, end = workspace.data_ptr(), workspace.data_ptr() + workspace.nbytes
        uses = [at for at, found in enumerate(touched) if any(start <= address < end for address in found)]
        assert max(uses) < until - before
    assert len({until for until, _ in GivesBack.kept}) >= 2 * count


def peaks(depth, size, batch, dtype, autocast, monkeypatch, accumulated=False):
    """The most memory that a step takes from a plan, and by the ops, beside gradients that it is to add to."""
    model = build(dtype=dtype, depth=depth, img_size=size).train()
    x = torch.zeros(batch, 3, size, size, device="cuda", dtype=model.cls_token.dtype)

    def peak():
        model.zero_grad(set_to_none=not accumulated)
        reset_peak()
        before = requested_bytes()
        step(model, x, autocast, set_to_none=not accumulated)
        return requested_bytes("peak") - before

    plan_it(lambda: step(model, x, autocast))
    only_plan(model)
    planned = peak()
    monkeypatch.setattr(planning, "why_not_plannable", lambda _: "a test")
    return planned, peak()


def relative_peak(*arguments):
    planned, ops = peaks(*arguments)
    return planned / ops


@pytest.mark.parametrize("batch", MOST_MEMORY)
@pytest.mark.parametrize("dtype, autocast", [(None, torch.bfloat16), (torch.bfloat16, None)])
def test_a_step_takes_no_more_memory_than_the_ops(dtype, autocast, batch, monkeypatch):
    assert relative_peak(6, 96, batch, dtype, autocast, monkeypatch) <= MOST_MEMORY[batch]


@pytest.mark.parametrize("most", [2, 5, 8])  # MiB, of 11 that all gradients take
def test_gradients_that_are_added_to_others_take_at_most_a_span_more(most, monkeypatch):
    monkeypatch.setattr(spans, "MOST_GRADIENTS", most << 20)
    planned, ops = peaks(6, 96, 1, None, torch.bfloat16, monkeypatch, accumulated=True)
    assert 0 < planned - ops <= most << 20


@pytest.mark.parametrize(
    "dtype, autocast, size, batch", [(None, torch.bfloat16, 96, 128), (torch.bfloat16, None, 128, 64)]
)
def test_a_span_of_one_block_gives_back_what_its_second_half_does_not_need(dtype, autocast, size, batch, monkeypatch):
    monkeypatch.setattr(spans, "MOST_GRADIENTS", 0)
    assert relative_peak(3, size, batch, dtype, autocast, monkeypatch) <= 1.01


def test_what_forward_leaves_to_backward_is_in_four_allocations():
    """However many blocks a span has."""
    model = build(dtype=torch.bfloat16, depth=6).train()
    for _ in range(3):
        step(model, images(model))
    assert [len(span.saved_sizes) for span in only_plan(model)._spans] == [4]


def test_without_backward_passes_nothing_is_recorded_for_long():
    model = build().train()
    x = images(model)
    with precision(torch.bfloat16):
        for _ in range(2 * planning.MOST_ATTEMPTS + 2):
            model(x)
    assert plans(model) == ["no backward pass follows"]


class Looks(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "context",
    [
        Looks,
        torch.autograd.detect_anomaly,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        torch.autograd.graph.save_on_cpu,
        lambda: fastdeit.use_backend("reference"),
    ],
    ids=["dispatch mode", "anomaly mode", "saved tensor hooks", "save_on_cpu", "backend"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_where_something_looks_on_the_ops_run(context, monkeypatch):
    model = build(dtype=torch.bfloat16).train()
    x = images(model)
    plan_it(lambda: step(model, x))
    plan = only_plan(model)
    monkeypatch.setattr(TrainingPlan, "__call__", lambda *_: pytest.fail("the plan ran"))
    with context():
        model(x)
    assert plan in plans(model)


def test_functional_gradients_are_the_ops():
    model = build(dtype=torch.bfloat16).train()
    x = images(model)
    plan_it(lambda: step(model, x))
    parameters = dict(model.named_parameters())
    loss = lambda p: sum(output.sum() for output in torch.func.functional_call(model, p, (x,)))  # noqa: E731
    assert torch.func.grad(loss)(parameters).keys() == parameters.keys()


@pytest.mark.parametrize("change", ["frozen", "LoRA", "other data", "a hook on a projection", "memory", "restore"])
def test_a_change_is_seen_at_the_next_step(change, monkeypatch):
    model = build().train()
    x = images(model)
    plan_it(lambda: step(model, x, torch.bfloat16))
    only_plan(model)
    change_it = CHANGES.get(change, lambda m: m.blocks[1].requires_grad_(False))
    twin = copy.deepcopy(model)
    change_it(twin)
    step(twin, x, torch.bfloat16)  # compiles kernels
    change_it(model)
    first = of_parameters(recorded(lambda: step(model, x, torch.bfloat16)), model)
    expected = of_parameters(unplanned(monkeypatch, lambda: step(model, x, torch.bfloat16)), model)
    later = [of_parameters(recorded(lambda: step(model, x, torch.bfloat16)), model) for _ in range(3)]
    assert first == expected and later[0] == expected and unmerged(later[2], expected) == expected


def test_hooks_on_gradients_run_once():
    model = build().train()
    x, seen = images(model), []
    plan_it(lambda: step(model, x, torch.bfloat16))
    weight = model.blocks[0].mlp.fc1.weight
    weight.register_hook(lambda gradient: seen.append(gradient.shape))
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.shape))
    step(model, x, torch.bfloat16)
    assert seen == [weight.shape] * 2
    model.blocks[0].norm1.eps = 1e-5  # another model, whose steps are not recorded while there is a hook
    plan_it(lambda: step(model, x, torch.bfloat16))
    assert seen == [weight.shape] * 8 and plans(model) == ["a hook is registered on a parameter"]


def test_a_dispatch_mode_around_the_backward_pass_sees_the_products_of_the_plan():
    model, loss = planned_loss()
    seen = []

    class Sees(Looks):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return super().__torch_dispatch__(func, types, args, kwargs)

    model.zero_grad()
    expected = recorded(lambda: loss.backward(retain_graph=True))
    model.zero_grad()
    with Sees():
        found = recorded(loss.backward)
    assert of_parameters(found, model) == of_parameters(expected, model) and "aten::mm" in seen


def own_work(events, model):
    """Kernels and products, without what autograd launches for gradients."""
    return [event for event in of_parameters(events, model) if event.kind in ("triton_launch", "gemm")]


def test_a_loss_of_one_output_leaves_parameters_of_the_other_without_gradients(monkeypatch):
    def gradients(which):
        model.zero_grad()
        with precision(torch.bfloat16):
            model(x)[which].sum().backward()
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    model = build().train()
    model.set_distilled_training()
    x, expected = images(model), []
    for which in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(planning, "why_not_plannable", lambda _: "a test")
            expected.append(gradients(which))
    assert "head_dist.weight" not in expected[0] and "head.weight" not in expected[1]
    gradients(0)
    assert gradients(0) == expected[0]  # recorded
    only_plan(model)
    assert [gradients(which) for which in (0, 1)] == expected
    step(model, x, torch.bfloat16)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_parameters_that_blocks_share_have_one_gradient(monkeypatch):
    model = build().train()
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    model.blocks[1].mlp = model.blocks[0].mlp
    x = images(model)
    steps = [recorded(lambda: step(model, x, torch.bfloat16)) for _ in range(3)]
    only_plan(model)
    ops = of_parameters(unplanned(monkeypatch, lambda: step(model, x, torch.bfloat16)), model)
    assert sum("CUDAFunctor_add" in event.name for event in ops) >= 5  # of the gradients of shared parameters
    assert [unmerged(of_parameters(events, model), ops) for events in steps[1:]] == [ops] * 2


@pytest.mark.parametrize("change", [replaced_data, transposed_data])
def test_a_weight_that_gets_other_data_before_the_recorded_backward_pass_is_read_at_the_next_step(change, monkeypatch):
    model = build().train()
    x, weight = images(model), model.blocks[1].attn.proj.weight
    twin = copy.deepcopy(model)
    change(twin.blocks[1].attn.proj.weight)
    step(twin, x, torch.bfloat16)  # compiles kernels
    step(model, x, torch.bfloat16)
    with precision(torch.bfloat16):
        loss = sum(output.sum() for output in model(x))
    change(weight)
    loss.backward()
    del loss
    assert plans(model) == ["called once"]
    events = [recorded(lambda: step(model, x, torch.bfloat16)) for _ in range(3)]
    only_plan(model)
    ops = own_work(unplanned(monkeypatch, lambda: step(model, x, torch.bfloat16)), model)
    assert [unmerged(own_work(each, model), ops) for each in events] == [ops] * 3


def test_a_recorded_backward_pass_that_fails_makes_no_plan(monkeypatch):
    def failing(*args, grad=torch.autograd.grad, **options):
        grad(*args, **options)
        raise torch.OutOfMemoryError

    model = build().train()
    x = images(model)
    step(model, x, torch.bfloat16)
    with precision(torch.bfloat16):
        loss = sum(output.sum() for output in model(x))
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", failing)
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward(retain_graph=True)
    assert plans(model) == ["called once"]
    loss.backward()
    assert plans(model) == ["called once"]
    events = [recorded(lambda: step(model, x, torch.bfloat16)) for _ in range(3)]
    only_plan(model)
    ops = of_parameters(unplanned(monkeypatch, lambda: step(model, x, torch.bfloat16)), model)
    assert [unmerged(of_parameters(each, model), ops) for each in events[1:]] == [ops] * 2
