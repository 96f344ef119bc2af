"""`fastdeit bench`: without a GPU it times PyTorch's own operations, so that the suites themselves are known to run."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from fastdeit import cli
from fastdeit.benchmarks import command


def test_a_suite_runs_and_is_reported(tmp_path, capsys):
    results = tmp_path / "results.json"
    # It is no test: it times, and knows nothing of the tests' worker processes, in which pytest-benchmark would stand aside.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    bench = [sys.executable, "-m", "fastdeit", "bench", "--toy", "--json", str(results)]
    done = subprocess.run(bench, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    timings = json.loads(results.read_text())["benchmarks"]
    names = {t["name"].split("[")[0] for t in timings}
    assert names == {"test_add_layer_norm", "test_attention", "test_distillation_cross_entropy", "test_mlp"}
    for timing in timings:
        assert timing["extra_info"]["flops"] > 0 and timing["extra_info"]["environment"]["torch"]
        rows = timing["extra_info"]["rows"]
        assert rows[0]["candidate"] == "fastdeit" and len(rows) >= 2
        assert all(row["status"] == "ok" and row["median_us"] > 0 for row in rows)

    assert cli.main(["bench", "report", str(results)]) == 0
    report = capsys.readouterr().out
    assert "On a CPU: these times show that the suites run, and nothing else" in report
    for timing in timings:
        ratio = timing["extra_info"]["rows"][1]["median_us"] / timing["extra_info"]["rows"][0]["median_us"]
        assert f" {ratio:.2f}x " in report
    assert report.count("| fastdeit |") == len(timings)


def test_a_report_has_a_row_for_what_did_not_run(tmp_path, capsys):
    done = dict(candidate="fastdeit", status="ok", median_us=2.0, first_quartile_us=1.0, third_quartile_us=3.0)
    done |= dict(launches=3, peak_mib=1.5, timed_by="graph replay", share_of_floor=0.5)
    missing = dict(candidate="peer", status="not installed: peer", median_us=None)
    ceilings = dict(tflops=700.0, tb_per_s=4.0)
    info = dict(shape=dict(batch=2), rows=[done, missing], environment=dict(gpu="G"), ceilings=ceilings)
    file = tmp_path / "raw.json"
    file.write_text(json.dumps(dict(benchmarks=[dict(name="test_x[1]", extra_info=info)])))
    assert cli.main(["bench", "report", str(file)]) == 0
    out = capsys.readouterr().out
    assert "| batch 2 | fastdeit | 2.0 | 1.0-3.0 | 1.00x | 50% | 3 | 1.5 | graph replay |" in out
    assert "| batch 2 | peer |  |  |  |  |  |  | not installed: peer |" in out
    assert "700 TFLOP/s bf16, 4.00 TB/s" in out


def test_a_file_that_is_no_result_is_named(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text("{}")
    assert cli.main(["bench", "report", str(file)]) == 2
    assert "other.json: expected a file that fastdeit bench --json wrote" in capsys.readouterr().err


def test_without_a_gpu_everything_is_skipped(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    bench = [sys.executable, "-m", "fastdeit", "bench", "distillation"]
    done = subprocess.run(bench, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and " skipped" in done.stdout and "passed" not in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [(["no_such_op"], "no_such_op; there are .*layer_norm"), (["--json", "/no/such/directory/x.json"], "no directory")],
)
def test_bad_arguments_are_named_before_anything_is_timed(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_suites_are_the_files_beside_the_command():
    assert "layer_norm" in command.suites()
