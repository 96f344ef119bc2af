"""What the fake CUDA runtime counts, and what it refuses. These tests run on it."""

import contextlib

import pytest
import torch

from fastdeit.testing import fake_cuda

pytestmark = pytest.mark.fake_device
refuses = pytest.mark.fake_device(refusals=True)


def cuda(*shape, **options):
    return torch.zeros(*shape, device="cuda", **options)


@contextlib.contextmanager
def refused(text):
    """Something in a with statement raises, and the fake runtime says why in these words."""
    before = len(fake_cuda.errors())
    with pytest.raises(RuntimeError):
        yield
    assert any(text in error for error in fake_cuda.errors()[before:]), fake_cuda.errors()[before:]


@pytest.fixture
def captured():
    """captured(function): what a function launches, captured on a stream of its own."""

    def capture(function, **options):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, **options):
            function()
        return graph

    return capture


def test_launches_products_and_waits_are_counted():
    x, w = cuda(8, 16), cuda(16, 4)
    (x @ w).relu().sum().item()
    with fake_cuda.counting() as counts:
        (x @ w).relu().sum().item()
    assert counts == dict(launch=2, gemm=1, copy_from_device=1, wait_stream=1)


def test_events_carry_name_sizes_and_stream():
    x, w = cuda(8, 16), cuda(16, 4)
    stream = torch.cuda.Stream()
    with fake_cuda.record("gemm", "launch") as events, torch.cuda.stream(stream):
        (x @ w).relu()
    product, relu = events
    assert product.name == "cublasSgemm_v2 nn 4x8x16 type 0"
    assert "elementwise_kernel" in relu.name and relu.grid == (1, 1, 1) and relu.block[0] >= 32
    assert {event.stream for event in events} == {stream.cuda_stream} and stream.cuda_stream != 0


def test_a_kind_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"'launches'.*triton_launch"), fake_cuda.record("launches"):
        pass


def test_a_wait_names_the_line_that_waits():
    x = cuda(4)

    def reads():
        return x.tolist()

    with fake_cuda.observe_waits() as waits:
        reads()
        torch.cuda.synchronize()
    (first, second) = waits
    assert first.call == "cudaStreamSynchronize" and first.where[0].endswith("in reads") and __file__ in first.where[0]
    assert second.call == "cudaDeviceSynchronize"


def test_copies_tell_pinned_from_pageable_memory():
    x = torch.arange(1000.0)
    with fake_cuda.counting() as counts, fake_cuda.moved_data():
        on_device = x.cuda()
        pinned = on_device.cpu().pin_memory()
        again = pinned.to("cuda", non_blocking=True)
        assert torch.equal(again.cpu(), x)
    assert counts["copy_to_device_pageable"] == 1 and counts["copy_to_device"] == 1
    assert counts["copy_from_device_pageable"] == 2
    with fake_cuda.counting() as counts:
        pinned.to("cuda", non_blocking=True)
    assert not any(counts[kind] for kind in fake_cuda.WAITS)


def test_device_memory_reads_as_zeros():
    for _ in range(2):  # the second time in memory that was used
        x = torch.arange(1.0, 1000.0).cuda()
        assert not (x + 1).cpu().any() and not x.cpu().any()


def test_separate_memory_is_given_to_no_second_tensor():
    def addresses():
        return {cuda(1000).data_ptr() for _ in range(20)}

    assert len(addresses()) < 20  # a cached block again and again
    with fake_cuda.separate_memory():
        assert len(addresses()) == 20
        kept = cuda(1000)
        assert kept.resize_(0).resize_(2000).is_cuda and cuda(0).data_ptr() == 0
    assert len(addresses()) < 20 and not kept.cpu().any()


def test_convolutions_run_without_cudnn():
    assert not torch.backends.cudnn.enabled
    layer = torch.nn.Conv2d(3, 8, 4, 4).cuda()
    layer(cuda(2, 3, 16, 16)).sum().backward()
    assert layer.weight.grad.is_cuda


def test_more_memory_than_the_device_has_is_refused():
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(100 << 30, dtype=torch.uint8, device="cuda")


def test_a_replayed_graph_is_one_launch(captured):
    x = cuda(4)
    with fake_cuda.counting() as counts:
        graph = captured(lambda: x.add_(1).mul_(2))
    assert counts["launch"] >= 2 and counts["capture"] == 1
    with fake_cuda.counting() as counts:
        graph.replay()
    assert counts["graph_launch"] == 1 and not counts["launch"]


@refuses
@pytest.mark.parametrize(
    "function, text",
    [
        (lambda x: x.sum().item(), "cudaStreamSynchronize of a captured stream"),
        (lambda x: torch.cuda.synchronize(), "cudaDeviceSynchronize"),
        (lambda x: torch.cuda.current_stream().record_event().query(), "cudaEventQuery"),
    ],
)
def test_what_waits_is_refused_in_a_capture(captured, function, text):
    x = cuda(4)
    with refused(text):
        captured(lambda: function(x))
    x.add_(1)
    torch.cuda.synchronize()  # and the device is as it was


@refuses
def test_a_fork_must_be_joined_before_a_capture_ends(captured):
    x, side = cuda(4), torch.cuda.Stream()

    def fork(join):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        if join:
            torch.cuda.current_stream().wait_stream(side)

    captured(lambda: fork(True))
    with refused("before a forked stream was joined"):
        captured(lambda: fork(False))


@refuses
def test_work_on_the_legacy_stream_is_missing_from_a_capture(captured):
    x = cuda(4)

    def stray():
        with torch.cuda.stream(torch.cuda.default_stream()):
            x.add_(1)

    before = len(fake_cuda.errors())
    captured(stray)
    assert "legacy stream during a capture is not captured" in fake_cuda.errors()[before]


@refuses
def test_a_stream_of_another_device_is_refused():
    b = torch.zeros(4, 4, device="cuda:1")
    foreign = torch.cuda.ExternalStream(torch.cuda.Stream(0).cuda_stream, device=1)
    with refused("the stream is of device 0, the current device is 1"), torch.cuda.stream(foreign):
        b.add_(1)


def test_a_copy_between_devices_is_counted_as_such():
    a = torch.ones(4, device="cuda:0")
    with fake_cuda.counting() as counts:
        b = a.to("cuda:1")
    assert counts["copy_between_devices"] == 1 and b.device.index == 1
