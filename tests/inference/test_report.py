"""`OptimizedModel.report`, and `fastdeit verify --precision`."""

import copy
import gc
import json

import pytest
import torch

from fastdeit import optimize_for_inference
from fastdeit.commands.cli import main


@pytest.fixture
def calibration(raw_images, normalised, small):
    return [(normalised(small(), raw_images).float(), torch.arange(len(raw_images)))]


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_a_report_on_a_model(small, calibration, precision):
    model, images = small(init_values=0.2), calibration[0][0]
    options = {} if precision == "bf16" else dict(calibration=calibration)
    fast = optimize_for_inference(model, precision, **options)
    found = fast.report([images[:2], (images[2:], torch.zeros(4))])
    with torch.no_grad():
        exact, got = model.double()(images.double()), fast(images).double()
    assert (found.precision, found.images) == (precision, 6)
    assert found.agreement == (got.argmax(1) == exact.argmax(1)).double().mean().item()
    assert found.logit_error == pytest.approx(((got - exact).norm() / exact.norm()).item(), rel=1e-3)
    errors = [layer.error for layer in found.layers]
    assert errors == sorted(errors, reverse=True) and len(errors) == (0 if precision == "bf16" else 8)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_the_layer_that_loses_most_comes_first(small, calibration, precision):
    model = small()
    fast = optimize_for_inference(model, precision, calibration=calibration)
    worst = fast.blocks[1].fc1 if precision == "fp8" else fast.blocks[1].proj
    worst.scale.mul_(3.0)
    found = fast.report(calibration)
    name = "blocks.1.mlp.fc1" if precision == "fp8" else "blocks.1.attn.proj"
    assert found.layers[0].name == name and found.layers[0].error > 0.1
    assert all(0 < layer.error < 0.06 for layer in found.layers[1:])
    first, _, head, _, row, *_ = str(found).splitlines()
    assert first.startswith(f"{precision} on 6 images: ") and head.split() == ["layer,", "for", "exclude", "error"]
    assert row.split()[0] == name


def test_uint8_images_and_another_readout(small, raw_images):
    model = small()
    fast = optimize_for_inference(model, images="uint8", readout="softmax_sum")
    assert fast.report([raw_images]).logit_error < 0.02


def test_the_model_is_not_kept_alive(small, calibration):
    model = small()
    fast, twin = optimize_for_inference(model), copy.deepcopy(model)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="model: expected the model that this one was made of, which is gone"):
        fast.report(calibration)
    assert fast.report(calibration, twin).images == 6
    with pytest.raises(ValueError, match="another: blocks differ"):
        fast.report(calibration, small(depth=3))
    with pytest.raises(ValueError, match="gone or was never here"):
        copy.deepcopy(optimize_for_inference(twin)).report(calibration)


@pytest.mark.parametrize("loader", [[], [torch.zeros(0, 3, 32, 32)]])
def test_a_loader_without_images(small, loader):
    model = small()
    with pytest.raises(ValueError, match="loader: expected images, got none"):
        optimize_for_inference(model).report(loader)


@pytest.mark.parametrize("precision", ["fp8", "int8", "fp16"])
def test_verify_prints_it(monkeypatch, small, capsys, precision):
    model = small()
    monkeypatch.setattr("timm.create_model", lambda name, **options: model)
    assert main(["verify", "deit_tiny_distilled_patch16_224", "--precision", precision]) == 0
    printed = capsys.readouterr().out
    assert f"{precision} on 32 images: " in printed and "The images were random" in printed
    assert ("blocks.1.mlp.fc2" in printed) is (precision != "fp16")


def test_verify_on_a_folder_of_images(monkeypatch, small, capsys, image_folder):
    model = small()
    monkeypatch.setattr("timm.create_model", lambda name, **options: model)
    command = ["verify", "deit_tiny_distilled_patch16_224", "--precision", "int8", "--images", str(image_folder)]
    assert main([*command, "--json", "--exclude", "blocks.0.*"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 56 and not found["random_images"] and len(found["layers"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "x"], "--images: is for --precision, which was not given"),
        (["--precision", "fp16", "--exclude", "blocks.0"], "--exclude: expected nothing for fp16"),
        (["--precision", "fp8", "--exclude", "blocks.9"], "exclude: no module of the model matches 'blocks.9'"),
        (["--precision", "fp8", "--images", "missing"], "missing: no such image"),
    ],
)
def test_what_verify_refuses(monkeypatch, small, capsys, options, message):
    model = small()
    monkeypatch.setattr("timm.create_model", lambda name, **options: model)
    assert main(["verify", "deit_tiny_distilled_patch16_224", *options]) == 2
    assert message in capsys.readouterr().err
