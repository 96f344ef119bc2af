"""Which implementation runs, and what is said about it."""

import subprocess
import sys

import pytest
import torch

import fastdeit
from fastdeit import backends, ops
from fastdeit.backends import registered_path, why_reference

needs_interpreter = pytest.mark.skipif(not backends.interpreter_active(), reason="there is a GPU")


def test_unknown_name_lists_the_allowed_ones():
    with pytest.raises(ValueError, match=r"backend: expected one of auto, triton, reference, got 'cuda'"):
        fastdeit.set_backend("cuda")
    assert fastdeit.get_backend() == "auto"


def test_use_backend_restores_what_was_there_also_after_an_error():
    fastdeit.set_backend("reference")
    with pytest.raises(KeyError), fastdeit.use_backend("auto"):
        assert fastdeit.get_backend() == "auto"
        raise KeyError
    assert fastdeit.get_backend() == "reference"


def test_auto_runs_the_reference_on_a_cpu():
    assert why_reference(torch.randn(2)) == "tensors on cpu"


def test_reference_says_that_it_was_chosen():
    with fastdeit.use_backend("reference"):
        assert why_reference(torch.randn(2)) == "the backend is set to reference"


@needs_interpreter
def test_triton_runs_cpu_tensors_under_the_interpreter():
    with fastdeit.use_backend("triton"):
        assert why_reference(torch.randn(2)) is None
        with pytest.raises(RuntimeError, match="float64 input"):
            why_reference(torch.randn(2).double())


def test_triton_without_gpu_or_interpreter_is_an_error_that_says_why():
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None); os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
        "import torch, fastdeit; from fastdeit import ops\n"
        "fastdeit.set_backend('triton')\n"
        "try: ops.layer_norm(torch.randn(2, 4), None, None)\n"
        "except RuntimeError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "backend 'triton' cannot run here: CPU tensors need Triton's interpreter" in result.stdout


@needs_interpreter
def test_backward_follows_the_choice_of_its_forward():
    x = torch.randn(2, 192, requires_grad=True)
    with fastdeit.use_backend("triton"):
        y = ops.layer_norm(x, None, None)
    fastdeit.set_backend("reference")
    assert "layer_norm" in type(y.grad_fn).__name__
    y.sum().backward()
    assert x.grad is not None


def test_registered_path_is_for_tracing_and_subclasses():
    class Subclass(torch.Tensor):
        pass

    x = torch.randn(2)
    assert not registered_path(x, None, torch.nn.Parameter(x))
    assert registered_path(x, x.as_subclass(Subclass))
    with torch._subclasses.FakeTensorMode():
        assert registered_path(x)


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_capability_decides_on_a_gpu(monkeypatch, capability, runs):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    backends._capability_is_too_low.cache_clear()
    try:
        reason = backends._why_not_this_gpu(0)
    finally:
        backends._capability_is_too_low.cache_clear()
    assert reason is None if runs else reason == "compute capability 7.5 is below 8.0"
