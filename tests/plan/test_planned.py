"""Plans without gradients launch what the ops launch, on the same tensors, and see what changes. On the fake runtime."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.knobs import runtime

import fastdeit
from fastdeit import ops
from fastdeit.blocks.snapshot import KEY
from fastdeit.kernels.runtime import launch
from fastdeit.plan import planned as planning
from fastdeit.plan import surroundings
from fastdeit.plan.planned import Plan, described
from fastdeit.plan.program import MOST_ADDRESSES
from fastdeit.plan.tape import Tape
from tests.plan.changes import CHANGES, LoRA
from tests.plan.events import WithoutPlans, dataflow, of_parameters, precision, recorded, requested_bytes, reset_peak
from tests.plan.models import MODEL, PLAIN, apart, build, images, needs_plans, only_plan, plan_it, plans

pytestmark = [pytest.mark.fake_device, needs_plans]


@pytest.fixture(autouse=True)
def _launches():
    fastdeit.set_graphs("off")
    yield
    fastdeit.set_graphs()


CASES = {
    "distilled": (MODEL, None, torch.bfloat16, {}),
    "bf16": (MODEL, torch.bfloat16, None, {}),
    "class token": (PLAIN, None, torch.bfloat16, {}),
    "registers": (PLAIN, None, torch.bfloat16, dict(reg_tokens=3)),
    "LayerScale": (PLAIN, None, torch.bfloat16, dict(init_values=0.1)),
    "LayerScale in bf16": (PLAIN, torch.bfloat16, None, dict(init_values=0.1)),
    "LayerScale in fp16": (PLAIN, None, torch.float16, dict(init_values=0.1)),
    "no qkv bias": (PLAIN, None, torch.bfloat16, dict(qkv_bias=False)),
    "positions of patches alone": (PLAIN, None, torch.bfloat16, dict(no_embed_class=True)),
    "drop path, inactive": (PLAIN, None, torch.bfloat16, dict(drop_path_rate=0.3)),
    "lean": (MODEL, None, torch.bfloat16, dict(memory="lean")),
}


@pytest.mark.parametrize(
    "case, without_gradients", [*((c, torch.inference_mode) for c in CASES), ("bf16", torch.no_grad)]
)
def test_a_plan_launches_what_the_ops_launch_on_the_same_tensors(case, without_gradients, monkeypatch):
    monkeypatch.setattr(planning, "packed", apart)
    name, dtype, autocast, options = CASES[case]
    model = build(name, dtype, **options)
    x = images(model)
    with without_gradients(), precision(autocast):
        model(x)  # compiles the kernels
        del model.__dict__[KEY]
        unseen = recorded(lambda: model(x))
        plan_it(lambda: model(x))
        only_plan(model)
        planned = recorded(lambda: model(x))
        with WithoutPlans():
            ops = recorded(lambda: model(x))
    assert len(planned) > 20 and dataflow(planned) == dataflow(ops)
    assert of_parameters(planned, model) == of_parameters(unseen, model)


def test_results_are_new_and_of_the_mode_of_the_call():
    model = build()
    x = images(model)
    with torch.no_grad(), precision(torch.bfloat16):
        plan_it(lambda: model(x))
    before = torch.cuda.memory_allocated()
    with torch.inference_mode(), precision(torch.bfloat16):
        results = [model(x) for _ in range(3)]
    assert len({result.data_ptr() for result in results}) == 3 and all(result.is_inference() for result in results)
    with torch.no_grad(), precision(torch.bfloat16):
        assert not model(x).is_inference()
    assert torch.cuda.memory_allocated() - before == 3 * 4096  # the workspace is given back
    only_plan(model)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_no_more_memory_than_the_ops_take(autocast):
    model = build(PLAIN, None if autocast else torch.bfloat16, depth=6)
    x = images(model, 8)

    def peak():
        reset_peak()
        before = requested_bytes()
        model(x)
        return requested_bytes("peak") - before

    with torch.inference_mode(), precision(autocast):
        first = peak()
        plan_it(lambda: model(x))
        only_plan(model)
        assert peak() <= 1.02 * first


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_the_next_call(change):
    model = build()
    x = images(model)
    with torch.no_grad(), precision(torch.bfloat16):
        plan_it(lambda: model(x))
        only_plan(model)
        CHANGES[change](model)
        first = recorded(lambda: model(x))
        with WithoutPlans():
            ops = recorded(lambda: model(x))
        later = [recorded(lambda: model(x)) for _ in range(3)]
    expected = of_parameters(ops, model)
    assert of_parameters(first, model) == expected
    assert all(of_parameters(events, model) == expected for events in later)


def test_weights_updated_in_place_are_read_by_the_plan():
    model = build()
    x = images(model)
    with torch.no_grad(), precision(torch.bfloat16):
        plan_it(lambda: model(x))
        plan = only_plan(model)
        for parameter in model.parameters():
            parameter.mul_(2)
        model(x)
    assert plans(model) == [plan]


def test_a_copy_has_no_plans_and_another_models_weights_are_not_read():
    model = build()
    x = images(model)
    with torch.no_grad(), precision(torch.bfloat16):
        plan_it(lambda: model(x))
        twin = copy.deepcopy(model)
        assert described(twin) == []
        plan_it(lambda: twin(x))
        only_plan(twin)
        ours, theirs = (recorded(lambda m=m: m(x)) for m in (model, twin))
    assert of_parameters(ours, model) == of_parameters(theirs, twin)
    assert of_parameters(ours, twin) != of_parameters(theirs, twin)


def test_a_function_that_replaces_parameters_is_seen():
    model = build()
    x = images(model)
    others = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad(), precision(torch.bfloat16):
        plan_it(lambda: model(x))
        only_plan(model)
        events = recorded(lambda: torch.func.functional_call(model, others, (x,)))
    read = {int.from_bytes(arg, "little") for event in events for arg in event.arguments if len(arg) == 8}
    assert len({tensor.data_ptr() for tensor in others.values()} & read) > 20
    assert not read & {parameter.data_ptr() for parameter in model.parameters()}


class Looks(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class LooksAtFunctions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "where", ["dispatch mode", "function mode", "torch.func", "global hook", "Triton's hook", "backend"]
)
def test_where_something_looks_on_the_ops_run(where, monkeypatch):
    model = build()
    x = images(model)
    with torch.no_grad(), precision(torch.bfloat16):
        plan_it(lambda: model(x))
        only_plan(model)
        monkeypatch.setattr(Plan, "__call__", lambda *_: pytest.fail("the plan ran"))
        if where == "dispatch mode":
            with Looks():
                model(x)
        elif where == "function mode":
            with LooksAtFunctions():
                model(x)
        elif where == "torch.func":
            torch.func.vmap(model)(x[:, None])
        elif where == "global hook":
            hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
            model(x)
            hook.remove()
        elif where == "Triton's hook":
            seen = []
            monkeypatch.setattr(runtime, "launch_enter_hook", lambda metadata: seen.append(metadata.get()["name"]))
            model(x)
            assert "layer_norm_forward_kernel" in seen
        else:
            with fastdeit.use_backend("reference"):
                assert not any(event.kind == "triton_launch" for event in recorded(lambda: model(x)))


def test_with_gradients_autograd_records_the_ops():
    model = build()
    x = images(model)
    with precision(torch.bfloat16):
        with torch.no_grad():
            plan_it(lambda: model(x))
        assert model(x).requires_grad
        model.requires_grad_(False)
        assert not model(x).requires_grad
        model.blocks[1].mlp.fc1.weight.requires_grad_()
        assert model(x).requires_grad


@pytest.mark.parametrize("what", ["shape", "strides", "alignment", "autocast", "stream"])
def test_other_calls_have_other_plans(what):
    model = build()
    x = images(model)
    other = {
        "shape": x[:1],
        "strides": x.to(memory_format=torch.channels_last),
        "alignment": torch.zeros(x.numel() + 1, device="cuda")[1:].view(x.shape),
    }.get(what, x)
    stream = torch.cuda.Stream() if what == "stream" else torch.cuda.current_stream()
    with torch.no_grad(), precision(torch.bfloat16):
        plan_it(lambda: model(x))
    with torch.no_grad(), precision(torch.float16 if what == "autocast" else torch.bfloat16), torch.cuda.stream(stream):
        with WithoutPlans():
            ops = recorded(lambda: model(other))
        for _ in range(4):
            assert of_parameters(recorded(lambda: model(other)), model) == of_parameters(ops, model)
    assert len(plans(model)) == (1 if what == "alignment" else 2)


def test_what_a_call_runs_is_looked_at_while_it_is_recorded_and_the_recording_itself_is_not(monkeypatch):
    looked_at, why = set(), surroundings._why_not_understood
    monkeypatch.setattr(surroundings, "_why_not_understood", lambda code: looked_at.add(code) or why(code))
    model = build()
    with torch.no_grad(), precision(torch.bfloat16):
        plan_it(lambda: model(images(model)))
    only_plan(model)
    assert ops.add_layer_norm_mlp.__wrapped__.__code__ in looked_at and Tape.__torch_dispatch__.__code__ in looked_at
    assert not {Tape.view.__code__, Tape._argument.__code__, Tape._make.__code__} & looked_at


class Finalized:
    """Garbage with a finalizer from outside of the package."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        pass


def test_garbage_from_elsewhere_does_not_end_a_recording(monkeypatch):
    why, threshold = surroundings._why_not_understood, gc.get_threshold()
    monkeypatch.setattr(surroundings, "_why_not_understood", lambda code: Finalized() and why(code))
    model = build()
    gc.set_threshold(1)
    try:
        with torch.no_grad(), precision(torch.bfloat16):
            plan_it(lambda: model(images(model)))
    finally:
        gc.set_threshold(*threshold)
    only_plan(model)
    assert gc.isenabled()


def test_a_kernel_with_memory_of_its_own_is_not_recorded(monkeypatch):
    monkeypatch.setattr("fastdeit.kernels.runtime.raw_launch.raw_launcher", lambda launch: None)
    model = build(dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for _ in range(4):
            model(images(model))
    (reason,) = plans(model)
    assert "needs memory of its own" in reason


def test_a_module_that_is_called_is_not_recorded():
    model = build()
    model.blocks[1].attn.proj = LoRA(model.blocks[1].attn.proj)
    with torch.no_grad(), precision(torch.bfloat16):
        plan_it(lambda: model(images(model)))
    assert plans(model) == ["block 1: a projection is a LoRA"]
    assert described(model) == ["2 x 3 x 64 x 64 float32: not planned: block 1: a projection is a LoRA"]
    assert "calls with 2 x 3 x 64 x 64 float32: not planned: block 1: a proj" in str(fastdeit.explain(model))


def test_a_function_that_replaces_one_of_ours_is_not_recorded(monkeypatch):
    from fastdeit.kernels.norm import layer_norm
    from fastdeit.ops import launchers

    forward, calls = layer_norm.layer_norm_forward, []
    for module in (layer_norm, launchers):
        monkeypatch.setattr(module, "layer_norm_forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    model = build()
    with torch.no_grad(), precision(torch.bfloat16):
        for calls_so_far in (5, 10, 15, 20):
            model(images(model))
            assert len(calls) == calls_so_far
    assert ["test_planned.py is called" in entry for entry in plans(model)] == [True]


def test_addresses_are_bounded():
    model = build(depth=1)
    kept = []
    with torch.no_grad(), precision(torch.bfloat16):
        x = images(model)
        for _ in range(MOST_ADDRESSES + 2):
            model(x)
            kept.append(torch.empty(4 << 20, dtype=torch.uint8, device="cuda"))  # so that the workspace is elsewhere
        assert 1 <= len(only_plan(model)._made[0].functions) <= MOST_ADDRESSES


def test_threads_have_workspaces_of_their_own():
    model, failures = build(depth=1), []
    x = images(model)
    with torch.no_grad(), precision(torch.bfloat16):
        plan_it(lambda: model(x))

    def work():
        try:
            with torch.no_grad(), precision(torch.bfloat16):
                for batch in range(30):
                    model(x[: 1 + batch % 2])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(plans(model)) == 2


def test_a_plan_is_captured_as_the_ops_are():
    model = build()
    x = images(model)
    with torch.no_grad(), precision(torch.bfloat16):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            plan_it(lambda: model(x))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = model(x)
        graph.replay()
    only_plan(model) and result.shape == (2, 1000)


def test_a_plan_runs_on_the_device_of_its_model():
    model = build().to("cuda:1")
    x = images(model).to("cuda:1")
    with torch.no_grad(), precision(torch.bfloat16):
        with torch.cuda.device(1):
            plan_it(lambda: model(x))
            only_plan(model)
            planned = recorded(lambda: model(x))
        away = recorded(lambda: model(x))  # on another device than the current one the ops run
    assert {event.device for event in planned} == {event.device for event in away} == {1}
    assert of_parameters(planned, model) == of_parameters(away, model)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_recording_in_which_kernels_are_compiled_is_made_again(gradients, monkeypatch):
    model = build(dtype=torch.bfloat16).train(gradients)

    def call(backward=gradients):
        with torch.set_grad_enabled(gradients):
            made = model(images(model))
            if backward:
                sum(each.sum() for each in made).backward()

    call(backward=False)  # which leaves the kernels of backward to the recording
    monkeypatch.setattr(launch, "_kernels", {})  # as in a new process
    call()
    assert [line.partition(": ")[2] for line in described(model)] == ["called once"]
    call()
    only_plan(model)
