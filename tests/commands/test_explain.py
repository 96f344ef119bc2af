"""`fastdeit explain MODEL`."""

import json

import pytest
import torch

from fastdeit.commands.cli import main


def test_it_prints_the_table(capsys):
    assert main(["explain", "deit_tiny_patch16_224", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "blocks.0-11.attn" in out and "tensors on cpu" in out


def test_json_train_and_exclude(capsys):
    argv = ["explain", "deit_tiny_patch16_224", "--device", "meta", "--json", "--train", "--exclude", "blocks.0"]
    assert main(argv) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["blocks.0"]["reason"] == "excluded"
    assert rows["blocks.1"]["reason"] == "tensors on meta"


def test_without_a_gpu_it_tells_what_would_run_on_one(capsys):
    rows = {}
    for options in ([], ["--on-gpu", "--amp", "bfloat16"], ["--on-gpu"]):
        assert main(["explain", "deit_tiny_patch16_224", "--device", "cpu", *options, "--json"]) == 0
        rows[tuple(options)] = json.loads(capsys.readouterr().out)
    here, autocast, single = rows.values()
    assert not any(row["fused"] for row in here.values())
    timms = {name for name, row in autocast.items() if not row["fused"]}
    assert timms == {"head"} and autocast["patch_embed.proj"]["fused"]
    assert "TF32" in single["blocks.0.attn"]["reason"] and "TF32" in single["patch_embed.proj"]["reason"]
    assert single["blocks.0.norm1"]["fused"]


def test_autocast_is_explained(capsys, kernels_stood_in, monkeypatch):
    from fastdeit.nn import Attention

    seen = []
    monkeypatch.setattr(
        Attention, "why_not_fused", lambda self, x: seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
    )
    assert main(["explain", "deit_tiny_patch16_224", "--device", "cpu", "--amp", "bfloat16"]) == 0
    assert main(["explain", "deit_tiny_patch16_224", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert set(seen) == {(torch.float32, True), (torch.bfloat16, False)}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["deit_tini_patch16_224"],
            "timm has no model named 'deit_tini_patch16_224'; close to it: deit_tiny_patch16_224",
        ),
        (["deit_tiny_patch16_224", "--exclude", "block.0"], "no module of the model matches 'block.0'"),
        (
            ["deit_tiny_patch16_224", "--device", "nowhere"],
            "--device: expected a device such as cpu, cuda or cuda:1",
        ),
    ],
)
def test_bad_arguments_are_named(capsys, argv, message):
    assert main(["explain", *argv]) == 2
    assert message in capsys.readouterr().err
