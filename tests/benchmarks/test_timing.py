"""The method of measuring: on the CPU for real, and the GPU's branch over a stand-in for torch.cuda that keeps a record."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdeit.benchmarks import machine, timing
from fastdeit.train import graphs


class FakeCuda:
    """Streams, events, graphs and memory of a device whose clock ticks a microsecond a call; `log` is what happened."""

    L2 = 100

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing = self.allocating_to = None
        self.allocated = self.peak = 0
        self.log: list[str] = []
        self.current = None
        outer = self

        class Graph:
            def __init__(self) -> None:
                self.calls: list = []

            def replay(self) -> None:
                assert outer.capturing is None, "a graph is replayed when its capture has ended"
                outer.log.append("replay")
                for call in self.calls:
                    call()

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            waited_for = False

            def record(self) -> None:
                assert outer.capturing is None, "an event with a time is no part of a graph"
                self.at, self.waited_for = outer.now, False

            def synchronize(self) -> None:
                outer.refuse_in_capture()
                self.waited_for = True

            def elapsed_time(self, end) -> float:
                assert end.waited_for, "the time of an event is known when it has happened"
                return (end.at - self.at) * 1e3

        class capture:
            def __init__(self, graph, pool, stream, capture_error_mode) -> None:
                assert stream is outer.current, "captured on the stream that all else ran on"
                outer.log.append(f"capture in pool {pool}")
                self.graph, self.pool = graph, pool

            def __enter__(self) -> None:
                outer.empty_cache()
                if self.pool in outer.spoiled:
                    raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
                outer.capturing, outer.allocating_to = self.graph.calls, self.pool

            def __exit__(self, kind, *_) -> None:
                outer.capturing = None
                if kind is not None:  # as PyTorch up to 2.12: the error comes before the allocator is told
                    outer.spoiled.add(self.pool)
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                outer.allocating_to = None

        class stream:
            def __init__(self, stream) -> None:
                self.stream = stream

            def __enter__(self) -> None:
                self.before, outer.current = outer.current, self.stream

            def __exit__(self, *_) -> None:
                outer.current = self.before

        self.CUDAGraph, self.Event, self.graph, self.stream = Graph, Event, capture, stream
        self.Stream = lambda: SimpleNamespace(device=SimpleNamespace(index=0))
        restore = SimpleNamespace(
            clone_state=lambda: "before", graphsafe_set_state=lambda s: self.log.append(f"state {s}")
        )
        self.default_generators = (restore,)
        self.pools = 0
        self.spoiled: set = set()

    def current_stream(self, _):
        return self.current

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def is_available(self) -> bool:
        return True

    def get_device_properties(self, _) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=self.L2)

    def refuse_in_capture(self) -> None:
        if self.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def synchronize(self) -> None:
        self.refuse_in_capture()

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated

    def memory_allocated(self) -> int:
        return self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak

    def end_allocation(self, device, pool) -> None:
        if self.allocating_to != pool:
            raise RuntimeError("not currently recording to mempool_id")
        self.allocating_to = None

    def empty_cache(self) -> None:
        self.refuse_in_capture()
        if self.allocating_to is not None:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        self.log.append("empty cache")

    def work(self, seconds: float, bytes_: int = 0) -> None:
        """What a candidate does on the device."""
        assert self.current is not None, "never on the default stream"
        if self.capturing is not None:
            self.capturing.append(lambda: self.work(seconds, bytes_))
            return
        self.now += seconds
        self.peak = max(self.peak, self.allocated + bytes_)


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()

    class Torch:
        cuda = fake
        _C = SimpleNamespace(_cuda_endAllocateToPool=fake.end_allocation, _cuda_releasePool=lambda *_: None)

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(timing, "torch", Torch())
    monkeypatch.setattr(graphs, "torch", Torch())
    monkeypatch.setattr(
        timing, "_kernels_of", lambda function, arguments: function(*arguments) or ["a_kernel", "b_kernel"]
    )
    monkeypatch.setattr(time, "perf_counter", lambda: fake.now)  # a plain call takes what its work takes
    return fake


def no_inputs() -> tuple:
    return ()


def big_input() -> tuple:
    return (torch.zeros(1000),)


def test_a_row_has_the_time_of_one_call_whatever_a_turn_has(cuda):
    (row,) = timing.measure({"a": lambda x: cuda.work(50e-6)}, big_input)
    assert row.status == "ok" and row.timed_by == "graph replay" and row.turns == 20
    assert row.median_us == pytest.approx(50) and row.plain_call_us == pytest.approx(50)
    assert row.first_quartile_us <= row.median_us <= row.third_quartile_us
    assert row.launches == 2 and row.kernels == ["a_kernel", "b_kernel"]


def test_candidates_take_turns(cuda):
    order = []
    names = {"a": lambda: (order.append("a"), cuda.work(1e-3)), "b": lambda: (order.append("b"), cuda.work(1e-3))}
    cuda.CUDAGraph.replay = lambda graph: order.append("turn") or [call() for call in graph.calls]
    replays = []

    def replay_of(graph):
        replays.append(id(graph))
        for call in graph.calls:
            call()

    cuda.CUDAGraph.replay = replay_of
    timing.measure(names, no_inputs, turns=5)
    first, second = replays[:2]
    assert first != second and replays == [first, second] * (timing.WARM_UP_TURNS + 5)


def test_a_turn_goes_through_every_copy_of_the_inputs(cuda):
    made, seen = [], []

    def inputs():
        made.append(torch.zeros(15))  # 60 bytes, five of which fill three caches of 100
        return (made[-1],)

    def function(x):
        if cuda.capturing is not None:
            seen.append(x.data_ptr())
        cuda.work(1.0)

    timing.measure({"a": function}, inputs)
    assert len(made) == 5 and sorted(seen) == sorted(t.data_ptr() for t in made)


def test_the_parameters_of_a_module_are_inputs_too():
    assert timing._bytes(nn.Linear(3, 5)) == 4 * (15 + 5)
    assert timing._bytes(torch.zeros(3, dtype=torch.bfloat16)) == 6 and timing._bytes("text") == 0


def test_peak_memory_is_beyond_what_was_there(cuda):
    cuda.allocated = 7 * 2**20
    (row,) = timing.measure({"a": lambda: cuda.work(1e-3, 3 * 2**20)}, no_inputs)
    assert row.peak_mib == 3.0


def test_graphs_of_one_measurement_share_their_memory(cuda):
    timing.measure({"a": lambda: cuda.work(1.0), "b": lambda: cuda.work(1.0)}, no_inputs)
    assert [entry for entry in cuda.log if entry.startswith("capture")] == ["capture in pool 1"] * 2


def test_what_cannot_be_captured_spoils_no_other_capture(cuda):
    def function():
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        cuda.work(1e-3)

    captured = lambda: cuda.work(1e-3)  # noqa: E731
    rows = timing.measure({"before": captured, "not captured": function, "after": captured}, no_inputs)
    assert [row.timed_by.split(" (")[0] for row in rows] == ["graph replay", "batched events", "graph replay"]
    assert [row.status for row in rows] == ["ok"] * 3


def test_what_cannot_be_captured_is_timed_in_plain_calls(cuda):
    def function():
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        cuda.work(1e-3)

    (row,) = timing.measure({"a": function}, no_inputs)
    assert row.median_us == pytest.approx(1000)
    why = "RuntimeError: operation not permitted when stream is capturing"
    assert row.timed_by == f"batched events (no graph: {why})"
    assert cuda.log.count("state before") == 1  # random numbers are to be had again


def test_what_the_host_does_can_belong_to_a_candidate(cuda):
    def function():
        cuda.work(1e-3)

    function.host = "and the host"
    (row,) = timing.measure({"a": function}, no_inputs)
    assert row.timed_by == "batched events (and the host)" and row.median_us == pytest.approx(1000)
    assert not any(entry.startswith("capture") for entry in cuda.log)


@pytest.mark.parametrize("when", ["first call", "capture", "turn", "capture, said by what ends it"])
def test_out_of_memory_at_any_time_is_a_row(cuda, when):
    replays = []

    def function():
        if when == "first call":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if when.startswith("capture") and cuda.capturing is not None:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except torch.OutOfMemoryError:
                if when == "capture":
                    raise
                raise RuntimeError("capture was invalidated")  # noqa: B904
        if when == "turn":
            if cuda.capturing is not None:
                cuda.capturing.append(lambda: replays.append(1) or (_ for _ in ()).throw(torch.OutOfMemoryError()))
        cuda.work(1e-3)

    big, small = timing.measure({"big": function, "small": lambda: cuda.work(1e-3)}, no_inputs)
    assert big.status == "out of memory" and big.median_us is None and len(replays) <= 1
    assert small.status == "ok" and small.turns == 20
    assert "empty cache" in cuda.log


def test_inputs_that_do_not_fit_are_rows():
    def inputs():
        raise torch.OutOfMemoryError

    (row,) = timing.measure({"a": len}, inputs)
    assert row.status == "out of memory, for the inputs alone"


def test_a_profiler_that_is_refused_leaves_the_time(cuda, monkeypatch):
    monkeypatch.setattr(timing, "_kernels_of", lambda *_: (_ for _ in ()).throw(RuntimeError("CUPTI")))
    (row,) = timing.measure({"a": lambda: cuda.work(1e-3)}, no_inputs)
    assert row.status == "ok" and row.median_us and row.launches is None and row.kernels == []


def test_what_fails_or_is_missing_is_a_row_beside_the_others():
    def missing():
        raise timing.NotInstalled("liger-kernel")

    def unsupported():
        raise timing.NotSupported("no FP8")

    def failing():
        raise ValueError("first line\nsecond")

    rows = timing.measure({"a": lambda: None, "b": missing, "c": unsupported, "d": failing}, no_inputs)
    reasons = ["not installed: liger-kernel", "not supported: no FP8", "failed: ValueError: first line"]
    assert [r.status for r in rows] == ["ok", *reasons]
    assert rows[0].median_us > 0 and not any(r.median_us for r in rows[1:])


def test_a_candidate_that_takes_too_long_to_set_up_is_a_row():
    def slow():
        try:
            time.sleep(30)
        except Exception:  # as a compiler does
            pytest.fail("the limit is no error of the candidate")

    start = time.monotonic()
    quick, late = timing.measure({"quick": lambda: None, "slow": slow}, no_inputs, candidate_seconds=0.2)
    assert time.monotonic() - start < 5
    assert quick.status == "ok" and late.status == "not measured: not set up within 0 s"


def test_after_the_deadline_nothing_is_set_up_and_few_turns_are_taken():
    (row,) = timing.measure({"a": lambda: None}, no_inputs, deadline=time.monotonic() - 1)
    assert row.status == "not measured: no time was left"
    end = time.monotonic() + 0.5
    (row,) = timing.measure({"a": lambda: time.sleep(0.1)}, no_inputs, turns=50, deadline=end)
    assert row.status == "ok" and row.turns == timing.LEAST_TURNS


def test_the_limit_is_gone_after_its_block():
    with timing.time_limit(0.05):
        pass
    time.sleep(0.1)
    with timing.time_limit(math.inf):
        pass


def test_errors_are_against_float64_and_of_the_rows_that_were_worked_out():
    exact = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    got = torch.tensor([[1.0, 2.5], [9.0, 9.0]])
    rows = timing.measure({"a": lambda: (got, got), "b": lambda: (got, got)}, no_inputs, expected=lambda: [exact, None])
    assert rows[0].max_errors == [0.5] and rows[0].rms_errors == [pytest.approx(0.5 / math.sqrt(2))]
    (other,) = timing.measure({"x": lambda: 1}, no_inputs, expected=lambda: [exact], different=["x"])
    assert other.status == "ok" and other.max_errors == []


@pytest.mark.parametrize("result", [torch.tensor([[1.0, float("nan")]]), torch.zeros(1, 3)])
def test_a_result_that_is_none_is_not_timed(result):
    expected = torch.zeros(1, 2, dtype=torch.float64)
    (row,) = timing.measure({"a": lambda: (result,)}, no_inputs, expected=lambda: [expected])
    assert row.status.startswith("failed: ValueError: ") and row.median_us is None


def test_a_profile_is_taken_where_it_is_asked_for_and_there_is_time(cuda, monkeypatch):
    """Each takes as long as a candidate's turns; what was timed is kept without it."""
    candidates, clock = {"a": lambda: cuda.work(1e-3)}, {"now": 0.0}
    replay = cuda.CUDAGraph.replay
    monkeypatch.setattr(cuda.CUDAGraph, "replay", lambda graph: clock.update(now=clock["now"] + 1) or replay(graph))
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    kernels = ["a_kernel", "b_kernel"]
    for options, expected in ((dict(), kernels), (dict(profiled=False), []), (dict(deadline=23.0), [])):
        (row,) = timing.measure(candidates, no_inputs, turns=8, **options)
        assert row.status == "ok" and row.kernels == expected
        assert row.turns == 8 or "deadline" in options


def test_rates_follow_from_work_and_time():
    row = timing.Row("a", median_us=2.0).derived(flops=4e6, bytes_=6e3, floor_us=1.0)
    assert (
        row["tflops"] == pytest.approx(2.0) and row["gb_per_s"] == pytest.approx(3.0) and row["share_of_floor"] == 0.5
    )


def test_the_environment_names_versions():
    facts = machine.environment()
    assert facts["torch"] == torch.__version__ and facts["timm"] and facts["python"]


@pytest.mark.gpu
@pytest.mark.numeric
def test_on_a_gpu_backward_is_captured_and_costs_what_it_should():
    from fastdeit.benchmarks.baselines import op_baselines as baselines

    def inputs():
        x, w = torch.randn(2, 4096, 4096, device="cuda", dtype=torch.bfloat16).unbind()
        return x, w.clone(), torch.randn_like(x)

    rows = timing.measure(
        {name: wrap(torch.matmul, 2) for name, wrap in baselines.DIRECTIONS.items()}
        | {"compiled backward": baselines.backward(baselines.compiled(torch.matmul), 2)},
        inputs,
    )
    assert [(row.status, row.timed_by) for row in rows] == [("ok", "graph replay")] * 4
    forward, backward, both, _ = (row.median_us for row in rows)
    assert 1.5 * forward < backward < 3 * forward and both > backward
    assert rows[1].peak_mib == pytest.approx(2 * 32, rel=0.1)
