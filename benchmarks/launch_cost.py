"""`fastdeit launch-cost`: host microseconds per call of the launch path, without a GPU.

A child process runs Triton's real launch path over a stand-in for the CUDA driver, so that what is timed is Python, Triton's
launcher and PyTorch's dispatch, but neither the driver nor a GPU. Tensors lie on the CPU and are tiny, so that PyTorch's own
functions cost little but their dispatch: they are yardsticks.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
import triton
import triton.language as tl

from fastdeit.kernels.stub_driver import driver

BUDGETS = {"launch, pointers": 8.0, "launch, 4 descriptors built and passed": 15.0}  # microseconds on a quiet machine
YARDSTICK = "torch: F.layer_norm"
_CALLS, _REPEATS = 200, 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints the table.

    Raises:
        OSError: no C compiler here to build the stand-in with.
        RuntimeError: the measuring process failed.
    """
    child = driver.run_python("-m", __name__)
    if child.returncode:
        raise RuntimeError(f"measuring the launch cost failed:\n{child.stderr}")
    costs = json.loads(child.stdout)
    print(json.dumps(costs, indent=2) if args.json else table(costs))
    return 0


def table(costs: dict[str, float]) -> str:
    """The costs as text, each beside its budget and as a multiple of a call of PyTorch's."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}"
    lines = [f"Host microseconds per call, least of {_REPEATS} runs of {_CALLS} calls; {versions}", ""]
    for name, cost in costs.items():
        budget = f"  budget {BUDGETS[name]:.0f}" if name in BUDGETS else ""
        lines.append(f"{name:44}{cost:7.1f}  {cost / costs[YARDSTICK]:5.1f} x F.layer_norm{budget}")
    return "\n".join(lines)


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
    runs = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        runs.append((time.perf_counter() - start) / _CALLS * 1e6)
    return round(min(runs), 2)


def measure() -> dict[str, float]:
    """Every cost by its name; for a process that `run_python` started, after `activate`."""
    from fastdeit.kernels.launch import descriptor, launch
    from fastdeit.kernels.layer_norm import layer_norm_forward, layer_norm_forward_kernel
    from fastdeit.ops import layer_norm as op

    torch.set_num_threads(1)
    x, weight, bias = torch.zeros(2, 198, 192), torch.ones(192), torch.zeros(192)
    y, mean, rstd = torch.empty_like(x), torch.empty(396), torch.empty(396)
    strides = (x.stride(0), x.stride(1))
    args = (x, None, None, None, weight, bias, None, y, mean, rstd, 198, *strides, *strides, 1e-6)
    constexprs = (192, 256, 16)
    qkv, out = torch.zeros(2, 198, 576, dtype=torch.bfloat16), torch.zeros(2, 198, 192, dtype=torch.bfloat16)

    def descriptors():
        q, k, v = (descriptor(qkv, [1, 64, 64]) for _ in range(3))
        return q, k, v, descriptor(out, [1, 64, 64])

    def launch_descriptors(maps):
        launch(_descriptors_kernel, (4, 1), (*maps, mean, 198, 0.125), (64,), 4)

    kept = descriptors()
    small, square = torch.zeros(1, 192), torch.zeros(192, 192)
    learned = x.clone().requires_grad_(), torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    functional = torch.nn.functional
    with mock.patch(f"{op.__module__}.why_reference", lambda *args, **kwargs: None):
        return {
            name: microseconds(call)
            for name, call in {
                "kernel[grid], pointers": lambda: layer_norm_forward_kernel[(396,)](*args, *constexprs, num_warps=1),
                "launch, pointers": lambda: launch(layer_norm_forward_kernel, (396,), args, constexprs, 1),
                "launch, 4 descriptors built and passed": lambda: launch_descriptors(descriptors()),
                "launch, 4 descriptors passed again": lambda: launch_descriptors(kept),
                "building 4 descriptors": descriptors,
                "launcher: layer_norm_forward": lambda: layer_norm_forward(x, weight, bias, 1e-6, torch.float32),
                "op: layer_norm without gradients": lambda: op(x, weight, bias),
                "op: layer_norm through autograd": lambda: op(*learned),
                YARDSTICK: lambda: functional.layer_norm(small, (192,), weight, bias),
                "torch: F.linear": lambda: functional.linear(small, square),
                "torch: empty": lambda: torch.empty(396),
            }.items()
        }


if __name__ == "__main__":
    driver.activate()
    json.dump(measure(), sys.stdout)
