"""The stages of benchmarks/gpu_check.sh, at toy size on the CPU."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdeit.aot import catalog
from fastdeit.aot.catalog import ARCHITECTURES
from fastdeit.benchmarks import first_descriptors, profile_step, repeat_step, small_kernels, timing
from fastdeit.benchmarks.report import block_counts
from fastdeit.commands import cli

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
STAGES = [
    "descriptor_forward",
    "descriptor_backward",
    "install",
    "kernels",
    "parity",
    "estimated",
    "small_kernels",
    "verify",
    "repeat",
    "profile",
]
STAGES += ["train", "bench", "gpu_tests"]
STAGES += ["memcheck", "racecheck", "tune"]
# What these run has tests of its own.
ELSEWHERE = [
    "descriptor_forward",
    "descriptor_backward",
    "kernels",
    "estimated",
    "small_kernels",
    "verify",
    "train",
    "bench",
    "parity",
    "gpu_tests",
]


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
        (folder / "log" / f"{name}.outcome").write_text("passed\n")
        (folder / "log" / f"{name}.seconds").write_text("0\n")


def test_what_the_script_imports_is_there():
    """Stages that only a GPU runs have Python of their own in the script."""
    text = SCRIPT.read_text()
    imported, run = re.findall(r"from (fastdeit[\w.]*) import (\w+)", text), re.findall(r"-m (fastdeit\.[\w.]+)", text)
    assert imported and run
    for module, name in imported:
        assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}"), name
    assert all(importlib.util.find_spec(module) for module in run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is what to run")
@pytest.mark.long
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


# Stands in for a Python with a GPU: notes what it is asked to run, and does as a case of the test says.
STAND_IN = """#!/bin/bash
echo "$*" >>"$(dirname "$0")/asked"
case "$*" in
    CASES
esac
exit 0
"""


@pytest.fixture
def stood_in(tmp_path):
    """stood_in(cases, *arguments): the script over a Python whose commands that match a case's pattern do what it says."""

    def run(cases, *arguments):
        lines = "\n    ".join(f"*'{pattern}'*) {action} ;;" for pattern, action in cases.items())
        python = tmp_path / "python"
        python.write_text(STAND_IN.replace("CASES", lines))
        python.chmod(0o755)
        (tmp_path / "asked").write_text("")
        found = check(tmp_path / "out", *arguments, python=python)
        return found, outcomes(tmp_path / "out"), (tmp_path / "asked").read_text()

    return run


def test_a_failed_stage_is_kept_until_it_is_named(stood_in):
    first, found, asked = stood_in({"repeat_step": "echo why; exit 3", "bench profile": "exit 1"})
    assert (
        first.returncode == 1 and found["repeat"] == "FAILED: exit code 3" and found["profile"] == "FAILED: exit code 1"
    )
    assert list(found) == STAGES and found["train"] == found["parity"] == "passed" and "tune all" in asked
    again, kept, asked = stood_in({})
    assert again.returncode == 1 and kept == found and "repeat_step" not in asked
    _, found, asked = stood_in({}, "--only", "repeat,profile")
    assert found["repeat"] == found["profile"] == "passed" and "small_kernels" not in asked
    assert list(found) == STAGES


def test_what_is_not_finished_goes_on(stood_in):
    """Cases that are left are no failure, nor is the stage done."""
    left = {"bench report": "echo '## Not measured, the time was over'", "tune all": "echo '2 cases are left'"}
    first, found, _ = stood_in(left)
    assert first.returncode == 0
    assert found["bench"] == found["tune"] == "not finished: the same command goes on"
    _, found, asked = stood_in({})
    assert found["bench"] == found["tune"] == "passed"
    assert "bench quick" in asked and "tune all" in asked and "small_kernels" not in asked


def test_a_failed_case_of_the_benchmarks_has_its_report(stood_in, tmp_path):
    _, found, _ = stood_in({"bench quick": "exit 1", "bench report": "echo '# the tables'"})
    assert found["bench"] == "FAILED: exit code 1"
    assert "## the tables" in (tmp_path / "out" / "summary.md").read_text()


def test_the_time_of_a_call_is_kept_and_nothing_is_lost(stood_in):
    """A stage that the call's end cuts off is begun again by the next; what came before is done."""
    began = time.monotonic()
    first, found, _ = stood_in({"small_kernels": "echo one is done; sleep 60"}, "--seconds", "11")
    assert time.monotonic() - began < 30 and first.returncode == 0
    assert found["kernels"] == "passed" and found["small_kernels"].startswith("not finished: cut off after 1")
    assert found["verify"].startswith("not run: the time is over")
    _, found, asked = stood_in({})
    assert found["small_kernels"] == found["verify"] == "passed" and "-m fastdeit kernels" not in asked


@pytest.mark.parametrize("bad", [["--seconds"], ["--seconds", "0"], ["--seconds", "1e3"], ["--only"]])
def test_options_without_a_value_are_refused(tmp_path, bad):
    environment = {**os.environ, "PYTHON": sys.executable}
    found = subprocess.run(["bash", str(SCRIPT), *bad], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert found.returncode == 2 and "usage: benchmarks/gpu_check.sh" in found.stderr


@pytest.mark.parametrize("arguments, message", [(["--fast"], "unknown option --fast"), ([], "PyTorch sees no GPU")])
def test_what_cannot_be_is_said(tmp_path, arguments, message):
    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = check(tmp_path, *arguments)
    assert found.returncode == 2 and message in found.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU")
@pytest.mark.parametrize("part", first_descriptors.PARTS)
def test_the_first_descriptors_are_right_and_a_wrong_result_is_noticed(part, monkeypatch, capsys):
    torch.manual_seed(0)
    assert first_descriptors.main(part) == 0
    plain = first_descriptors.descriptor_attention
    wrong = lambda qkv: ((name, lambda call=call: call() * 1.5) for name, call in plain(qkv))  # noqa: E731
    monkeypatch.setattr(first_descriptors, "descriptor_attention", wrong)
    assert first_descriptors.main(part) == 1
    assert capsys.readouterr().out.count(f"{part}: largest difference") == 2


def test_every_kernel_is_among_the_small_ones():
    with block_counts.kernels_left_out() as launched:
        for _, call in small_kernels.calls(torch.float16):
            if (result := call()).requires_grad:
                result.float().sum().backward()
    shipped = {row.kernel.__name__ for arch in ARCHITECTURES for row in catalog.aot_configs(arch)}
    assert shipped <= set(launched)


def test_a_small_kernel_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    def refused():
        raise ValueError("does not compile\nat line 3")

    def calls(dtype):
        yield "first", refused
        yield "second", lambda: torch.full((2,), float("inf"))
        yield "third", lambda: torch.ones(2, requires_grad=True) * 1

    monkeypatch.setattr(small_kernels, "calls", calls)
    monkeypatch.setattr(small_kernels, "kernel_dtypes", lambda: [torch.float16])
    assert small_kernels.main() == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("first float16: FAILED, ValueError: does not compile, ")
    assert second.startswith("second float16: FAILED, ArithmeticError: the result is not finite")
    assert third.startswith("third float16: ok")


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


def test_a_region_with_a_name_is_no_kernel():
    """The device's time line has `Optimizer.step` over the optimizer's kernels: its time would count twice."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    names = [("a_kernel", cuda, False), ("Optimizer.step#AdamW.step", cuda, True), ("aten::mm", cpu, False)]
    events = [SimpleNamespace(name=n, device_type=d, is_user_annotation=a) for n, d, a in names]
    assert [e.name for e in timing.device_events(SimpleNamespace(events=lambda: events))] == ["a_kernel"]


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


def test_what_was_measured_stands_beside_the_estimate():
    """And the command runs at toy size. Kernels are compiled in a process of their own, so that this one's stay interpreted."""
    program = """
from fastdeit.benchmarks import estimated
times = {("B", "autocast", "activation_forward_kernel"): 200.0, ("S", "bf16", "layer_norm_forward_kernel"): 50.0}
rows = [*estimated.compared(times, 90)]
print([(r["kernel"], r["DeiT"], r["precision"], r["measured, µs"]) for r in rows if r["measured, µs"] != "-"])
assert all(r["estimated, µs"] > 0 for r in rows)
(ratio,) = (r["measured / estimated"] for r in rows if r["measured, µs"] == 200.0)
assert 1.2 < ratio < 1.6
assert estimated.main(["--toy"]) == 0
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition("\n")
    expected = [("activation_forward_kernel", "B", "autocast", 200.0), ("layer_norm_forward_kernel", "S", "bf16", 50.0)]
    assert sorted(ast.literal_eval(first)) == expected
    assert "Estimated for H200 SXM" in rest and "attention_forward_descriptor_kernel" in rest
