"""The rule of tests/type_check.py on outputs written by hand; mypy itself runs in `make lint`."""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("type_check", HERE / "type_check.py")
type_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(type_check)

OUTPUT = """\
fastdeit/kernels/a.py:3: error: first  [index]
fastdeit/kernels/a.py:3: error: second on the same line  [index]
fastdeit/kernels/a.py:9: error: other  [index]
fastdeit/ops/b.py:1: error: wrong  [misc]
fastdeit/ops/b.py:1: note: a note is no error
Found 4 errors in 2 files (checked 3 source files)
"""
FOUND = {
    "kernels/a.py": {3: "first  [index]", 9: "other  [index]"},
    "fastdeit/ops/b.py": {1: "wrong  [misc]"},
}


def test_lines_are_counted_once_under_the_path_in_the_repository():
    assert type_check.lines_with_errors(OUTPUT) == FOUND


def test_a_line_too_many_fails_with_the_lines_of_that_file_only():
    (problem,) = type_check.too_many(FOUND, {"kernels/a.py": 1, "fastdeit/ops/b.py": 1})
    assert "kernels/a.py: 2 lines with type errors, 1 granted" in problem and "kernels/a.py:9: other" in problem
    assert type_check.too_many(FOUND, {"kernels/a.py": 2, "fastdeit/ops/b.py": 1}) == []
    assert len(type_check.too_many(FOUND, {})) == 2


def test_the_list_shrinks_and_never_grows():
    granted = {"kernels/a.py": 1, "fastdeit/ops/b.py": 5, "fastdeit/gone.py": 2}
    assert type_check.shrunk(FOUND, granted) == {"fastdeit/ops/b.py": 1, "kernels/a.py": 1}


def test_without_mypy_nothing_passes(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="mypy is not installed"):
        type_check.run_mypy()
