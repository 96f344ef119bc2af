"""`fastdeit launch-cost`: host microseconds per call of the launch path and per block of a model, without a GPU.

A child process runs Triton's real launch path over a stand-in for the CUDA driver, so that what is timed is Python, Triton's
launcher and PyTorch's dispatch, but neither the driver nor a GPU. Tensors lie on the CPU and are tiny, so that PyTorch's own
functions cost little but their dispatch: they are yardsticks. A model of blocks is timed accelerated and as timm's, in turns.
"""

import argparse
import copy
import functools
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
import triton
import triton.language as tl

from fastdeit import backends
from fastdeit.aot.stub_driver import driver

BLOCKS, TRAINED = "a block's share of a forward pass", "a block's share of a training step"
CHECK = "whether a block of a model runs fused"
# Microseconds on a quiet machine.
BUDGETS = {"launch, pointers": 8.0, "launch, 4 descriptors built and passed": 15.0, CHECK: 5.0}
YARDSTICK = "torch: F.layer_norm"
_CALLS, _REPEATS = 200, 25
_DEPTH = 12  # of the model whose blocks are timed


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
        lines.append(f"{name:50}{cost:7.1f}  {cost / costs[YARDSTICK]:5.1f} x F.layer_norm{budget}")
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
    return round(min(_microseconds(call, _CALLS) for _ in range(_REPEATS)), 2)


def _microseconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def measure_blocks() -> dict[str, float]:
    """A block's share of what a model's forward pass and training step take of the host, timm's and accelerated.

    And of that, what the accelerated model's look at its blocks takes before every pass.

    The model is as small as its kernels allow, so that what PyTorch's operations compute on the CPU is little beside their
    dispatch: what remains of it counts against both. The step is of a whole model, patches and head included.
    """
    import timm

    import fastdeit
    from fastdeit.nn import Block
    from fastdeit.nn.whole_block import run_whole

    sizes = dict(img_size=32, embed_dim=64, num_heads=1, depth=_DEPTH, num_classes=10)
    timms = timm.create_model("deit_tiny_patch16_224", **sizes)
    models = {"timm": timms, "accelerated": fastdeit.accelerate(copy.deepcopy(timms))}
    images = torch.zeros(2, 3, 32, 32)

    def step(model):
        model.zero_grad()
        model(images).sum().backward()

    runs_kernels = mock.patch.object(backends, "_why_kernels_cannot_run", lambda x, products: None)
    blocks, tokens = list(models["accelerated"].blocks), torch.zeros(2, 5, 64)
    with runs_kernels:
        costs = {CHECK: round(microseconds(lambda: run_whole(blocks, Block, tokens)) / _DEPTH, 2)}
    for what, run, context in (
        (BLOCKS, lambda model: model(images), torch.no_grad),
        (TRAINED, step, torch.enable_grad),
    ):
        least = dict.fromkeys(models, math.inf)
        with context(), runs_kernels:
            for turn in range(_REPEATS):
                for name, model in models.items():
                    cost = _microseconds(functools.partial(run, model), 4) / _DEPTH
                    least[name] = min(least[name], cost) if turn else math.inf  # the first turn compiles
        costs |= {f"{name}: {what}": round(cost, 1) for name, cost in least.items()}
    return costs


def measure() -> dict[str, float]:
    """Every cost by its name; for a process that `run_python` started, after `activate`."""
    from fastdeit.kernels.norm.layer_norm import layer_norm_forward, layer_norm_forward_kernel
    from fastdeit.kernels.runtime.launch import descriptor, launch
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
    json.dump(measure() | measure_blocks(), sys.stdout)
