"""The fake CUDA runtime's library and processes, from the side of the process that starts them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdeit.testing import fake_cuda
from fastdeit.testing.fake_cuda import __main__ as command_line
from fastdeit.testing.fake_cuda import library

needs_fake_cuda = pytest.mark.skipif(
    fake_cuda.why_unavailable() is not None, reason=f"no fake CUDA runtime: {fake_cuda.why_unavailable()}"
)


@pytest.fixture
def asked_anew():
    library.why_unavailable.cache_clear()
    yield
    library.why_unavailable.cache_clear()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.setattr(torch.version, "cuda", None), "is built without CUDA"),
        (lambda m: m.setattr(torch.version, "cuda", "12.8"), "is built for CUDA 12.8, not CUDA 13"),
        (lambda m: m.setattr(library, "compiler", lambda: None), "no C compiler"),
        (lambda m: m.setattr(library, "_include_folders", lambda: []), r"no cuda\.h in the wheels"),
        (lambda m: m.setattr(sys, "platform", "darwin"), "works on Linux only"),
    ],
)
def test_what_is_missing_is_said(change, reason, monkeypatch, asked_anew):
    change(monkeypatch)
    with pytest.raises(OSError, match=f"fake CUDA runtime is not available: .*{reason}"):
        fake_cuda.run_python("-c", "pass")


@needs_fake_cuda
def test_the_library_is_built_once(monkeypatch):
    folder = library.build()
    monkeypatch.setattr(subprocess, "run", None)
    assert library.build() == folder and (folder / library.NAME).exists()


@needs_fake_cuda
def test_a_source_that_does_not_compile_is_said(monkeypatch, tmp_path):
    (tmp_path / "broken.c").write_text("int broken(void) { return unknown; }\n")
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    with pytest.raises(OSError, match=r"compiling the fake CUDA runtime failed:\n(?s:.*)unknown"):
        library.build()


@pytest.mark.parametrize(
    "options", [dict(devices=0), dict(devices=17), dict(capability=(9, 10)), dict(capability=(0, 0))]
)
def test_devices_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} is .*expected"):
        fake_cuda.run_python("-c", "pass", **options)


def test_a_process_without_it_is_told():
    with pytest.raises(RuntimeError, match=r"start this process with fake_cuda\.run_python"):
        fake_cuda.counts()


@needs_fake_cuda
def test_a_program_sees_the_devices_that_were_asked_for():
    code = "import sys, torch; print(torch.cuda.device_count(), torch.cuda.get_device_capability(2), sys.argv[1:])"
    command = [
        sys.executable,
        "-m",
        "fastdeit.testing.fake_cuda",
        "--devices",
        "3",
        "--capability=8.9",
        "-c",
        code,
        "--x",
    ]
    child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert child.stdout == "3 (8, 9) ['--x']\n", child.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "0", "x.py"], "devices is 0"),
        (["--capability", "9", "x.py"], "not of the form 9.0"),
        (["--devices", "2"], "expected a script"),
    ],
)
def test_the_command_line_names_what_is_wrong(options, message, capsys):
    try:
        code = command_line.main(options)
    except SystemExit as error:  # argparse's
        code = error.code
    assert code == 2 and message in capsys.readouterr().err
