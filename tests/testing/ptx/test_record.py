"""Counts on record, compared with what a case counts."""

import dataclasses

import pytest

from fastdeit.aot import report
from fastdeit.aot.execution import Accesses
from fastdeit.testing.ptx.rows import Ran, off_the_record


@pytest.mark.skipif(not report.read_committed(), reason="the counts on record are of another Triton")
def test_counts_that_differ_from_the_record_are_named():
    key, found = next((key, x.execution) for key, x in report.read_committed().items() if x.execution is not None)
    assert off_the_record([Ran(found.case, {key: found})]) == []
    other = dataclasses.replace(found, loop=found.loop + Accesses(loaded=1))
    (sentence,) = off_the_record([Ran(found.case, {key: other})])
    assert f"loop of row {key}" in sentence and report.REEXECUTE_COMMAND in sentence
    assert off_the_record([Ran("another case", {key: other})]) == []  # which has counts of its own
