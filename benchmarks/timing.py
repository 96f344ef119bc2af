"""How every figure of this directory is measured. One method, so that rows can be compared.

- Candidates for the same work are measured in one run, turn by turn (A B C A B C ...), so that clocks, temperature and neighbours
  change under all of them alike. Every candidate gets the same number of warm-up turns.
- One turn replays a CUDA graph of many calls between two events: no host time in it. What cannot be captured is timed as a batch
  of plain calls between events, and its row says so. What one plain call takes on the wall clock, host included, is a column.
- The calls of a turn go through copies of the inputs that together exceed three times the L2 cache, as a layer's inputs do.
- A row has the median over the turns and the quartiles. Clocks are read before and after.
- Launches and kernel names come from a profile of one call, taken when all is timed; they say which of a library's kernels ran.
- Peak memory is what one call allocates at the most beyond its inputs and what it had kept from before, results included.
- What takes too long to set up, does not fit into memory or fails is a row that says so, whenever it happens.
- On a CPU (`--toy`) plain calls are timed by the wall clock. Such figures show that the suite runs, and nothing else.
"""

import contextlib
import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdeit.train.graphs import recorded

WARM_UP_TURNS = 3
LEAST_TURNS = 7  # quartiles of fewer say little
L2_ROTATIONS = 3
_MOST_SETS = 64
_MAX_CALLS_PER_TURN = 100
_SECONDS_PER_TURN = 2e-3  # long against the resolution of events, short against drifting clocks
_PLAIN_CALLS = 5


class NotInstalled(Exception):
    """A candidate's library is missing: its row says so."""


class NotSupported(Exception):
    """The device cannot run a candidate: its row says why."""


class OutOfTime(BaseException):
    """No Exception: compilers handle those of what they run."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the main thread when the time is over. Code that never returns to Python is not interrupted."""

    def expire(*_):
        raise OutOfTime

    if math.isinf(seconds):
        yield
        return
    previous = signal.signal(signal.SIGALRM, expire)
    try:
        # Again each second: an exception raised in a finalizer is lost.
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


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
    plain_call_us: float | None = None  # on the wall clock, until the device is done
    launches: int | None = None
    kernels: list[str] = field(default_factory=list)
    peak_mib: float | None = None
    max_errors: list[float] = field(default_factory=list)  # against float64, one per result that is compared
    rms_errors: list[float] = field(default_factory=list)
    agreement: float | None = None  # of logits: share of images whose largest one is that in float64
    logit_error: float | None = None  # RMS of the error over RMS of the logits

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
    expected: Callable[..., Sequence[Tensor | None]] | None = None,
    different: Collection[str] = (),
    agreement: bool = False,
    candidate_seconds: float = math.inf,
    deadline: float = math.inf,
    profiled: bool = True,
) -> list[Row]:
    """Times every candidate on the same inputs, interleaved.

    Args:
        candidates: name -> function called as `function(*inputs())`; one that raises gets a row that says why. What the host does
            belongs to a function that has an attribute `host`, which says so in words: it is timed as batches of plain calls.
        inputs: makes one fresh set of arguments: tensors, modules (whose parameters count as inputs), anything else.
        turns: how often each candidate is timed after warming up; fewer, `LEAST_TURNS` at least, where `deadline` passes.
        expected: the candidates' results in float64 for the same arguments, in their order, None for one that is not compared.
            One with fewer rows than the result is compared with the result's first rows.
        different: candidates that are known to compute something else, and are not compared.
        agreement: results are logits, of which rows say how many are largest where those in float64 are.
        candidate_seconds: a candidate that takes longer to set up is a row that says so.
        deadline: of time.monotonic(), after which nothing more is set up, or profiled.
        profiled: name the kernels of each candidate, which takes a profile of each.
    """
    try:
        return _measured(
            candidates, inputs, turns, expected, different, agreement, candidate_seconds, deadline, profiled
        )
    finally:
        _release()


def _measured(
    candidates, inputs, turns, expected, different, agreement, candidate_seconds, deadline, profiled
) -> list[Row]:
    side = torch.cuda.Stream() if torch.cuda.is_available() else None
    # Off the default stream for good: backward runs where its forward ran, and the default stream cannot be captured.
    with torch.cuda.stream(side) if side is not None else contextlib.nullcontext():
        try:
            sets = _rotation(inputs)
            oracle = None if expected is None else expected(*sets[0])
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            return [Row(name, status="out of memory, for the inputs alone") for name in candidates]
        _wait()
        pools = [] if side is None else [torch.cuda.graph_pool_handle()]  # one: no graph reads another's results
        timers = [_Timer(name, function, sets, side, pools) for name, function in candidates.items()]

        def warm_up(timer: _Timer) -> None:
            timer.warm_up(None if timer.row.candidate in different else oracle, agreement)

        for step in (warm_up, _Timer.make_turn):
            for timer in timers:
                timer.attempt(step, min(candidate_seconds, deadline - time.monotonic()))
        _take_turns(timers, turns, deadline)
        for timer in timers:
            timer.run = None  # a captured graph holds its memory, which the plain call of the profile needs
        _release()
        for timer in timers:
            if profiled and time.monotonic() < deadline:
                timer.profile()
        _wait()
    return [timer.row for timer in timers]


def _take_turns(timers: list["_Timer"], turns: int, deadline: float) -> None:
    for turn in range(WARM_UP_TURNS + turns):
        if turn >= WARM_UP_TURNS + LEAST_TURNS and time.monotonic() > deadline:
            break
        for timer in timers:
            if timer.run is not None:
                timer.attempt(lambda timer, warm=turn < WARM_UP_TURNS: timer.turn(warm))
    for timer in timers:
        row, times = timer.row, timer.times
        if row.status == "ok":
            row.turns = len(times)
            row.first_quartile_us, row.median_us, row.third_quartile_us = statistics.quantiles(times, n=4)


class _Timer:
    """A candidate on its way to a row."""

    def __init__(self, name: str, function: Callable[..., Any], sets: list[Sequence[Any]], side, pools) -> None:
        self.row = Row(name)
        self.function, self.sets, self.side, self.pools = function, sets, side, pools
        self.run: Callable[[], None] | None = None  # `calls` calls
        self.calls = 1
        self.times: list[float] = []

    def attempt(self, step: Callable[["_Timer"], None], seconds: float = math.inf) -> None:
        """Takes a step; if that fails the row says why, and no other step is taken."""
        if self.row.status != "ok":
            return
        if seconds <= 0:
            self.row.status = "not measured: no time was left"
            return
        try:
            with time_limit(seconds):
                step(self)
        except OutOfTime:
            self.row.status = f"not measured: not set up within {seconds:.0f} s"
        except NotInstalled as missing:
            self.row.status = f"not installed: {missing}"
        except NotSupported as reason:
            self.row.status = f"not supported: {reason}"
        except Exception as error:  # a baseline that fails is a row, not the end of the suite
            self.row.status = "out of memory" if _is_out_of_memory(error) else f"failed: {_described(error)}"
        if self.row.status != "ok":
            self.run = None
            _release()

    def warm_up(self, oracle: Sequence[Tensor | None] | None, agreement: bool) -> None:
        """Compiles what compiles, and fills in what plain calls tell."""
        row = self.row
        result = self.function(*self.sets[0])
        if oracle is not None:
            row.max_errors, row.rms_errors = _errors(result, oracle)
            if agreement:
                row.agreement, row.logit_error = _agreement(result, oracle[0])
        del result
        for arguments in self.sets[1:]:
            self.function(*arguments)
        _wait()
        if self.side is not None:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.function(*self.sets[0])
            _wait()
            row.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        plain = []
        for _ in range(_PLAIN_CALLS if self.side is not None else 1):
            start = time.perf_counter()
            self.function(*self.sets[0])
            _wait()
            plain.append(time.perf_counter() - start)
        row.plain_call_us = statistics.median(plain) * 1e6

    def make_turn(self) -> None:
        """Captures the calls of one turn."""
        if self.side is None:
            self.row.timed_by = "wall clock"
            self.run = lambda: self.function(*self.sets[0])
            return
        wanted = round(_SECONDS_PER_TURN / (self.row.plain_call_us * 1e-6))
        self.calls = max(len(self.sets), min(wanted, _MAX_CALLS_PER_TURN))

        def batch():
            for i in range(self.calls):
                self.function(*self.sets[i % len(self.sets)])

        host = getattr(self.function, "host", None)
        if host is not None:
            self.run, self.row.timed_by = batch, f"batched events ({host})"
            return
        try:
            self.run, self.row.timed_by = recorded(batch, self.side, self.pools[-1]).replay, "graph replay"
        except Exception as error:
            # What is left of a capture that failed, a gradient say, lies in its pool, which PyTorch refuses to take up again.
            self.pools.append(torch.cuda.graph_pool_handle())
            if _is_out_of_memory(error):
                raise
            _wait()
            self.run, self.row.timed_by = batch, f"batched events (no graph: {_described(error)})"

    def turn(self, warm_up: bool) -> None:
        """One turn; what it takes per call counts unless it warms up."""
        if self.side is None:
            start = time.perf_counter()
            self.run()
            seconds = time.perf_counter() - start
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.run()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        if not warm_up:
            self.times.append(seconds / self.calls * 1e6)

    def profile(self) -> None:
        """Names the kernels of one call. Where the profiler is refused the row has its time and no names."""
        if self.side is None or self.row.status != "ok":
            return
        with contextlib.suppress(Exception):
            self.row.kernels = _kernels_of(self.function, self.sets[0])
        self.row.launches = len(self.row.kernels) or None


def _rotation(inputs: Callable[[], Sequence[Any]]) -> list[Sequence[Any]]:
    """Enough sets of arguments that a turn never finds its input in the L2 cache."""
    sets = [inputs()]
    if torch.cuda.is_available():
        size = sum(_bytes(argument) for argument in sets[0])
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        sets += [inputs() for _ in range(min(math.ceil(L2_ROTATIONS * cache / max(size, 1)), _MOST_SETS) - 1)]
    return sets


def _bytes(argument: Any) -> int:
    tensors = argument.parameters() if isinstance(argument, nn.Module) else [argument]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _kernels_of(function: Callable[..., Any], arguments: Sequence[Any]) -> list[str]:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function(*arguments)
        torch.cuda.synchronize()
    return [e.name for e in device_events(profile) if not e.name.startswith(("Memcpy", "Memset"))]


def device_events(profile: torch.profiler.profile) -> list[Any]:
    """What ran on the GPU in a profile. A region that the host gave a name, as an optimizer's step, is on the device's time line as
    well, over the kernels in it: that is no event of its own."""
    cuda = torch.autograd.DeviceType.CUDA
    return [e for e in profile.events() if e.device_type == cuda and not e.is_user_annotation]


def _agreement(result: Any, exact: Tensor | None) -> tuple[float, float]:
    """Of logits with float64 ones of the first images: share of equal classes, and the error's RMS over theirs."""
    got = result[0] if isinstance(result, tuple | list) else result
    assert exact is not None
    got = got[: len(exact)].double()
    error = (got - exact).norm() / exact.norm()
    return (got.argmax(-1) == exact.argmax(-1)).double().mean().item(), error.item()


def _errors(result: Any, oracle: Sequence[Tensor | None]) -> tuple[list[float], list[float]]:
    """Maximum and root mean square of what results differ by from the float64 ones.

    Raises:
        ValueError: a result is not finite where it should be, or has another shape.
    """
    results = result if isinstance(result, tuple | list) else (result,)
    largest, rms = [], []
    for got, exact in zip(results, oracle, strict=True):
        if exact is None:
            continue
        if got.dim() and len(got) > len(exact):
            got = got[: len(exact)]
        if got.shape != exact.shape:
            raise ValueError(f"a result of shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
        error = got.double() - exact
        if not bool(error.isfinite().all()):
            raise ValueError("the result is not finite")
        largest.append(error.abs().max().item())
        rms.append(error.square().mean().sqrt().item())
    return largest, rms


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Also where ending a capture failed because of it, and where a library says it in words."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _described(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _release() -> None:
    """Gives back what a failed or finished candidate held: tracebacks and autograd graphs are cycles."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
