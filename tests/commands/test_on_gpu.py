"""Commands on a CUDA device, run on the fake CUDA runtime: what they ask of the device is possible. Results are taken as right."""

import pytest
import timm
import torch

from fastdeit import testing
from fastdeit.benchmarks import results_folder, timing
from fastdeit.commands import cli
from fastdeit.kernels.norm.layer_norm import layer_norm_forward
from fastdeit.testing import fake_cuda

pytestmark = pytest.mark.fake_device
NAME = "deit_tiny_distilled_patch16_224"


def test_verify_compares_and_times_every_module(capsys, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=1, **options))
    monkeypatch.setattr(timing, "_SECONDS_PER_TURN", 1e-5)
    monkeypatch.setattr(timing, "_MOST_SETS", 1)
    command = ["verify", NAME, "--img-size", "32", "--batch-size", "1", "--amp", "bfloat16"]
    assert cli.main(command) == 1  # zeros are read wherever it asks whether a result is finite
    out = capsys.readouterr().out
    assert "nothing can be compared" in out
    times = out[out.index("speed-up") :]
    rows = [line.split()[-9:] for line in times.splitlines() if line.startswith(("(the model)", "blocks.0.attn"))]
    assert [row[0] for row in rows] == ["inference", "training"] * 2 and all(float(row[1]) > 0 for row in rows)
    assert not fake_cuda.errors()


def test_bench_captures_and_reports_without_a_profiler(tmp_path, capsys):
    x, weight = torch.zeros(2, 198, 64, device="cuda"), torch.zeros(64, device="cuda")

    def fused(x, weight):
        return layer_norm_forward(x, weight, weight, 1e-6, torch.float32)[1]

    def eager(x, weight):
        return torch.nn.functional.layer_norm(x, (64,), weight, weight)

    def waits(x, weight):
        return x.sum().item()

    with fake_cuda.counting() as counts:
        rows = timing.measure(dict(fastdeit=fused, eager=eager), lambda: (x.clone(), weight.clone()), turns=3)
    assert [(row.status, row.timed_by, row.launches) for row in rows] == [("ok", "graph replay", None)] * 2
    assert counts["capture"] == 2 and counts["graph_launch"] >= 6
    folder = results_folder.Folder(tmp_path)
    folder.begin(results_folder.identity(False))
    folder.plan(["layer_norm-1"])
    info = dict(shape=dict(rows=396), rows=[row.derived(1e6, 1e6, 1.0) for row in rows], ceilings=None, floor_us=1.0)
    info |= dict(compile_floor_us=None, flops=1e6, bytes=1e6)
    folder.write("layer_norm-1", dict(benchmarks=[dict(name="test_layer_norm[1]", extra_info=info)]))
    assert cli.main(["bench", "report", str(tmp_path)]) == 0
    assert "| rows 396 | eager |" in capsys.readouterr().out


def test_bench_profile_says_that_the_profiler_saw_nothing(capsys):
    assert cli.main(["bench", "profile", "--toy"]) == 0
    assert capsys.readouterr().out.count("The profiler saw nothing run on the device") == 2


def test_tune_runs_every_candidate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(testing, "assert_close_to_oracle", lambda *_: None)
    assert cli.main(["tune", "layer_norm", "--toy", "--out", str(tmp_path)]) == 0
    assert "no candidate ran" not in (out := capsys.readouterr().out)
    assert "90: {" in out and "rows" in out
