"""What calls reach beyond the listed configurations (see compiled_reachable.py)."""

CHECKS = "compiled_reachable.py"


def test_reachable(check, outcome):
    failure = outcome(CHECKS, check)
    assert failure is None, failure
