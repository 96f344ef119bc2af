"""What tests/version_matrix.py installs and runs; the environments themselves are made by hand."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("version_matrix", ROOT / "tests" / "version_matrix.py")
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)

PINS = '# a comment\ntorch==2.11.0\nnumpy==2.3.5; python_version >= "3.11"\nPyYAML==6.0.3\n'


def test_a_corner_replaces_the_pins_of_its_packages_only():
    oldest = matrix.Corner("3.10", {"torch": "2.8.0"}, constrained=True)
    assert matrix.constraints(PINS, oldest).split("\n") == [
        'numpy==2.3.5; python_version >= "3.11"',
        "PyYAML==6.0.3",
        "torch==2.8.0",
        "",
    ]
    newest = matrix.Corner("3.13", {"numpy": "2.3.5"}, constrained=False)
    assert matrix.constraints(PINS, newest) == "numpy==2.3.5\n"


def test_the_oldest_corner_has_the_lower_bounds_of_setup():
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "setup.py").read_text()))
    versions = matrix.CORNERS["oldest"].versions
    assert versions.keys() >= {"torch", "triton"}
    for package, version in versions.items():
        assert version.removesuffix(".0") == bounds[package], package


def test_the_default_tests_are_those_of_test_fast():
    paths = matrix.fast_selection((ROOT / "Makefile").read_text())
    assert len(paths) > 5 and all((ROOT / path).exists() for path in paths)


def test_a_python_that_does_not_run_is_named(tmp_path, monkeypatch):
    shim = tmp_path / "python9.9"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(matrix, "FOLDER", tmp_path / "matrix")
    with pytest.raises(SystemExit, match=r"no python9\.9 on the path that runs"):
        matrix.environment("pinned", matrix.CORNERS["pinned"], "9.9")
