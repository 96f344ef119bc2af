"""How every figure of this directory is measured. One method, so that rows can be compared.

- Candidates for the same work are measured in one run, turn by turn (A B C A B C ...), so that clocks, temperature and neighbours
  change under all of them alike. Every candidate gets the same number of warm-up turns.
- One turn replays a CUDA graph of many calls between two events: no host time in it. What cannot be captured is timed as a batch
  of plain calls between events, and its row says so.
- The calls of a turn go through copies of the inputs that together exceed three times the L2 cache, as a layer's inputs do.
- A row has the median over the turns and the quartiles. Clocks are read before and after.
- Launches and kernel names come from a profile of one call; they say which of a library's kernels really ran.
- On a CPU (`--toy`) plain calls are timed by the wall clock. Such figures show that the suite runs, and nothing else.
"""

import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

WARM_UP_TURNS = 3
L2_ROTATIONS = 3
_MAX_CALLS_PER_TURN = 100
_SECONDS_PER_TURN = 2e-3  # long against the resolution of events, short against drifting clocks


class NotInstalled(Exception):
    """A candidate's library is missing: its row says so."""


@dataclass
class Row:
    """One candidate at one shape. Times in microseconds per call."""

    candidate: str
    status: str = "ok"  # or why there is no figure
    median_us: float | None = None
    first_quartile_us: float | None = None
    third_quartile_us: float | None = None
    turns: int = 0
    timed_by: str = ""
    launches: int | None = None
    kernels: list[str] = field(default_factory=list)
    peak_mib: float | None = None
    max_error: float | None = None  # against float64

    def derived(self, flops: float, bytes_: float, floor_us: float | None) -> dict[str, Any]:
        """The row as a dictionary, with the rates that its time means for the given work."""
        row = asdict(self)
        if self.median_us:
            row["tflops"] = flops / self.median_us / 1e6
            row["gb_per_s"] = bytes_ / self.median_us / 1e3
            row["share_of_floor"] = None if floor_us is None else floor_us / self.median_us
        return row


def measure(
    candidates: dict[str, Callable[..., Any]],
    inputs: Callable[[], Sequence[Any]],
    *,
    turns: int = 20,
    errors: dict[str, float] | None = None,
) -> list[Row]:
    """Times every candidate on the same inputs, interleaved.

    Args:
        candidates: name -> function called as `function(*inputs())`; one that raises gets a row that says why.
        inputs: makes one fresh set of arguments.
        turns: how often each candidate is timed after warming up.
        errors: largest error of each candidate against float64, where it is known.
    """
    try:
        sets = _rotation(inputs)
    except torch.OutOfMemoryError:
        return [Row(name, status="out of memory, for the inputs alone") for name in candidates]
    rows, timers = [], {}
    for name, function in candidates.items():
        row = Row(name, max_error=(errors or {}).get(name))
        rows.append(row)
        try:
            timers[name] = _prepare(function, sets, row)
        except NotInstalled as missing:
            row.status = f"not installed: {missing}"
        except torch.OutOfMemoryError:
            row.status = "out of memory"
        except Exception as error:  # a peer that fails is a row, not the end of the suite
            row.status = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(WARM_UP_TURNS + turns):
        for name, timer in timers.items():
            seconds = timer()
            if turn >= WARM_UP_TURNS:
                times[name].append(seconds * 1e6)
    for row in rows:
        if row.candidate in times:
            first, median, third = statistics.quantiles(times[row.candidate], n=4)
            row.first_quartile_us, row.median_us, row.third_quartile_us = first, median, third
            row.turns = turns
    return rows


def _rotation(inputs: Callable[[], Sequence[Any]]) -> list[Sequence[Any]]:
    """Enough sets of arguments that a turn never finds its input in the L2 cache."""
    sets = [inputs()]
    if torch.cuda.is_available():
        size = sum(t.numel() * t.element_size() for t in sets[0] if isinstance(t, Tensor))
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        sets += [inputs() for _ in range(min(math.ceil(L2_ROTATIONS * cache / max(size, 1)), 64) - 1)]
    return sets


def _prepare(function, sets, row: Row) -> Callable[[], float]:
    """Warms a candidate up, fills in what is read once, and returns what times one turn in seconds per call."""
    if not torch.cuda.is_available():
        function(*sets[0])
        row.timed_by = "wall clock"

        def turn() -> float:
            start = time.perf_counter()
            function(*sets[0])
            return time.perf_counter() - start

        return turn

    # Off the default stream from the first call on: backward runs where its forward ran, and that stream cannot be captured.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for arguments in sets:
            function(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*sets[0])
    torch.cuda.synchronize()
    row.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    row.kernels = _kernels_of(function, sets[0])
    row.launches = len(row.kernels)
    calls = _calls_per_turn(function, sets)

    def batch():
        for i in range(calls):
            function(*sets[i % len(sets)])

    run = batch
    row.timed_by = "batched events"
    try:
        run = _captured(batch, side)
        row.timed_by = "graph replay"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        row.timed_by += f" (no graph: {type(error).__name__})"
        torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def turn() -> float:
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return turn


def _captured(batch: Callable[[], None], side: torch.cuda.Stream) -> Callable[[], None]:
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        batch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        batch()
    return graph.replay


def _calls_per_turn(function, sets) -> int:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function(*sets[0])
    end.record()
    end.synchronize()
    once = max(start.elapsed_time(end) / 1e3, 1e-6)
    return max(len(sets), min(round(_SECONDS_PER_TURN / once), _MAX_CALLS_PER_TURN))


def _kernels_of(function, arguments) -> list[str]:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function(*arguments)
        torch.cuda.synchronize()
    on_device = (e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]


def environment() -> dict[str, Any]:
    """What the figures depend on: GPU, driver, clocks, versions."""
    import timm

    import fastdeit

    facts = {
        "fastdeit": fastdeit.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cudnn"] = torch.backends.cudnn.version()
        facts |= _nvidia_smi()
    return facts


def clocks() -> dict[str, str]:
    """Present clocks and temperature of the GPU; empty without one."""
    query = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    return _nvidia_smi(query) if torch.cuda.is_available() else {}


def _nvidia_smi(query: str = "driver_version,clocks.max.sm,clocks.max.mem") -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(query.split(","), (value.strip() for value in line.split(",")), strict=False))
