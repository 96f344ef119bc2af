"""The training step as a CUDA graph: recorded once, then launched as a whole, so that the host has next to nothing to do."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdeit.train.config import Config
from fastdeit.train.distributed import World

WARM_UP = 3  # steps launched kernel by kernel before one is recorded, in which libraries choose and compilers compile
OFF = "cuda_graphs is off"


def why_not_captured(
    config: Config, device: torch.device, optimizer: torch.optim.Optimizer, world: World
) -> str | None:
    """Why the steps of a run are launched kernel by kernel; None if they can be recorded.

    What is drawn on the host (mixup, CutMix, erasing) happens before the recorded part, and so do labels of a cached teacher.
    """
    if not config.cuda_graphs:
        return OFF
    if device.type != "cuda":
        return f"graphs are CUDA's, and the device is {device}"
    if world.size > 1:
        return (
            f"{world.size} processes exchange gradients, by hooks of DistributedDataParallel that a graph does not hold"
        )
    if config.precision == "fp16":
        return "fp16's scaler, not the verdict on the loss, says on the device whether an update is made"
    if not masks_updates(optimizer):
        return (
            f"the update of {config.opt} cannot be held back on the device where a loss is not finite, as adamw's can"
        )
    if config.grad_checkpointing:
        return "grad_checkpointing takes down random states on the host"
    return None


def masks_updates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an update heeds the optimizer's `found_inf` on the device, as PyTorch's fused optimizers do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class DeviceRates:
    """An optimizer's learning rates as tensors on its device, where a graph reads them anew in each step.

    They are float32, from which a fused optimizer computes as from a number. Weight decay stays a number: no run changes it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.known: list[float | None] = [None] * len(optimizer.param_groups)
        self.tensors = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def follow(self) -> None:
        """Takes over the rates that the schedule has set."""
        for number, group in enumerate(self.optimizer.param_groups):
            if group["lr"] != self.known[number]:
                self.known[number] = group["lr"]
                self.tensors[number].fill_(group["lr"])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """For the length of a with statement the optimizer has the tensors in place of its numbers."""
        groups = self.optimizer.param_groups
        before = [(group["lr"], group.get("capturable")) for group in groups]
        capturing = self.tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        for group, tensor in zip(groups, self.tensors, strict=True):
            group["lr"] = tensor
            group["capturable"] = capturing  # PyTorch warns of one that is set without a graph
        try:
            yield
        finally:
            for group, (rate, capturable) in zip(groups, before, strict=True):
                group["lr"], group["capturable"] = rate, capturable


class Recorder(Protocol):
    """Runs a function of tensors, and records one, whose replay reads the same inputs and writes the same result again."""

    def run(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor: ...

    def record(
        self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]
    ) -> tuple[Callable[[], Any], Tensor]: ...


class CudaRecorder:
    """Records on a stream of its own, on which the steps before run as well: what libraries set up for a stream is there then."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def run(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        around = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(around)
        with torch.cuda.stream(self.stream):
            result = function(*inputs)
        around.wait_stream(self.stream)
        return result

    def record(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Callable[[], Any], Tensor]:
        """Nothing is computed. Raises RuntimeError as `recorded`."""
        found: list[Tensor] = []
        return recorded(lambda: found.append(function(*inputs)), self.stream).replay, found[0]


def recorded(function: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None) -> torch.cuda.CUDAGraph:
    """What function launches, as a graph; each replay draws from the device's generator as a plain call would.

    Args:
        stream: to record on.
        pool: of memory, to be shared with other graphs that never run at the same time.

    Raises:
        RuntimeError: something in it cannot be recorded, or whatever function raises. Generator, stream and allocator are as they
            were.
    """
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    generator = torch.cuda.default_generators[stream.device.index]
    spare = generator.clone_state()  # PyTorch leaves the one that it records with unusable where that fails
    around = torch.cuda.stream(
        torch.cuda.current_stream(stream.device)
    )  # nor does it leave the stream where that fails
    failures: list[BaseException] = []
    try:
        # A thread that pins batches goes on allocating, which in the default mode would end the recording.
        with around, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                function()
            except BaseException as error:
                failures.append(error)
                raise
    except RuntimeError as error:
        failures.append(error)
    if not failures:
        return graph
    generator.graphsafe_set_state(spare)
    _end_allocation(graph, stream.device.index, pool)
    try:
        raise failures[0]  # to end a recording that failed fails as well, and does not say why
    finally:
        failures.clear()  # whose tracebacks keep what was allocated


_failed: list[torch.cuda.CUDAGraph] = []  # which the allocator goes on asking about


def _end_allocation(graph: torch.cuda.CUDAGraph, device: int, pool: Any) -> None:
    """Tells PyTorch's allocator that a recording is over, where PyTorch forgot: up to 2.12 an error that ends one comes first.

    In that state it frees no batch that was copied ahead and does not empty its cache, so that every later recording in the
    process fails.
    """
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it was told
        return
    torch._C._cuda_releasePool(device, pool)
    _failed.append(graph)


class _Recording(NamedTuple):
    inputs: tuple[Tensor, ...]
    replay: Callable[[], Any]
    result: Tensor

    def takes(self, inputs: tuple[Tensor, ...]) -> bool:
        return [(t.shape, t.dtype) for t in inputs] == [(t.shape, t.dtype) for t in self.inputs]

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.replay()
        return self.result


class CapturedStep:
    """A step that is recorded at its fourth call, and from then on replayed.

    Args:
        function: of tensors on the device, whose values change from call to call; returns a tensor there. All else that it reads
            and that changes must change in place.
        reason: why it is not to be recorded.
        recorder: makes what records; not called with a reason.
    """

    def __init__(self, function: Callable[..., Tensor], reason: str | None, recorder: Callable[[], Recorder]) -> None:
        self.function = function
        self.reason = reason
        self.recorder = recorder() if reason is None else None
        self.forget()

    def forget(self) -> None:
        """Records anew, after so many plain calls as at first: to be called when tensors that the function reads were replaced."""
        self.warm_up = WARM_UP
        self.recording: _Recording | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result; once recorded, a tensor that the next call overwrites. Other shapes run as at first."""
        if self.recorder is not None and self.recording is None and self.warm_up == 0:
            self._record(self.recorder, inputs)
        if self.recorder is None:
            return self.function(*inputs)
        if self.recording is not None and self.recording.takes(inputs):
            return self.recording(inputs)
        self.warm_up = max(0, self.warm_up - 1)
        return self.recorder.run(self.function, inputs)

    def _record(self, recorder: Recorder, inputs: tuple[Tensor, ...]) -> None:
        held = tuple(given.clone() for given in inputs)
        try:
            self.recording = _Recording(held, *recorder.record(self.function, held))
        except RuntimeError as error:
            self.recorder = None
            self.reason = f"recording failed: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
            print(f"cuda_graphs: {self.outcome}", file=sys.stderr, flush=True)

    @property
    def outcome(self) -> str | None:
        """In words, for a report; None of a run that did not ask for graphs."""
        if self.reason is None:
            return "steps are replayed as a graph"
        return None if self.reason == OFF else f"steps are not captured: {self.reason}"
