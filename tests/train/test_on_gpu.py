"""Training on a CUDA device from the data to the checkpoint. Without a GPU it runs on the fake CUDA runtime."""

import json
from unittest import mock

import pytest
import torch
from torch import nn

from fastdeit.commands import cli
from fastdeit.testing import fake_cuda
from fastdeit.train.datasets import load_data
from fastdeit.train.engine import Trainer
from fastdeit.train.graphs import WARM_UP
from fastdeit.train.models import create_student

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
COLOUR = dict(in_chans=3, mean=[0.5] * 3, std=[0.5] * 3)


@pytest.fixture
def make_trainer(make_small_config):
    """make_trainer(**changes): of a small distilled student, 3 updates an epoch, with all parts of the recipe."""

    def make(**changes):
        config = make_small_config(device="cuda", **COLOUR).replace(**changes)
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).to(GPU).eval().requires_grad_(False)
        return Trainer(config, create_student(config, 3, GPU), teacher, load_data(config).train, 3)

    return make


def train(trainer, epochs=3):
    for epoch in range(epochs):
        trainer.train_epoch(epoch, mock.Mock())
    return trainer


RECIPES = {
    "bf16": dict(precision="bf16"),
    "fp16 with a scaler": dict(precision="fp16"),
    "fp32": dict(precision="fp32"),
    "accumulated and clipped": dict(grad_accum_steps=2, clip_grad=0.5),
    "workers": dict(workers=1),
    "checkpointed": dict(grad_checkpointing=True),
}


# The scaler's scale is read, and zero on the fake device.
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.numeric if "scaler" in name else ()) for name in RECIPES]
)
def test_a_recipe_trains(make_trainer, recipe):
    trainer = train(make_trainer(**RECIPES[recipe]), 1)
    assert trainer.step == 3 and trainer.state_dict()["step"] == 3
    assert all(p.is_cuda and p.grad is not None for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("changes", [dict(), dict(grad_accum_steps=2, clip_grad=0.5)])
def test_a_recorded_step_is_captured_and_replayed(make_trainer, changes):
    trainer = train(make_trainer(cuda_graphs=True, sched_on_updates=True, **changes))
    assert trainer.whole_step.reason is None and trainer.whole_step.recording is not None
    assert trainer.step == 9 > WARM_UP


def test_the_command_trains_and_resumes(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "not_finite", lambda self: [])  # on the fake device no comparison is true
    sizes = json.dumps(dict(patch_size=8, embed_dim=32, num_heads=1, depth=2))
    command = ["train", "--device", "cuda", "--data", str(image_folder), "--output", str(tmp_path), "--workers", "1"]
    command += ["--img-size", "16", "--batch-size", "32", "--warmup-epochs", "0", "--teacher-epochs", "1"]
    command += ["--model-kwargs", sizes]
    assert cli.main([*command, "--epochs", "1"]) == 0
    assert cli.main([*command, "--epochs", "2", "--resume", "auto", "--cuda-graphs"]) == 0
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 3


@pytest.mark.fake_device
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_waits_once_for_the_loss_of_the_step_before(make_trainer, recorded, workers):
    """Between the first steps and the epoch's end; copies are from pinned memory, and no step allocates device memory."""
    trainer = make_trainer(
        cuda_graphs=recorded, sched_on_updates=True, workers=workers, grad_accum_steps=2, clip_grad=0.5
    )
    train(trainer, 2)  # six steps: compiled, recorded
    steps = []
    with fake_cuda.observe_waits() as waits:
        before = [fake_cuda.counts(), 0]

        def after_step():
            counts = fake_cuda.counts()
            steps.append((counts - before[0], waits[before[1] :]))
            before[:] = counts, len(waits)

        trainer.after_step = after_step
        trainer.train_epoch(2, mock.Mock())
    assert len(steps) == 3
    for counts, found in steps[1:]:  # the first step of an epoch finds no loss before it
        assert [wait.call for wait in found] == ["cudaEventSynchronize"]
        assert "monitor.py" in found[0].where[0] and found[0].where[0].endswith("in check")
        assert not any(counts[kind] for kind in ("copy_to_device_pageable", "copy_from_device_pageable", "allocation"))
        assert counts["copy_from_device"] == 1
        if recorded:  # the graph, and the augmentation of the next batch: two kernels for its one layer
            assert (counts["graph_launch"], counts["triton_launch"]) == (1, 2)
        else:
            assert counts["triton_launch"] > 50
