"""Names go with weights, and data, weights and state whose names differ are refused by name."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastdeit.commands import cli
from fastdeit.train.checkpoints import load_weights, read_metadata, save_weights
from fastdeit.train.class_names import class_difference, stored_classes

NAMES = ("digit-0", "digit-1", "digit-2")


@pytest.mark.parametrize(
    "names, expected, words",
    [
        (("a", "b"), ("a", "b"), None),
        (["a", "b"], ("a", "b"), None),
        (("a",), ("a", "b"), "lacks b"),
        (("a", "b", "c"), ("a", "b"), "has c besides"),
        (("a", "c"), ("a", "b"), "lacks b and has c besides"),
        (("b", "a"), ("a", "b"), "has another order: class 0 is b, not a"),
        (("a", "c", "b"), ("a", "b", "c"), "has another order: class 1 is c, not b"),
        ((), "abcdefg", "lacks a, b, c, d, e and 2 more"),
    ],
)
def test_what_differs_is_said_by_name(names, expected, words):
    assert class_difference(names, expected) == words


@pytest.mark.parametrize("text", ["[1, 2]", '{"a": 0}', "[]", "null", '["a", null]', '"ab"', "3"])
def test_names_of_wrong_types_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"x: metadata `classes` holds .*, expected a JSON list of the classes' names"):
        stored_classes({"classes": text}, "x")


@pytest.mark.parametrize(
    "text, message",
    [("[", "is not JSON"), ("[" * 100_000, "is not JSON"), ('["a", "b", "a", "b", "c"]', "has a, b more than once")],
)
def test_names_that_are_no_names_are_refused(text, message):
    with pytest.raises(ValueError, match=f"x: metadata `classes` {message}"):
        stored_classes({"classes": text}, "x")


def test_the_names_are_in_the_metadata_and_equal_weights_are_equal_files(tmp_path, small_config):
    weights = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(1, dtype=torch.bfloat16)}
    for number in range(8):
        save_weights(tmp_path / f"{number}.safetensors", weights, small_config, ("a", "é", "日本"), epoch=3)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["a", "é", "日本"]
    assert read_metadata(tmp_path / "0.safetensors")[1:] == (("a", "é", "日本"), {"epoch": 3})
    loaded = load_file(tmp_path / "0.safetensors")
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("length", range(1, 9))
def test_tensors_start_at_a_multiple_of_eight_bytes(tmp_path, small_config, length):
    """As safetensors has it, whatever the length of the names; readers map the file."""
    save_weights(tmp_path / "w.safetensors", {"w": torch.ones(2)}, small_config, ("a" * length,))
    data = (tmp_path / "w.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0 and data[-8:] == torch.ones(2).numpy().tobytes()


def renamed(folder, source, names):
    """A copy of the images of three digits under other names."""
    for split in ("train", "val"):
        for digit, name in enumerate(names):
            shutil.copytree(source / split / f"digit-{digit}", folder / split / name)
    return folder


def test_evaluation_refuses_other_classes_and_reads_no_training_images(
    small_checkpoint, image_folder, tmp_path, capsys
):
    call = ["eval", "--checkpoint", str(small_checkpoint), "--data"]
    folder = renamed(tmp_path / "images", image_folder, ("digit-0", "two", "digit-2"))
    assert cli.main([*call, str(folder)]) == 2
    assert f"beside them {folder} lacks digit-1 and has two besides" in capsys.readouterr().err
    shutil.rmtree(folder / "train")
    (folder / "val" / "two").rename(folder / "val" / "digit-1")
    assert cli.main([*call, str(folder)]) == 0


def damage(path, **metadata):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        known = file.metadata()
    save_file(tensors, path, {key: value for key, value in {**known, **metadata}.items() if value is not None})


@pytest.mark.parametrize("command", ["eval", "predict"])
@pytest.mark.parametrize(
    "metadata, message",
    [
        (dict(classes=None), "holds weights without classes in its metadata"),
        (dict(fastdeit=None), "holds weights without fastdeit in its metadata"),
        (dict(classes="{}"), "metadata `classes` holds {}, expected a JSON list"),
        (dict(fastdeit="["), "metadata `fastdeit` is not JSON"),
        (dict(fastdeit="[" * 100_000), "metadata `fastdeit` is not JSON"),
        (dict(fastdeit="[]"), "metadata `fastdeit` holds [], expected an object with a `config`"),
        (dict(fastdeit='{"config": 3}'), "expected an object with a `config`"),
        (dict(fastdeit='{"config": {"colour": 3}}'), "metadata `fastdeit`, config: config: unknown field colour"),
        (dict(fastdeit='{"config": {"epochs": "many"}}'), "metadata `fastdeit`, config: epochs: expected an integer"),
    ],
)
def test_malformed_metadata_is_one_line(small_checkpoint, image_folder, capsys, command, metadata, message):
    damage(small_checkpoint, **metadata)
    images = [str(image_folder / "val")] if command == "predict" else []
    assert cli.main([command, *images, "--checkpoint", str(small_checkpoint)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastdeit {command}: {small_checkpoint}: ") and message in err and err.count("\n") == 1


def test_names_for_another_number_of_classes_than_the_weights_are_refused(small_checkpoint, image_folder, capsys):
    damage(small_checkpoint, classes='["a", "b"]')
    assert cli.main(["predict", str(image_folder / "val"), "--checkpoint", str(small_checkpoint)]) == 2
    assert "it has head.weight of shape (3, 32) where the model has (2, 32)" in capsys.readouterr().err


def test_a_teachers_classes_are_compared(small_checkpoint, small_config):
    from fastdeit.train.models import create_student

    model = create_student(small_config, 3, torch.device("cpu"))
    load_weights(model, small_checkpoint, NAMES)
    with pytest.raises(
        ValueError, match=r"last\.safetensors: trained on other classes: beside them the data has another order"
    ):
        load_weights(model, small_checkpoint, ("digit-0", "digit-2", "digit-1"))


def test_a_run_is_not_resumed_on_other_classes(small_config, image_folder, tmp_path, capsys):
    """Found by name, not by number: the folders hold the same images in the same order."""
    from fastdeit.train.run import train

    config = small_config.replace(epochs=1, warmup_epochs=0, teacher_epochs=1, data=str(tmp_path / "images"))
    folder = renamed(tmp_path / "images", image_folder, ("1", "2", "10"))
    train(config, tmp_path / "run")
    with safe_open(tmp_path / "run" / "last.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["1", "2", "10"]
    for split in ("train", "val"):
        (folder / split / "10").rename(folder / split / "9")
    with pytest.raises(ValueError, match=r"trained on other classes: beside them .*images lacks 10 and has 9 besides"):
        train(config.replace(epochs=2), tmp_path / "run", resume=True)
    assert os.path.exists(tmp_path / "run" / "last.state.pt")
