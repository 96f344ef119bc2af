"""Host time of a whole model on the fake CUDA runtime: a forward pass and a training step, accelerated beside timm's.

Processor time of the process, all its threads included, so that other processes count little; timm's and the accelerated model
take turns, and what is reported is the median of the ratios of neighbouring turns. A turn begins with a call that is not timed:
the other model has changed what the caching allocator holds, and a plan of the accelerated one is bound to other addresses, which
a program with one model does in its first steps alone. The GPU takes no time, so the host's is all there is.
"""

import contextlib
import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import fastdeit
from fastdeit.testing import fake_cuda

PRECISIONS = ("bf16", "autocast")  # a bf16 model, or fp32 parameters under autocast to bf16
PASSES = ("forward", "step")
# Launches one by one; in a CUDA graph, a forward pass by `fastdeit.set_graphs`, a step by hand; a forward pass of
# `optimize_for_inference` in bf16, which captures its graph too.
MODES = ("eager", "captured", "optimized")
# The first calls of a shape: op by op, recorded for a plan, and with the plan's code being written.
FIRST_CALLS = ("first call", "second call", "third call")
LAUNCHES = ("launch", "triton_launch", "gemm", "graph_launch", "memset", "copy_on_device")
_WARM_UP = 8  # calls: the first compiles, and the seventh may capture a graph


class HostTime(NamedTuple):
    """Of one model, precision, pass and mode; timm's always runs eagerly."""

    model: str
    precision: str
    passed: str
    mode: str
    timm_us: float
    fastdeit_us: float
    ratio: float
    timm_launches: int
    fastdeit_launches: int


def measure(names: list[str], batch_size: int, turns: int, calls: int, driver_us: float) -> Iterator[HostTime]:
    """Yields the host times of timm's models with these names, each in PRECISIONS, PASSES, those of MODES that a pass has, and
    FIRST_CALLS.

    Args:
        batch_size: images; cuDNN is not there, and timm's patch embedding then launches a GEMM an image.
        turns, calls: how often each candidate is timed, and over how many calls each time.
        driver_us: added to both for each launch, GEMM, copy and memset: what a real driver takes of the host.
    """
    for name in names:
        for precision in PRECISIONS:
            timms = _model(name, precision)
            accelerated = fastdeit.accelerate(copy.deepcopy(timms))
            for passed in PASSES:
                images = _images(timms, precision, batch_size)
                baseline = _call(timms, precision, passed, images)
                eager = _call(accelerated, precision, passed, images)
                candidates = {"eager": eager, "captured": eager if passed == "forward" else _captured(eager, images)}
                if passed == "forward":
                    frozen = fastdeit.optimize_for_inference(copy.deepcopy(timms).cpu()).cuda()
                    candidates["optimized"] = _call(frozen, "bf16", passed, images)
                for mode, candidate in candidates.items():
                    fastdeit.set_graphs("off" if mode == "eager" else "auto")
                    times, launches = _in_turns((baseline, candidate), turns, calls, driver_us)
                    ratio = statistics.median(mine / theirs for theirs, mine in zip(*times, strict=True))
                    medians = (round(statistics.median(each) * 1e6, 1) for each in times)
                    yield HostTime(name, precision, passed, mode, *medians, round(ratio, 6), *launches)
                fastdeit.set_graphs("off")
                shapes = [_images(timms, precision, batch_size + more) for more in range(1, turns + 1)]
                calls_of = [[_call(model, precision, passed, x) for x in shapes] for model in (timms, accelerated)]
                first = _first_calls(*calls_of, driver_us)
                for number, mode in enumerate(FIRST_CALLS):
                    yield HostTime(name, precision, passed, mode, *_medians(first, number))


def _first_calls(
    timms: Sequence[Callable], accelerated: Sequence[Callable], driver_us: float
) -> list[list[tuple[float, int]]]:
    """Seconds and launches of timm's call of each shape, made before, and of the accelerated model's FIRST_CALLS of it."""
    found = []
    gc.collect()
    gc.disable()
    try:
        with fake_cuda.without_pointer_checks():
            for baseline, call in zip(timms, accelerated, strict=True):
                baseline()
                found.append([_timed(each, driver_us) for each in (baseline, *(call for _ in FIRST_CALLS))])
    finally:
        gc.enable()
    return found


def _timed(call: Callable, driver_us: float) -> tuple[float, int]:
    with fake_cuda.counting() as counts:
        start = time.process_time()
        call()
        seconds = time.process_time() - start
    launches = sum(counts[kind] for kind in LAUNCHES)
    return seconds + launches * driver_us * 1e-6, launches


def _medians(first: list[list[tuple[float, int]]], number: int) -> tuple[float, float, float, int, int]:
    """What `HostTime` has of the accelerated model's call with this number beside timm's, of all shapes."""
    pairs = [(theirs, each[number]) for theirs, *each in first]
    theirs, mine = ([each[i] for each in pairs] for i in (0, 1))
    ratio = statistics.median(b[0] / a[0] for a, b in pairs)
    seconds = (round(statistics.median(each[0] for each in side) * 1e6, 1) for side in (theirs, mine))
    launches = (int(statistics.median(each[1] for each in side)) for side in (theirs, mine))
    return *seconds, round(ratio, 6), *launches


def ratios(
    baseline: nn.Module, others: Mapping[str, nn.Module], turns: int, calls: int, driver_us: float
) -> dict[str, float]:
    """Host time of a forward pass of others, by name, over that of timm's bf16 model, at batch size 1; as `measure`."""
    images = _images(baseline, "bf16", 1)
    candidates = tuple(_call(module, "bf16", "forward", images) for module in (baseline, *others.values()))
    times, _ = _in_turns(candidates, turns, calls, driver_us)
    return {
        name: round(statistics.median(mine / theirs for theirs, mine in zip(times[0], each, strict=True)), 3)
        for name, each in zip(others, times[1:], strict=True)
    }


def _model(name: str, precision: str) -> nn.Module:
    with torch.device("cuda"):
        model = timm.create_model(name).train()
    return model.bfloat16() if precision == "bf16" else model


def _images(model: nn.Module, precision: str, batch_size: int) -> Tensor:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return torch.zeros(batch_size, 3, *model.patch_embed.img_size, dtype=dtype, device="cuda")


def _call(model: nn.Module, precision: str, passed: str, images: Tensor) -> Callable[[], Any]:
    context = contextlib.nullcontext if precision == "bf16" else lambda: torch.autocast("cuda", torch.bfloat16)

    model.train(passed == "step")

    @torch.inference_mode()
    def forward() -> None:
        with context():
            model(images)

    if passed == "forward":
        return forward
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()  # as training loops do: model.zero_grad finds the parameters by walking all modules
        with context():
            outputs = model(images)
        sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()

    return step


def _captured(call: Callable[[], Any], images: Tensor) -> Callable[[], None]:
    """A function that copies new images to where the captured call reads them, and replays it."""
    others = images.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay() -> None:
        images.copy_(others)
        graph.replay()

    return replay


def _in_turns(candidates: tuple[Callable, ...], turns: int, calls: int, driver_us: float) -> tuple[list, list[int]]:
    """Seconds a call of each candidate and turn, what the driver would take included, and launches a call of each."""
    launches = []
    for call in candidates:
        for _ in range(_WARM_UP):
            call()
        with fake_cuda.counting() as counts:
            call()
        launches.append(sum(counts[kind] for kind in LAUNCHES))
    times = [[] for _ in candidates]
    gc.collect()
    gc.disable()
    try:
        with fake_cuda.without_pointer_checks():
            for _ in range(turns):
                for call, found, count in zip(candidates, times, launches, strict=True):
                    call()  # after the other model's: see above
                    start = time.process_time()
                    for _ in range(calls):
                        call()
                    found.append((time.process_time() - start) / calls + count * driver_us * 1e-6)
    finally:
        gc.enable()
    return times, launches
