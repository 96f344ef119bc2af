"""What the forward pass of a block costs in Python: calls of this package's functions, on the fake CUDA runtime."""

import sys
from collections import Counter
from inspect import CO_GENERATOR

import pytest
import timm
import torch

import fastdeit
from fastdeit.plan import planned
from tests.plan.models import needs_plans

# Without gradients, what kernels/ does aside, op by op and from a plan: in one dtype, and under autocast.
LIMITS = {torch.bfloat16: (76, 37), torch.float32: (73, 38)}


def python_calls(function) -> Counter:
    """Calls of this package's functions by their files, without those of kernels/."""
    package, kernels, calls = fastdeit.__path__[0], f"{fastdeit.__path__[0]}/kernels/", Counter()

    def count(frame, event, _):
        code = frame.f_code
        file = code.co_filename
        if event == "call" and not code.co_flags & CO_GENERATOR and file.startswith(package):
            calls[file] += not file.startswith(kernels)

    for _ in range(3):
        function()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.fake_device
@pytest.mark.parametrize("from_plan", [False, pytest.param(True, marks=needs_plans)])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_a_blocks_forward_makes_few_python_calls(dtype, from_plan, monkeypatch):
    if not from_plan:
        monkeypatch.setattr(planned, "why_not_plannable", lambda _: "a test")
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1).eval().cuda().to(dtype)
    block = fastdeit.accelerate(model).blocks[0]
    x = torch.zeros(2, 198, 192, dtype=dtype, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
        assert block.why_not_fused(x) is None
        calls = python_calls(lambda: block(x))
    assert calls.total() <= LIMITS[dtype][from_plan], calls
