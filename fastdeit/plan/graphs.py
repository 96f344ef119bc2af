"""Automatic CUDA graphs: where the host is slower than the device, a plan's launches are captured and replayed as one."""

import contextlib
import ctypes
import functools
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

MODES = ("auto", "off")
MOST_GRAPHS = 8
_SAMPLES = 3  # calls that are timed
_LONGEST = 1.25  # times the host's time that the device may take where a graph is captured: events take time themselves
_PATIENCE = 32  # calls before a graph that gave way to another is captured again; twice as many at each further time
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: work on the default stream does not disturb a capture

_mode, _most = MODES[0], MOST_GRAPHS
_failed: str | None = None  # why a capture failed; then there are no others in this process
_everyone: "weakref.WeakSet[AutomaticGraph]" = weakref.WeakSet()
_changing = threading.Lock()
_clock = itertools.count()


def set_graphs(mode: str = "auto", *, max_graphs: int = MOST_GRAPHS) -> None:
    """Sets whether accelerated and optimized models capture their forward pass in CUDA graphs, from now on and in every thread.

    Calls without gradients are captured, in one graph for each shape, dtype, autocast setting and stream, once the first calls
    of that kind have proved to be launch-bound. Outputs are new tensors, with and without a graph.

    Args:
        mode: "auto", or "off", which also drops all graphs of the process.
        max_graphs: most graphs in the process at a time, at least 1. A new graph replaces the least recently used one.

    Raises:
        TypeError: max_graphs is not a whole number.
        ValueError: mode is neither "auto" nor "off", or max_graphs is below 1.
    """
    global _mode, _most
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if isinstance(max_graphs, bool) or not isinstance(max_graphs, int):
        raise TypeError(f"max_graphs: expected a whole number, got {max_graphs!r}")
    if max_graphs < 1:
        raise ValueError(f"max_graphs: expected at least 1, got {max_graphs} (mode 'off' captures none)")
    with _changing:
        _mode, _most = mode, max_graphs
        _make_room(0 if mode == "off" else _most)


class Repeated(Protocol):
    """What can be captured: launches for an input of one shape, dtype, device and stream."""

    def launch(self, x: Tensor) -> Tensor:
        """The output, a new tensor."""
        ...

    def receive(self, x: Tensor) -> Tensor:
        """A new tensor that x, and every other input of this kind, can be copied to; it may be longer."""
        ...

    def fixed(self, stream: int) -> "tuple[Callable[[Tensor], object], Tensor, Any]":
        """A function of what `receive` gives that launches the same on a stream and into memory of its own: the output, and what
        else is to be held."""
        ...


class AutomaticGraph:
    """Finds out from the first calls of one plan whether it is worth a graph, and captures it.

    Attributes:
        state: in words.
    """

    def __init__(self) -> None:
        self.state = "launched"
        self.last_used = 0
        self._graph: _Graph | None = None
        self._samples: list[tuple[float, torch.cuda.Event, torch.cuda.Event]] = []
        self._calls_before = 1  # the first binds the plan's code
        self._evictions = 0
        self._decided = False
        self._measuring = threading.Lock()
        _everyone.add(self)

    def run(self, plan: Repeated, x: Tensor) -> Tensor:
        """The plan's output for x."""
        graph = self._graph
        if (graph is None and self._decided) or _mode == "off" or torch.cuda.is_current_stream_capturing():
            return plan.launch(x)
        if graph is not None:
            self.last_used = next(_clock)
            return graph(x)
        if not self._measuring.acquire(blocking=False):
            return plan.launch(x)
        try:
            return self._measured(plan, x)
        finally:
            self._measuring.release()

    def captured(self) -> bool:
        return self._graph is not None

    def leave_out(self, reason: str) -> None:
        """There will be no graph."""
        self._decided, self.state = True, f"launched: {reason}"

    def drop(self) -> None:
        """Gives the memory back. After more and more calls there may be another graph."""
        self._graph, self._decided, self.state = None, False, "launched"
        self._calls_before = _PATIENCE * 2**self._evictions
        self._evictions += 1

    def _measured(self, plan: Repeated, x: Tensor) -> Tensor:
        if self._calls_before > 0:
            self._calls_before -= 1
        elif len(self._samples) < _SAMPLES:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before = time.perf_counter()
            start.record()
            out = plan.launch(x)
            end.record()
            self._samples.append((time.perf_counter() - before, start, end))
            return out
        elif all(end.query() for _, _, end in self._samples):  # a question, not a wait
            self._decide(plan, x)
            if self._graph is not None:
                return self._graph(x)
        return plan.launch(x)

    def _decide(self, plan: Repeated, x: Tensor) -> None:
        host = min(seconds for seconds, _, _ in self._samples) * 1e3
        device = min(start.elapsed_time(end) for _, start, end in self._samples)
        self._samples.clear()
        self._decided = True
        if device > _LONGEST * host:
            self.state = f"launched: the device takes {device:.2f} ms, the host {host:.2f} ms"
            return
        global _failed
        with _changing:
            if _mode == "off":  # since this call began
                self._decided = False
                return
            _make_room(_most - 1)
            try:
                if _failed is None:
                    self._graph, self.state = _Graph(plan, x), "captured in a graph"
            except (RuntimeError, OSError) as error:  # no memory, no driver's library, or what cannot be captured
                _failed = str(error).partition("\n")[0]
            if self._graph is None:
                self.state = f"launched: no graph could be captured ({_failed})"
        self.last_used = next(_clock)


def _make_room(most: int) -> None:
    """Drops the least recently used graphs until `most` are left."""
    captured = sorted(filter(AutomaticGraph.captured, list(_everyone)), key=lambda each: each.last_used)
    for each in captured[: max(0, len(captured) - most)]:
        each.drop()


class _Graph:
    """One captured plan: an input is copied to where the graph reads it, and the output from where it is written. Of an input
    that is shorter than what the graph reads, the output is as long.

    What it reads and writes is allocated on the stream that it is replayed on, so that it may be freed while a replay is under way.
    """

    def __init__(self, plan: Repeated, x: Tensor) -> None:
        side = _side(x.get_device(), torch.cuda.current_stream(x.device).cuda_stream)
        with torch.inference_mode(False), torch.no_grad():
            self._input = plan.receive(x)
            run, self._output, self._held = plan.fixed(side.stream.cuda_stream)
            self._graph = side.capture(lambda: run(self._input))
        self._length = len(self._input)
        self._in_order = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        given = len(x)
        with self._in_order:  # another thread must not come between, on the same stream
            (self._input if given == self._length else self._input[:given]).copy_(x)
            self._graph.replay()
            return (self._output if given == self._length else self._output[:given]).clone()


class _Side:
    """Where the graphs that are replayed on one stream are captured.

    cuBLAS has a workspace for each stream, and PyTorch allocates it at the stream's first product. Here that is inside of a
    capture, in a pool that holds nothing else and that the anchor, never replayed, keeps for good: whatever PyTorch does with
    that workspace later, nobody else gets its memory. The stream is no one else's either; those of `torch.cuda.Stream()` are
    handed out again and again, and products of two streams must not meet in a workspace.
    """

    def __init__(self, device: int) -> None:
        handle = ctypes.c_void_p()
        error = ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(handle), _NON_BLOCKING)
        if error:
            raise RuntimeError(f"cuStreamCreate failed with error {error}")
        self.stream = torch.cuda.ExternalStream(handle.value, device=torch.device("cuda", device))
        self._pool = torch.cuda.graph_pool_handle()
        self._operands = torch.empty(2, 16, 16, device=self.stream.device)
        out = torch.empty_like(self._operands[0])
        self._anchor = self.capture(lambda: torch.mm(*self._operands, out=out))

    def capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """The graph of what run() launches. Raises RuntimeError where that cannot be captured; then nothing else may be."""
        collects = gc.isenabled()
        gc.disable()  # a destructor may call what a capture forbids
        try:
            return self._captured(run, self._pool)
        except RuntimeError:
            self._forget_failed_capture()
            raise
        finally:
            if collects:
                gc.enable()

    def _captured(self, run: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
        with torch.cuda.stream(self.stream):
            # PyTorch 2.11 ends the process if there is no memory for the two numbers that a capture begins with: here the error is
            # one like others, and the allocator keeps their place.
            numbers = [torch.empty(1, dtype=torch.int64, device=self.stream.device) for _ in range(2)]
            del numbers
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        return graph

    def _forget_failed_capture(self) -> None:
        """PyTorch 2.11 leaves its generator of random numbers and its allocator as if the capture went on."""
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self.stream.device.index, self._pool)
        with contextlib.suppress(RuntimeError):
            self._captured(lambda: torch.mm(*self._operands), torch.cuda.graph_pool_handle())


@functools.cache
def _side(device: int, stream: int) -> _Side:
    return _Side(device)
