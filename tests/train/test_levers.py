"""What a run costs with and without each way of doing less: the arithmetic, and that the options do less."""

import csv
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from fastdeit.cost.models import parts, seconds
from fastdeit.train import epoch_results, run
from fastdeit.train.checkpoints import STATE, load_state
from fastdeit.train.config import load_config
from fastdeit.train.datasets import load_data
from fastdeit.train.dry_run import describe
from fastdeit.train.engine import Trainer
from fastdeit.train.estimate import BYTES_PER_SECOND, FLOPS_PER_SECOND, gpu_hours, teacher_gpu_hours
from fastdeit.train.levers import Estimate, describe_levers
from fastdeit.train.models import create_student

CPU = torch.device("cpu")
IMAGES = 5000


@pytest.fixture
def estimate(make_small_config):
    """estimate(**changes): of 10 epochs of 3 updates, at 112 pixels in patches of 8."""

    def make(**changes):
        given = dict(img_size=112, epochs=10, distillation_type="none", teacher_model=None, teacher_epochs=0)
        given |= dict(model="deit_tiny_patch16_224", model_ema_decay=0.0, drop_path=0.0)
        config = make_small_config(**{**given, **changes})
        model = create_student(config, 3, CPU)
        return config, model, Estimate(config, model, 3, 30, IMAGES)

    return make


def one_pass(estimate, size):
    work = parts(estimate.shape.at(size), 256, "fastdeit", "amp", training=False)
    return IMAGES / 256 * seconds(work, FLOPS_PER_SECOND, BYTES_PER_SECOND) / 3600


def test_the_hours_are_those_of_student_teacher_and_evaluations(estimate):
    config, model, made = estimate()
    hours = made.hours(config)
    assert hours.student == gpu_hours(config, model, 30) and hours.teacher == 0
    assert hours.evaluation == pytest.approx(10 * one_pass(made, 112))
    assert hours.total == hours.student + hours.evaluation

    distilled = dict(distillation_type="hard", teacher_model="regnetx_002", model="deit_tiny_distilled_patch16_224")
    config, model, made = estimate(**distilled, teacher_kwargs={})
    assert made.hours(config).teacher == teacher_gpu_hours(config, 3, 30) > 0
    assert made.hours(config.replace(teacher_cache="x.labels")).teacher == 0


@pytest.mark.parametrize(
    "changes, passes",
    [
        (dict(eval_every=4), 3),  # epochs 3, 7 and the last
        (dict(eval_every=100), 1),
        (dict(model_ema_decay=0.9), 11),
        (dict(model_ema_decay=0.9, eval_ema="each"), 20),
        (dict(model_ema_decay=0.9, eval_ema="each", eval_every=4), 6),
    ],
)
def test_evaluations_are_counted_as_they_are_made(estimate, changes, passes):
    config, _, made = estimate(**changes)
    assert made.hours(config).evaluation == pytest.approx(passes * one_pass(made, 112))


def test_a_lever_is_counted_with_all_else_as_configured(estimate):
    config, _, made = estimate()
    found = {lever.field: lever for lever in made.levers()}
    assert set(found) == {
        "img_size_schedule"
    }  # 10 epochs are too few to evaluate after each tenth, and nothing else is in use
    sizes = found["img_size_schedule"]
    assert sizes.value == [[0, 80], [6, 96], [8, 112]] and not sizes.on
    assert sizes.without == made.hours(config).total
    assert sizes.with_it == made.hours(config.replace(img_size_schedule=sizes.value)).total < sizes.without

    schedule = [[0, 56], [5, 112]]
    config, _, made = estimate(img_size_schedule=schedule, eval_every=5, model_ema_decay=0.9, epochs=12)
    found = {lever.field: lever for lever in made.levers()}
    assert all(lever.on and lever.with_it == pytest.approx(made.hours(config).total) for lever in found.values())
    assert (
        set(found) == {"img_size_schedule", "eval_every", "eval_ema"} and found["img_size_schedule"].value == schedule
    )
    assert all(lever.without > lever.with_it for lever in found.values())


def test_cached_labels_save_the_teacher(estimate):
    distilled = dict(distillation_type="hard", teacher_model="regnetx_002", model="deit_tiny_distilled_patch16_224")
    _, _, made = estimate(**distilled, teacher_kwargs={})
    cache = next(lever for lever in made.levers() if lever.field == "teacher_cache")
    assert not cache.on and cache.without - cache.with_it == pytest.approx(made.teacher)


def test_the_table_of_a_dry_run(estimate):
    config, model, _ = estimate()
    lines = describe_levers(config, model, 3, 30, IMAGES)
    assert lines[0].startswith("GPU-hours, estimated") and len(lines) == 3
    assert lines[2].endswith("  img_size_schedule: [[0, 80], [6, 96], [8, 112]] (off)")
    without, with_it = map(float, lines[2].split()[:2])
    assert without > with_it > 0
    assert describe_levers(config, nn.Linear(2, 2), 3, 30, IMAGES) == []
    with pytest.raises(ValueError, match="costs are known for plain vision transformers, not for a Linear"):
        Estimate(config, nn.Linear(2, 2), 3, 30, IMAGES)


def test_a_dry_run_ends_with_the_table(make_small_config):
    config = make_small_config(model="deit_tiny_patch16_224", drop_path=0.4, epochs=12)
    config = config.replace(distillation_type="none", teacher_model=None, teacher_epochs=0)
    found = describe(config).splitlines()
    data = load_data(config)
    updates = config.epochs * -(-len(data.train) // config.batch_size)
    assert found[-5:] == describe_levers(config, create_student(config, 3, CPU), 3, updates, len(data.val))
    assert [line.split()[2] for line in found[-3:]] == ["drop_path_mode:", "eval_every:", "eval_ema:"]


def test_the_table_of_the_documentation_is_that_of_a_dry_run():
    """Of the recipe on ImageNet: 1,281,167 images in batches of 1024, 50,000 to evaluate on."""
    config = load_config("deit_base_distilled")
    model = create_student(config, 1000, CPU)
    text = (Path(__file__).parents[2] / "docs/less-time.md").read_text()
    assert "\n".join(describe_levers(config, model, 1000, config.epochs * (1281167 // 1024), 50000)) in text


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(eval_every=0), "eval_every: expected a value at least 1, got 0"),
        (dict(eval_ema="never"), "eval_ema: expected one of last, each, got 'never'"),
    ],
)
def test_what_the_options_take(make_small_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_small_config(**changes)


def evaluated(config, folder):
    """The row of each epoch, and whether models that were evaluated were moving averages."""
    evaluate, models = epoch_results.evaluate, []

    def noted(model, *args):
        models.append(model)
        return evaluate(model, *args)

    with mock.patch.object(epoch_results, "evaluate", noted):
        run.train(config, folder)
    return load_state(folder / STATE)["history"], models


def test_epochs_are_evaluated_where_asked(make_small_config, tmp_path):
    plain = dict(
        distillation_type="none", teacher_model=None, teacher_epochs=0, model="deit_tiny_patch16_224", epochs=5
    )
    every, all_models = evaluated(make_small_config(**plain, eval_ema="each", keep_best=2), tmp_path / "every")
    some, few = evaluated(make_small_config(**plain, eval_every=2, keep_best=2), tmp_path / "some")
    assert len(all_models) == 10 and len(few) == 3 + 1
    assert [row["epoch"] for row in some if "val_loss" in row] == [1, 3, 4]
    assert [row["epoch"] for row in some if row.get("ema_val_loss") is not None] == [4]
    for one, other in zip(every, some, strict=True):  # training is the same
        assert one["train_loss"] == other["train_loss"]
        results = {name: value for name, value in other.items() if "top1" in name or "val_loss" in name}
        assert all(value in (one[name], None) for name, value in results.items())
    with (tmp_path / "some" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["val_loss"] == "" for row in rows] == [True, False, True, False, False]
    assert rows[4]["ema_top1_top1"] and not rows[1]["ema_top1_top1"]
    best = load_state(tmp_path / "some" / STATE)["best"]
    assert best["top1"] == max(row["top1_top1"] for row in some if "top1_top1" in row)
    kept = {path.name for path in (tmp_path / "some").glob("epoch-*")}
    assert len(kept) == 2 and kept <= {"epoch-1.safetensors", "epoch-3.safetensors", "epoch-4.safetensors"}


def test_a_run_may_be_resumed_with_other_evaluations(make_small_config, tmp_path):
    config = make_small_config(epochs=1, warmup_epochs=0)
    run.train(config, tmp_path)
    run.train(config.replace(epochs=2, eval_every=2, eval_ema="each"), tmp_path, resume=True)
    assert len(load_state(tmp_path / STATE)["history"]) == 2


class Interrupted(BaseException):
    pass


def test_a_run_that_skips_samples_learns_and_goes_on_with_the_same_bits(make_small_config, tmp_path, monkeypatch):
    plain = dict(distillation_type="none", teacher_model=None, teacher_epochs=0, model="deit_tiny_patch16_224")
    config = make_small_config(**plain, drop_path_mode="skip", drop_path=0.4, checkpoint_steps=2, mixup=0.0, cutmix=0.0)
    run.train(config, tmp_path / "whole")
    train_step = Trainer._train_step

    def interrupted(trainer, *args):
        if trainer.step == 5:
            raise Interrupted
        return train_step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        with pytest.raises(Interrupted):
            run.train(config, tmp_path / "run")
    run.train(config, tmp_path / "run", resume=True)
    whole, found = (load_state(tmp_path / name / STATE) for name in ("whole", "run"))
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in whole["model"].items())
    assert whole["history"][-1]["train_loss"] < whole["history"][0]["train_loss"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(drop_path_mode="drop"), "drop_path_mode: expected one of mask, skip, got 'drop'"),
        (dict(drop_path_mode="skip", accelerate=False), "drop_path_mode: skip is for accelerated blocks"),
        (dict(drop_path_mode="skip", drop_path=1.0), "drop_path: with drop_path_mode skip, a rate of 1 leaves nothing"),
    ],
)
def test_a_configuration_that_cannot_skip_is_refused(make_small_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_small_config(**changes)


def test_batches_and_models_that_cannot_skip_are_refused_before_training(make_small_config, tmp_path):
    with pytest.raises(ValueError, match=r"a rate of 0\.9 leaves none of 2 samples"):
        run.train(make_small_config(drop_path_mode="skip", drop_path=0.9, grad_accum_steps=16), tmp_path)
    config = make_small_config(
        model="regnetx_002",
        model_kwargs={},
        drop_path_mode="skip",
        distillation_type="none",
        teacher_model=None,
        teacher_epochs=0,
    )
    with pytest.raises(ValueError, match="drop_path_mode: drop_path: 'skip' is for timm's vision transformer blocks"):
        run.train(config, tmp_path)


def test_skipping_is_estimated_where_stochastic_depth_is_on(estimate):
    config, _, made = estimate(drop_path=0.4, drop_path_uniform=True)
    found = next(lever for lever in made.levers() if lever.field == "drop_path_mode")
    assert not found.on and found.without == made.hours(config).total
    assert found.with_it == made.hours(config.replace(drop_path_mode="skip")).total != found.without
    assert "drop_path_mode" not in {lever.field for lever in estimate(drop_path=0.0)[2].levers()}
