"""With a Triton that recorded launches were not tested with, ops are launched by Triton's public interface. On the fake runtime."""

import pytest
import torch

import fastdeit
from fastdeit.kernels.runtime import launch, raw_launch
from fastdeit.plan.surroundings import why_not_plannable
from tests.plan.events import WithoutPlans, precision, recorded
from tests.plan.models import build, images, plan_it, plans

pytestmark = pytest.mark.fake_device


@pytest.fixture
def untested(monkeypatch):
    monkeypatch.setattr(raw_launch, "WHY_NO_RAW_LAUNCHES", "an untested version")
    monkeypatch.setattr(launch, "_DIRECT", False)
    fastdeit.set_graphs("auto")
    yield
    fastdeit.set_graphs()


def launched(call):
    """Names and grids of the kernels that call() launches."""
    return [(event.name, event.grid) for event in recorded(call) if event.kind == "triton_launch"]


@pytest.mark.parametrize("gradients", [False, True])
def test_nothing_is_recorded_and_every_call_launches_the_ops(gradients, untested):
    model = build()
    x = images(model)
    assert why_not_plannable(x) == "an untested version"

    def call():
        with torch.set_grad_enabled(gradients), precision(torch.bfloat16):
            y = model(x)
        if gradients:
            model.zero_grad()
            y.sum().backward()

    plan_it(call)  # compiles the kernels too
    assert plans(model) == []
    found = launched(call)
    with WithoutPlans():
        expected = launched(call)
    assert len(found) > (20 if gradients else 8) and found == expected
