"""`fastdeit bench`: without a GPU it times PyTorch's own operations, so that the suites themselves are known to run."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastdeit.benchmarks import results_folder, runner
from fastdeit.commands import bench as command
from fastdeit.commands import cli
from fastdeit.kernels.gemm.config import EPILOGUES


def bench(*arguments: object, cwd) -> subprocess.CompletedProcess:
    """In a process of its own: it is no test, and knows nothing of the tests' workers, where pytest-benchmark stands aside."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    words = [sys.executable, "-m", "fastdeit", "bench", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A toy run of every suite, and what it printed. The GEMMs are those of one model: the others' are alike but for the width."""
    out = tmp_path_factory.mktemp("bench") / "toy"
    done = bench("quick", "--toy", "-k", "not test_gemm or 256-B", "--out", out, cwd=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_every_suite_runs_and_every_row_has_its_figures(results):
    out, _ = results
    identity, benchmarks, missing = results_folder.read(out)
    assert identity["toy"] and identity["torch"] == torch.__version__ and not missing
    assert {b["extra_info"]["suite"] for b in benchmarks} == set(command.suites())
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        assert info["flops"] > 0 and info["environment"]["torch"] and info["shape"]
        assert info["rows"][0]["candidate"] == "fastdeit" and len(info["rows"]) >= 2
        for row in info["rows"]:
            assert row["status"] == "ok" and row["median_us"] > 0 and row["tflops"] > 0 and row["plain_call_us"] > 0
    compared = [row for b in benchmarks for row in b["extra_info"]["rows"] if row["max_errors"]]
    assert all(b["extra_info"]["rows"][0] in compared for b in benchmarks)
    logits = [row for b in benchmarks if b["extra_info"]["suite"] == "inference" for row in b["extra_info"]["rows"]]
    assert len(logits) >= 6 and all(0 <= row["agreement"] <= 1 and 0 < row["logit_error"] < 0.1 for row in logits)
    gemms = [b["extra_info"]["shape"] for b in benchmarks if b["extra_info"]["suite"] == "gemm"]
    assert len({(shape["layer"], shape["direction"]) for shape in gemms}) == len(gemms) == 12
    assert all(m >= r >= 0 for row in compared for m, r in zip(row["max_errors"], row["rms_errors"], strict=True))


def test_every_work_of_the_mlp_runs(tmp_path):
    """A short run has its first alone."""
    words = ("full", "--toy", "--only", "mlp", "-k", "198-768-256-", "--out", tmp_path / "r")
    done = bench(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    _, benchmarks, _ = results_folder.read(tmp_path / "r")
    works = [benchmark["extra_info"]["shape"] for benchmark in benchmarks]
    assert len({(shape["work"], shape["direction"]) for shape in works}) == len(works) == 10
    assert {shape["work"] for shape in works} >= {"branch", "mlp", *EPILOGUES}
    assert all(row["status"] == "ok" for benchmark in benchmarks for row in benchmark["extra_info"]["rows"])


def test_a_line_tells_of_each_case(results):
    out, printed = results
    for case in json.loads((out / "run.json").read_text())["cases"]:
        assert f"{case}: " in printed


def test_a_second_run_goes_on_with_what_is_missing(results):
    out, _ = results
    cases = sorted((out / "cases").iterdir())
    before = {path.name: path.read_bytes() for path in cases}
    gone = next(path for path in cases if path.name.startswith("attention"))
    gone.unlink()
    done = bench("quick", "--toy", "--out", out, "--only", "attention", "--only", "mlp", cwd=out.parent)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    after = {path.name: path.read_bytes() for path in (out / "cases").iterdir()}
    assert set(after) == set(before) and {n for n in after if after[n] != before[n]} == {gone.name}


def test_time_that_is_over_leaves_cases_for_later(tmp_path):
    done = bench("quick", "--toy", "--out", tmp_path / "r", "--only", "mlp", "--seconds", "7", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases are left: the same command goes on with them" in done.stdout
    assert results_folder.read(tmp_path / "r")[2]


def test_other_results_are_not_mixed_in(tmp_path, capsys):
    folder = results_folder.Folder(tmp_path / "r")
    folder.begin(results_folder.identity(True) | {"source": "another", "gpu": "G"})
    before = (tmp_path / "r" / "run.json").read_bytes()
    assert cli.main(["bench", "quick", "--toy", "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert "source another, now" in error and "Give another folder" in error and "torch" not in error
    assert (tmp_path / "r" / "run.json").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(tmp_path, capsys):
    assert cli.main(["bench", "quick", "--out", str(tmp_path / "r")]) == 2
    assert "need a CUDA device; --toy" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_pytest_skips_the_suites(tmp_path):
    suite = runner.SUITES / "test_distillation.py"
    words = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider", str(suite)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and " skipped" in done.stdout and "passed" not in done.stdout


def test_bad_arguments_are_named_before_anything_is_timed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "quick", "--only", "no_such_op"])
    error = capsys.readouterr().err
    assert "no_such_op" in error and "layer_norm" in error
    assert cli.main(["bench", "quick", "--toy", "--seconds", "-1", "--out", str(tmp_path / "r")]) == 2
    assert "--seconds: expected a positive number, got -1.0" in capsys.readouterr().err


def test_an_expression_that_matches_no_case_is_an_error(tmp_path, capsys):
    words = ["bench", "quick", "--toy", "--only", "layer_norm", "-k", "no_such_case", "--out", str(tmp_path / "r")]
    assert cli.main(words) == 2
    assert "-k: no case matches 'no_such_case'" in capsys.readouterr().err


def test_suites_are_the_files_beside_the_command():
    assert {"attention", "layer_norm", "mlp"} <= set(command.suites())


def test_the_loader_is_measured_beside_timms(capsys):
    assert cli.main(["bench", "loader", "--turns", "1", "--copies", "11", "--only", "simplejpeg", "--only", "v2"]) == 0
    header, *rows, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["images/CPU", "s", "of", "timm"]
    names = ["timm", "torchvision transforms v2", "fastdeit, simplejpeg, exact", "fastdeit, simplejpeg, resize torch"]
    assert [row.rsplit(maxsplit=2)[0] for row in rows] == names
    assert rows[0].endswith(" 1.00") and all(float(row.split()[-1]) > 0 for row in rows)
