"""Checks that need compiled kernels run in a process of their own, once a session; each is reported as a test."""

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUNNER = HERE / "run_checks.py"


def pytest_generate_tests(metafunc):
    """A test with the parameter `check` becomes one per function of the file that its module names as CHECKS."""
    if "check" in metafunc.fixturenames:
        tree = ast.parse((HERE / metafunc.module.CHECKS).read_text())
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        metafunc.parametrize("check", [name for name in names if name.startswith("check_")])


@pytest.fixture(scope="session")
def outcome() -> Callable[[str, str], str | None]:
    """outcome(file, check): what a check of a file raised, or None."""

    @functools.cache
    def outcomes(file: str) -> dict[str, str | None]:
        arguments = (str(RUNNER), str(HERE / file))
        environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(HERE.parents[1])}
        result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return lambda file, check: outcomes(file)[check]
