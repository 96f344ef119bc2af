"""What launches cost the host, per call of the launch path and per model beside timm's, without a GPU.

A child process runs PyTorch's and Triton's CUDA code on the fake CUDA runtime, so that what is timed is Python, dispatch, autograd,
allocator and launchers, but neither the driver nor a GPU.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from fastdeit.testing import fake_cuda

MODELS = tuple(f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base"))
CHECK = "whether a block of a model runs fused"
# Microseconds on a quiet machine.
BUDGETS = {"launch, pointers": 8.0, "launch, 4 descriptors built and passed": 15.0, CHECK: 10.0}
YARDSTICK = "torch: F.layer_norm"
CALLS, REPEATS = 200, 25
_MODEL_CALLS = 3  # of a model, a turn


def measured(models: list[str], batch_size: int = 1, turns: int = 15, driver_us: float = 0.0) -> dict[str, Any]:
    """{"calls": {name: microseconds}, "models": rows as `host_time.HostTime`}, measured in a process of its own.

    Raises:
        OSError: the fake CUDA runtime is not available here.
        RuntimeError: the measuring process failed.
    """
    child = fake_cuda.run_python("-m", __name__, json.dumps([models, batch_size, turns, _MODEL_CALLS, driver_us]))
    if child.returncode:
        raise RuntimeError(f"measuring the launch cost failed:\n{child.stderr}")
    return json.loads(child.stdout)


# What attention asks of a launch: four tensor maps, a pointer, an integer and a number.
@triton.jit(do_not_specialize=["N"])
def _descriptors_kernel(q_desc, k_desc, v_desc, o_desc, lse_ptr, N, scale, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    total = q_desc.load([0, row, 0]) + k_desc.load([0, row, 0]) + v_desc.load([0, row, 0])
    o_desc.store([0, row, 0], total)
    tl.store(lse_ptr + row, scale, row < N)


def microseconds(call: Callable[[], object]) -> float:
    """The least over runs of the mean cost of a call: the run that other processes disturbed least."""
    for _ in range(20):
        call()
    return round(min(_microseconds(call, CALLS) for _ in range(REPEATS)), 2)


def _microseconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def measure_calls() -> dict[str, float]:
    """Every cost by its name; in a process on the fake CUDA runtime."""
    import timm

    import fastdeit
    from fastdeit.blocks.snapshot import Snapshot
    from fastdeit.kernels.norm.layer_norm import layer_norm_forward, layer_norm_forward_kernel
    from fastdeit.kernels.runtime.launch import descriptor, launch
    from fastdeit.ops import layer_norm as op

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device="cuda")

    x, weight, bias = zeros(2, 198, 192), zeros(192), zeros(192)
    y, mean, rstd = zeros(2, 198, 192), zeros(396), zeros(396)
    strides = (x.stride(0), x.stride(1))
    args = (x, None, None, None, weight, bias, None, y, mean, rstd, None, None, 198, 0, 0, *strides, *strides, 1e-6)
    constexprs = (192, 256, 16, True)
    qkv, out = zeros(2, 198, 576, dtype=torch.bfloat16), zeros(2, 198, 192, dtype=torch.bfloat16)

    def descriptors():
        q, k, v = (descriptor(qkv, [1, 64, 64]) for _ in range(3))
        return q, k, v, descriptor(out, [1, 64, 64])

    def launch_descriptors(maps):
        launch(_descriptors_kernel, (4, 1), (*maps, mean, 198, 0.125), (64,), 4)

    made = descriptors()
    small, square = zeros(1, 192), zeros(192, 192)
    learned = x.clone().requires_grad_(), torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    sizes = dict(img_size=32, embed_dim=64, num_heads=1, depth=12, num_classes=10)
    model = fastdeit.accelerate(timm.create_model("deit_tiny_patch16_224", **sizes)).cuda().bfloat16()
    snapshot = Snapshot(model)
    functional = torch.nn.functional
    calls = {
        "kernel[grid], pointers": lambda: layer_norm_forward_kernel[(396,)](*args, *constexprs, num_warps=1),
        "launch, pointers": lambda: launch(layer_norm_forward_kernel, (396,), args, constexprs, 1),
        "launch, 4 descriptors built and passed": lambda: launch_descriptors(descriptors()),
        "launch, 4 descriptors passed again": lambda: launch_descriptors(made),
        "building 4 descriptors": descriptors,
        "launcher: layer_norm_forward": lambda: layer_norm_forward(x, weight, bias, 1e-6, torch.float32),
        "op: layer_norm without gradients": lambda: op(x, weight, bias),
        "op: layer_norm through autograd": lambda: op(*learned),
        YARDSTICK: lambda: functional.layer_norm(small, (192,), weight, bias),
        "torch: F.linear": lambda: functional.linear(small, square),
        "torch: empty": lambda: torch.empty(396, device="cuda"),
    }
    with fake_cuda.without_pointer_checks():
        costs = {name: microseconds(call) for name, call in calls.items()}
        return costs | {CHECK: round(microseconds(snapshot.unchanged) / len(model.blocks), 2)}


if __name__ == "__main__":
    from fastdeit.benchmarks import host_time

    torch.set_num_threads(1)
    rows = [row._asdict() for row in host_time.measure(*json.loads(sys.argv[1]))]
    json.dump({"calls": measure_calls(), "models": rows}, sys.stdout)
