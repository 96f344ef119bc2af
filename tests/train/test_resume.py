"""Whatever ends a run, and whenever: resumed, it ends with the weights of one that was never interrupted, bit for bit."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastdeit.train import checkpoints, fit, run
from fastdeit.train.checkpoints import STATE, load_state
from fastdeit.train.engine import Trainer
from fastdeit.train.failures import RunFailedError

WEIGHTS = ("last.safetensors", "best.safetensors", "ema.safetensors", "teacher/last.safetensors")


def same_files(a, b, name):
    a, b = load_file(a / name), load_file(b / name)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def figures(folder):
    rows = json.loads((folder / "results.json").read_text())
    return rows["top1"], rows["disagreement"], rows["token_cosines"]


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "whole"


@pytest.fixture
def config(small_config):
    """3 updates an epoch, a state after every second one."""
    return small_config.replace(checkpoint_steps=2)


@pytest.fixture
def whole(once, config):
    if not once.exists():
        run.train(config, once)
    return once


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("model, step", [("regnetx", 3), ("deit", 1), ("deit", 4), ("deit", 5)])
def test_a_run_goes_on_in_the_middle_of_an_epoch(whole, config, tmp_path, monkeypatch, model, step):
    train_step, taken = Trainer._train_step, []

    def interrupted(trainer, *args):
        if trainer.config.model.startswith(model) and trainer.step == step:
            raise Interrupted
        return train_step(trainer, *args)

    def counted(trainer, *args):
        taken.append((trainer.config.model, trainer.step))
        return train_step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        with pytest.raises(Interrupted):
            run.train(config, tmp_path)
    monkeypatch.setattr(Trainer, "_train_step", counted)
    run.train(config, tmp_path, resume=True)
    assert all(same_files(whole, tmp_path, name) for name in WEIGHTS) and figures(whole) == figures(tmp_path)
    saved = max(step // 2 * 2, step // 3 * 3)  # every second update, and at the end of an epoch
    assert next(s for name, s in taken if name.startswith(model)) == saved


@pytest.fixture(scope="module")
def killed():
    """killed(folder, config, point): the exit code of a run that is killed there, see killed_run.py."""
    command = [sys.executable, Path(__file__).with_name("killed_run.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runs:

        def run_until(folder, config, point):
            runs.stdin.write(json.dumps([str(folder), config.as_dict(), point]) + "\n")
            runs.stdin.flush()
            return int(runs.stdout.readline())

        yield run_until


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(killed, whole, config, tmp_path):
    folder = tmp_path / "run"
    for point in ("write:5", "step:4", "write:7", "step:3"):  # every second write is of the folder
        assert killed(folder, config, point) == -signal.SIGKILL, point
        assert any(folder.rglob("*.tmp")) is point.startswith("write")  # cut off
    run.train(config, folder, resume=True)
    assert all(same_files(whole, folder, name) for name in WEIGHTS) and figures(whole) == figures(folder)
    assert not any(folder.rglob("*.tmp"))


def test_a_run_asked_to_stop_saves_and_says_so(killed, whole, config, tmp_path):
    """SIGTERM after four steps of the teacher's six and later after two of the student's nine."""
    config, folder = config.replace(checkpoint_steps=0), tmp_path / "run"
    assert killed(folder, config, "term:5") == 128 + signal.SIGTERM == 143
    assert load_state(folder / "teacher" / checkpoints.STATE)["step"] == 5
    assert killed(folder, config, "term:3") == 143
    state = load_state(folder / checkpoints.STATE)
    assert state["step"] == 2 and state["epoch"] == 0
    run.train(config, folder, resume=True)
    assert all(same_files(whole, folder, name) for name in WEIGHTS)


def test_a_full_disk_is_said_and_keeps_the_former_state(config, tmp_path, monkeypatch):
    fsync, full = os.fsync, False

    def out_of_space(descriptor):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    train_step = Trainer._train_step

    def fill(trainer, *args):
        nonlocal full
        full = trainer.config.model.startswith("deit") and trainer.step >= 3
        return train_step(trainer, *args)

    monkeypatch.setattr(os, "fsync", out_of_space)
    monkeypatch.setattr(Trainer, "_train_step", fill)
    with pytest.raises(
        RunFailedError,
        match=rf"{STATE}: cannot be written: the disk is full; the former one stands. The state at step 3 is",
    ):
        run.train(config, tmp_path)
    assert load_state(tmp_path / checkpoints.STATE)["step"] == 3
    assert not any(tmp_path.rglob("*.tmp"))


def test_time_saves_too(config, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(fit.time, "monotonic", lambda: now[0])
    saved, train_step, save = [], Trainer._train_step, run.Fit._save_state

    def slow(trainer, *args):
        now[0] += 40.0
        return train_step(trainer, *args)

    def noted(fit, *args):
        saved.append((fit.label, fit.trainer.step))
        save(fit, *args)

    monkeypatch.setattr(Trainer, "_train_step", slow)
    monkeypatch.setattr(run.Fit, "_save_state", noted)
    run.train(config.replace(checkpoint_steps=0, checkpoint_minutes=1.0), tmp_path)
    assert [step for label, step in saved if label == "student"] == [2, 3, 3, 5, 6, 6, 8, 9, 9]


def test_the_best_epochs_are_kept(config, tmp_path):
    run.train(config.replace(keep_best=2), tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["config"]["keep_best"] == 2
    kept = sorted(path.name for path in tmp_path.glob("epoch-*.safetensors"))
    history = load_state(tmp_path / checkpoints.STATE)["history"]
    best = sorted(history, key=lambda row: (-row["top1_both"], row["epoch"]))[:2]
    assert kept == sorted(f"epoch-{row['epoch']}.safetensors" for row in best)
    assert same_files(tmp_path, tmp_path, "best.safetensors")
    assert (tmp_path / "best.safetensors").read_bytes() == (
        tmp_path / f"epoch-{best[0]['epoch']}.safetensors"
    ).read_bytes()
