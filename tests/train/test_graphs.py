"""Which runs can be recorded, and that a recorded step is the same step."""

import copy
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastdeit.train import engine, graphs
from fastdeit.train.datasets import load_data
from fastdeit.train.device import reproducible
from fastdeit.train.distributed import SINGLE, World
from fastdeit.train.engine import Trainer
from fastdeit.train.graphs import OFF, WARM_UP, CapturedStep, CudaRecorder, DeviceRates, why_not_captured
from fastdeit.train.models import create_student
from fastdeit.train.monitor import NonFiniteLossError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
STEPS = 9  # of which WARM_UP are plain
READS_ON_THE_HOST = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class OpRecorder:
    """In a CUDA graph's place on a CPU: what operators computed is computed again, in the same memory, without any Python.

    As in a graph, numbers stay as they were when the function was recorded, tensors are read anew, random numbers are drawn anew.
    """

    def run(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        return function(*inputs)

    def record(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Callable[[], Any], Tensor]:
        """Unlike a graph's, this recording computes; what that changed in place it takes back."""
        tape = _Tape()
        with tape:
            result = function(*inputs)
        tape.take_back()
        return tape.replay, result


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()
        self.random = torch.get_rng_state()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS_ON_THE_HOST:
            raise RuntimeError(f"{func} waits for the device, which a recording does not allow")
        inputs = _tensors((args, kwargs))
        if not _is_view(func):
            for tensor in inputs:  # any may be written to
                self._keep(tensor)
        outputs = func(*args, **kwargs)
        known = {id(t) for t in inputs}
        found = [t for t in _tensors(outputs) if id(t) not in known]
        if not _is_view(func):
            self.made |= {t.untyped_storage().data_ptr() for t in found}
            self.steps.append((func, args, kwargs, found))
        return outputs

    def _keep(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address not in self.made and address not in self.before:
            whole = tensor.detach().new_empty(0).set_(tensor.untyped_storage())
            self.before[address] = (whole, whole.clone())

    def take_back(self) -> None:
        for now, before in self.before.values():
            now.copy_(before)
        torch.set_rng_state(self.random)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.steps:
            again = func(*args, **kwargs)
            known = {id(t) for t in _tensors((args, kwargs))}
            fresh = [t for t in _tensors(again) if id(t) not in known]
            for held, new in zip(outputs, fresh, strict=True):
                held.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _is_view(func: Any) -> bool:
    return func.is_view or func.name() in ("aten::detach", "aten::_unsafe_view", "aten::_reshape_alias")


class Fused:
    _step_supports_amp_scaling = True


@pytest.mark.parametrize(
    "changes, device, optimizer, world, reason",
    [
        (dict(cuda_graphs=False), GPU, Fused(), SINGLE, "cuda_graphs is off"),
        (dict(), CPU, Fused(), SINGLE, "the device is cpu"),
        (dict(), GPU, Fused(), World(0, 2), "2 processes exchange gradients"),
        (dict(precision="fp16"), GPU, Fused(), SINGLE, "fp16's scaler"),
        (dict(opt="sgd"), GPU, object(), SINGLE, "the update of sgd cannot be held back on the device"),
        (dict(grad_checkpointing=True), GPU, Fused(), SINGLE, "grad_checkpointing"),
        (dict(), GPU, Fused(), SINGLE, None),
        (dict(grad_accum_steps=4, clip_grad=1.0, compile=True, drop=0.1), GPU, Fused(), SINGLE, None),
    ],
)
def test_what_keeps_a_run_from_being_recorded(small_config, changes, device, optimizer, world, reason):
    config = small_config.replace(**{"cuda_graphs": True, **changes})
    found = why_not_captured(config, device, optimizer, world)
    assert found is None if reason is None else reason in found


def test_a_recorded_function_is_replayed_on_the_inputs_of_each_call():
    calls = []

    def function(x, y):
        calls.append(x.shape)
        return x * 2 + y

    step = CapturedStep(function, None, OpRecorder)
    for value in range(WARM_UP + 3):
        given = torch.full((3,), float(value)), torch.full((3,), 10.0 * value)
        assert torch.equal(step(*given), given[0] * 2 + given[1])
    assert len(calls) == WARM_UP + 1  # and one that was recorded
    assert torch.equal(step(torch.ones(2), torch.ones(2)), torch.full((2,), 3.0)) and len(calls) == WARM_UP + 2
    assert torch.equal(step(torch.ones(3), torch.ones(3)), torch.full((3,), 3.0)) and len(calls) == WARM_UP + 2
    step.forget()
    step(torch.ones(3), torch.ones(3))
    assert len(calls) == WARM_UP + 3


def test_what_cannot_be_recorded_runs_on_and_says_why(capsys):
    step = CapturedStep(lambda x: x * x.sum().item(), None, OpRecorder)
    for _ in range(WARM_UP + 2):
        assert torch.equal(step(torch.ones(2)), torch.full((2,), 2.0))
    assert step.outcome.startswith("steps are not captured: recording failed: aten._local_scalar_dense")
    assert capsys.readouterr().err.count("recording failed") == 1
    assert CapturedStep(torch.neg, OFF, OpRecorder).outcome is None


def test_rates_are_numbers_outside_of_the_update():
    optimizer = torch.optim.AdamW(
        [dict(params=[nn.Parameter(torch.ones(2))]), dict(params=[nn.Parameter(torch.ones(1))])]
    )
    rates = DeviceRates(optimizer, CPU)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = before["param_groups"][0]["lr"] = 0.25
    rates.follow()
    with rates.in_place():
        assert [group["lr"].item() for group in optimizer.param_groups] == [0.25, pytest.approx(1e-3)]
    assert optimizer.state_dict() == before


@pytest.fixture
def make_trainer(small_config, monkeypatch):
    """As on a GPU: a fused optimizer that heeds the verdict, which is read one step later. Recorded or not."""
    create = functools.partial(timm.optim.create_optimizer_v2, fused=True)
    monkeypatch.setattr(timm.optim, "create_optimizer_v2", create)

    def make(recorded, teacher=None, **changes):
        config = small_config.replace(sched_on_updates=True, epochs=3, batch_size=32, **changes)
        torch.manual_seed(3)
        if teacher is None:
            teacher = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).eval().requires_grad_(False)
        trainer = Trainer(config, create_student(config, 3, CPU), teacher, load_data(config).train, 3)
        trainer.monitor.deferred = True
        if recorded:
            trainer.whole_step = CapturedStep(trainer._whole_step, None, OpRecorder)
        return trainer

    return make


def run(trainer):
    """Each step's loss, and all that training has changed in the end."""
    losses = []
    judge = trainer.monitor.note

    def note(values, step, epoch):
        losses.append(values[-1].clone())
        judge(values.clone(), step, epoch)

    trainer.monitor.note = note
    for epoch in range(3):
        trainer.train_epoch(epoch, mock.Mock())
    assert len(losses) == STEPS
    return [loss.item() for loss in losses], trainer.state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        dict(),  # mixup, erasing, drop path, hard distillation, moving average, a new learning rate at each step
        dict(grad_accum_steps=2, clip_grad=0.5),
        dict(clip_grad=0.01, clip_mode="agc", distillation_type="soft", layer_decay=0.7),
        dict(mixup=0.0, cutmix=0.0, drop=0.3, model_ema_warmup=True),
    ],
    ids=["recipe", "accumulated, clipped", "agc, soft, layer decay", "dropout, average warmed up"],
)
def test_a_recorded_run_is_the_same_bits(make_trainer, changes):
    losses, state = run(make_trainer(False, **changes))
    trainer = make_trainer(True, **changes)
    recorded_losses, recorded = run(trainer)
    assert trainer.whole_step.recording is not None and len(set(losses)) == STEPS
    assert recorded_losses == losses
    for part in ("model", "ema"):
        assert all(torch.equal(recorded[part][name], tensor) for name, tensor in state[part].items()), part
    moments = state["optimizer"]["state"]
    assert all(torch.equal(recorded["optimizer"]["state"][i]["exp_avg"], moments[i]["exp_avg"]) for i in moments)
    assert recorded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]


def test_a_recorded_run_with_cached_labels(make_trainer, monkeypatch):
    """Labels of each step reach the recording, also in parts."""

    class Cached(engine.CachedTeacher):
        def __init__(self):
            nn.Module.__init__(self)
            self.labels, self.device = None, CPU
            self.file = mock.Mock(
                labels=torch.randint(0, 3, (3, 96), generator=torch.Generator().manual_seed(5)).numpy()
            )

    results = [run(make_trainer(recorded, Cached(), grad_accum_steps=2))[0] for recorded in (False, True)]
    assert results[0] == results[1]


def test_a_recorded_step_whose_loss_is_not_finite_changes_nothing(make_trainer):
    """Nor does the next one, which is under way when the verdict is read."""
    trainer = make_trainer(True)
    before = {}
    train_step = trainer._train_step

    def step(epoch, images, classes):
        if trainer.step == 4:
            before.update(copy.deepcopy(trainer.model.state_dict()))
            images = images.float() * float("nan")
        train_step(epoch, images, classes)

    trainer._train_step = step
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 4 \(epoch 1\)"):
        run(trainer)
    assert before and all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_run_says_why_it_is_not_recorded(small_config, capsys):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).eval()
    config = small_config.replace(cuda_graphs=True)
    trainer = Trainer(config, create_student(config, 3, CPU), teacher, load_data(config).train, 3)
    said = "steps are not captured: graphs are CUDA's, and the device is cpu"
    assert trainer.whole_step.outcome == said and f"cuda_graphs: {said}" in capsys.readouterr().err


def test_plain_steps_and_the_recording_are_on_one_stream_that_waits_and_is_waited_for(monkeypatch):
    log = []

    class Stream:
        def __init__(self, name, device=None):
            self.name, self.device = name, mock.Mock(index=0)

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Context:
        def __init__(self, name, stream):
            self.name = f"{name} on {stream.name}"

        def __enter__(self):
            log.append(self.name)

        def __exit__(self, *_):
            log.append("end")

    cuda = mock.Mock()
    cuda.Stream = lambda device: Stream("side")
    cuda.current_stream = lambda device: Stream("main")
    cuda.stream = lambda stream: Context("run", stream)
    cuda.graph = lambda graph, pool, stream, capture_error_mode: Context(f"record {capture_error_mode}", stream)
    cuda.default_generators = [mock.Mock()]
    monkeypatch.setattr(graphs, "torch", mock.Mock(cuda=cuda))
    recorder = CudaRecorder(GPU)
    assert recorder.run(lambda x: log.append("step") or x, (7,)) == 7
    assert log == ["side waits for main", "run on side", "step", "end", "main waits for side"]
    log.clear()
    replay, result = recorder.record(lambda x: log.append("step") or x + 1, (7,))
    assert log == ["run on main", "record thread_local on side", "step", "end", "end"] and result == 8
    assert replay is cuda.CUDAGraph().replay and not cuda.default_generators[0].graphsafe_set_state.called
    with pytest.raises(RuntimeError, match="no"):
        recorder.record(mock.Mock(side_effect=RuntimeError("no")), (7,))
    cuda.default_generators[0].graphsafe_set_state.assert_called_with(cuda.default_generators[0].clone_state())


@pytest.mark.parametrize("told", [False, True])
def test_a_failed_recording_is_over_for_the_allocator(monkeypatch, told):
    """PyTorch up to 2.12 leaves that out where ending the capture is what fails; where it did not, a pool is not released twice."""
    log = []

    def end(device, pool):
        if told:
            raise RuntimeError("not currently recording to mempool_id")
        log.append(f"{pool} ended")

    fake = mock.MagicMock()
    fake.cuda.graph_pool_handle = lambda: "a pool"
    fake.cuda.graph.return_value.__exit__.side_effect = RuntimeError("CUDA error: operation failed during capture")
    fake._C._cuda_endAllocateToPool, fake._C._cuda_releasePool = (
        end,
        lambda device, pool: log.append(f"{pool} released"),
    )
    monkeypatch.setattr(graphs, "torch", fake)
    monkeypatch.setattr(graphs, "_failed", [])
    with pytest.raises(RuntimeError, match="not permitted"):  # the reason, not what ends the recording because of it
        graphs.recorded(mock.Mock(side_effect=RuntimeError("operation not permitted")), mock.Mock())
    assert log == ([] if told else ["a pool ended", "a pool released"]) and len(graphs._failed) == (not told)


@pytest.mark.gpu
@pytest.mark.numeric
@pytest.mark.parametrize("changes", [dict(), dict(compile=True), dict(grad_accum_steps=2, clip_grad=0.5)])
def test_a_captured_run_has_the_losses_of_an_uncaptured_one(make_small_config, changes):
    """Bit for bit: the same kernels in the same order on the same random numbers."""
    results = []
    for captured in (False, True):
        config = make_small_config(
            epochs=3, in_chans=3, mean=[0.5] * 3, std=[0.5] * 3, batch_size=32, cuda_graphs=captured
        )
        config = config.replace(sched_on_updates=True, **changes)
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).to(GPU).eval().requires_grad_(False)
        torch.manual_seed(3)
        nn.init.normal_(teacher[1].weight)
        with reproducible(config):
            trainer = Trainer(config, create_student(config, 3, GPU), teacher, load_data(config).train, 3)
            results.append(run(trainer))
        assert trainer.whole_step.reason == (None if captured else OFF)
        assert (trainer.whole_step.recording is not None) is captured
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[1][1]["model"][name], tensor) for name, tensor in results[0][1]["model"].items())
    assert all(torch.equal(results[1][1]["ema"][name], tensor) for name, tensor in results[0][1]["ema"].items())


@pytest.mark.gpu
@pytest.mark.numeric
def test_a_failed_recording_leaves_the_device_as_it_was(capsys):
    """Random numbers, too: PyTorch's own generator is unusable after a recording that failed."""

    def function(x):
        noise = torch.rand_like(x)
        return x + noise if noise.sum().item() >= 0 else x

    step = CapturedStep(function, None, functools.partial(CudaRecorder, GPU))
    for _ in range(WARM_UP + 2):
        torch.manual_seed(1)
        found = step(torch.ones(4, device=GPU))
        torch.manual_seed(1)
        assert torch.equal(found, function(torch.ones(4, device=GPU)))
    assert "recording failed" in step.outcome
    torch.cuda.empty_cache()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.ones(4, device=GPU)
        graphs.recorded(lambda: x.add_(1), stream).replay()
        assert x.tolist() == [2.0] * 4
