"""The launch path for real, compiled kernels included, over a stand-in for the CUDA driver (see stubbed_launches.py)."""

import pytest

from fastdeit.kernels.stub_driver import driver

CHECKS = "stubbed_launches.py"


@pytest.mark.skipif(driver.why_unavailable() is not None, reason=f"cannot be built: {driver.why_unavailable()}")
def test_launch(check, outcome):
    failure = outcome(CHECKS, check)
    assert failure is None, failure


def test_a_process_without_the_stand_in_is_refused():
    with pytest.raises((RuntimeError, OSError), match=r"libcuda"):
        driver.activate()
