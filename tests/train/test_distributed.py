"""Two processes over gloo do what one does; the environment of a launcher is read as it should be."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
import torch.distributed as dist

from fastdeit.train import distributed, run
from fastdeit.train.cached_labels import cache_labels
from fastdeit.train.checkpoints import BAD_STATE, STATE, load_state, save_weights
from fastdeit.train.datasets import load_data
from fastdeit.train.distributed import SINGLE, World, started_world
from fastdeit.train.engine import share_of_batch
from fastdeit.train.models import create_teacher
from fastdeit.train.sampling import eval_loader


@pytest.fixture(scope="module")
def config(make_small_config):
    """Without what each process draws for itself: mixup, erasing, drop path."""
    plain = dict(
        mixup=0.0, cutmix=0.0, reprob=0.0, drop_path=0.0, smoothing=0.0, epochs=2, teacher_epochs=1, warmup_epochs=0
    )
    return make_small_config(**plain)


@pytest.fixture(scope="module")
def labels(make_small_config, tmp_path_factory):
    """A configuration with a teacher's weights, and the file of the labels that it gives two processes."""
    folder = tmp_path_factory.mktemp("labels")
    config = make_small_config(
        epochs=1, warmup_epochs=0, repeated_aug=2, teacher_epochs=0, grad_accum_steps=2, model_ema_decay=0.0
    )
    data, cpu = load_data(config), torch.device("cpu")
    torch.manual_seed(0)
    teacher = timm.create_model(config.teacher_model, num_classes=3, in_chans=1, **config.teacher_kwargs).eval()
    images = torch.stack([image for image, _ in data.val])
    with torch.no_grad():
        teacher.get_classifier().bias -= teacher(images).mean(0)  # else it says the same of all images
    save_weights(folder / "teacher.safetensors", teacher.state_dict(), config, data.classes)
    config = config.replace(teacher_checkpoint=str(folder / "teacher.safetensors"))
    list(cache_labels(config, data, create_teacher(config, 3, cpu), cpu, folder / "x.labels", ranks=2))
    return config, folder / "x.labels"


@pytest.fixture(scope="module")
def two_processes(config, labels, tmp_path_factory):
    """The folder of each run of two processes, by name: one start of a launcher for all."""
    root = tmp_path_factory.mktemp("two")
    jobs = {
        "train": (config, "train"),
        "sizes": (config.replace(img_size_schedule=[[0, 8], [1, 16]]), "train"),
        "live": (labels[0], "train"),
        "cached": (labels[0].replace(teacher_cache=str(labels[1])), "train"),
        "skip": (labels[0].replace(drop_path_mode="skip"), "train"),
        "skip again": (labels[0].replace(drop_path_mode="skip"), "train"),
        "stop": (config, "stop"),
        "diverge": (config, "diverge"),
        "gradient": (config, "gradient"),
    }
    for name in jobs:
        (root / name).mkdir()
    file = root / "jobs.json"
    file.write_text(json.dumps([(str(root / name), job.as_dict(), what) for name, (job, what) in jobs.items()]))
    script = Path(__file__).with_name("distributed_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, file]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: root / name for name in jobs}


def outcomes(folder):
    return [(folder / f"rank-{rank}.txt").read_text() for rank in range(2)]


def history(folder):
    return load_state(folder / STATE)["history"]


@pytest.mark.parametrize("name, schedule", [("train", None), ("sizes", [[0, 8], [1, 16]])])
def test_two_processes_train_what_one_trains(config, two_processes, tmp_path, name, schedule):
    run.train(config.replace(img_size_schedule=schedule), tmp_path)
    two = two_processes[name]
    assert all(outcome.startswith("trained") for outcome in outcomes(two))
    for one, both in zip(history(tmp_path), history(two), strict=True):
        assert both["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert both["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
    weights = load_state(two / STATE)["model"]
    for name, tensor in load_state(tmp_path / STATE)["model"].items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)
    assert json.loads((two / "results.json").read_text())["top1"]
    assert len(set(outcomes(two))) == 1  # both have the same teacher, statistics of its BatchNorm included


def test_two_processes_that_skip_samples_draw_the_same_again(two_processes):
    folders = two_processes["skip"], two_processes["skip again"]
    assert all(outcome.startswith("trained") for folder in folders for outcome in outcomes(folder))
    one, other = (load_state(folder / STATE)["model"] for folder in folders)
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    assert history(folders[0])[0]["train_loss"] != history(two_processes["live"])[0]["train_loss"]


def test_a_bad_loss_in_one_process_stops_both_with_clean_weights(two_processes):
    folder = two_processes["diverge"]
    assert all("on rank 1 at step 4 (epoch 1); the last finite one was" in outcome for outcome in outcomes(folder))
    state = load_state(folder / BAD_STATE)
    assert state["step"] == 4 and all(t.isfinite().all() for t in state["model"].values())


def test_a_bad_gradient_in_one_process_stops_both_with_clean_weights(two_processes):
    folder = two_processes["gradient"]
    said = "but its gradient is not finite on rank 0, 1 at step 4 (epoch 1); the last finite one was"
    assert all(said in outcome for outcome in outcomes(folder))  # as both have exchanged gradients
    for name, step in ((BAD_STATE, 4), (STATE, 3)):
        state = load_state(folder / name)
        assert state["step"] == step and all(t.isfinite().all() for t in state["model"].values())


def test_a_signal_to_one_process_stops_both_at_the_same_step(config, two_processes, tmp_path):
    folder = two_processes["stop"]
    assert all("stopped by SIGTERM" in outcome for outcome in outcomes(folder))
    assert load_state(folder / STATE)["step"] == 5
    # Taken up in the middle of an epoch, by one process: the epoch's mean loss is of all that both had seen.
    run.train(config, folder, resume=True)
    run.train(config, tmp_path)
    for there, here in zip(history(tmp_path), history(folder), strict=True):
        assert here["train_loss"] == pytest.approx(there["train_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "environment, world",
    [
        ({}, SINGLE),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, World(3, 8, 1)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, World(2, 4, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, SINGLE),
    ],
)
def test_the_launchers_environment_is_read(environment, world, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert started_world() == world


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is missing"),
        ({"RANK": "a", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must be numbers"),
    ],
)
def test_half_an_environment_is_refused(environment, message, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        started_world()


@pytest.mark.parametrize(
    "changes, size, message",
    [
        (dict(batch_size=32), 3, "batch_size: 32 images cannot be shared evenly by 3 processes"),
        (dict(batch_size=32, grad_accum_steps=3), 2, "grad_accum_steps: 16 images of a process cannot be cut into 3"),
        (dict(batch_size=6, mixup=0.8), 2, "batch_size: mixup pairs a process's images, .* got 3"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(small_config, changes, size, message):
    with pytest.raises(ValueError, match=message):
        share_of_batch(small_config.replace(**changes), World(0, size))


def test_every_image_is_evaluated_by_one_process():
    shares = [eval_loader(list(range(11)), 2, 0, False, rank, 3) for rank in range(3)]
    assert sorted(int(i) for share in shares for batch in share for i in batch) == list(range(11))


def test_two_processes_train_on_labels_as_with_the_teacher(two_processes):
    """Each process finds the labels of its own batches, mixed by itself; to the bit."""
    live, cached = (load_state(two_processes[name] / STATE) for name in ("live", "cached"))
    assert live["history"][0]["train_loss"] == cached["history"][0]["train_loss"]
    assert all(torch.equal(live["model"][name], tensor) for name, tensor in cached["model"].items())


def test_nccl_is_told_its_device(monkeypatch):
    """Else it guesses one from the rank at the first barrier, and warns of it."""
    seen = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.update(current=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kwargs: seen.update(backend=backend, **kwargs))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed.peers, "start", lambda *_: mock.Mock())
    for name, value in {"MASTER_ADDR": "there", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with distributed.joined(World(rank=5, size=8, local_rank=1), "cuda"):
        assert seen["current"] == seen["device_id"] == torch.device("cuda:1") and seen["backend"] == "nccl"
    with distributed.joined(World(rank=5, size=8, local_rank=1), "cpu"):
        assert seen["device_id"] is None and seen["backend"] == "gloo"


def test_processes_that_do_not_meet_are_an_error_in_one_line(monkeypatch):
    def refused(*args, **kwargs):
        raise RuntimeError("The client socket has timed out\nException raised from ...")

    monkeypatch.setattr(dist, "init_process_group", refused)
    for name, value in {"MASTER_ADDR": "there", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    message = (
        "^rank 1 of 2 has not reached the others at there:1, where all are to meet: The client socket has timed out$"
    )
    with pytest.raises(ConnectionError, match=message), distributed.joined(World(rank=1, size=2), "cpu"):
        pass


def test_an_error_of_the_main_process_is_raised_in_all(monkeypatch):
    shared = []

    def agreed(world, value):
        if world.main:
            shared.append(value)
        return shared[-1]

    monkeypatch.setattr(World, "agreed", agreed)
    for world in (World(0, 2), World(1, 2)):
        with pytest.raises(ValueError, match="output: odd"):
            world.on_main(lambda: (_ for _ in ()).throw(ValueError("output: odd")))
    assert World(0, 2).on_main(lambda: 3) == 3 and World(1, 2).on_main(lambda: 3) is None
