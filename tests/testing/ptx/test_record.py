"""Counts on record, compared with what a case counts."""

import dataclasses

import pytest

from fastdeit.aot import report
from fastdeit.aot.execution import Accesses
from fastdeit.testing.ptx import rows
from fastdeit.testing.ptx.cases import Case
from fastdeit.testing.ptx.rows import Ran, off_the_record


@pytest.mark.skipif(not report.read_committed(), reason="the counts on record are of another Triton")
def test_counts_that_differ_from_the_record_are_named():
    key, found = next((key, x.execution) for key, x in report.read_committed().items() if x.execution is not None)
    assert off_the_record([Ran(found.case, {key: found})]) == []
    other = dataclasses.replace(found, loop=found.loop + Accesses(loaded=1))
    (sentence,) = off_the_record([Ran(found.case, {key: other})])
    assert f"loop of row {key}" in sentence and report.REEXECUTE_COMMAND in sentence
    assert off_the_record([Ran("another case", {key: other})]) == []  # which has counts of its own


def test_a_row_goes_on_record_in_the_first_case_that_can_be_executed(monkeypatch):
    launches = {"in products": {"a", "b"}, "alone": {"a"}, "another": {"b", "c"}}
    failures = {"in products": "PtxError: unknown instruction tcgen05.mma", "another": "AssertionError: RMS"}
    ran = []

    def run_cases(arch, names, *, thorough, jobs):
        ran.append(names)
        for name in names:
            failure = failures.get(name)
            yield Ran(name, {} if failure else dict.fromkeys(launches[name], name), failure=failure)

    monkeypatch.setattr(rows, "cases", lambda arch: [Case(name, dict) for name in launches])
    monkeypatch.setattr(rows, "launched_by", lambda case, arch: launches[case.name])
    monkeypatch.setattr(rows, "run_cases", run_cases)
    found, failed = rows.record(100, {"a", "b"}, jobs=1)
    assert ran == [["in products"], ["alone", "another"]]
    assert found == {"a": "alone"} and failed == ["sm_100, another: AssertionError: RMS"]
