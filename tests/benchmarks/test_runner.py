"""A crash or a hang of the measuring process costs one case, and no time limit is overrun."""

import sys
import time

import pytest

from fastdeit.benchmarks import results_folder, runner
from fastdeit.benchmarks.runner import Limits

CHILD = """
import sys, time
from pathlib import Path
from fastdeit.benchmarks.results_folder import Folder
folder = Folder(Path(sys.argv[1]))
folder.plan(["s-1", "s-2", "s-3"])
for case in ("s-1", "s-2", "s-3"):
    if folder.is_done(case):
        continue
    folder.started(case)
    {at_work}
    folder.write(case, dict(benchmarks=[dict(name=case, extra_info=dict(shape={}, rows=[dict(candidate="c", status="ok")]))]))
    folder.ended()
"""


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """measure(code): runs a process that executes code at each case instead of pytest."""

    def run(at_work: str, total=60, case=30):
        folder = results_folder.Folder(tmp_path / "results")
        folder.begin({})
        words = [sys.executable, "-c", CHILD.replace("{at_work}", at_work), str(folder.directory)]
        monkeypatch.setattr(runner, "_command", lambda *_: words)
        code = runner.measure(folder, [], Limits(total, case, case), [])
        _, benchmarks, missing = results_folder.read(folder.directory)
        return code, [b["extra_info"]["rows"][0]["status"] for b in benchmarks], missing

    return run


def test_all_cases_are_measured(measure):
    assert measure("pass") == (0, ["ok"] * 3, [])


def test_a_crash_costs_its_case_alone(measure):
    code, statuses, missing = measure("if case == 's-2': import os; os.kill(os.getpid(), 11)")
    assert code == 1 and missing == []
    assert statuses[0] == statuses[2] == "ok"
    assert statuses[1].startswith("failed: the process ended with -11 after")


def test_a_hang_is_killed_and_costs_its_case_alone(measure, monkeypatch):
    monkeypatch.setattr(runner, "_GRACE_SECONDS", 0)
    code, statuses, missing = measure("time.sleep(60 if case == 's-2' else 0)", case=1)
    assert code == 1 and missing == []
    assert statuses[1].startswith("failed: the process was killed: it did not keep its time")
    assert statuses[0] == statuses[2] == "ok"


def test_a_case_cut_off_by_the_end_is_left_for_the_next_run(measure, monkeypatch):
    monkeypatch.setattr(runner, "_GRACE_SECONDS", 0)
    start = time.monotonic()
    code, statuses, missing = measure("time.sleep(60 if case == 's-2' else 0)", total=6)
    assert time.monotonic() - start < 40
    assert code == 0 and statuses == ["ok"] and missing == ["s-2", "s-3"]
    assert measure("pass") == (0, ["ok"] * 3, [])


def test_a_process_that_lost_its_device_is_followed_by_another(measure):
    after_the_case = """
    if case == 's-2':
        folder.write_failure(case, 'failed: illegal access')
        folder.ended()
        sys.exit(70)"""
    code, statuses, missing = measure(after_the_case.strip())
    assert (code, statuses, missing) == (1, ["ok", "failed: illegal access", "ok"], [])


def test_a_process_that_fails_outside_of_any_case_is_an_error(measure, tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(RuntimeError, match="ended with 4, at no case"):
        measure("folder.ended(); sys.exit(4)")
