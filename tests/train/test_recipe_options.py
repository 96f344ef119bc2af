"""What a recipe may ask of the step: precision, accumulation, clipping, layer decay, checkpointing, compiling; learning rates."""

import copy
import math
from unittest import mock

import pytest
import torch
from torch import nn

from fastdeit.train import engine, run
from fastdeit.train.checkpoints import BAD_STATE, STATE, load_state
from fastdeit.train.config import load_config
from fastdeit.train.datasets import load_data
from fastdeit.train.distributed import SINGLE
from fastdeit.train.engine import Trainer
from fastdeit.train.models import create_student
from fastdeit.train.monitor import LossMonitor, NonFiniteLossError, all_finite
from fastdeit.train.optimization import Schedule

CPU = torch.device("cpu")


@pytest.fixture
def plain(small_config):
    """Nothing drawn at random within a step."""
    return small_config.replace(mixup=0.0, cutmix=0.0, reprob=0.0, drop_path=0.0, warmup_epochs=0)


def trainer_of(config):
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).eval().requires_grad_(False)
    return Trainer(config, create_student(config, 3, CPU), teacher, load_data(config).train, 3)


def after_an_epoch(config):
    trainer = trainer_of(config)
    loss = trainer.train_epoch(0, mock.Mock())
    return loss, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_close(found, expected, atol=2e-5):
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(
            found[1][name], tensor, rtol=1e-3, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_give_the_whole_batchs_update(plain, parts):
    assert_close(
        after_an_epoch(plain.replace(grad_accum_steps=parts, opt="sgd")), after_an_epoch(plain.replace(opt="sgd"))
    )


def test_checkpointed_blocks_give_the_same_update(small_config):
    """Drop path is on: the masks of the forward pass come again."""
    config = small_config.replace(opt="sgd")
    assert_close(after_an_epoch(config.replace(grad_checkpointing=True)), after_an_epoch(config), atol=1e-6)


def test_a_compiled_model_is_what_is_called(plain, monkeypatch):
    calls = []

    def compile(model):
        return lambda images: calls.append(len(images)) or model(images)

    monkeypatch.setattr(torch, "compile", compile)
    assert_close(after_an_epoch(plain.replace(compile=True)), after_an_epoch(plain), atol=0)
    assert calls == [32] * 3


@pytest.mark.parametrize(
    "precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_products_run_in_the_precision_asked_for(plain, precision, dtype):
    trainer, seen = trainer_of(plain.replace(precision=precision)), set()
    trainer.model.head.register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    trainer.train_epoch(0, mock.Mock())
    assert seen == {dtype}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.model.parameters())


def test_fp16_skips_an_update_that_overflows_and_scales_less(plain):
    trainer = trainer_of(plain.replace(precision="fp16"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**40})
    trainer.batches.set_epoch(0)
    trainer._train_step(0, *next(iter(trainer.loader)))
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert trainer.scaler.get_scale() == 2.0**39


def test_the_scale_of_fp16_is_resumed(small_config, tmp_path):
    run.train(small_config.replace(precision="fp16"), tmp_path)
    state = load_state(tmp_path / STATE)
    trainer = trainer_of(small_config.replace(precision="fp16"))
    trainer.load_state_dict(state)
    assert state["scaler"]["_growth_tracker"] > 0
    assert trainer.scaler.state_dict() == state["scaler"]


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_gradients_are_clipped_in_every_mode(plain, mode):
    trainer = trainer_of(plain.replace(clip_grad=1e-3, clip_mode=mode))
    seen = []
    trainer.optimizer.step = lambda: seen.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
    trainer.train_epoch(0, mock.Mock())
    for gradients in seen:
        if mode == "norm":
            assert math.sqrt(sum(g.square().sum().item() for g in gradients.values())) <= 1e-3 * 1.001
        elif mode == "value":
            assert max(g.abs().max().item() for g in gradients.values()) <= 1.001e-3
        else:
            ratio = gradients["head.weight"].norm() / trainer.model.head.weight.norm()
            assert (
                ratio > 0
                and gradients["blocks.0.mlp.fc1.weight"].norm()
                <= 1.1e-3 * trainer.model.blocks[0].mlp.fc1.weight.norm()
            )


def test_layers_decay_towards_the_first(small_config):
    trainer = trainer_of(small_config.replace(layer_decay=0.5))
    trainer.schedule.set(4)
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    model = trainer.model
    first, second = (rates[id(block.attn.qkv.weight)] for block in model.blocks)
    assert first == pytest.approx(second / 2) and rates[id(model.patch_embed.proj.weight)] == pytest.approx(first / 2)
    assert rates[id(model.head.weight)] > second


# DeiT-B's recipe: 1024 images, 1e-3 at the peak, warm-up from 1e-6 over 5 epochs, cosine to 1e-5 over 300.
LEARNING_RATES = {
    0: 1e-6,
    1: 1e-6 + (1e-3 - 1e-6) / 5,
    4: 1e-6 + 4 * (1e-3 - 1e-6) / 5,
    5: 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * 5 / 300)) / 2,
    150: 1e-5 + (1e-3 - 1e-5) / 2,
    299: 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * 299 / 300)) / 2,
}


@pytest.mark.parametrize("epoch", LEARNING_RATES)
def test_learning_rates_are_those_of_the_recipe(epoch):
    config = load_config("deit_base")
    optimizer = torch.optim.AdamW(
        [nn.Parameter(torch.zeros(2, 2))], lr=config.scaled_lr, weight_decay=config.weight_decay
    )
    schedule = Schedule(config, optimizer, updates_per_epoch=1251)
    for step in (epoch * 1251, epoch * 1251 + 1250):  # the same through the epoch
        assert schedule.set(step) == pytest.approx(LEARNING_RATES[epoch], rel=1e-6)
    assert optimizer.param_groups[0]["weight_decay"] == 0.05


def rate_of_the_recipe(config, step, updates):
    """Linear warm-up from warmup_lr, then a cosine over all epochs down to min_lr, by epoch or by update; deit's formula."""
    peak = config.lr * config.batch_size / config.lr_base_size
    time, unit = (step, updates) if config.sched_on_updates else (step // updates, 1)
    warm_up, whole = config.warmup_epochs * unit, config.epochs * unit
    if time < warm_up:
        return config.warmup_lr + (peak - config.warmup_lr) * time / warm_up
    return config.min_lr + (peak - config.min_lr) * (1 + math.cos(math.pi * time / whole)) / 2


@pytest.mark.parametrize("by_update", [False, True])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_every_step_has_the_rate_and_the_weight_decay_of_the_recipe(small_config, by_update, layer_decay):
    """Read where the optimizer takes them, for every weight in every step of a run."""
    config = small_config.replace(
        epochs=6,
        warmup_epochs=2,
        warmup_lr=1e-6,
        min_lr=1e-5,
        lr=2e-3,
        weight_decay=0.07,
        sched_on_updates=by_update,
        layer_decay=layer_decay,
        model_ema_decay=0.0,
        reprob=0.0,
        mixup=0.0,
        cutmix=0.0,
    )
    trainer = trainer_of(config)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    depth, found = len(trainer.model.blocks), []
    step = trainer.optimizer.step

    def scale(name):
        """Of the layer's own rate: the head's is whole, the last norm is of the last block, the embedding the first layer."""
        if layer_decay is None or name.startswith("head"):
            return 1.0
        layer = depth if name.startswith("norm.") else int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0
        return layer_decay ** (depth + 1 - layer)

    def decays(name, parameter):
        return parameter.ndim > 1 and not name.endswith(("token", "pos_embed"))

    def recording_step():
        groups = trainer.optimizer.param_groups
        found.append({names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]})
        step()

    trainer.optimizer.step = recording_step
    for epoch in range(config.epochs):
        trainer.train_epoch(epoch, mock.Mock())
    assert len(found) == 18
    for number, rates in enumerate(found):
        expected = rate_of_the_recipe(config, number, updates=3)
        for name, parameter in trainer.model.named_parameters():
            decay = 0.07 if decays(name, parameter) else 0.0
            assert rates[name] == (pytest.approx(expected * scale(name), rel=1e-9), decay), (number, name)
    assert len({rates["head.weight"] for rates in found}) == (18 if by_update else 6)


def test_a_deferred_verdict_keeps_the_step_going(plain, monkeypatch):
    """As on a GPU: the loss of one step is read in the next, and the update heeds it on the device."""
    trainer = trainer_of(plain)
    trainer.monitor.deferred = True
    heeded = []
    monkeypatch.setattr(trainer, "_update", lambda: heeded.append(trainer.monitor.bad.item()))
    real = trainer.criterion.forward
    trainer.criterion.forward = lambda *args: real(*args) * (float("nan") if len(heeded) == 1 else 1)
    with pytest.raises(ArithmeticError, match="the loss is nan at step 1"):
        trainer.train_epoch(0, mock.Mock())
    assert heeded == [0.0, 1.0, 1.0]  # the third was under way when the second's verdict was read


def test_a_verdict_that_one_process_asks_for_stays_for_all():
    """A timed save asks on one process only; raising there would leave the others waiting for its gradients."""
    monitor = LossMonitor(torch.device("cpu"), SINGLE, deferred=True)
    monitor.note(monitor.judge(torch.tensor(2.0)), 0, 0)
    assert monitor.clean()
    monitor.note(monitor.judge(torch.tensor(float("inf"))), 1, 0)
    assert not monitor.clean()
    with pytest.raises(NonFiniteLossError, match="the loss is inf at step 1") as raised:
        monitor.check()
    assert raised.value.step == 1 and monitor.mean(1) == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # how it is asked there, of tensors here
def test_one_value_that_is_not_finite_is_found_in_any_place(device, bad):
    tensors = [torch.randn(3), torch.full((4, 5), 3e38), torch.zeros(1)]
    assert all_finite(tensors[::2], torch.device(device)) == 1 and all_finite([], torch.device("cpu")) == 1
    assert device == "cuda" or all_finite(tensors, torch.device(device)) == 1  # though their sum is not
    for tensor in tensors[::2]:
        for place in range(len(tensor)):
            changed = tensor.clone()
            changed[place] = bad
            assert all_finite([torch.ones(2), changed], torch.device(device)) == 0
    assert all_finite([torch.tensor([math.inf, -math.inf])], torch.device(device)) == 0


def test_a_bad_gradient_holds_the_update_back_as_a_bad_loss_does():
    monitor = LossMonitor(torch.device("cpu"), SINGLE, deferred=True)
    monitor.note(monitor.judge(torch.tensor(2.0), [torch.ones(2)]), 0, 0)
    assert monitor.clean() and monitor.bad == 0
    monitor.note(monitor.judge(torch.tensor(4.0), [torch.ones(2), torch.tensor([math.inf])]), 1, 0)
    assert not monitor.clean() and monitor.bad == 1 and monitor.mean(1) == 2.0
    message = "^the loss is 4, but its gradient is not finite at step 1 .*; the last finite one was 2. The update was not made$"
    with pytest.raises(NonFiniteLossError, match=message):
        monitor.check()


def test_what_was_noted_of_a_step_that_is_taken_back_is_dropped():
    monitor = LossMonitor(torch.device("cpu"), SINGLE, deferred=True)
    for step, left in ((1, True), (2, False), (3, False)):
        monitor.note(monitor.judge(torch.tensor(2.0)), step, 0)
        monitor.forget(2)
        assert (monitor.noted is not None) is left


def test_fp16_stops_where_no_scale_helps(small_config):
    """An overflow alone is no fault: the scaler leaves the update out and scales less."""
    config = small_config.replace(model="deit_tiny_patch16_224", distillation_type="none", precision="fp16")
    trainer = engine.Trainer(config, create_student(config, 3, torch.device("cpu")), None, load_data(config).train, 3)
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2 * engine.SMALLEST_SCALE)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(
        NonFiniteLossError, match=r"not finite in fp16 however small the loss is scaled \(by 3\.05e-05\) at step 1"
    ) as raised:
        trainer.train_epoch(0, mock.Mock())
    assert raised.value.step == trainer.step == 1 and trainer.take_back(1)
    assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_late_verdict_saves_the_state_of_the_step_before(small_config, tmp_path, monkeypatch):
    """As on a GPU: the verdict on step 4 is read in step 5, while the weights are still those before step 4."""
    create, train_step, before = engine.create_optimizer, engine.Trainer._train_step, {}

    def fused(config, model):
        optimizer = create(config, model)
        for group in optimizer.param_groups:
            group["fused"] = True
        return optimizer

    def diverge(trainer, epoch, images, classes):
        trainer.monitor.deferred = True
        if trainer.step == 4:
            before.update({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
            images = images.float() * float("nan")
        return train_step(trainer, epoch, images, classes)

    monkeypatch.setattr(engine, "create_optimizer", fused)
    monkeypatch.setattr(engine.Trainer, "_train_step", diverge)
    config = small_config.replace(
        model="deit_tiny_patch16_224", distillation_type="none", teacher_epochs=0, checkpoint_steps=1
    )
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 4"):
        run.train(config, tmp_path)
    state = load_state(tmp_path / BAD_STATE)
    assert state["step"] == 4 and math.isfinite(state["loss_sum"])
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in before.items())
    assert load_state(tmp_path / STATE)["step"] == 4


def test_fused_optimizers_leave_weights_alone_where_they_are_told(plain):
    """What `_update` relies on, on a CPU."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for bad, changed in ((1.0, False), (0.0, True)):
        weight.grad = torch.full((3,), float("nan") if bad else 1.0)
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(bad)
        optimizer.step()
        assert bool((weight != 1).any()) is changed and weight.isfinite().all()
    assert copy.deepcopy(optimizer.state_dict())["state"][0]["step"] == 1
