"""`OptimizedModel.save`, `fastdeit.load_optimized` and `fastdeit predict --optimized`: round trips and bad files."""

import json

import pytest
import safetensors.torch
import torch

import fastdeit
from fastdeit import optimize_for_inference
from fastdeit.commands.cli import main
from fastdeit.inference.file import KEY
from fastdeit.inference.model import Preprocessing


@pytest.fixture
def made(small, raw_images):
    def make(precision="bf16", images="uint8", **options):
        given = {} if precision in ("bf16", "fp16") else dict(calibration=[(raw_images, torch.arange(6))])
        return optimize_for_inference(small(**options), precision, images=images, **given)

    return make


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("bf16", {}),
        ("fp16", dict(init_values=1e-6)),
        ("fp8", {}),
        ("int8", {}),
        ("bf16", dict(name="vit_base_patch16_clip_224")),
    ],
)
def test_a_round_trip(made, raw_images, tmp_path, precision, options):
    fast, path = made(precision, **options), tmp_path / "deit.safetensors"
    fast.save(path)
    loaded = fastdeit.load_optimized(path)
    assert (loaded.architecture, loaded.options, loaded.preprocessing) == (
        fast.architecture,
        fast.options,
        fast.preprocessing,
    )
    assert torch.equal(loaded(raw_images), fast(raw_images)) and not loaded.training
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def described(path, change):
    """Rewrites a file's description."""
    with safetensors.safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()[KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = change(description, tensors)
    safetensors.torch.save_file(tensors, path, {KEY: json.dumps(description)} if metadata is None else metadata)


def with_version(description, tensors):
    description["version"] = 2


def without_version(description, tensors):
    del description["version"]


def without_description(description, tensors):
    return {"format": "pt"}


def no_json(description, tensors):
    return {KEY: "{"}


def without_a_tensor(description, tensors):
    del tensors["blocks.0.qkv.weight"]


def of_another_shape(description, tensors):
    tensors["norm_extra"] = torch.zeros(3)


def without_heads(description, tensors):
    del tensors["heads.mean.weight"], description["tensors"]["heads.mean.weight"]


def with_an_unknown_option(description, tensors):
    description["options"]["compression"] = "zip"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_version, "is of version 2, and this fastdeit reads version 1; optimize the model again"),
        (without_version, "is damaged: expected an object with a version"),
        (no_json, "is damaged: expected an object with a version"),
        (without_description, r"holds no optimized model; expected a file of OptimizedModel\.save"),
        (
            without_a_tensor,
            r"was changed: blocks\.0\.qkv\.weight is missing, its description says \['bfloat16', 192, 64\]",
        ),
        (of_another_shape, r"was changed: norm_extra is \['float32', 3\], its description says none"),
        (without_heads, "is damaged: KeyError"),
        (with_an_unknown_option, "is damaged: TypeError.*compression"),
    ],
)
def test_a_file_that_was_changed(made, tmp_path, change, message):
    path = tmp_path / "deit.safetensors"
    made().save(path)
    described(path, change)
    with pytest.raises(ValueError, match=rf"deit\.safetensors: .*{message}"):
        fastdeit.load_optimized(path)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_file(made, tmp_path, size):
    path = tmp_path / "deit.safetensors"
    made().save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cannot be read \(\d+ bytes\): truncated, or no safetensors file"):
        fastdeit.load_optimized(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such file"):
        fastdeit.load_optimized(tmp_path / "none")


def test_a_device_without_the_precision(made, tmp_path, monkeypatch):
    made("fp8").save(tmp_path / "deit")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"'fp8' needs a GPU of compute capability 8\.9 or newer"):
        fastdeit.load_optimized(tmp_path / "deit", "cuda:0")


@pytest.mark.parametrize("images", ["uint8", "float"])
def test_predict_by_a_file(made, tmp_path, image_folder, capsys, images):
    fast = made(images=images)
    fast.preprocessing = fast.preprocessing._replace(class_names=tuple("abcdefghij"))
    fast.save(tmp_path / "deit")
    picture = next((image_folder / "val" / "digit-0").iterdir())
    assert main(["predict", "--optimized", str(tmp_path / "deit"), str(picture), "--json", "--top", "10"]) == 0
    (classes,) = json.loads(capsys.readouterr().out).values()
    assert sorted(entry["class"] for entry in classes) == list("abcdefghij")
    assert sum(entry["probability"] for entry in classes) == pytest.approx(1, abs=1e-5)


def test_uint8_and_normalised_images_give_the_same_prediction(small, tmp_path, image_folder, capsys):
    model, found = small(), []
    picture = next((image_folder / "val" / "digit-1").iterdir())
    for images in ("uint8", "float"):
        optimize_for_inference(model, "fp16", images=images).save(tmp_path / images)
        assert main(["predict", "--optimized", str(tmp_path / images), str(picture), "--json"]) == 0
        (classes,) = json.loads(capsys.readouterr().out).values()
        found.append(classes[0])
    assert found[0]["class"] == found[1]["class"]
    assert found[0]["probability"] == pytest.approx(found[1]["probability"], abs=5e-3)


def test_what_predict_refuses(made, tmp_path, image_folder, capsys):
    fast, picture = made(), str(next((image_folder / "val" / "digit-0").iterdir()))
    fast.preprocessing = Preprocessing()
    fast.save(tmp_path / "deit")
    (tmp_path / "text").write_text("no weights")
    for file, message in (
        ("deit", "deit: does not say how images are resized and normalised"),
        ("text", "truncated, or no safetensors file"),
        ("missing", "missing: no such file"),
    ):
        assert main(["predict", "--optimized", str(tmp_path / file), picture]) == 2
        assert message in capsys.readouterr().err
