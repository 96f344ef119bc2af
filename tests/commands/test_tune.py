"""`fastdeit tune`: without a GPU the whole flow runs on tiny shapes, with kernels interpreted."""

import io
import json
import os
import subprocess

import pytest
import torch

from fastdeit.benchmarks import machine, timing
from fastdeit.benchmarks.tuning import cases as tuning_cases
from fastdeit.benchmarks.tuning import compile_ahead
from fastdeit.benchmarks.tuning.journal import DEVICE_LOST, Journal
from fastdeit.commands import cli, tune
from fastdeit.kernels.attention.config import Tiles
from fastdeit.kernels.gemm import config as gemm_config
from fastdeit.kernels.gemm import fused_mlp, linear
from fastdeit.kernels.gemm.forward import fits
from fastdeit.kernels.mlp import activation as mlp
from fastdeit.kernels.mlp.activation import Config


def toy(op, folder, *more) -> int:
    return cli.main(["tune", op, "--toy", "--out", str(folder), *more])


def table(out: str, header: str) -> list[str]:
    lines = out.split(header)[1].splitlines()[1:]
    return [line for line in lines[: lines.index("")] if not line.startswith("#")]


def test_finished_cases_are_not_measured_again(tmp_path, capsys, monkeypatch):
    assert toy("mlp", tmp_path) == 0
    first = capsys.readouterr().out
    (line,) = table(first, "# kernels/mlp/activation.py, select_config")
    for owner in (gemm_config, fused_mlp):
        text = " ".join(table(first, f"# {owner.__name__.removeprefix('fastdeit.').replace('.', '/')}.py"))
        assert isinstance(eval(text.split(" = ")[1], vars(owner)), dict)
    assert isinstance(eval(line.removeprefix("return "), {"Config": Config}), Config)

    file = tmp_path / "tune_mlp.jsonl"
    whole = file.read_text()
    rows = json.loads(whole.splitlines()[0])["rows"]
    assert all(row["status"] == "ok" and row["median_us"] > 0 for row in rows) and len(rows) >= 2
    file.write_text(whole + '{"case": "stopped in')
    monkeypatch.setattr(timing, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert toy("mlp", tmp_path) == 0
    assert capsys.readouterr().out == first
    assert file.read_text() == whole


def test_another_environment_is_measured_anew(tmp_path, capsys, monkeypatch):
    case = next(tuning_cases.cases("mlp", True))
    monkeypatch.setattr(tuning_cases, "cases", lambda *_: [case])
    assert toy("mlp", tmp_path) == 0
    environment = machine.environment()
    monkeypatch.setattr(machine, "environment", lambda: environment | {"gpu": "another"})
    assert toy("mlp", tmp_path) == 0
    assert len((tmp_path / "tune_mlp.jsonl").read_text().splitlines()) == 2


def test_attention_is_tuned_in_every_form(tmp_path, capsys):
    assert toy("attention", tmp_path) == 0
    handed_over, whole, *tiles, keys = table(capsys.readouterr().out, "# kernels/attention/config.py")
    assert eval(handed_over.removeprefix("SDPA_PREFERRED = ")) == {}  # nothing to compare with at toy size
    assert set(eval(whole.removeprefix("ONE_PROGRAM_BACKWARD_TOKENS = "))) == {90, 100}
    for line in tiles:
        entries = eval(line.removeprefix("return "), {"Tiles": Tiles})
        assert len(entries) == 3 and all(isinstance(entry, Tiles) for entry in entries)
    assert len(tiles) == 2 and isinstance(eval(keys.removeprefix("return "), {"Tiles": Tiles}), Tiles)
    _, backward = map(json.loads, (tmp_path / "tune_attention.jsonl").read_text().splitlines())
    parts = {row["part"] for row in backward["rows"]}
    assert parts == {"whole", *(f"{entry} {form}" for entry in ("dq", "dkv") for form in ("pointers", "descriptors"))}


def test_time_that_is_over_leaves_the_cases_for_later(tmp_path, capsys):
    assert toy("all", tmp_path, "--seconds", "1e-9") == 0
    out = capsys.readouterr().out
    assert "16 cases are left: the same command goes on with them" in out
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_candidate_is_not_timed(monkeypatch, tmp_path):
    right = mlp.activation_forward
    monkeypatch.setattr(mlp, "activation_forward", lambda z, a, c: right(z, a, c) * (1.1 if c.num_warps == 1 else 1.0))
    case, journal = next(tuning_cases.cases("mlp", True)), Journal(tmp_path / "tune_mlp.jsonl")
    rows = tune._measure(case, float("inf"), True, journal)
    status = {"num_warps=1)" in row["config"]: row for row in rows}
    assert status[False]["status"] == "ok"
    assert status[True]["status"].startswith("wrong: result 0") and status[True]["median_us"] is None


def test_every_kernel_of_ours_multiplies_when_its_turn_comes(monkeypatch):
    calls = []
    for name in ("gemm_forward", "gemm_backward"):
        kernel = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *a, kernel=kernel, **k: calls.append(1) or kernel(*a, **k))
    cases = [case for case in tuning_cases.cases("mlp", True) if "epilogue" in case.call]
    assert {case.call["epilogue"] for case in cases} == set(gemm_config.EPILOGUES)
    for case in cases:
        expected = tune._expected(case)
        for candidate in case.candidates:
            calls.clear()
            tune._check(candidate, *expected)
            assert len(calls) == (candidate.config is not gemm_config.CUBLAS)


def test_the_whole_mlp_runs_in_one_kernel_when_its_turn_comes(monkeypatch):
    calls, launch = [], fused_mlp.launch
    monkeypatch.setattr(fused_mlp, "launch", lambda *a: calls.append(1) or launch(*a))
    cases = [case for case in tuning_cases.cases("mlp", True) if "form" in case.call]
    assert [case.call["form"] for case in cases] == ["mlp", "add_layer_norm_mlp", "add_layer_norm_mlp"]
    for case in cases:
        expected = tune._expected(case)
        for candidate in case.candidates:
            calls.clear()
            tune._check(candidate, *expected)
            assert len(calls) == (candidate.config is not None)


def test_every_kernel_of_ours_can_do_every_product_that_is_tuned(monkeypatch):
    monkeypatch.setattr(tuning_cases, "kernel_device", lambda: torch.device("meta"))
    for case in tuning_cases.cases("mlp", False):
        if "epilogue" in case.call:
            rows, weight, *rest = case.inputs(case.batch)
            operands = (rows, weight, *rest) if case.call["epilogue"] == "derivative" else (rows, weight)
            assert (len(rows), rows.shape[1]) == (case.call["M"], case.call["K"])
            assert all(fits(c.config, case.call["N"], *operands) for c in case.candidates)


@pytest.mark.parametrize("op", tune.OPS)
def test_the_present_choice_is_among_the_candidates_of_every_shape(op):
    cases = list(tuning_cases.cases(op, toy=False))
    assert len(cases) >= 3
    for case in cases:
        labels = [candidate.label for candidate in case.candidates]
        assert len(set(labels)) == len(labels) >= (4 if "K" in case.call else 3 if "form" in case.call else 10)
        present = [candidate.part for candidate in case.candidates if candidate.present]
        assert len(present) == (2 if "backward" in case.name else 1)  # dq and dkv are entries of their own


def test_a_faster_peer_asks_for_a_hand_over():
    times = {"a": 3.0, "b": 2.0}
    rows = [dict(part="config", config=c, candidate=c, median_us=t, present=c == "a") for c, t in times.items()]
    rows.append(dict(part="baseline", candidate="SDPA flash", median_us=1.0))
    case = dict(case="c", rows=rows)
    assert "0.67x the present choice's time, 2.00x SDPA flash's: hand over" in tune._summary(case)


def test_without_a_gpu_it_says_what_it_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "mlp", "--out", str(tmp_path)]) == 2
    assert "tuning needs a CUDA device; --toy" in capsys.readouterr().err


def test_bad_arguments_are_named(tmp_path, capsys):
    assert toy("mlp", tmp_path, "--seconds", "0") == 2
    assert "--seconds: expected a positive number, got 0.0" in capsys.readouterr().err
    (tmp_path / "tune_mlp.jsonl").write_text("[]\n")
    assert toy("mlp", tmp_path) == 2
    assert "tune_mlp.jsonl: expected what fastdeit tune wrote" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["tune", "softmax"])
    assert "softmax" in capsys.readouterr().err


def one_case(**runs) -> tuning_cases.Case:
    """A case of candidates by name, whose result is their input."""
    candidates = [tuning_cases.Candidate("config", name, run, False) for name, run in runs.items()]
    return tuning_cases.Case("a case", "all", 1, 2, lambda n: (torch.ones(n, 2),), lambda x: (x,), candidates)


@pytest.fixture
def losable(monkeypatch):
    """A device that can be lost: losable["lost"] = True."""
    state = {"lost": False}

    def synchronize():
        if state["lost"]:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return state


@pytest.mark.parametrize("where", ["check", "timing"])
def test_a_candidate_that_takes_the_device_down_is_run_once(tmp_path, monkeypatch, losable, where):
    """Whatever ran after it would fail as well, and stand in the results for good."""

    def breaks(x):
        losable["lost"] = True
        if where == "check":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return (x,)

    def measured(candidates, inputs, **_):
        for run in candidates.values():
            run(*inputs())
        return [timing.Row(name, median_us=1.0) for name in candidates]

    def same(x):
        losable["lost"] = losable["lost"] and where == "check"
        return (x,)

    case = one_case(first=same, breaks=breaks, last=same)
    monkeypatch.setattr(timing, "measure", measured)
    monkeypatch.setattr(machine, "clocks", dict)
    if where == "timing":
        monkeypatch.setattr(tune, "_check", lambda *_: None)
        case.candidates.pop()  # whose call a lost device would refuse
    monkeypatch.setattr(tuning_cases, "cases", lambda *_: [case])
    file = tmp_path / "tune_mlp.jsonl"
    with pytest.raises(
        tune.DeviceLostError, match="a case: the device was lost to config breaks: CUDA error: an illegal"
    ):
        tune._tune("mlp", file, {}, float("inf"), True)
    losable["lost"] = False
    ((result,), left) = tune._tune("mlp", file, {}, float("inf"), True)
    assert left == 0
    assert {row["candidate"]: row["status"] for row in result["rows"]}[
        "config breaks"
    ] == "failed: an earlier run ended at it"
    assert json.loads(file.read_text())["case"] == "a case"


def test_a_lost_device_ends_the_command_so_that_it_goes_on(tmp_path, monkeypatch, capsys):
    def lost(*_):
        raise tune.DeviceLostError("a case: the device was lost to x")

    monkeypatch.setattr(tune, "_tune", lost)
    assert toy("mlp", tmp_path) == DEVICE_LOST == 70
    assert "a case: the device was lost to x. The same command goes on without it" in capsys.readouterr().err


def test_a_candidate_that_a_process_ended_at_is_not_run_again(tmp_path):
    """Killed in a hang, say. What Python can handle is no loss."""
    file = tmp_path / "tune_mlp.jsonl"
    with pytest.raises(KeyboardInterrupt), Journal(file).at("a case", "slow"):
        raise KeyboardInterrupt
    entered = Journal(file).at("a case", "hangs")
    entered.__enter__()
    assert Journal(file).lost == Journal(file).lost == {("a case", "hangs")}


def test_shares_of_the_candidates_are_compiled_whatever_fails(monkeypatch):
    ran = []

    def refused(x):
        ran.append("refused")
        raise ValueError

    noted = {name: lambda x, name=name: ran.append(name) for name in ("a", "b", "c")}
    other = one_case(never=lambda x: ran.append("never"))
    case = one_case(a=noted["a"], refused=refused, b=noted["b"], c=noted["c"])
    monkeypatch.setattr(tuning_cases, "cases", lambda *_: [tuning_cases.replace(other, name="done"), case])
    for share in range(2):
        compile_ahead.run_share("mlp", share, 2, ["a case"])
    assert sorted(ran) == ["a", "b", "c", "refused"]


@pytest.mark.parametrize("cores, expected", [(1, 0), (2, 0), (4, 3), (64, compile_ahead.PROCESSES)])
def test_compiling_ahead_takes_the_cores_and_keeps_its_time(monkeypatch, capsys, cores, expected):
    started, killed = [], []

    class Child:
        def __init__(self, command, **_):
            started.append(command[-2:])
            self.stdin = io.BytesIO()

        def wait(self, timeout=None):
            if timeout is not None:
                raise subprocess.TimeoutExpired("", timeout)

        def kill(self):
            killed.append(self)

    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    compile_ahead.compile_ahead("mlp", ["a case"], 0.0)
    assert started == [[str(share), str(expected)] for share in range(expected)] and len(killed) == expected
    started.clear()
    compile_ahead.compile_ahead("mlp", [], 0.0)
    assert not started
