"""`fastdeit bench deployment`: the tutorial's forms of a model and frozen ones, in one table."""

import copy
import json

import pytest
import timm

from fastdeit.benchmarks import deployment, host_time
from fastdeit.commands import cli
from fastdeit.inference.architecture import STREAM
from tests.inference.conftest import SMALL

WAYS = ["timm, float32", "tutorial: script", "tutorial: dynamic int8, script"]
WAYS += ["tutorial: the same for mobile, lite interpreter", *(f"fastdeit, {precision}" for precision in STREAM)]


def test_a_model_that_knows_nothing_has_sizes_and_estimates(capsys, monkeypatch):
    monkeypatch.setattr(deployment, "_untrained", lambda name: timm.create_model(name, embed_dim=96, depth=2).eval())
    monkeypatch.setattr(deployment, "measured_host_time", lambda name: dict.fromkeys(STREAM, 0.125))
    assert cli.main(["bench", "deployment", "deit_tiny_patch16_224", "--json"]) == 0
    rows = {row["way"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == WAYS
    assert all(row["same_class"] is row["logit_error"] is None for row in rows.values())
    ratios = {name: row["of_float32"] for name, row in rows.items()}
    assert ratios["timm, float32"] == 1 and ratios["tutorial: script"] == pytest.approx(1, abs=0.2)
    assert [ratios["fastdeit, bf16"], ratios["fastdeit, fp16"]] == pytest.approx([0.5, 0.5], abs=0.05)
    assert 0.25 < ratios["fastdeit, fp8"] < 0.45  # two blocks alone: embedding and head weigh more
    assert {rows[f"fastdeit, {precision}"]["host_time"] for precision in STREAM} == {0.125}
    assert rows["fastdeit, fp8"]["images_per_s"] > rows["fastdeit, bf16"]["images_per_s"] > 0
    assert cli.main(["bench", "deployment", "deit_tiny_patch16_224", "--no-host"]) == 0
    out = capsys.readouterr().out
    assert "random weights" in out and "estimated" in out and "0.12" not in out
    first = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert first[0] == "way" and first[2:] == WAYS


def test_a_checkpoint_is_compared_on_its_validation_images(small_checkpoint, capsys):
    assert cli.main(["bench", "deployment", str(small_checkpoint), "--json"]) == 0
    rows = {row["way"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == WAYS
    for name in WAYS[:2]:
        assert rows[name]["same_class"] == 1 and rows[name]["logit_error"] < 1e-5
    for name in WAYS[2:]:
        assert 0 < rows[name]["logit_error"] < 0.2 and 0 <= rows[name]["same_class"] <= 1
        assert rows[name]["host_time"] is None
    assert rows["fastdeit, fp16"]["logit_error"] < rows["fastdeit, bf16"]["logit_error"]
    assert rows["tutorial: dynamic int8, script"]["logit_error"] == pytest.approx(
        rows["tutorial: the same for mobile, lite interpreter"]["logit_error"], rel=0.2
    )


@pytest.mark.fake_device
def test_host_time_is_over_timms_by_name():
    model = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL).eval()
    fast = deployment._frozen(model, "bf16", None).cuda()
    slow = deployment._frozen(model, "bf16", None).cuda()
    slow.register_forward_pre_hook(lambda *_: sum(range(200_000)) and None)
    found = host_time.ratios(model.cuda().bfloat16(), {"fast": fast, "slow": slow}, 3, 3, 2.5)
    assert 0 < found["fast"] < 0.5 < found["slow"]


@pytest.mark.fake_device
def test_what_a_model_does_after_another_ones_calls_is_not_timed():
    model = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL).eval().cuda().bfloat16()
    other, last = copy.deepcopy(model), []
    model.register_forward_pre_hook(lambda *_: last.append("baseline"))
    other.register_forward_pre_hook(lambda *_: None if last[-1] == "other" else sum(range(2_000_000)) and None)
    other.register_forward_pre_hook(lambda *_: last.append("other"))
    assert 0.3 < host_time.ratios(model, {"other": other}, 3, 3, 2.5)["other"] < 3


@pytest.mark.parametrize("name", ["deit_of_nobody", "nowhere/last.safetensors"])
def test_a_model_that_is_not_there_is_named(name, capsys):
    assert cli.main(["bench", "deployment", name]) == 2
    assert name in capsys.readouterr().err
