"""What `python -m fastdeit.testing.ptx` makes of its options."""

from collections import Counter

import pytest

from fastdeit.testing.ptx import __main__ as command
from fastdeit.testing.ptx.mutations import KINDS

PLANT = ("--arch", "sm_90", "--thin", "--only", "augment", "--mutants", "2")


@pytest.fixture
def planted(monkeypatch):
    """The choice of faults of every call that plants some."""
    found = []

    def run(cases, arch, most, seed, *, kinds, rest):
        assert cases and rest and all("augment" in case.name for case in cases)
        found.append((arch, most, seed, tuple(kinds)))
        return Counter()

    monkeypatch.setattr(command, "run_mutants", run)
    monkeypatch.setattr(command, "why_untested", lambda: None)
    return found


@pytest.mark.parametrize(
    "given, seed, kinds",
    [((), 0, ()), (("--seed", "3"), 3, ()), (("--kinds", "mask", "--kinds", "moved"), 0, ("mask", "moved"))],
)
def test_faults_are_chosen_by_kind_and_seed(planted, given, seed, kinds):
    assert command.main([*PLANT, *given]) == 0
    assert planted == [(90, 2, seed, kinds)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--kinds", "mask"], "--mutants plants: give that too"),
        (["--seed", "0"], "--mutants plants: give that too"),
        ([*PLANT, "--thorough"], "leave --thorough out"),
        (["--mutants", "0"], "expected at least 1 fault of each kind, got 0"),
        ([*PLANT, "--kinds", "mask", "--kinds", "typo"], f"got 'typo'; the kinds are {', '.join(KINDS)}"),
        (["--arch", "sm_70"], "expected one of sm_80, sm_89, sm_90, sm_100, got 'sm_70'"),
        (["--arch", "sm_80", "--only", "D=64 int4"], "the name of a case of sm_80, got 'D=64 int4'"),
        (["--only", "attention D=48", "--thin"], "sm_100 that --thin leaves in, got 'attention D=48'"),
        (["--part", "3/2"], "expected I/N with I from 1 to N, got '3/2'"),
        (["--part", "2"], "expected I/N with I from 1 to N, got '2'"),
    ],
)
def test_what_no_option_can_mean_is_refused(planted, capsys, arguments, message):
    with pytest.raises(SystemExit) as refused:
        command.main(arguments)
    assert refused.value.code == 2 and not planted
    assert message in " ".join(capsys.readouterr().err.split())
