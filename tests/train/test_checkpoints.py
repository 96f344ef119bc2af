"""Checkpoints are whole or not there, and what is wrong with one is said."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from fastdeit.train import checkpoints
from fastdeit.train.config import Config
from fastdeit.train.files import remove_temporaries, write_atomically

CLASSES = ("cat", "dog")


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "best.safetensors"
    checkpoints.save_weights(path, nn.Linear(4, 2).state_dict(), Config(seed=3), CLASSES, epoch=5)
    return path


def make_state(**changes):
    state = dict.fromkeys(checkpoints.STATE_KEYS) | dict(
        config=Config().as_dict(),
        epoch=2,
        history=[dict(epoch=0, loss=0.1)],
        model=nn.Linear(4, 2).state_dict(),
        classes=["a"],
        data={},
        step=4,
        loss_sum=0.5,
        img_size=224,
        optimizer={},
        best={},
    )
    return state | changes


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("config", "text", "config: expected dict, got str"),
        ("classes", {"a": 0}, "classes: expected list, got dict"),
        ("step", "7", "step: expected int, got str"),
        ("epoch", True, "epoch: expected int, got bool"),
        ("loss_sum", None, "loss_sum: expected float or int, got NoneType"),
        ("ema", [], "ema: expected dict or NoneType, got list"),
        ("history", None, "history: expected list, got NoneType"),
    ],
)
def test_a_state_with_a_field_of_another_type_names_it(tmp_path, field, value, message):
    checkpoints.save_state(tmp_path / "last.state.pt", make_state(**{field: value}))
    with pytest.raises(ValueError, match=rf"last\.state\.pt: {message}"):
        checkpoints.load_state(tmp_path / "last.state.pt")


def test_weights_carry_what_evaluation_needs(weights):
    config, classes, facts = checkpoints.read_metadata(weights)
    assert (config, classes, facts) == (Config(seed=3), CLASSES, {"epoch": 5})


def test_weights_come_back_to_the_bit(tmp_path):
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    checkpoints.save_weights(tmp_path / "w.safetensors", model.state_dict(), Config(), CLASSES)
    checkpoints.load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)


def test_state_comes_back_to_the_bit_without_pickled_code(tmp_path):
    state = make_state()
    checkpoints.save_state(tmp_path / "last.state.pt", state)
    loaded = torch.load(tmp_path / "last.state.pt", weights_only=True)
    assert torch.equal(loaded["model"]["weight"], state["model"]["weight"]) and loaded["history"] == state["history"]


def test_of_two_states_the_last_is_taken_and_a_good_one_has_no_problem(tmp_path):
    for step in (4, 8):
        checkpoints.save_state(tmp_path / checkpoints.STATE, make_state(step=step))
    state, path, problem = checkpoints.newest_state(tmp_path)
    assert (state["step"], path, problem) == (8, tmp_path / checkpoints.STATE, None)
    path.write_bytes(b"")
    state, path, problem = checkpoints.newest_state(tmp_path)
    assert (state["step"], path) == (4, tmp_path / checkpoints.PREVIOUS) and "cannot be read" in problem


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_weights_are_named(weights, share):
    os.truncate(weights, int(share * weights.stat().st_size))
    model = nn.Linear(4, 2)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=r"best\.safetensors: cannot be read .*truncated"):
        checkpoints.load_weights(model, weights)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_state_is_named(tmp_path, share):
    path = tmp_path / "last.state.pt"
    checkpoints.save_state(path, make_state())
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=r"last\.state\.pt: cannot be read .*truncated"):
        checkpoints.load_state(path)


def test_a_state_of_something_else_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "last.state.pt")
    with pytest.raises(ValueError, match="expected the training state of a run with best, classes"):
        checkpoints.load_state(tmp_path / "last.state.pt")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such checkpoint"):
        checkpoints.read_metadata(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.state\.pt: no such checkpoint"):
        checkpoints.load_state(tmp_path / "none.state.pt")


def test_weights_of_others_are_refused(tmp_path):
    import safetensors.torch

    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="without fastdeit in its metadata"):
        checkpoints.read_metadata(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Linear(5, 2), r"from another model: it has weight of shape \(2, 4\) where the model has \(2, 5\)"),
        (nn.Linear(4, 2, bias=False), "from another model: it has an unknown bias"),
        (nn.Linear(4, 2, dtype=torch.cfloat), r"it has weight of torch\.float32 where the model has torch\.complex64"),
        (nn.Sequential(nn.Linear(4, 2)), r"it has no 0\.weight; no 0\.bias; an unknown .* and 1 more"),
    ],
)
def test_weights_of_another_model_are_refused_untouched(weights, model, message):
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        checkpoints.load_weights(model, weights)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_another_configuration_is_refused_by_field(tmp_path):
    with pytest.raises(ValueError, match=r"another configuration: seed \(0 there, 4 now\)"):
        checkpoints.check_same_run(make_state(), Config(seed=4), tmp_path)


def test_the_number_of_workers_and_epochs_may_change(tmp_path):
    checkpoints.check_same_run(make_state(), Config(workers=7, output="elsewhere", epochs=400), tmp_path)


def test_fewer_epochs_than_done_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"epochs: .* has trained 40 epochs already"):
        checkpoints.check_same_run(make_state(epoch=40), Config(epochs=30), tmp_path)


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="the disk is full; the former one stands"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.state.pt"
    write_atomically(path, lambda file: file.write(b"old"))
    code = (
        "import pathlib, sys, time\nfrom fastdeit.train.files import remove_temporaries, write_atomically\n"
        "def write(file):\n    file.write(b'new' * 10000); file.flush(); print('writing', flush=True); time.sleep(60)\n"
        "write_atomically(pathlib.Path(sys.argv[1]), write)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"old"
    write_atomically(path, lambda file: file.write(b"newer"))  # what the kill left is no obstacle
    assert len(list(tmp_path.iterdir())) == 2
    remove_temporaries(tmp_path)
    assert path.read_bytes() == b"newer" and list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_a_part(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []

    def write(file):
        for _ in range(3):
            file.write(b"new")
            file.flush()
            seen.append(path.read_bytes())
            time.sleep(0.001)

    write_atomically(path, write)
    assert seen == [b"old"] * 3 and path.read_bytes() == b"new" * 3
