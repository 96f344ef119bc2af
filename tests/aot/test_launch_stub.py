"""The launch path for real, compiled kernels included, over a stand-in for the CUDA driver (see stubbed_launches.py)."""

import argparse
import json

import pytest

from fastdeit.aot.stub_driver import driver
from fastdeit.benchmarks import launch_cost
from fastdeit.kernels.runtime import launch

CHECKS = "stubbed_launches.py"
needs_compiler = pytest.mark.skipif(
    driver.why_unavailable() is not None, reason=f"the stand-in cannot be built: {driver.why_unavailable()}"
)


@needs_compiler
@pytest.mark.skipif(not launch._DIRECT, reason=f"launches are direct on Triton {launch._TESTED_VERSIONS} only")
def test_launch(check, outcome):
    failure = outcome(CHECKS, check)
    assert failure is None, failure


@needs_compiler
def test_the_command_prints_costs_and_budgets(capsys):
    assert launch_cost.run(argparse.Namespace(json=True)) == 0
    costs = json.loads(capsys.readouterr().out)
    assert launch_cost.BUDGETS.keys() <= costs.keys()
    assert all(cost > 0 for cost in costs.values())
    lines = launch_cost.table(costs).splitlines()
    assert [line for line in lines if line.startswith("launch, pointers ") and line.endswith("budget 8")]


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    monkeypatch.setattr(driver, "_compiler", lambda: None)
    with pytest.raises(OSError, match="no C compiler"):
        launch_cost.run(argparse.Namespace(json=False))


def test_a_process_without_the_stand_in_is_refused():
    with pytest.raises((RuntimeError, OSError), match=r"libcuda"):
        driver.activate()
