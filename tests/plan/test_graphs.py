"""Graphs that come by themselves: when they are captured, what they launch, and what drops them. On the fake runtime."""

import gc
import threading
import weakref

import pytest
import timm
import torch

import fastdeit
from fastdeit.blocks.snapshot import KEY
from fastdeit.kernels.runtime.raw_launch import WHY_NO_RAW_LAUNCHES
from fastdeit.plan import graphs
from fastdeit.plan.planned import described
from fastdeit.testing import fake_cuda
from tests.plan.events import KINDS, of_parameters, recorded

CALLS = 7  # op by op, recorded, bound, three that are timed, captured


@pytest.fixture(autouse=True)
def _as_by_default(monkeypatch):
    monkeypatch.setattr(graphs, "_failed", None)
    graphs._side.cache_clear()
    fastdeit.set_graphs("off")
    fastdeit.set_graphs()
    yield
    fastdeit.set_graphs("off")
    fastdeit.set_graphs()


@pytest.fixture
def model():
    if WHY_NO_RAW_LAUNCHES is not None:  # a graph is of a plan
        pytest.skip(WHY_NO_RAW_LAUNCHES)
    with torch.device("cuda"):
        found = timm.create_model("deit_tiny_distilled_patch16_224", depth=2, img_size=64).eval().bfloat16()
    return fastdeit.accelerate(found)


def images(batch=2):
    return torch.zeros(batch, 3, 64, 64, device="cuda", dtype=torch.bfloat16)


@torch.inference_mode()
def call(model, x=None):
    return model(images() if x is None else x)


def launched(model, x=None):
    """Counts of one call."""
    with fake_cuda.counting() as counts:
        call(model, x)
    return counts


def capture(model, x=None):
    for _ in range(CALLS):
        call(model, x)


def is_replayed(model, x=None):
    return launched(model, x)["graph_launch"] == 1


def entries(model):
    return [kind.entry for _, kind in model.__dict__[KEY].made[1].kinds]


def graphs_of(model):
    return [plan.graph._graph for plan in entries(model) if plan.graph.captured()]


@pytest.mark.fake_device
def test_the_seventh_call_replays_and_nothing_waits(model):
    x = images()
    with fake_cuda.counting() as counts:
        for _ in range(CALLS - 1):
            call(model, x)
    assert counts["graph_launch"] == 0
    with fake_cuda.counting() as last:
        call(model, x)
    assert last["graph_launch"] == 1 and last["capture"] == 2  # the first on a stream has one more, of the anchor
    assert not any((counts + last)[kind] for kind in fake_cuda.WAITS)
    counts = launched(model, x)
    assert counts["triton_launch"] == 0 and counts["graph_launch"] == 1
    assert "2 x 3 x 64 x 64 bfloat16: planned, captured in a graph" in described(model)


@pytest.mark.fake_device
def test_a_graph_holds_the_launches_of_its_plan(model):
    def of(events):
        return [event._replace(stream=0) for event in of_parameters(events, model)]

    capture(model)
    (plan,) = entries(model)
    x = images()
    launches = of(recorded(lambda: plan.launch(x)))
    capture_again = recorded(lambda: graphs._Graph(plan, x))
    captured = of(
        event for event in capture_again if "FillFunctor" not in event.name
    )  # the generator's seed and offset
    assert captured == launches and len(launches) > 10


@pytest.mark.fake_device
def test_outputs_are_new_tensors_and_the_input_is_copied(model):
    capture(model)
    (graph,) = graphs_of(model)
    x = images()
    with fake_cuda.record(*KINDS, "graph_launch") as events:
        first, second = graph(x), graph(x)
    assert [event.kind for event in events] == ["copy_on_device", "graph_launch", "copy_on_device"] * 2
    pointers = {tensor.untyped_storage().data_ptr() for tensor in (first, second, graph._output, graph._input, x)}
    assert len(pointers) == 5
    assert call(model).is_inference()
    with torch.no_grad():
        assert not model.forward_features(images()).is_inference()
        assert not model(images()).is_inference()


@pytest.mark.fake_device
@pytest.mark.parametrize("change", ["data", "hook", "child", "drop"])
def test_a_change_drops_the_graph(model, change):
    capture(model)
    (graph,) = map(weakref.ref, graphs_of(model))
    assert is_replayed(model)
    if change == "data":
        model.blocks[0].mlp.fc1.weight.data = model.blocks[0].mlp.fc1.weight.data.clone()
    elif change == "hook":
        model.blocks[1].register_forward_hook(lambda *_: None)
    elif change == "child":
        model.blocks[1].mlp.fc2 = torch.nn.Linear(768, 192, device="cuda", dtype=torch.bfloat16)
    else:
        fastdeit.set_graphs("off")
    assert not is_replayed(model)
    gc.collect()
    assert graph() is None


@pytest.mark.fake_device
def test_weights_that_are_updated_in_place_keep_it(model):
    capture(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert is_replayed(model)


@pytest.mark.fake_device
def test_the_graph_that_was_not_used_for_longest_gives_way(model):
    fastdeit.set_graphs(max_graphs=2)
    for batch in (1, 2):
        capture(model, images(batch))
    assert is_replayed(model, images(1)) and is_replayed(model, images(2)) and is_replayed(model, images(1))
    capture(model, images(3))
    assert is_replayed(model, images(3)) and is_replayed(model, images(1))
    assert not any(is_replayed(model, images(2)) for _ in range(30))  # it does not take the place of another at once
    assert any(is_replayed(model, images(2)) for _ in range(10))
    assert len(graphs_of(model)) == 2
    fastdeit.set_graphs(max_graphs=1)
    assert len(graphs_of(model)) == 1


@pytest.mark.fake_device
def test_expanded_images_are_launched(model):
    x = images(1).expand(3, -1, -1, -1)
    for _ in range(2 * CALLS):
        assert not is_replayed(model, x)
    assert described(model) == [
        "3 x 3 x 64 x 64 bfloat16: planned, launched: the images share memory, to which nothing can be copied"
    ]
    capture(model, x.contiguous())
    assert is_replayed(model, x.contiguous())


@pytest.mark.fake_device
def test_a_call_that_the_device_bounds_is_launched(model, monkeypatch):
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda start, end: 1e4)
    for _ in range(2 * CALLS):
        counts = launched(model)
    assert counts["graph_launch"] == 0
    assert entries(model)[0].graph.state.startswith("launched: the device takes 10000.00 ms, the host ")


@pytest.mark.fake_device
def test_work_that_is_not_done_yet_is_not_waited_for(model, monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda.Event, "query", lambda event: bool(done))
    for _ in range(2 * CALLS):
        assert not is_replayed(model)
    done.append(True)
    assert is_replayed(model)


@pytest.mark.fake_device
@pytest.mark.parametrize("kind", [RuntimeError, OSError])
def test_what_cannot_be_captured_goes_on_launch_by_launch(model, monkeypatch, kind):
    def refuse(plan, x):
        raise kind("CUDA out of memory\nmore")

    monkeypatch.setattr(graphs, "_Graph", refuse)
    capture(model)
    assert not is_replayed(model)
    assert entries(model)[0].graph.state == "launched: no graph could be captured (CUDA out of memory)"


@pytest.mark.fake_device(refusals=True)
def test_a_capture_that_fails_half_way_ends(model, monkeypatch):
    for _ in range(CALLS - 1):
        call(model)
    (plan,) = entries(model)

    def fixed(stream, given=plan.fixed):
        run, out, workspace = given(stream)
        return lambda x: (run(x), torch.cuda.synchronize()), out, workspace

    monkeypatch.setattr(plan, "fixed", fixed)
    call(model)
    assert plan.graph.state.startswith("launched: no graph could be captured")
    assert not torch.cuda.is_current_stream_capturing()
    assert launched(model)["triton_launch"] > 5
    torch.rand(3, device="cuda")  # the generator of random numbers is not left inside the capture
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.rand(3, device="cuda")
    with fake_cuda.counting() as counts:
        capture(model, images(3))
    assert counts["capture"] == 0  # there is not another attempt


@pytest.mark.fake_device
def test_inside_another_capture_the_launches_are_captured(model):
    stream, x = torch.cuda.Stream(), images()
    with torch.cuda.stream(stream):
        capture(model)
        assert is_replayed(model)
    with fake_cuda.counting() as counts, torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        call(model, x)
    assert counts["graph_launch"] == 0 and counts["triton_launch"] > 5


@pytest.mark.fake_device
def test_streams_have_graphs_of_their_own(model):
    capture(model)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert not is_replayed(model)
        capture(model)
        assert is_replayed(model)
    assert is_replayed(model) and len(graphs_of(model)) == 2


@pytest.mark.fake_device
def test_threads_do_not_come_between(model):
    capture(model)
    (graph,) = graphs_of(model)
    x = images()

    def work():
        for _ in range(50):
            graph(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    with fake_cuda.record(*KINDS, "graph_launch") as events:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [event.kind for event in events] == ["copy_on_device", "graph_launch", "copy_on_device"] * 200


@pytest.mark.fake_device
def test_calls_with_gradients_are_not_captured(model):
    for _ in range(2 * CALLS):
        with fake_cuda.counting() as counts:
            model(images())
    assert counts["graph_launch"] == 0


@pytest.mark.fake_device
def test_switched_off_nothing_is_timed(model):
    fastdeit.set_graphs("off")
    with fake_cuda.counting() as counts:
        capture(model)
    assert counts["record_event"] == counts["query"] == counts["capture"] == 0


@pytest.mark.parametrize(
    ("mode", "most", "error", "said"),
    [
        ("on", 8, ValueError, "mode: expected one of auto, off, got 'on'"),
        ("auto", 0, ValueError, "max_graphs: expected at least 1, got 0"),
        ("auto", 2.0, TypeError, "max_graphs: expected a whole number, got 2.0"),
        ("auto", True, TypeError, "max_graphs: expected a whole number, got True"),
    ],
)
def test_bad_settings_are_named(mode, most, error, said):
    with pytest.raises(error, match=said):
        fastdeit.set_graphs(mode, max_graphs=most)
