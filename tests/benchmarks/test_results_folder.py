"""A folder of results is whole at any time, and never a mixture."""

import json
import os

import pytest

from fastdeit.benchmarks import results_folder


@pytest.fixture
def folder(tmp_path) -> results_folder.Folder:
    folder = results_folder.Folder(tmp_path / "results")
    folder.begin(dict(gpu="G", toy=False))
    return folder


def document(name: str) -> dict:
    return dict(benchmarks=[dict(name=name, extra_info=dict(shape={}, rows=[dict(candidate="fastdeit")]))])


def test_results_come_in_the_order_of_importance_with_what_is_missing(folder):
    folder.plan(["b-1", "a-1"])
    folder.plan(["a-1", "c-1"])
    folder.write("c-1", document("c"))
    folder.write("b-1", document("b"))
    identity, benchmarks, missing = results_folder.read(folder.directory)
    assert identity == dict(gpu="G", toy=False)
    assert [b["name"] for b in benchmarks] == ["b", "c"] and missing == ["a-1"]


def test_a_write_that_is_stopped_leaves_what_was_there(folder, monkeypatch):
    folder.plan(["a-1"])
    folder.write("a-1", document("first"))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.write("a-1", document("second"))
    assert results_folder.read(folder.directory)[1][0]["name"] == "first"


def test_what_changed_since_the_first_run_is_named(folder):
    folder.begin(dict(gpu="G", toy=False))
    with pytest.raises(ValueError, match=r"gpu G, now H; new None, now 1\. Give another folder"):
        folder.begin(dict(gpu="H", toy=False, new=1))


def test_a_case_that_ended_its_process_is_a_row(folder):
    folder.plan(["attention-8-forward"])
    folder.write_failure("attention-8-forward", "failed: the process ended with -11 after 3 s")
    (benchmark,) = results_folder.read(folder.directory)[1]
    assert results_folder.suite_of(benchmark) == "attention"
    (row,) = benchmark["extra_info"]["rows"]
    assert row["status"] == "failed: the process ended with -11 after 3 s" and row["median_us"] is None


def test_the_case_at_work_is_known_until_it_ends(folder):
    assert folder.at_work() is None
    folder.started("a-1")
    case, seconds = folder.at_work()
    assert case == "a-1" and 0 <= seconds < 60
    folder.ended()
    assert folder.at_work() is None


def test_two_cases_have_two_files():
    names = {results_folder.file_name(case) for case in ("a-1 x", "a-1/x", "a-1.5", "a-15")}
    assert len(names) == 3  # the first two are told apart by no suite's labels
    assert all("/" not in name and " " not in name for name in names)


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"benchmarks": [{}]}'])
def test_what_is_no_result_is_named(tmp_path, content):
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json: expected results that fastdeit bench wrote"):
        results_folder.read(file)
    with pytest.raises(ValueError, match="expected results that fastdeit bench wrote"):
        results_folder.read(tmp_path)


def test_the_file_of_a_whole_pytest_run_is_read_too(tmp_path):
    info = dict(environment=dict(gpu="G"), shape={}, rows=[dict(candidate="fastdeit")])
    (tmp_path / "all.json").write_text(json.dumps(dict(benchmarks=[dict(name="test_x[1]", extra_info=info)])))
    identity, benchmarks, missing = results_folder.read(tmp_path / "all.json")
    assert identity == dict(gpu="G") and len(benchmarks) == 1 and missing == []


def test_the_source_hash_follows_every_file_of_the_package(monkeypatch):
    from pathlib import Path

    now = results_folder.source_hash()
    assert results_folder.source_hash() == now
    read = Path.read_bytes
    for name in ("kernels/attention/forward.py", "benchmarks/timing.py", "nn/block.py"):
        edited = lambda path, name=name: read(path) + (b"#" if path.as_posix().endswith(name) else b"")  # noqa: E731
        monkeypatch.setattr(Path, "read_bytes", edited)
        assert results_folder.source_hash() != now


def test_results_that_would_not_compare_have_other_names():
    identity = dict(gpu="G", driver_version="1", source="a")
    assert results_folder.digest(identity) == results_folder.digest(dict(reversed(identity.items())))
    assert (
        len({results_folder.digest(identity | change) for change in ({}, dict(driver_version="2"), dict(source="b"))})
        == 3
    )


def test_a_quick_runs_case_is_done_for_quick_runs_alone(tmp_path):
    folder = results_folder.Folder(tmp_path)
    folder.begin({})
    for case, quick in (("a-1", True), ("a-2", False)):
        folder.write(case, dict(benchmarks=[dict(name=case, extra_info=dict(quick=quick))]))
    folder.write_failure("a-3", "failed")
    assert [folder.is_done(f"a-{i}") for i in (1, 2, 3, 4)] == [True, True, True, False]
    assert [folder.is_done(f"a-{i}", quick=False) for i in (1, 2, 3, 4)] == [False, True, True, False]
