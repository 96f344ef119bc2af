"""`fastdeit verify`: what it prints and what it returns."""

import json
import re
import sys
import types

import pytest
import timm
import torch

from fastdeit import ops
from fastdeit.commands import named_model
from fastdeit.commands import verify as verify_command
from fastdeit.commands.cli import main
from fastdeit.ops.attention_op import attention_reference
from fastdeit.verification import Pair

SMALL = ["verify", "deit_tiny_patch16_224", "--device", "cpu", "--img-size", "32", "--batch-size", "1"]


@pytest.fixture
def shallow(monkeypatch):
    """timm makes two blocks where it is asked for a whole model."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=2, **options))


def test_without_a_gpu_it_says_that_nothing_is_fused_and_passes(shallow, capsys):
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    assert "Nothing runs fused here (tensors on cpu): every layer is timm's code" in out
    assert "The contract holds in all 12 modules, 0 of which run fused." in out
    assert "blocks.1.attn" in out and "speed-up" not in out


def test_fused_modules_that_are_right_pass(shallow, kernels_stood_in, capsys):
    assert main([*SMALL, "--amp", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "autocast to bfloat16" in out and "all 12 modules, 12 of which run fused" in out


HOST = """
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer
def model():
    return VisionTransformer(image_size=16, patch_size=8, num_layers=1, num_heads=1, hidden_dim=32, mlp_dim=48)
def text():
    return "model"
number = 3
"""


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """The present directory, with a file of the user's of a name that no other test has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models_of_mine.py").write_text(HOST)
    yield
    sys.modules.pop("models_of_mine", None)


def test_a_model_that_a_function_makes(own_file, kernels_stood_in, capsys):
    pytest.importorskip("torchvision", reason="needs torchvision")
    path = list(sys.path)
    assert main(["verify", "models_of_mine:model", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "models_of_mine:model, 2 images of 16 pixels on cpu" in out and "inference, stock" in out
    assert "EncoderBlock" in out and "timm" not in out and sys.path == path
    assert main(["explain", "models_of_mine:model", "--device", "cpu"]) == 0
    assert re.search(r"EncoderBlock +fused", capsys.readouterr().out)


def test_a_class_of_transformers_has_its_default_configuration():
    class Vit(torch.nn.Linear):
        config_class = staticmethod(lambda: 3)

        def __init__(self, config):
            super().__init__(config, 1)
            self.config = types.SimpleNamespace(image_size=48)

    module = types.SimpleNamespace(Vit=Vit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "a_library", module)
        model = named_model.make("a_library:Vit")
    assert model.in_features == 3 and named_model.image_side(model) == 48


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["models_of_mine:nothing"], "MODEL: expected MODULE:FUNCTION, got 'models_of_mine:nothing': module"),
        (["none_such:model"], "MODEL: expected MODULE:FUNCTION, got 'none_such:model': No module named"),
        ([":model"], "MODEL: expected MODULE:FUNCTION, got ':model'"),
        (["models_of_mine:number"], "MODEL: models_of_mine:number is a int, not a function that returns a model"),
        (["models_of_mine:text"], "MODEL: models_of_mine:text returned a str, not a torch.nn.Module"),
        (["torch.nn:Linear"], "MODEL: torch.nn:Linear cannot be called without arguments"),
        (["models_of_mine:model", "--num-classes", "3"], "--num-classes: for timm's models; let models_of_mine:model"),
        (["models_of_mine:model", "--checkpoint", "x"], "--checkpoint: for timm's models"),
    ],
)
def test_a_function_that_does_not_fit_is_named(own_file, capsys, argv, message):
    assert main(["verify", *argv, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_kernel_is_exit_code_1(shallow, kernels_stood_in, monkeypatch, capsys):
    monkeypatch.setattr(ops, "attention", lambda *args, **kwargs: 1.01 * attention_reference(*args, **kwargs))
    assert main(SMALL) == 1
    out = capsys.readouterr().out
    assert "blocks.0.attn: inference: maximum error" in out and "The contract FAILS in " in out
    assert main([*SMALL, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    holds = {layer["name"]: layer["holds"] for layer in found["layers"]}
    assert not found["holds"] and not holds["blocks.1.attn"] and holds["blocks.1.mlp"]


def test_a_checkpoint_is_what_is_verified(shallow, tmp_path, capsys, monkeypatch):
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    seen = []
    monkeypatch.setattr(verify_command, "Pair", lambda model, *args: seen.append(model) or Pair(model, *args))
    assert main([*SMALL, "--checkpoint", str(tmp_path / "weights.pth"), "--num-classes", "3"]) == 0
    assert torch.equal(seen[0].head.weight, model.head.weight)
    assert main([*SMALL, "--checkpoint", str(tmp_path / "weights.pth")]) == 2
    assert "weights.pth does not fit deit_tiny_patch16_224" in capsys.readouterr().err


def test_speed_and_memory_are_taken_of_the_model_and_of_each_kind_of_module(shallow, kernels_stood_in):
    """On a CPU by the wall clock; that this is not printed there is tested above."""
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=3, embed_dim=64, num_heads=1).eval()
    timings = verify_command.timed(Pair(model, torch.randn(1, 3, 32, 32), torch.bfloat16))
    names = ["", "blocks.0", "blocks.0.norm1", "blocks.0.attn", "blocks.0.mlp"]
    assert [(t["name"], t["work"]) for t in timings] == [(n, w) for n in names for w in ("inference", "training")]
    assert all(t[who]["status"] == "ok" and t[who]["us"] > 0 for t in timings for who in ("timm", "fastdeit"))
    table = verify_command.times_as_text(timings)
    assert table.count(" training ") == 5 and "speed-up" in table


def test_what_could_not_be_timed_is_said():
    done = dict(status="ok", us=2.0, peak_mib=1.0, launches=3, timed_by="graph replay")
    failed = dict(status="out of memory", us=None, peak_mib=None, launches=None, timed_by="")
    timing = dict(name="", kind="Block", work="training", timm=failed, fastdeit=done)
    assert "timm: out of memory" in verify_command.times_as_text([timing])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["deit_tini_patch16_224"], "close to it: deit_tiny_patch16_224"),
        (["deit_tiny_patch16_224", "--batch-size", "0"], "--batch-size: expected a positive number, got 0"),
        (["deit_tiny_patch16_224", "--img-size", "0"], "--img-size: expected a positive number, got 0"),
        (["deit_tiny_patch16_224", "--num-classes", "-1"], "--num-classes: expected a positive number, got -1"),
        (["deit_tiny_patch16_224", "--checkpoint", "empty.pth"], "--checkpoint: empty.pth cannot be read"),
        (["deit_tiny_patch16_224", "--checkpoint", "nowhere"], "--checkpoint: there is no file 'nowhere'"),
        (["deit_tiny_patch16_224", "--device", "nowhere"], "--device: expected a device such as cpu"),
        (["resnet18", "--device", "cpu"], "no part of this ResNet can be accelerated"),
    ],
)
def test_bad_arguments_are_named(capsys, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.pth").touch()
    assert main(["verify", *argv]) == 2
    assert message in capsys.readouterr().err
