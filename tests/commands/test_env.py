"""fastdeit env: what a bug report names."""

import json
import subprocess

import pytest
import torch
import triton

import fastdeit
from fastdeit.commands import cli, env


def test_it_names_versions_and_the_gpu(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fastdeit"] == fastdeit.__version__ and found["triton"] == triton.__version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert any(name.startswith("GPU") for name in found)


def test_a_line_for_each(capsys):
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(env.environment())


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(env, "LIBRARIES", ("no-such-library",))
    assert env.environment()["no-such-library"] == "not installed"


@pytest.mark.parametrize("failure", [OSError("no"), subprocess.TimeoutExpired("nvidia-smi", 20)])
def test_a_driver_that_does_not_answer_is_no_error(monkeypatch, failure):
    def fails(*_, **__):
        raise failure

    monkeypatch.setattr(subprocess, "run", fails)
    assert env._driver().startswith("unknown")


def test_an_untested_triton_is_said(monkeypatch):
    monkeypatch.setattr("fastdeit.kernels.runtime.launch._DIRECT", False)
    assert "was not tested" in env.environment()["kernel launches"]
