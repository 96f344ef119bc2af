"""DDP and FSDP2 with two processes: the checks of two_processes.py, each reported as a test."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).with_name("two_processes.py")
CHECKS = [n.name for n in ast.parse(SCRIPT.read_text()).body if getattr(n, "name", "").startswith("check_")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, str | None]]:
    """Per rank, what each check raised, or None."""
    folder = tmp_path_factory.mktemp("two_processes")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    errors = []
    try:
        for process in processes:
            errors.append(process.communicate(timeout=240)[1])
    finally:
        for process in processes:
            process.kill()
    results = [folder / f"{rank}.json" for rank in (0, 1)]
    return [
        json.loads(file.read_text()) if file.exists() else dict.fromkeys(CHECKS, error)
        for file, error in zip(results, errors, strict=True)
    ]


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_processes(outcomes, check):
    for rank, outcome in enumerate(outcomes):
        raised = outcome.get(check, "it did not run")
        assert raised is None, f"rank {rank}:\n{raised}"
