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


def test_a_suite_runs_and_writes_its_raw_results(tmp_path):
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
