"""The stages of benchmarks/gpu_check.sh, at toy size on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdeit import cli
from fastdeit.benchmarks import block_counts, profile_step, repeat_step, small_kernels
from fastdeit.kernels import catalog
from fastdeit.kernels.catalog import ARCHITECTURES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
STAGES = [
    "install",
    "small_kernels",
    "parity",
    "verify",
    "graphs",
    "repeat",
    "profile",
    "bench",
    "memcheck",
    "racecheck",
]
ELSEWHERE = ["small_kernels", "parity", "verify", "graphs", "bench"]  # what these run has tests of its own


def check(folder, *arguments, python=sys.executable):
    environment = {**os.environ, "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", str(SCRIPT), *arguments, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def outcomes(folder) -> dict[str, str]:
    lines = (folder / "summary.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.endswith(".txt |")]
    return {row[0]: row[1] for row in rows}


def mark_as_passed(folder, names):
    (folder / "log").mkdir(parents=True)
    for name in names:
        (folder / "log" / f"{name}.passed").touch()
        (folder / "log" / f"{name}.outcome").write_text("passed\n")
        (folder / "log" / f"{name}.seconds").write_text("0\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is what to run")
def test_every_stage_runs_once_and_is_summed_up(tmp_path):
    mark_as_passed(tmp_path, ELSEWHERE)
    first = check(tmp_path, "--toy")
    assert first.returncode == 0, first.stdout + first.stderr
    found = outcomes(tmp_path)
    assert list(found) == STAGES
    assert {name for name, outcome in found.items() if outcome == "passed"} >= {"install", "repeat", "profile"}
    assert all(outcome == "passed" or outcome.startswith("not run: ") for outcome in found.values())
    text = (tmp_path / "summary.md").read_text()
    assert "### training step" in text and "torch==" in text
    assert (tmp_path / "profile" / "inference.trace.json").exists()

    again = check(tmp_path, "--toy")
    assert again.returncode == 0 and "== install" not in again.stdout and outcomes(tmp_path) == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is what to run")
def test_a_stage_that_fails_is_said_and_does_not_stop_the_others(tmp_path):
    mark_as_passed(tmp_path / "out", ["install", *ELSEWHERE, "profile"])
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[[ "$*" == *repeat_step* ]] && exit 3\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    found = check(tmp_path / "out", "--toy", python=python)
    assert found.returncode == 1
    assert outcomes(tmp_path / "out")["repeat"] == "FAILED: exit code 3"
    assert list(outcomes(tmp_path / "out")) == STAGES


@pytest.mark.parametrize("arguments, message", [(["--fast"], "unknown option --fast"), ([], "PyTorch sees no GPU")])
def test_what_cannot_be_is_said(tmp_path, arguments, message):
    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = check(tmp_path, *arguments)
    assert found.returncode == 2 and message in found.stderr


def test_every_kernel_is_among_the_small_ones():
    with block_counts.kernels_left_out() as launched:
        for _, result in small_kernels.calls(torch.float16):
            if result.requires_grad:
                result.float().sum().backward()
    shipped = {row.kernel.__name__ for arch in ARCHITECTURES for row in catalog.shipped(arch)}
    assert shipped <= set(launched)


def test_two_runs_of_a_training_step_give_the_same_bits():
    first, second = repeat_step.fingerprint(toy=True), repeat_step.fingerprint(toy=True)
    assert repeat_step.differing(first, second) == 0
    assert repeat_step.differing(first, repeat_step.fingerprint(toy=True, seed=1)) > 0


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("layer_norm_forward_kernel", "fastdeit"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTT", "matrix product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix product"),
        ("void pytorch_flash::flash_fwd_kernel", "attention, PyTorch's"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention, PyTorch's"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernel>", "left to fuse"),
        ("Memcpy HtoD (Pinned -> Device)", "copy or fill"),
        ("void at::native::multi_tensor_apply_kernel<AdamW>", "optimizer"),
    ],
)
def test_kernels_are_told_apart(kernel, kind):
    assert profile_step.kind_of(kernel) == kind


def test_a_kernels_launches_are_summed():
    entries = profile_step.summed([("a", 1.0), ("b", 5.0), ("a", 2.0), ("never", 0.0)])
    assert [(e.kernel, e.count, e.microseconds) for e in entries] == [("b", 1, 5.0), ("a", 2, 3.0)]
    text = profile_step.report(entries, top=1)
    assert text.startswith("3 launches, 0.01 ms") and "62.5" in text
    assert "| a " not in text


def test_the_command_says_what_it_needs(capsys):
    if not torch.cuda.is_available():
        assert cli.main(["bench", "profile"]) == 2
        assert "a profile needs a CUDA device; --toy" in capsys.readouterr().err
    assert cli.main(["bench", "profile", "--toy", "--model", "no_such_model"]) == 2
    assert "timm has no 'no_such_model'" in capsys.readouterr().err
