"""Runs whose image size and augmentation change at given epochs."""

import math
from unittest import mock

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

import fastdeit
from fastdeit.train import run, workers
from fastdeit.train.cached_labels import CachedTeacher, cache_labels
from fastdeit.train.checkpoints import STATE, load_state, load_weights, read_metadata, save_weights
from fastdeit.train.config import config_from, load_config
from fastdeit.train.datasets import load_data
from fastdeit.train.dry_run import describe
from fastdeit.train.engine import Trainer
from fastdeit.train.estimate import gpu_hours, memory
from fastdeit.train.failures import RunFailedError
from fastdeit.train.models import create_student, create_teacher
from fastdeit.train.phases import config_at, enlarged, exchange, phases, set_input_size

CPU = torch.device("cpu")
SIZES = [[0, 8], [1, 16]]
WEIGHTS = ("last.safetensors", "best.safetensors", "ema.safetensors", "teacher/last.safetensors")


@pytest.fixture(scope="module")
def config(make_small_config):
    """An epoch of 3 updates at 8 pixels, two at 16; a state after every update."""
    return make_small_config(
        img_size_schedule=SIZES, aa="rand-m9-inc1", aa_schedule=[[0, None], [2, "rand-m9-inc1"]], checkpoint_steps=1
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run.train(config, folder)
    return folder


def same_files(a, b):
    for name in WEIGHTS:
        first, second = load_file(a / name), load_file(b / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(img_size_schedule=[]), "img_size_schedule: expected at least one entry"),
        (dict(img_size_schedule=[[0, 8, 1, 1]]), r"expected entries \[epoch, size\] or .*, got \[0, 8, 1, 1\]"),
        (dict(img_size_schedule=[["0", 8]]), "expected entries"),
        (dict(img_size_schedule=[[1, 16]]), "expected epochs that start at 0 and increase, got 1"),
        (dict(img_size_schedule=[[0, 8], [0, 16]]), "expected epochs that start at 0 and increase, got 0, 0"),
        (dict(img_size_schedule=[[0, 24], [1, 16]]), "expected sizes that never shrink"),
        (dict(img_size_schedule=[[0, 8], [1, 24]]), "ends with 24, and img_size is 16"),
        (dict(img_size_schedule=[[0, 8], [3, 16]]), r"starts at epoch 3, expected less than epochs \(3\)"),
        (dict(img_size_schedule=[[0, 0], [1, 16]]), "expected sizes from 1 to 4096, got"),
        (dict(img_size_schedule=[[0, 8.5], [1, 16]]), "expected sizes from 1 to 4096, got"),
        (dict(img_size_schedule=[[0, 8, 0], [1, 16, 1]]), "expected parts from 1 to"),
        (dict(img_size_schedule=[[0, 8, 1], [1, 16]]), "grad_accum_steps in all entries or in none"),
        (dict(img_size_schedule=[[0, 8, 1], [1, 16, 2]]), "ends with grad_accum_steps 2, and grad_accum_steps is 1"),
        (dict(img_size_schedule=8), "expected a list of lists such as"),
        (dict(img_size_schedule=[0, 8]), "expected a list of lists such as"),
        (dict(aa_schedule=[[0, "rand-m1"]]), "aa_schedule: ends with rand-m1, and aa is None"),
        (dict(aa_schedule=[[0, 5], [1, None]]), "aa_schedule: expected policies as aa has them"),
        (dict(aa_schedule=[[0, "rand-m1"], [1, None]], three_augment=True), "aa_schedule: contradicts three_augment"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(make_small_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_small_config(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(img_size_schedule=[[0, 12], [1, 16]]), "expected multiples of the model's patch size, 8 pixels, got 12"),
        (dict(aa="rand-m1", aa_schedule=[[0, "rand-q1"], [1, "rand-m1"]]), "aa: timm cannot make 'rand-q1'"),
        (dict(img_size_schedule=[[0, 8, 3], [1, 16, 1]]), "cannot be cut into 3 equal parts"),
    ],
)
def test_what_model_batch_or_timm_refuse_is_refused_before_training(make_small_config, tmp_path, changes, message):
    config = make_small_config(teacher_epochs=0, distillation_type="none", teacher_model=None, **changes)
    with pytest.raises(ValueError, match=message):
        describe(config)
    with pytest.raises(ValueError, match=message):
        run.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / STATE).exists()


def test_a_model_whose_size_timm_cannot_change_is_refused(make_small_config):
    config = make_small_config(model="deit_tiny_patch16_224", distillation_type="none", img_size_schedule=SIZES)
    model = create_student(config, 3, CPU)
    with mock.patch.object(timm.models.VisionTransformer, "set_input_size", new_callable=mock.PropertyMock) as missing:
        missing.side_effect = AttributeError
        with pytest.raises(ValueError, match="timm cannot change the input size of a VisionTransformer"):
            set_input_size(model, 8)


def test_each_epoch_has_its_configuration(config):
    assert [(p.first, p.end, p.config.img_size, p.config.aa) for p in phases(config)] == [
        (0, 1, 8, None),
        (1, 2, 16, None),
        (2, 3, 16, "rand-m9-inc1"),
    ]
    plain = config.replace(img_size_schedule=None, aa_schedule=None)
    assert config_at(plain, 2) is plain and len(phases(plain)) == 1
    parts = config.replace(img_size_schedule=[[0, 8, 1], [1, 16, 2]], grad_accum_steps=2)
    assert [config_at(parts, epoch).grad_accum_steps for epoch in range(3)] == [1, 2, 2]


def test_shares_of_efficienttrain_pp_are_equal_in_pixels():
    config = load_config("deit_small_efficienttrain_pp")
    shares = [(p.end - p.first) * p.config.img_size**2 for p in phases(config)]
    whole = 200 * 224**2  # what as much training at 224 pixels shows
    assert len(shares) == 10 and all(share == pytest.approx(whole / 10, rel=0.03) for share in shares)
    assert sum(shares) == pytest.approx(whole, rel=0.002)


def test_efficienttrain_is_the_released_command():
    c = load_config("deit_small_efficienttrain")
    assert (c.epochs, c.batch_size, c.scaled_lr, c.min_lr, c.warmup_epochs) == (300, 4096, 4e-3, 1e-6, 20)
    assert (c.drop_path, c.clip_grad, c.repeated_aug, c.reprob, c.opt) == (0.1, 5.0, 1, 0.25, "adamw")
    sizes = [(p.end - p.first, p.config.img_size, p.config.aa) for p in phases(c)]
    assert sizes == [
        (60, size, f"rand-m{2 * fifth + 1}-mstd0.5-inc1") for fifth, size in enumerate([160] * 3 + [192, 224])
    ]


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224"]
)
def test_positions_are_interpolated_as_timm_does(name):
    model = timm.create_model(name, img_size=32, depth=1, num_classes=3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    before, prefix = model.pos_embed, 0 if model.no_embed_class else model.num_prefix_tokens
    replaced = set_input_size(model, 64)
    exchange(optimizer, replaced)
    assert replaced == {before: model.pos_embed} and not set_input_size(model, 64)
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(before, [4, 4], [2, 2], prefix))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert model.pos_embed not in optimizer.state and before not in optimizer.state
    assert len(optimizer.state) == len(held) - 1
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.pos_embed]["step"] == 1


def test_a_convolutional_network_takes_any_size():
    assert set_input_size(timm.create_model("regnetx_002", num_classes=3), 64) == {}


def test_an_accelerated_model_computes_at_the_other_size(kernels_stood_in):
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    fastdeit.accelerate(model)
    model(torch.randn(2, 3, 32, 32))
    kernels_stood_in.clear()
    set_input_size(model, 64)
    images = torch.randn(2, 3, 64, 64)
    found = model(images)
    assert kernels_stood_in["patch_embedding"] == 1 and kernels_stood_in["add_layer_norm_attention"] > 0
    torch.testing.assert_close(found, fastdeit.restore(model)(images))


def test_every_epoch_trains_and_evaluates_at_its_size(config, whole):
    history = load_state(whole / STATE)["history"]
    assert [row["img_size"] for row in history] == [8, 16, 16]
    assert all(math.isfinite(row["val_loss"]) for row in history)
    stored, _, _ = read_metadata(whole / "last.safetensors")
    assert stored.replace(decoder="auto") == config


def test_weights_of_a_smaller_size_say_so(config, tmp_path):
    """What an epoch at 8 pixels leaves can be evaluated by itself."""
    with (
        mock.patch.object(Trainer, "enter", autospec=True, side_effect=_stopping_at(16)),
        pytest.raises(RunFailedError),
    ):
        run.train(config, tmp_path)
    for name in ("last.safetensors", "best.safetensors", "ema.safetensors"):
        stored, classes, _ = read_metadata(tmp_path / name)
        assert (stored.img_size, stored.img_size_schedule) == (8, None)
        model = create_student(stored, len(classes), CPU)
        load_weights(model, tmp_path / name, classes)
        assert model.pos_embed.shape[1] == 1 + 2


def _stopping_at(size):
    enter = Trainer.enter

    def entering(trainer, current):
        if current.img_size == size and trainer.current.img_size != size:
            raise RuntimeError("stopped here")
        enter(trainer, current)

    return entering


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize(
    "step, failure", [(2, Interrupted), (3, Interrupted), (3, RuntimeError), (4, RuntimeError), (6, Interrupted)]
)
def test_a_run_goes_on_across_a_change(config, whole, tmp_path, monkeypatch, step, failure):
    """At step 3 the first update at 16 pixels is to come; an error in it leaves a state that has the size already."""
    train_step = Trainer._train_step

    def interrupted(trainer, *args):
        if trainer.config.model.startswith("deit") and trainer.step == step:
            raise failure
        return train_step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        with pytest.raises((Interrupted, RunFailedError)):
            run.train(config, tmp_path)
    state = load_state(tmp_path / STATE)
    assert state["step"] == step
    run.train(config, tmp_path, resume=True)
    same_files(whole, tmp_path)


def test_a_state_of_a_size_that_the_schedule_does_not_have_is_refused(config, whole, tmp_path):
    state = load_state(whole / STATE)
    torch.save({**state, "img_size": 24}, tmp_path / STATE)
    with pytest.raises(ValueError, match="damaged: images of 24 pixels at epoch 3"):
        run.train(config, tmp_path, resume=True)


def test_a_state_from_before_there_were_schedules_is_taken_up(make_small_config, tmp_path):
    config = make_small_config(epochs=1, warmup_epochs=0)
    run.train(config, tmp_path)
    state = load_state(tmp_path / STATE)
    del state["img_size"]
    torch.save(state, tmp_path / STATE)
    assert load_state(tmp_path / STATE)["img_size"] == 16


def test_workers_change_nothing_and_end_with_their_phase(config, whole, tmp_path, monkeypatch):
    loaders, make = [], Trainer._loader

    def noted(trainer):
        loaders.append(make(trainer))
        return loaders[-1]

    monkeypatch.setattr(Trainer, "_loader", noted)
    processes, start = [], workers.start

    def started(make_iterator):
        iterator = start(make_iterator)
        processes.extend(getattr(iterator, "_workers", ()))
        return iterator

    monkeypatch.setattr(workers, "start", started)
    entered, enter = [], Trainer.enter

    def entering(trainer, current):
        changes = current != trainer.current
        enter(trainer, current)
        if changes:
            entered.append({worker.pid for worker in processes if worker.is_alive()})

    monkeypatch.setattr(Trainer, "enter", entering)
    run.train(config.replace(workers=1), tmp_path)
    same_files(whole, tmp_path)
    assert len(loaders) == 4 and len(entered) == 2  # one of the teacher's, three of the student's
    first, second = (loader.loader._iterator for loader in loaders[1:3])
    assert first is None and second is None
    assert len(set(processes)) >= 4 and all(len(alive) <= 1 for alive in entered)  # of the teacher's loader


def test_a_teacher_sees_its_own_size(config):
    shown = []

    class Teacher(torch.nn.Module):
        def forward(self, images):
            shown.append(images)
            return torch.zeros(len(images), 3)

    model = create_student(config_at(config, 0), 3, CPU)
    trainer = Trainer(config, model, Teacher(), load_data(config).train, 3)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    trainer.train_epoch(0, mock.Mock())
    trainer.train_epoch(1, mock.Mock())
    assert [images.shape[-1] for images in seen] == [8] * 3 + [16] * 3
    assert [images.shape[-1] for images in shown] == [16] * 6
    assert torch.equal(shown[3], seen[3]) and torch.equal(shown[0], enlarged(seen[0], 16))


def test_cached_labels_are_those_of_the_schedule(config, tmp_path):
    data = load_data(config)
    torch.manual_seed(5)
    teacher = timm.create_model(config.teacher_model, num_classes=3, in_chans=1, **config.teacher_kwargs).eval()
    images = torch.stack([image for image, _ in data.val])
    teacher.get_classifier().bias.data -= teacher(images).mean(0)
    save_weights(tmp_path / "teacher.safetensors", teacher.state_dict(), config, data.classes)
    config = config.replace(
        teacher_checkpoint=str(tmp_path / "teacher.safetensors"),
        teacher_epochs=0,
        img_size_schedule=[[0, 8, 1], [1, 16, 2]],
        grad_accum_steps=2,
    )
    list(cache_labels(config, data, create_teacher(config, 3, CPU), CPU, tmp_path / "x.labels"))
    cached = config_from({**config.as_dict(), "teacher_cache": str(tmp_path / "x.labels")})
    run.train(config, tmp_path / "live")
    run.train(cached, tmp_path / "cached")
    live, other = (load_state(tmp_path / name / STATE) for name in ("live", "cached"))
    assert [row["train_loss"] for row in live["history"]] == [row["train_loss"] for row in other["history"]]
    with pytest.raises(ValueError, match=r"labels of another run: img_size_schedule \("):
        CachedTeacher(cached.replace(img_size_schedule=[[0, 8, 1], [2, 16, 2]]), data, CPU)


def test_hours_and_memory_are_those_of_the_phases(config):
    model = create_student(config, 3, CPU)
    small, large = (config.replace(img_size_schedule=None, aa_schedule=None, img_size=size) for size in (8, 16))
    expected = gpu_hours(small, model, 100) / 3 + 2 * gpu_hours(large, model, 100) / 3
    assert gpu_hours(config, model, 100) == pytest.approx(expected)
    assert gpu_hours(small, model, 100) < gpu_hours(large, model, 100)
    assert memory(config, model)["activations"] == memory(large, model)["activations"]
    assert memory(small, model)["activations"] < memory(large, model)["activations"]
    parts = config.replace(img_size_schedule=[[0, 8, 1], [1, 16, 4]], grad_accum_steps=4)
    assert memory(parts, model)["activations"] == memory(small, model)["activations"]


def test_a_dry_run_lists_the_phases(config):
    text = describe(config)
    assert "  epochs 0 to 0: img_size 8, grad_accum_steps 1, aa None\n" in text
    assert "  epochs 2 to 2: img_size 16, grad_accum_steps 1, aa rand-m9-inc1\n" in text


def test_it_learns_the_digits(tmp_path):
    """Half of the epochs at 24 pixels a side: after 6 epochs far above the 10 % of chance."""
    config = load_config(
        "digits", dict(epochs=6, warmup_epochs=1, distillation_type="none", teacher_model=None, teacher_epochs=0)
    ).replace(model="deit_tiny_patch16_224", img_size_schedule=[[0, 24], [3, 32]])
    result = run.train(config, tmp_path)
    assert result.last["top1"] > 30
