"""`compare`, the fixture that every suite measures with; the method itself is in timing.py."""

import pytest
import torch

from fastdeit.benchmarks import roofline, timing


def pytest_addoption(parser):
    parser.addoption(
        "--toy", action="store_true", help="tiny shapes on the CPU: shows that the suites run, measures nothing"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: part of the short run")


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() or config.getoption("--toy"):
        return
    for item in items:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device, or --toy"))


@pytest.fixture(autouse=True)
def _compiled_afresh():
    """Dynamo remembers shapes by code object: without this, torch.compile would turn to dynamic shapes from the second case on."""
    torch.compiler.reset()


@pytest.fixture
def toy(request) -> bool:
    """Whether to run tiny shapes on the CPU."""
    return bool(request.config.getoption("--toy")) or not torch.cuda.is_available()


@pytest.fixture
def compare(benchmark):
    """compare(candidates, inputs, cost=..., matrix=..., **shape): measures all candidates and records a row of each."""

    def run(candidates, inputs, *, cost, matrix, errors=None, turns=20, **shape):
        ceilings = roofline.measured_ceilings()
        floor = None if ceilings is None else ceilings.floor_us(cost, matrix=matrix)
        before = timing.clocks()
        result = []

        def measured():
            result[:] = timing.measure(candidates, inputs, errors=errors, turns=turns if ceilings else 3)

        benchmark.pedantic(measured, rounds=1)
        benchmark.extra_info |= {
            "shape": shape,
            "flops": cost.flops,
            "bytes": cost.bytes,
            "floor_us": floor,
            "ceilings": None if ceilings is None else vars(ceilings),
            "clocks": [before, timing.clocks()],
            "environment": timing.environment(),
            "rows": [row.derived(cost.flops, cost.bytes, floor) for row in result],
        }
        assert result[0].status.startswith(("ok", "out of memory")), f"{result[0].candidate}: {result[0].status}"
        return result

    return run
