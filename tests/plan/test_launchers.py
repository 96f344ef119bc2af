"""Both forms of Triton's launcher in C: a kernel's arguments one by one (Triton 3.6), and as one tuple (later versions)."""

from types import SimpleNamespace

import pytest
import torch

from fastdeit.kernels.runtime import raw_launch
from fastdeit.kernels.runtime.launch import DirectLaunch
from fastdeit.plan import planned as planning
from tests.plan.events import WithoutPlans, dataflow, precision, recorded
from tests.plan.models import apart, build, images, needs_plans, only_plan, plan_it

pytestmark = pytest.mark.fake_device


def in_form(packed, seen):
    """A `raw_launcher` whose launchers take the arguments in that form, and note how many came by position."""
    original = raw_launch.raw_launcher

    def raw_launcher(launch):
        found = original(launch)
        constants = len(found.grid) + 1 + len(found.leading)  # the stream is one

        def run(*args):
            seen.append(len(args) - constants)
            given, own = args[:constants], args[constants:]
            (arguments,) = own if packed else (own,)
            assert type(arguments) is tuple
            found.run(*given, *((arguments,) if found.packed else arguments))

        return found._replace(run=run, packed=packed)

    return raw_launcher


@needs_plans
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_plan_launches_what_the_ops_launch(gradients, packed, monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(planning, "packed", apart)
    monkeypatch.setattr(raw_launch, "raw_launcher", in_form(packed, seen))
    model = build().train(gradients)
    x = images(model)

    def call():
        with torch.set_grad_enabled(gradients), precision(torch.bfloat16):
            y = model(x)
        if gradients:
            torch.autograd.grad(y.sum(), list(model.parameters()))

    plan_it(call)
    only_plan(model)
    seen.clear()
    planned = recorded(call)
    with WithoutPlans():
        ops = recorded(call)
    assert len(seen) > 10 and (set(seen) == {1}) is packed
    if not gradients:
        assert dataflow(planned) == dataflow(ops)
    # The flow of data in a step is compared in test_training.py; folds are merged there.
    assert launched(planned) == launched(ops)


def launched(events):
    return [e.name for e in events if e.kind == "triton_launch" and "fold" not in e.name]


def by_position(launcher, tensordesc_indices, tensordesc_meta):
    return lambda *args: (launcher, tensordesc_indices, tensordesc_meta)


def by_path(launcher, signature, relevant_paths, tensordesc_meta, make_tensordesc_arg):
    return lambda *args: (launcher, signature, relevant_paths, tensordesc_meta, make_tensordesc_arg)


def unknown(launcher, tensordesc_meta):
    return lambda *args: (launcher, tensordesc_meta)


def of(run, launch=None, trailing=(None, None, "annotations", "signature")):
    kernel = SimpleNamespace(run=SimpleNamespace(launch=run if launch is None else launch))
    compiled = SimpleNamespace(kernel=kernel, run=run, leading=("function", False, False, (4, 1, 0)), trailing=trailing)
    return raw_launch.raw_launcher(DirectLaunch(None, compiled, (3, 1, 1), (), ()))


class InC:
    """No Python function, as Triton's launcher."""

    def __call__(self, *args):
        raise AssertionError("not called here")


LAUNCHER = InC()
MAP = {"swizzle": 3}


@pytest.mark.parametrize(
    ("run", "maps"),
    [
        (LAUNCHER, {}),
        (by_position(LAUNCHER, {4, 0}, [MAP, None]), {0: MAP, 4: None}),
        (by_path(LAUNCHER, ("*i8",), {0: {}, 3: {}}, [MAP, MAP], None), {0: MAP, 3: MAP}),
        (by_path(LAUNCHER, ("*i8",), {2: {}}, None, None), {2: None}),
    ],
)
def test_descriptors_are_found_in_each_version_of_tritons_wrapper(run, maps):
    found = of(run)
    assert found.run is LAUNCHER and found.maps == maps and found.packed
    assert found.leading == (
        "function",
        False,
        False,
        (4, 1, 0),
        None,
        None,
        None,
        None,
        None,
        "annotations",
        "signature",
    )
    assert not of(run, trailing=None).packed and of(run, trailing=None).leading == found.leading[:-4]


@pytest.mark.parametrize(
    "run",
    [
        by_path(LAUNCHER, ("*i8",), {0: {1: {}}}, [MAP], None),  # inside a tuple
        unknown(LAUNCHER, [MAP]),
    ],
)
def test_a_launch_that_is_not_understood_is_not_repeated(run):
    assert of(run) is None


def test_a_launch_with_memory_of_its_own_is_not_repeated():
    assert of(LAUNCHER, launch=InC()) is None
