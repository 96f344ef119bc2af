"""Costs in explain's report: what runs fused costs what the formulas say, the rest what timm costs."""

import json

import pytest
import timm
import torch
from torch import nn

import fastdeit
from fastdeit.commands import cli
from fastdeit.cost.models import DEIT, parts, total
from fastdeit.cost.view import shape_of

BATCH = 8


def model(name="deit_tiny_distilled_patch16_224", **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, depth=3, **kwargs).eval()


def sums(report, which):
    costs = [pair[which] for pair in report.costs.values()]
    return sum(cost.launches for cost in costs), sum(cost.bytes for cost in costs)


def whole(shape, execution, precision="amp"):
    cost = total(parts(shape, BATCH, execution, precision, training=False))
    return cost.launches, cost.bytes


def test_everything_fused_costs_what_the_formulas_say(kernels_stood_in):
    plain = fastdeit.accelerate(timm.create_model("deit_tiny_distilled_patch16_224", depth=3)).eval()
    report = fastdeit.explain(plain, batch_size=BATCH)
    assert sums(report, 0) == whole(shape_of(plain), "fastdeit")
    assert sums(report, 1) == whole(shape_of(plain), "eager")
    bf16 = fastdeit.explain(plain.bfloat16(), batch_size=BATCH)
    assert sums(bf16, 1) == whole(shape_of(plain), "eager", "bf16")


def test_nothing_fused_costs_what_timm_costs():
    report = fastdeit.explain(fastdeit.accelerate(model()), batch_size=BATCH)
    assert sums(report, 0) == sums(report, 1) == whole(shape_of(model()), "eager")


def test_what_is_excluded_costs_what_timm_costs(kernels_stood_in):
    plain = timm.create_model("deit_tiny_distilled_patch16_224", depth=3)
    report = fastdeit.explain(fastdeit.accelerate(plain, exclude=["blocks.1"]).eval(), batch_size=BATCH)
    assert report.costs["blocks.1.mlp"][0] == report.costs["blocks.1.mlp"][1]
    assert report.costs["blocks.0"][0].bytes < report.costs["blocks.0"][1].bytes
    assert report.costs["blocks.2.attn"][0] == report.costs["blocks.0.attn"][0]  # nothing is left out of the last block


@pytest.mark.parametrize("depth", [1, 3])
def test_the_embedding_costs_what_runs(kernels_stood_in, depth):
    plain = fastdeit.accelerate(timm.create_model("deit_tiny_patch16_224", depth=depth), exclude=["blocks.*"])
    ours, timms = fastdeit.explain(plain, batch_size=BATCH).costs["patch_embed.proj"]
    assert ours.bytes < timms.bytes
    plain.patch_embed.register_forward_hook(lambda *_: None)
    ours, timms = fastdeit.explain(plain, batch_size=BATCH).costs["patch_embed.proj"]
    assert ours == timms


def test_the_shape_is_the_models():
    assert shape_of(timm.create_model("deit_tiny_distilled_patch16_224")) == shape_like(DEIT["Ti"])
    registers = timm.create_model("vit_tiny_patch16_224", reg_tokens=4, depth=2, num_classes=7)
    found = shape_of(registers)
    assert (found.tokens, found.prefix_tokens, found.classifiers, found.classes) == (201, 5, 1, 7)


def shape_like(shape):
    from dataclasses import replace

    return replace(shape, hidden=4 * shape.channels)


def test_the_table_and_json_have_them(capsys):
    arguments = ["explain", "deit_tiny_distilled_patch16_224", "--batch-size", str(BATCH)]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "timm's launches" in lines[0] and f"a forward pass of {BATCH} images, by arithmetic" in lines[-1]
    assert cli.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["blocks.0.attn"]["launches"] == 3 and "launches" not in rows["norm"]
    assert "launches" not in fastdeit.explain(model()).as_dict()["blocks.0.attn"]


@pytest.mark.parametrize(
    "value, error, message",
    [
        (0, ValueError, "at least 1, got 0"),
        (2.0, TypeError, "an int, got float"),
        (True, TypeError, "an int, got bool"),
    ],
)
def test_a_batch_that_is_none_is_named(value, error, message):
    with pytest.raises(error, match=f"batch_size: expected {message}"):
        fastdeit.explain(model(), batch_size=value)


@pytest.mark.parametrize("other", [nn.Linear(2, 2), timm.create_model("resnet10t")], ids=["layer", "convnet"])
def test_a_model_whose_costs_are_not_known_is_named(other):
    with pytest.raises(ValueError, match=f"not for a {type(other).__name__}"):
        fastdeit.explain(other, batch_size=1)
