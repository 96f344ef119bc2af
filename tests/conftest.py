"""Runs before any test module is imported: without a GPU, kernels run under Triton's interpreter from here on."""

import os

import torch

# Triton decides at the first `@triton.jit` whether kernels are interpreted, hence before fastdeit is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from fastdeit import backends, testing

torch.set_num_threads(1)  # tests run in parallel processes
if os.environ.get("TRITON_INTERPRET") == "1":
    testing.correct_interpreter_dot()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh_state():
    """Every test starts from the same seed and from the default backend, whatever ran before it."""
    torch.manual_seed(0)
    backends.set_backend("auto")
    yield
    backends.set_backend("auto")
