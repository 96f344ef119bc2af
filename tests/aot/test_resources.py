"""The compile gate: what ships holds its limits, and the gate can fail (see compiled_kernels.py)."""

CHECKS = "compiled_kernels.py"


def test_compiled(check, outcome):
    failure = outcome(CHECKS, check)
    assert failure is None, failure
