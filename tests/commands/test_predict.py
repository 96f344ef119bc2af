"""`fastdeit predict` on real images and a checkpoint."""

import json

import pytest
import torch

from fastdeit.commands import cli
from fastdeit.train.checkpoints import load_weights
from fastdeit.train.datasets import load_data
from fastdeit.train.models import create_student


def predict(checkpoint, *arguments) -> int:
    return cli.main(["predict", *map(str, arguments), "--checkpoint", str(checkpoint)])


def test_the_classes_are_those_of_the_models_own_prediction(small_checkpoint, small_config, image_folder, capsys):
    folder = image_folder / "val" / "digit-1"
    assert predict(small_checkpoint, folder, "--json", "--top", "2") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [str(p) for p in sorted(folder.iterdir())]

    model = create_student(small_config, 3, torch.device("cpu"))
    load_weights(model, small_checkpoint)
    data = load_data(small_config).val
    pixels = {data.filename(i): data[i][0] for i in range(len(data))}
    for path, classes in found.items():
        with torch.no_grad():
            expected = model.eval()(pixels[path][None])[0].softmax(0).sort(descending=True)
        assert [entry["class"] for entry in classes] == [f"digit-{i}" for i in expected.indices[:2]]
        torch.testing.assert_close(torch.tensor([e["probability"] for e in classes]), expected.values[:2])


def test_more_classes_than_there_are_are_all_of_them(small_checkpoint, image_folder, capsys):
    image = next((image_folder / "val" / "digit-0").iterdir())
    assert predict(small_checkpoint.parent, image) == 0  # a run folder
    path, *lines = capsys.readouterr().out.splitlines()
    assert path == str(image) and len(lines) == 3
    assert sum(float(line.split()[0]) for line in lines) == pytest.approx(100, abs=0.02)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.png", None, "none.png: no such image"),
        ("text.png", b"no image", "text.png: cannot be read as an image"),
        ("folder", "folder", "folder has no image"),
    ],
)
def test_what_is_no_image_is_named(small_checkpoint, tmp_path, capsys, name, content, message):
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    assert predict(small_checkpoint, tmp_path / name) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastdeit predict: ") and message in err and err.count("\n") == 1


def test_a_number_of_classes_below_one_is_refused(small_checkpoint, tmp_path, capsys):
    assert predict(small_checkpoint, tmp_path, "--top", "0") == 2
    assert "--top: expected at least 1, got 0" in capsys.readouterr().err
