"""The compiled code of a thinned set of shipped rows, executed: in processes of their own, where kernels are not interpreted."""

import os
import subprocess
import sys

import pytest
import torch

from fastdeit.testing.ptx.compiler import why_untested

PARTS = 6  # of about a dozen cases each, to be spread over processes
COMMAND = (sys.executable, "-m", "fastdeit.testing.ptx", "--jobs", "1")


def run(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(why_untested() is not None, reason=str(why_untested()))
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")
@pytest.mark.parametrize("part", range(1, PARTS + 1))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiled_code_is_as_accurate_as_eager(arch, part):
    result = run("--arch", arch, "--thin", "--part", f"{part}/{PARTS}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) >= 3, result.stdout  # a line a case


def test_an_unknown_architecture_is_named():
    result = run("--arch", "sm_70")
    assert result.returncode == 2 and "expected one of sm_80, sm_89, sm_90, sm_100, got 'sm_70'" in result.stderr
