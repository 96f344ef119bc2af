"""How an optimized model runs: batches padded to buckets, and CUDA graphs, on the fake runtime; what they compute, on a CPU."""

import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch

import fastdeit
from fastdeit import ops, optimize_for_inference
from fastdeit.inference.calls import MOST_KINDS, Batch
from fastdeit.ops import quantized_linear_op
from fastdeit.plan import graphs
from fastdeit.testing import fake_cuda
from tests.inference.conftest import make_model
from tests.plan.events import KINDS, launched

CALLS = 5  # one that allocates, three that are timed, captured
REPLAYED = ["launch", "graph_launch", "copy_on_device"]  # the copy to the graph's input is a cast
PRECISIONS = pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8", "int8"])


@pytest.fixture(autouse=True)
def _as_by_default(monkeypatch):
    monkeypatch.setattr(graphs, "_failed", None)
    fastdeit.set_graphs("off")
    fastdeit.set_graphs()
    yield
    fastdeit.set_graphs("off")
    fastdeit.set_graphs()


def optimized(precision="bf16", **options):
    """Calibrated where the precision needs that; on the CPU."""
    if precision in ("fp8", "int8"):
        options["calibration"] = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    return optimize_for_inference(make_model(), precision, **options)


def images(batch=2, device="cuda"):
    return torch.zeros(batch, 3, 32, 32, device=device)


def capture(fast, batch=2):
    for _ in range(CALLS):
        fast(images(batch))


def kinds_of_a_call(fast, batch=2):
    x = images(batch)
    with fake_cuda.record(*KINDS, "graph_launch") as events:
        fast(x)
    return [event.kind for event in events]


def is_replayed(fast, batch=2):
    return kinds_of_a_call(fast, batch) == REPLAYED


# ---- buckets, on a CPU


@PRECISIONS
def test_a_padded_batch_gives_the_logits_of_its_images(precision):
    fast = optimized(precision, buckets=[4, 2])
    x = torch.randn(5, 3, 32, 32)
    for count, padded in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 5), (0, 0)):
        zeros = torch.zeros(padded - count, 3, 32, 32)
        got = fast(x[:count])
        assert got.shape == (count, 10)
        assert torch.equal(got, fast.run(torch.cat((x[:count], zeros)))[:count])
        torch.testing.assert_close(got, fast.run(x[:count]), rtol=0.05, atol=0.05)


def test_uint8_images_are_padded_too():
    fast = optimized(images="uint8", buckets=[4])
    x = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(fast(x), fast.run(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"cuda_graphs": "on"}, ValueError, "cuda_graphs: expected one of auto, off, got 'on'"),
        ({"cuda_graphs": True}, ValueError, "cuda_graphs: expected one of auto, off, got True"),
        ({"buckets": 8}, TypeError, r"buckets: expected batch sizes, such as \(1, 8, 64\), got 8"),
        ({"buckets": "8"}, TypeError, "buckets: expected batch sizes"),
        ({"buckets": (8, "16")}, TypeError, "buckets: expected whole numbers, got '16'"),
        ({"buckets": (True,)}, TypeError, "buckets: expected whole numbers, got True"),
        ({"buckets": (0, 8)}, ValueError, "buckets: expected batch sizes of at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options, error, said, tmp_path):
    with pytest.raises(error, match=said):
        optimized(**options)
    optimized().save(tmp_path / "m.safetensors")
    with pytest.raises(error, match=said):
        fastdeit.load_optimized(tmp_path / "m.safetensors", **options)


def test_a_file_is_loaded_with_buckets_of_its_own(tmp_path):
    optimized(buckets=(2,)).save(tmp_path / "m.safetensors")
    assert fastdeit.load_optimized(tmp_path / "m.safetensors")._calls.buckets == ()
    assert fastdeit.load_optimized(tmp_path / "m.safetensors", buckets=(8, 4, 8))._calls.buckets == (4, 8)


def test_an_exported_program_takes_every_batch_size():
    fast = optimized(buckets=(4,))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fast, (images(2, "cpu"),), dynamic_shapes=({0: batch},)).module()
    assert program(images(3, "cpu")).shape == (3, 10)


# ---- what a replay computes: a graph's place is taken by a second run of what was captured


@pytest.fixture
def replayed_by_hand(monkeypatch):
    def captured(run):
        run()
        return SimpleNamespace(replay=run)

    side = SimpleNamespace(stream=SimpleNamespace(cuda_stream=0), capture=captured)
    monkeypatch.setattr(graphs, "_side", lambda device, stream: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: side.stream)


@PRECISIONS
def test_a_replay_computes_what_a_call_computes(replayed_by_hand, precision):
    fast = optimized(precision)
    graph = graphs._Graph(Batch(fast, 4), torch.randn(2, 3, 32, 32))
    full = torch.randn(4, 3, 32, 32)
    first = graph(full)
    assert torch.equal(first, fast.run(full))
    part = torch.randn(2, 3, 32, 32)
    second = graph(part)
    assert torch.equal(second, fast.run(torch.cat((part, full[2:])))[:2])  # what lies behind is of an earlier call
    assert torch.equal(first, fast.run(full)) and second.untyped_storage().nbytes() == second.nbytes
    other = make_model()
    fast.refresh(other)
    assert torch.equal(graph(full), fast.run(full)) and not torch.equal(graph(full), first)


# ---- graphs, on the fake runtime


@pytest.mark.fake_device
@PRECISIONS
def test_the_fifth_call_replays_and_nothing_waits(precision):
    fast = optimized(precision).cuda()
    fast(images())
    with fake_cuda.counting() as counts:
        for _ in range(CALLS - 2):
            fast(images())
    assert counts["graph_launch"] == 0 and counts["gemm"] > 20
    with fake_cuda.counting() as last:
        fast(images())
    assert last["graph_launch"] == 1 and last["capture"] in (1, 2)  # the first on a stream has one more, of the anchor
    assert not any((counts + last)[kind] for kind in fake_cuda.WAITS)
    assert is_replayed(fast)
    assert fast.calls() == ["2 images on cuda:0: captured in a graph"]


@pytest.mark.fake_device
@PRECISIONS
def test_a_graph_holds_the_launches_of_a_call(precision):
    def of(events):
        return [
            (event.kind, event.name, event.grid, event.block) for event in events if "FillFunctor" not in event.name
        ]

    fast = optimized(precision).cuda()
    capture(fast)
    with torch.no_grad():
        x = images().to(fast.dtype)
        launches = of(launched(lambda: fast.run(x)))
        captured = of(launched(lambda: graphs._Graph(Batch(fast, 2), x)))
    assert captured[:-1] == launches and len(launches) > 15  # the last one copies the logits to where they are read
    assert captured[-1][0] == "copy_on_device"


@pytest.mark.fake_device
def test_a_bucket_has_one_graph_and_copies_no_more_than_is_given():
    fast = optimized(buckets=(4, 8)).cuda()
    for batch in (3, 4, 2, 1, 3):
        fast(images(batch))
    for batch in (1, 2, 3, 4):
        x = images(batch).bfloat16()
        with fake_cuda.record(*KINDS, "graph_launch") as events:
            out = fast(x)
        copied_in, launched, copied_out = events
        assert launched.kind == "graph_launch"
        assert (copied_in.bytes, copied_out.bytes) == (batch * 3 * 32 * 32 * 2, batch * 10 * 2)
        assert out.shape == (batch, 10) and out.untyped_storage().nbytes() == out.nbytes
    assert fast.calls() == ["4 images on cuda:0: captured in a graph"]
    capture(fast, 9)  # larger than all buckets
    capture(fast, 5)
    assert [line.split(" on ")[0] for line in fast.calls()] == ["4 images", "9 images", "8 images"]


@pytest.mark.fake_device
def test_outputs_are_new_tensors():
    fast = optimized().cuda()
    capture(fast)
    first, second = fast(images()), fast(images())
    assert first.data_ptr() != second.data_ptr()
    with torch.inference_mode():
        assert fast(images()).is_inference()
    assert not fast(images()).is_inference() and not fast(images()).requires_grad


@pytest.mark.fake_device
def test_an_image_dtype_that_is_cast_and_autocast_share_the_graph():
    fast = optimized().cuda()
    capture(fast)
    for dtype in (torch.float16, torch.float64):
        with torch.autocast("cuda", torch.float16), fake_cuda.counting() as counts:
            assert fast(images().to(dtype)).dtype == torch.bfloat16
        assert counts["graph_launch"] == 1
    assert len(fast.calls()) == 1


@pytest.mark.fake_device
def test_weights_that_are_refreshed_keep_the_graph():
    fast = optimized().cuda()
    capture(fast)
    addresses = [buffer.data_ptr() for buffer in fast.buffers()]
    fast.refresh(make_model())
    assert [buffer.data_ptr() for buffer in fast.buffers()] == addresses
    assert is_replayed(fast)
    fast.load_state_dict(fast.state_dict())
    assert is_replayed(fast)


def _moved(fast):
    fast.cpu().cuda()


def _assigned(fast):
    fast.load_state_dict({name: tensor.clone() for name, tensor in fast.state_dict().items()}, assign=True)


def _data_replaced(fast):
    fast.blocks[0].fc1.weight.data = fast.blocks[0].fc1.weight.data.clone()


def _hooked(fast):
    fast.blocks[1].fc1.register_forward_hook(lambda *_: None)


def _head_replaced(fast):
    fast.heads["mean"] = torch.nn.Linear(128, 10, device="cuda", dtype=torch.bfloat16)


def _tapped(fast):
    fast.blocks[0].tap = lambda layer, x: x


def _wrapped(fast):
    fast.norm.forward = fast.norm.forward


@pytest.mark.fake_device
@pytest.mark.parametrize("change", [_moved, _assigned, _data_replaced])
def test_buffers_that_are_replaced_drop_the_graph(change):
    fast = optimized().cuda()
    capture(fast)
    change(fast)
    assert not is_replayed(fast)
    capture(fast)
    assert is_replayed(fast)


@pytest.mark.fake_device
@pytest.mark.parametrize("change", [_hooked, _head_replaced, _tapped, _wrapped])
def test_a_module_that_may_do_more_than_launch_is_called(change):
    fast = optimized().cuda()
    capture(fast)
    change(fast)
    for _ in range(2 * CALLS):
        assert "graph_launch" not in kinds_of_a_call(fast)
    assert fast.calls() == []


@pytest.mark.fake_device
def test_a_hook_of_the_model_itself_is_called_beside_the_graph():
    fast, seen = optimized().cuda(), []
    fast.register_forward_hook(lambda *_: seen.append(1))
    capture(fast)
    assert is_replayed(fast) and len(seen) == CALLS + 1


@pytest.mark.fake_device
def test_streams_have_graphs_of_their_own():
    fast, stream = optimized().cuda(), torch.cuda.Stream()
    capture(fast)
    with torch.cuda.stream(stream):
        assert not is_replayed(fast)
        capture(fast)
        x = images()
        with fake_cuda.record(*KINDS, "graph_launch") as events:
            fast(x)
    assert [event.kind for event in events] == REPLAYED
    assert {event.stream for event in events} == {stream.cuda_stream}
    assert is_replayed(fast) and len(fast.calls()) == 2
    assert fast.calls()[1] == f"2 images on cuda:0, stream {stream.cuda_stream:#x}: captured in a graph"


@pytest.mark.fake_device
def test_a_backend_has_graphs_of_its_own():
    fast = optimized().cuda()
    capture(fast)
    with fastdeit.use_backend("reference"):
        assert not is_replayed(fast)
    assert is_replayed(fast)


@pytest.mark.fake_device
def test_the_graph_that_was_not_used_for_longest_gives_way():
    fast = optimized().cuda()
    fastdeit.set_graphs(max_graphs=2)
    for batch in (1, 2):
        capture(fast, batch)
    assert is_replayed(fast, 2) and is_replayed(fast, 1)
    capture(fast, 3)
    assert is_replayed(fast, 3) and is_replayed(fast, 1) and not is_replayed(fast, 2)


@pytest.mark.fake_device
def test_kinds_of_calls_are_remembered_up_to_a_limit():
    fast = optimized().cuda()
    for batch in range(1, MOST_KINDS + 4):
        fast(images(batch))
    lines = fast.calls()
    assert len(lines) == MOST_KINDS and lines[0] == "4 images on cuda:0: launched"


@pytest.mark.fake_device
@pytest.mark.parametrize("off", ["of the model", "of all"])
def test_switched_off_nothing_is_timed(off):
    fast = optimized(cuda_graphs="off" if off == "of the model" else "auto").cuda()
    if off == "of all":
        fastdeit.set_graphs("off")
    with fake_cuda.counting() as counts:
        capture(fast)
    assert counts["record_event"] == counts["query"] == counts["capture"] == 0


@pytest.mark.fake_device
def test_a_call_that_the_device_bounds_is_launched(monkeypatch):
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda start, end: 1e4)
    fast = optimized().cuda()
    capture(fast)
    assert not is_replayed(fast)
    assert fast.calls()[0].startswith("2 images on cuda:0: launched: the device takes 10000.00 ms, the host ")


@pytest.mark.fake_device
def test_inside_another_capture_the_launches_are_captured():
    fast, stream, x = optimized().cuda(), torch.cuda.Stream(), images()
    with torch.cuda.stream(stream):
        capture(fast)
        assert is_replayed(fast)
    with fake_cuda.counting() as counts, torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        fast(x)
    assert counts["graph_launch"] == 0 and counts["triton_launch"] > 5


@pytest.mark.fake_device
def test_threads_do_not_come_between():
    fast = optimized(buckets=(4,)).cuda()
    capture(fast)
    x = images(3)

    def work():
        for _ in range(25):
            fast(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    with fake_cuda.record(*KINDS, "graph_launch") as events:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [event.kind for event in events] == REPLAYED * 100


@pytest.mark.fake_device
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))], ids=["copied", "pickled"]
)
def test_a_copy_has_graphs_of_its_own(how):
    fast = optimized(buckets=(2,), cuda_graphs="auto").cuda()
    capture(fast)
    other = how(fast)
    assert other._calls.buckets == (2,) and other.calls() == []
    assert is_replayed(fast)
    capture(other, 1)
    assert is_replayed(other, 1)


@pytest.mark.fake_device
def test_ones_of_a_float8_product_outlive_the_graphs_that_read_them():
    q = torch.zeros(24, 32, device="cuda", dtype=torch.float8_e4m3fn)
    weight, scale = q[:16], torch.ones(16, device="cuda")
    quantized_linear_op._ones_of.clear()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.quantized_linear(q, None, weight, scale)
    assert not quantized_linear_op._ones_of  # those are in the graph's memory
    ops.quantized_linear(q, None, weight, scale)
    ((rows, _), ones) = next(iter(quantized_linear_op._ones_of.items()))
    with fake_cuda.counting() as counts:
        ops.quantized_linear(q[:17], None, weight, scale)
    assert rows == 32 and ones.shape == (32, 1) and counts["launch"] == counts["allocation"] == 0
