"""The method of Table 5, on a step that has a memory limit of its own and takes as long as it is told."""

import json

import pytest
import torch

from fastdeit.commands import cli
from fastdeit.train import throughput
from fastdeit.train.throughput import WARM_UP, largest_batch, measure, training_throughput

CPU = torch.device("cpu")


class Step:
    def __init__(self, memory):
        self.memory = memory
        self.sizes = []

    def __call__(self, size):
        self.sizes.append(size)
        if size > self.memory:
            raise torch.OutOfMemoryError("too much")


@pytest.mark.parametrize(
    "memory, found", [(1, 1), (2, 2), (3, 3), (7, 7), (8, 8), (100, 96), (127, 120), (128, 128), (10_000, 512)]
)
def test_the_largest_batch_to_an_eighth(memory, found):
    step = Step(memory)
    assert largest_batch(step, CPU, limit=512) == found
    assert max(step.sizes) <= 512 and len(step.sizes) < 20


def test_a_single_image_that_does_not_fit_is_said():
    with pytest.raises(torch.OutOfMemoryError, match="not even one image"):
        largest_batch(Step(0), CPU)


def test_the_rate_is_of_the_mean_time(monkeypatch):
    seconds = iter([1.0, 3.0])
    monkeypatch.setattr(throughput, "_seconds", lambda *_: next(seconds))
    step = Step(100)
    found = measure(step, CPU, batch_size=8, runs=2)
    assert (found.images_per_second, found.deviation, found.batch_size, found.runs) == (4.0, 0.5, 8, 2)
    assert step.sizes == [8] * WARM_UP
    assert str(found) == "4.0 images/s: batches of 8, mean of 2 runs, deviation 50.0%"


def test_real_runs_are_timed():
    found = measure(lambda size: torch.randn(size, 1000).sum(), CPU, runs=3, limit=16)
    assert found.batch_size == 16 and found.images_per_second > 0 and found.peak_bytes is None


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="runs: expected at least 1, got 0"):
        measure(Step(1), CPU, runs=0)


def test_eval_times_the_model_of_a_checkpoint(small_checkpoint, small_config, capsys):
    arguments = ["eval", "--throughput", "--checkpoint", str(small_checkpoint), "--runs", "2"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch_size"], found["runs"]) == (small_config.batch_size, 2) and found["images_per_second"] > 0
    assert cli.main([*arguments, "--batch-size", "4"]) == 0
    assert "images/s: batches of 4, mean of 2 runs" in capsys.readouterr().out


def test_eval_times_the_model_of_a_configuration(capsys):
    assert cli.main(["eval", "--throughput", "--config", "digits", "--runs", "1", "--batch-size", "2"]) == 0
    assert "images/s: batches of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--throughput", "--runs", "0"], "runs: expected at least 1, got 0"),
        (["--throughput", "--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--throughput", "--data", "digits"], "--data: --throughput takes synthetic images"),
        (["--runs", "3"], "--runs: is for --throughput"),
    ],
)
def test_options_that_do_not_go_together_are_named(small_checkpoint, capsys, arguments, message):
    assert cli.main(["eval", "--checkpoint", str(small_checkpoint), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_configuration_alone_cannot_be_evaluated(capsys):
    assert cli.main(["eval", "--config", "digits"]) == 2
    assert "a configuration has no weights to evaluate, use --checkpoint" in capsys.readouterr().err


def test_train_times_the_whole_step(monkeypatch, capsys):
    small = [
        "--model-kwargs",
        "{patch_size: 8, embed_dim: 32, num_heads: 1, depth: 2}",
        "--teacher-kwargs",
        "{depth: 8, stem_width: 8}",
    ]
    assert cli.main(["train", "--throughput", "--runs", "2", "--batch-size", "6", *small]) == 0
    assert "images/s: batches of 6, mean of 2 runs" in capsys.readouterr().out


def test_the_step_that_is_timed_is_the_recipes(small_config, monkeypatch):
    from fastdeit.train.engine import Trainer

    sizes, train_step = [], Trainer._train_step

    def noted(trainer, epoch, images, classes):
        sizes.append(len(images))
        assert trainer.criterion.teacher_model is not None and trainer.ema is not None and trainer.augment.mixup
        return train_step(trainer, epoch, images, classes)

    monkeypatch.setattr(Trainer, "_train_step", noted)
    found = training_throughput(small_config.replace(grad_accum_steps=2), batch_size=8, runs=1)
    assert found.batch_size == 8 and sizes == [8] * (WARM_UP + 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--throughput", "--batch-size", "5", "--runs", "1"], "batch_size: mixup pairs"),
        (["--runs", "3"], "--runs: is for --throughput"),
        (
            ["--throughput", "--teacher-cache", "labels", "--teacher-epochs", "0"],
            "teacher_cache: labels belong to images",
        ),
    ],
)
def test_a_step_that_cannot_be_timed_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err
