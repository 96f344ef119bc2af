"""`fastdeit bench`: without a GPU it times PyTorch's own operations, so that the suites themselves are known to run."""

import json
import os
import re
import subprocess
import sys

import pytest

from fastdeit import cli
from fastdeit.benchmarks import command


def test_a_suite_runs_and_writes_its_raw_results(tmp_path):
    results = tmp_path / "results.json"
    environment = {
        key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"
    }  # it is no test: it times
    bench = [sys.executable, "-m", "fastdeit", "bench", "layer_norm", "--json", str(results)]
    done = subprocess.run(bench, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    timings = json.loads(results.read_text())["benchmarks"]
    assert {t["params"]["backend"] for t in timings} >= {"reference"}
    assert all(t["stats"]["min"] > 0 for t in timings)


@pytest.mark.parametrize(
    "arguments, message",
    [(["no_such_op"], "no_such_op; there are .*layer_norm"), (["--json", "/no/such/directory/x.json"], "no directory")],
)
def test_bad_arguments_are_named_before_anything_is_timed(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_suites_are_the_files_beside_the_command():
    assert "layer_norm" in command.suites()
