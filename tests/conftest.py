"""Runs before any test module is imported: without a GPU, kernels run under Triton's interpreter from here on."""

import os
from collections import Counter

import torch

# Triton decides at the first `@triton.jit` whether kernels are interpreted, hence before fastdeit is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from fastdeit import backends, testing

pytest_plugins = ["fastdeit.fake_cuda.pytest_plugin"]

torch.set_num_threads(1)  # tests run in parallel processes
if os.environ.get("TRITON_INTERPRET") == "1":
    testing.correct_interpreter_bfloat16()
    testing.hasten_interpreter()


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


@pytest.fixture
def kernels_stood_in(monkeypatch) -> Counter:
    """Lets the drop-in modules take their fused forward on the CPU, each op running its reference. Counts the ops' calls."""
    import importlib

    from fastdeit import ops

    def why_reference(x, *_):
        return "inside a torch.func transform" if backends.in_functional_transform() else None

    for name in ("attention", "block", "embedding", "layer_norm", "mlp"):
        monkeypatch.setattr(importlib.import_module(f"fastdeit.nn.{name}"), "why_reference", why_reference)
    calls = Counter()

    def counted(name, op):
        def call(*args, **kwargs):
            calls[name] += 1
            return op(*args, **kwargs)

        return call

    for name in (
        "add_layer_norm",
        "add_layer_norm_attention",
        "add_layer_norm_mlp",
        "attention",
        "attention_qkv",
        "layer_norm",
        "mlp",
        "patch_embedding",
    ):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return calls
