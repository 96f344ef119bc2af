"""Whatever ends training: one message with the cause and what stands, the state saved, and resumed to the same bits."""

import errno
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from timm.data.transforms import RandomResizedCropAndInterpolation

from fastdeit.commands import cli
from fastdeit.train import batched_images, checkpoints, epoch_results, failures, fit, run, sampling, workers
from fastdeit.train.checkpoints import BAD_STATE, DAMAGED, PREVIOUS, STATE, load_state
from fastdeit.train.engine import Trainer
from fastdeit.train.failures import ERROR, RunFailedError
from fastdeit.train.locks import LOCK, Lock
from fastdeit.train.monitor import NonFiniteLossError, NonFiniteWeightsError
from fastdeit.train.signals import Stopped
from fastdeit.train.workers import WorkerDiedError


@pytest.fixture
def config(make_small_config):
    """One model without a teacher, 3 updates an epoch."""
    return make_small_config(
        model="deit_tiny_patch16_224",
        distillation_type="none",
        teacher_epochs=0,
        teacher_model=None,
        epochs=2,
        warmup_epochs=0,
        model_kwargs=dict(patch_size=8, embed_dim=32, num_heads=1, depth=1),
        drop_path=0.0,
        model_ema_decay=0.9,
    )


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "whole"


@pytest.fixture
def whole(once, config):
    if not once.exists():
        run.train(config, once)
    return once


def same(a, b):
    for name in ("last.safetensors", "best.safetensors", "ema.safetensors"):
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    return True


def at(step, action):
    """`Trainer._gradients` that does something before the update of that number, when the forward pass has changed buffers."""
    gradients = Trainer._gradients

    def acting(trainer, images, targets):
        values = gradients(trainer, images, targets)
        if trainer.step == step:
            action(trainer)
        return values

    return acting


def raises(error):
    def action(*args, **kwargs):
        raise error

    return action


def test_an_error_in_a_step_saves_the_state_before_it(config, tmp_path, monkeypatch):
    """Statistics of BatchNorm and the sum of losses, which the step had changed already, are as before it, too."""
    config = config.replace(model="regnetx_002", model_kwargs=dict(depth=8, stem_width=8))
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run.train(config, whole)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_gradients", at(4, raises(RuntimeError("something odd"))))
        with pytest.raises(RunFailedError) as failed:
            run.train(config, folder)
    cause = rf"RuntimeError: something odd \(test_failures.py, line \d+\) \(traceback: {folder / ERROR}\)"
    assert failed.match(rf"^{cause}\. The state at step 4 is saved in {folder / STATE}; --resume auto goes on from it$")
    assert "in action\n" in (folder / ERROR).read_text()
    assert load_state(folder / STATE)["step"] == 4 and not (folder / LOCK).exists()
    run.train(config, folder, resume=True)
    assert same(whole, folder)
    losses = [[row["train_loss"] for row in load_state(f / STATE)["history"]] for f in (whole, folder)]
    assert losses[0] == losses[1]


def test_an_error_within_an_update_leaves_the_last_state(whole, config, tmp_path, monkeypatch):
    update = Trainer._average

    def fails(trainer, step):
        if step == 5:
            raise RuntimeError("odd")
        update(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_average", fails)
        with pytest.raises(
            RunFailedError, match=r"odd .*\. That was in the middle of an update\. The state at step 3 is saved"
        ):
            run.train(config, tmp_path)
    run.train(config, tmp_path, resume=True)
    assert same(whole, tmp_path)


def test_before_any_state_the_message_says_so(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_average", raises(ValueError("odd")))
    with pytest.raises(
        RunFailedError, match="No state of the student was saved yet; --resume auto starts its training anew"
    ):
        run.train(config, tmp_path)


def test_a_device_fault_leaves_the_last_state(config, tmp_path, monkeypatch):
    monkeypatch.setattr(failures, "device_failed", lambda device: True)
    monkeypatch.setattr(Trainer, "_gradients", at(4, raises(RuntimeError("CUDA error: an illegal memory access"))))
    with pytest.raises(
        RunFailedError, match=r"illegal memory access.*The device can no longer be read\. The state at step 3"
    ):
        run.train(config, tmp_path)


@pytest.mark.parametrize("broken, failed", [(RuntimeError("CUDA error"), True), (None, False)])
def test_a_device_is_asked(monkeypatch, broken, failed):
    monkeypatch.setattr(torch.cuda, "synchronize", raises(broken) if broken else lambda device: None)
    assert failures.device_failed(torch.device("cuda")) is failed
    assert not failures.device_failed(torch.device("cpu"))


@pytest.mark.parametrize("workers, augment_on", [(0, "cpu"), (1, "device")])
def test_an_error_of_a_transform_names_where_it_came_and_saves(
    whole, config, tmp_path, monkeypatch, workers, augment_on
):
    seed_sample, get_params, made = sampling.seed_sample, RandomResizedCropAndInterpolation.get_params, []

    def seeding(seed, *place):
        made[:] = place
        seed_sample(seed, *place)

    def failing(*args):
        if made == [1, 40]:
            raise ValueError("bits")
        return get_params(*args)

    config = config.replace(workers=workers, augment_on=augment_on)
    with monkeypatch.context() as patch:
        for module in (sampling, batched_images):  # images one by one, and a batch at once
            patch.setattr(module, "seed_sample", seeding)
        patch.setattr(RandomResizedCropAndInterpolation, "get_params", staticmethod(failing))
        where = r"\(seed 0, epoch 1, position 40, image \d+ of 96\)"
        message = (
            rf"^scale: the transform fails on \S+\.png: ValueError: bits {where}\. The state at step 4 is saved in"
        )
        with pytest.raises(RunFailedError, match=message):
            run.train(config, tmp_path)
    run.train(config, tmp_path, resume=True)
    assert same(whole, tmp_path)


def test_an_unreadable_validation_image_costs_no_epoch(whole, config, image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    image = data / "val/digit-1/35.png"
    content = image.read_bytes()
    image.write_bytes(bytes(len(content)))
    folder, config = tmp_path / "run", config.replace(data=str(data))
    with pytest.raises(RunFailedError, match=r"35\.png: cannot be read.*\. The state at step 3 is saved in"):
        run.train(config, folder)
    assert not (folder / "summary.csv").exists() and not (folder / ERROR).exists()
    image.write_bytes(content)
    run.train(config, folder, resume=True)
    assert same(whole, folder)


def test_a_signal_stops_an_evaluation(whole, config, tmp_path, monkeypatch):
    evaluate = epoch_results.evaluate

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(epoch_results, "evaluate", signalled)
        with pytest.raises(Stopped, match="stopped by SIGTERM; The state at step 3 is saved") as stopped:
            run.train(config, tmp_path)
    assert stopped.value.exit_code == 143
    run.train(config, tmp_path, resume=True)
    assert same(whole, tmp_path)


def test_ctrl_c_twice_ends_at_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_gradients", at(4, raises(KeyboardInterrupt())))
    with pytest.raises(Stopped, match=r"stopped by SIGINT; at once\. The state at step 3 is saved"):
        run.train(config, tmp_path)


def make_infinite(trainer):
    next(trainer.model.parameters()).grad.view(-1)[0] = float("inf")


def test_a_gradient_that_is_not_finite_stops_before_the_update(config, tmp_path, monkeypatch):
    gradients = torch.Tensor.backward

    def backward(loss, *args, **kwargs):
        gradients(loss, *args, **kwargs)
        if trainers[0].step == 4:
            make_infinite(trainers[0])

    trainers, init = [], Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *args: (trainers.append(self), init(self, *args))[1])
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    message = (
        r"^the loss is \d\S*, but its gradient is not finite at step 4 \(epoch 1\); the last finite one was \S+\. The update "
        r"was not made \(gradient of cls_token\)\. The state before it is in .*nonfinite\.state\.pt\. The state at step 3 is saved"
    )
    with pytest.raises(NonFiniteLossError, match=message):
        run.train(config, tmp_path)
    bad, good = load_state(tmp_path / BAD_STATE), load_state(tmp_path / STATE)
    assert (bad["step"], good["step"]) == (4, 3)
    assert all(t.isfinite().all() for state in (bad, good) for t in state["model"].values())


@pytest.mark.parametrize("what", ["weight", "average", "optimizer"])
def test_weights_that_are_not_finite_never_take_the_place_of_good_ones(config, tmp_path, monkeypatch, what):
    """They become so in the last update of an epoch, whose loss is finite, or go unnoticed by every loss."""
    average = Trainer._average

    def overflow(trainer, step):
        average(trainer, step)
        if step == 6:
            name, weight = next(trainer.model.named_parameters())
            where = {
                "weight": weight,
                "average": trainer.ema.module.state_dict()[name],
                "optimizer": trainer.optimizer.state[weight]["exp_avg_sq"],
            }
            with torch.no_grad():
                where[what].view(-1)[0] = float("inf")

    monkeypatch.setattr(Trainer, "_average", overflow)
    names = {"weight": "", "average": "moving average of ", "optimizer": "exp_avg_sq of "}
    with pytest.raises(
        NonFiniteWeightsError,
        match=rf"^not finite after step 6: {names[what]}cls_token\. .*The state with them",
    ):
        run.train(config, tmp_path)
    assert load_state(tmp_path / STATE)["step"] == 3 and load_state(tmp_path / BAD_STATE)["step"] == 6
    assert all(t.isfinite().all() for t in load_file(tmp_path / "best.safetensors").values())


def test_weights_that_were_not_finite_before_are_named(config, tmp_path, monkeypatch):
    def spoil(trainer):
        if trainer.step == 4:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(float("nan"))

    monkeypatch.setattr(fit.Fit, "_between_steps", lambda fit: spoil(fit.trainer))
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 4.*, but cls_token became so before\. The"):
        run.train(config, tmp_path)


def test_a_timed_save_passes_over_weights_that_are_not_finite(config, tmp_path, monkeypatch):
    between = fit.Fit._between_steps

    def spoil(fit):
        if fit.trainer.step == 2:
            with torch.no_grad():
                next(fit.trainer.model.parameters()).fill_(float("nan"))
        between(fit)

    monkeypatch.setattr(fit.Fit, "_between_steps", spoil)
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 2"):
        run.train(config.replace(checkpoint_steps=1), tmp_path)
    assert load_state(tmp_path / STATE)["step"] == 1


def test_a_full_disk_hides_no_loss_that_is_not_finite(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Trainer, "_gradients", at(4, lambda trainer: monkeypatch.setattr(os, "fsync", full) or spoil(trainer))
    )

    def full(descriptor):
        raise OSError(errno.ENOSPC, "")

    def spoil(trainer):
        raise NonFiniteLossError("the loss is nan", 4)

    message = (
        r"^the loss is nan\. The state before it could not be saved: .*nonfinite\.state\.pt: .* the disk is full\. The "
    )
    with pytest.raises(NonFiniteLossError, match=message):
        run.train(config, tmp_path)


def test_a_folder_that_is_removed_is_named(config, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(Trainer, "_gradients", at(4, lambda trainer: shutil.rmtree(folder, ignore_errors=True)))
    with pytest.raises(
        RunFailedError, match=rf"^{folder}: the folder is gone, or cannot be reached any more\. No state is left in"
    ):
        run.train(config, folder)
    assert not folder.exists()


def test_a_state_that_cannot_be_saved_after_an_error_leaves_the_last(config, tmp_path, monkeypatch):
    def fail(trainer):
        monkeypatch.setattr(checkpoints, "save_state", raises(OSError("disk odd")))
        raise ValueError("first")

    monkeypatch.setattr(Trainer, "_gradients", at(4, fail))
    with pytest.raises(
        RunFailedError, match=r"first.*\. The state at step 4 could not be saved: .*disk odd.*\. The state at step 3 is"
    ):
        run.train(config, tmp_path)


def test_a_second_run_in_a_folder_is_refused_by_name(config, tmp_path, monkeypatch, capsys):
    lock = Lock(tmp_path / LOCK, "it")
    for resume in (False, True):
        with pytest.raises(ValueError, match=rf"output: {tmp_path} is in use by process {os.getpid()} on"):
            run.train(config, tmp_path, resume=resume)
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_run_whose_lock_another_took_writes_no_more(config, tmp_path, monkeypatch):
    """As after a sleep that was longer than the lock's patience."""

    def take(trainer):
        (tmp_path / LOCK).write_text('{"token": "other", "pid": 7, "host": "there", "since": "now"}')

    monkeypatch.setattr(Trainer, "_gradients", at(4, take))
    with pytest.raises(
        RunFailedError,
        match=r"is no longer this process's: .*process 7 on there \(since now\) has it\. The state at step 3",
    ):
        run.train(config, tmp_path)
    assert load_state(tmp_path / STATE)["step"] == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_state_is_named_and_the_one_before_it_is_used(whole, config, tmp_path, damage, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_gradients", at(5, raises(RuntimeError("odd"))))
        with pytest.raises(RunFailedError):
            run.train(config, tmp_path)
    path = tmp_path / STATE
    content = bytearray(path.read_bytes())
    if damage == "flipped":  # a bit of a weight, which PyTorch reads without a word
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1000])
    else:
        path.unlink()
    run.train(config, tmp_path, resume=True)
    said = capsys.readouterr().err
    assert {"cut": "truncated", "flipped": "checksum", "gone": "no such checkpoint"}[damage] in said
    assert f"going on from {tmp_path / PREVIOUS}, step 3" in said
    assert (tmp_path / DAMAGED).exists() is (damage != "gone") and same(whole, tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(step=-1), "damaged: step -1 and epoch 2 with 2 rows of history; an epoch has 3"),
        (dict(step=10), "damaged: step 10 and epoch 2"),
        (dict(epoch=1), "damaged: step 6 and epoch 1"),
        (dict(loss_sum=float("nan")), "damaged: loss_sum is nan, expected a finite number"),
    ],
)
def test_a_state_that_no_run_has_is_refused(whole, config, tmp_path, change, message):
    checkpoints.save_state(tmp_path / STATE, {**load_state(whole / STATE), **change})
    with pytest.raises(ValueError, match=rf"last\.state\.pt: {message}"):
        run.train(config.replace(epochs=4), tmp_path, resume=True)


def test_two_damaged_states_are_both_named(whole, config, tmp_path):
    for name in (STATE, PREVIOUS):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=rf"{STATE}: cannot be read.*{PREVIOUS}: cannot be read.*use another folder"):
        run.train(config, tmp_path, resume=True)
    assert (tmp_path / STATE).read_bytes() == b"PK" and len(list(tmp_path.iterdir())) == 2


def test_the_same_data_elsewhere_go_on_and_other_data_are_refused(whole, config, image_folder, tmp_path):
    data, folder = shutil.copytree(image_folder, tmp_path / "scratch"), shutil.copytree(whole, tmp_path / "run")
    moved = config.replace(data=str(data))
    run.train(moved.replace(epochs=2), folder, resume=True)
    shutil.copy(data / "train/digit-0/0.png", data / "train/digit-0/new.png")
    with pytest.raises(
        ValueError, match=r"scratch, train, are not those that .*last\.state\.pt was trained on: 97 images, not 96"
    ):
        run.train(moved, folder, resume=True)
    (data / "train/digit-0/new.png").unlink()
    (data / "val/digit-2/36.png").write_bytes((data / "val/digit-2/36.png").read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"scratch, val, .*other names or sizes of the images of .?digit-2"):
        run.train(moved, folder, resume=True)
    for split in ("train", "val"):
        (data / split / "digit-2").rename(data / split / "digit-3")
    with pytest.raises(ValueError, match=r"last\.state\.pt was trained on other classes: .*digit-[23]"):
        run.train(moved, folder, resume=True)
    assert same(whole, folder)


@pytest.mark.parametrize("noticed", ["by its loader", "in an evaluation"])
def test_a_worker_that_is_killed_is_named_and_the_state_saved(config, tmp_path, monkeypatch, noticed):
    """When it has made the epoch's last batch, so that its loader asks it for one again after the evaluation alone."""
    killed, evaluate = [], epoch_results.evaluate

    def kill(trainer):
        (worker,) = trainer.loader.loader._iterator._workers
        killed.append(worker.pid)
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # and a handler of PyTorch's would raise here

    def told(*args):
        if killed and noticed == "in an evaluation":  # of an end, while it waits for a batch
            next(workers.batches_of(map(os.kill, [os.getpid()], [signal.SIGCHLD])))
        return evaluate(*args)

    monkeypatch.setattr(epoch_results, "evaluate", told)
    monkeypatch.setattr(Trainer, "_gradients", at(5, kill))
    with pytest.raises(RunFailedError) as failed:
        run.train(config.replace(workers=1, prefetch=1, epochs=3), tmp_path)
    assert failed.match(
        rf"^worker 0 of the loader \(process {killed[0]}\) was killed by SIGKILL, as the kernel does.*step 6 is saved"
    )
    assert load_state(tmp_path / STATE)["step"] == 6 and not workers._alive


@pytest.mark.parametrize("code, words", [(3, "ended with exit code 3"), (-15, "was killed by SIGTERM"), (0, None)])
def test_what_ended_a_worker_is_said(monkeypatch, code, words):
    class Ended:
        exitcode, pid = code, 7

    ended = Ended()
    monkeypatch.setattr(workers, "_alive", {ended: 1})
    failing = map(raises(RuntimeError("DataLoader worker exited")), [None])
    expected = WorkerDiedError if words else RuntimeError
    with pytest.raises(expected, match=rf"^worker 1 of the loader \(process 7\) {words}$" if words else "DataLoader"):
        next(workers.batches_of(failing))


def test_memory_that_is_used_up_says_what_takes_less():
    text = failures.cause(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"))
    assert text.startswith("the GPU's memory is used up (CUDA out of memory); a smaller batch_size")
    assert "fewer workers" in failures.cause(MemoryError())


def test_an_error_that_is_not_ours_has_its_type_and_place():
    try:
        int("x")
    except ValueError as error:
        assert failures.cause(error).startswith("ValueError: invalid literal") and not failures.expected(error)
        assert ", line " in failures.cause(error)
    assert failures.cause(KeyError("x")) == "KeyError: 'x'"  # that nothing raised has no place


def test_a_cause_is_waited_for_where_processes_work_together_alone():
    assert failures.patience(RuntimeError("[gloo] Connection closed by peer")) == 5
    assert failures.patience(RuntimeError("odd")) == failures.patience(ValueError("peer")) == 0


def test_the_command_says_it_in_one_line(config, tmp_path, monkeypatch, capsys):
    import yaml

    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config.as_dict()))
    call = ["train", "--config", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "run"), "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_gradients", at(4, raises(RuntimeError("odd\nthing"))))
        assert cli.main(call) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdeit")]
    assert len(lines) == 1 and "odd thing" in lines[0] and "step 4 is saved" in lines[0]
    monkeypatch.setattr(run, "create_student", raises(RuntimeError("no kernel image")))
    assert cli.main(call) == 1 and "RuntimeError: no kernel image" in capsys.readouterr().err
