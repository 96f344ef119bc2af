"""Which classes an image may be called, and evaluation by that."""

import json
from pathlib import Path

import pytest
import torch
from timm.data import ImageNetInfo

from fastdeit.commands import cli
from fastdeit.commands.eval import evaluate_checkpoint
from fastdeit.train.datasets import load_data
from fastdeit.train.label_maps import LabelMap, labelled_images

CLASSES = ("digit-0", "digit-1", "digit-2")


def label_map(tmp_path, entries, classes=CLASSES) -> LabelMap:
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(entries))
    return LabelMap(str(file), classes)


@pytest.mark.parametrize(
    "entries, path, accepted",
    [
        ({"a.png": "digit-1"}, "x/a.png", (1,)),
        ({"a": 2}, "x/a.png", (2,)),
        ({"x": ["digit-0", 2]}, "x/a.png", (0, 2)),
        ({"a.png": [], "x": 1}, "x/a.png", ()),  # the file's entry before the folder's
        ([[1], [0, 2]], "val/ILSVRC2012_val_00000002.JPEG", (0, 2)),
        ([[1], []], "n01440764/ILSVRC2012_val_00000002_n01440764.JPEG", ()),
        ({}, "2/anything.png", (2,)),
    ],
)
def test_an_entry_is_found_by_file_number_or_folder(tmp_path, entries, path, accepted):
    assert label_map(tmp_path, entries).accepted(Path(path)) == accepted


def test_reals_labels_come_with_timm():
    real = LabelMap("real", [str(i) for i in range(1000)])
    assert real.accepted(Path("val/ILSVRC2012_val_00000001.JPEG")) == ()
    assert real.accepted(Path("ILSVRC2012_val_00000002.JPEG")) == (970, 795)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"a": "cat"}, "gives a the class 'cat'; expected one of the model's 3 classes by name or index"),
        ({"a": 3}, "gives a the class 3; expected one of the model's 3 classes"),
        ({"a": True}, "gives a the class True"),
        ([[0], [1.5]], "gives ILSVRC2012_val_00000002 the class 1.5"),
        ("text", "holds a str, expected a list or an object"),
        (None, "holds a NoneType, expected a list or an object"),
        ({"a": -1}, "gives a the class -1"),
        ({"a": None}, "gives a the class None"),
        ({"a": {"b": 1}}, "gives a the class {'b': 1}"),
        ({"a": [[1]]}, "gives a the class [1]"),
        ({"a": float("nan")}, "gives a the class nan"),
        ({"a": "1"}, "gives a the class '1'"),
        ([0, [10**30]], f"gives ILSVRC2012_val_00000002 the class {10**30}"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(tmp_path, entries, message):
    with pytest.raises(ValueError, match="labels: ") as error:
        label_map(tmp_path, entries)
    assert message in str(error.value)


def test_an_image_without_an_entry_is_named(tmp_path, small_config, image_folder):
    with pytest.raises(ValueError, match=r"labels.json has no entry for .*val/digit-1/\d+\.png, nor for its folder"):
        labelled_images(small_config, image_folder, label_map(tmp_path, {"digit-0": 0, "digit-2": 2}))


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "labels.json").write_text("{")
    with pytest.raises(ValueError, match=r"labels\.json cannot be read as JSON"):
        LabelMap(str(tmp_path / "labels.json"), CLASSES)
    with pytest.raises(FileNotFoundError, match="neither a file nor 'real'"):
        LabelMap(str(tmp_path / "none.json"), CLASSES)


def test_the_folders_own_labels_give_what_plain_evaluation_gives(tmp_path, small_checkpoint, image_folder):
    own = {name: name for name in CLASSES}
    label_map(tmp_path, own)
    expected = evaluate_checkpoint(small_checkpoint)
    del expected["loss"]
    assert evaluate_checkpoint(small_checkpoint, labels=str(tmp_path / "labels.json")) == expected
    label_map(tmp_path, dict.fromkeys(own, CLASSES))  # whatever it says is right
    assert set(evaluate_checkpoint(small_checkpoint, labels=str(tmp_path / "labels.json")).values()) == {100.0}


def test_images_without_a_right_class_do_not_count(tmp_path, small_checkpoint, small_config, capsys):
    label_map(tmp_path, {"digit-0": [], "digit-1": [], "digit-2": []})
    arguments = ["eval", "--checkpoint", str(small_checkpoint), "--labels", str(tmp_path / "labels.json")]
    assert cli.main(arguments) == 2
    assert "labels: no image has a right class" in capsys.readouterr().err

    label_map(tmp_path, {"digit-0": [], "digit-1": [], "digit-2": list(CLASSES)})
    assert cli.main([*arguments, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out).values()) == {100.0}


def test_the_images_are_those_of_plain_evaluation(tmp_path, small_config, image_folder):
    mine = labelled_images(small_config, image_folder, label_map(tmp_path, {name: name for name in CLASSES}))
    theirs = load_data(small_config).val
    assert len(mine) == len(theirs)
    pixels = lambda dataset: sorted(image.sum().item() for image, _ in dataset)  # noqa: E731
    assert pixels(mine) == pixels(theirs)
    image, right = mine[0]
    assert image.shape == (1, 16, 16) and right.dtype == torch.bool and right.tolist() == [True, False, False]


def test_an_image_that_is_cut_off_is_named(tmp_path, small_config, image_folder):
    folder = tmp_path / "val" / "digit-0"
    folder.mkdir(parents=True)
    whole = next((image_folder / "val" / "digit-0").iterdir())
    (folder / "cut.png").write_bytes(whole.read_bytes()[:60])
    images = labelled_images(small_config, tmp_path, label_map(tmp_path, {"digit-0": 0}))
    with pytest.raises(ValueError, match=r"cut\.png: cannot be read as an image"):
        images[0]


def test_reals_labels_are_for_imagenets_classes_in_its_order():
    names = ImageNetInfo().label_names()
    assert LabelMap("real", names).accepted(Path("ILSVRC2012_val_00000002.JPEG")) == (970, 795)
    swapped = [names[1], names[0], *names[2:]]
    with pytest.raises(ValueError, match="the model has another order: class 0 is n01443537, not n01440764"):
        LabelMap("real", swapped)
    with pytest.raises(
        ValueError, match=r"the model lacks n01440764, .* and 995 more and has digit-0, digit-1, digit-2"
    ):
        LabelMap("real", CLASSES)


def test_a_folder_named_by_another_number_than_its_class_has_is_no_label(tmp_path):
    """With classes 1, 2 and 10 folder 2 would be taken for class number 2, which is 10."""
    labels = label_map(tmp_path, {}, ("1", "2", "10"))
    for folder in ("1", "2", "10"):
        with pytest.raises(ValueError, match=rf"takes the folder .*/?{folder} for .* its class {folder} is number \d"):
            labels.accepted(Path(f"val/{folder}/a.png"))
    assert label_map(tmp_path, {}, ("0", "1", "2")).accepted(Path("val/2/a.png")) == (2,)
    assert label_map(tmp_path, {}, ("cat", "dog")).accepted(Path("val/1/a.png")) == (1,)
    for folder in ("²", "٣", "2" * 5000):
        with pytest.raises(ValueError, match="has no entry for"):
            label_map(tmp_path, {}).accepted(Path(f"val/{folder}/a.png"))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"[" * 100_000, b'{"a": }'])
def test_a_damaged_file_is_one_line(tmp_path, small_checkpoint, capsys, content):
    (tmp_path / "labels.json").write_bytes(content)
    assert cli.main(["eval", "--checkpoint", str(small_checkpoint), "--labels", str(tmp_path / "labels.json")]) == 2
    err = capsys.readouterr().err
    assert "labels.json cannot be read as JSON" in err and err.count("\n") == 1
