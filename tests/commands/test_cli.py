"""The command table: help without heavy imports, errors without tracebacks."""

import importlib
import subprocess
import sys

import pytest

from fastdeit.commands import cli
from fastdeit.train.transform_errors import TransformError


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for name in cli.COMMANDS:
        assert f"\n    {name}" in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there_and_has_help(name, capsys):
    module = importlib.import_module(cli.COMMANDS[name].module)
    assert callable(module.add_arguments) and callable(module.run)
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0 and f"fastdeit {name}" in capsys.readouterr().out


def test_unknown_command_is_refused_with_the_list(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fly"])
    assert stop.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, TransformError])
def test_expected_errors_are_one_line_and_exit_code_2(monkeypatch, capsys, error):
    module = importlib.import_module(cli.COMMANDS["explain"].module)
    monkeypatch.setattr(module, "run", lambda args: (_ for _ in ()).throw(error("model: no such name")))
    assert cli.main(["explain", "nothing"]) == 2
    assert capsys.readouterr().err == "fastdeit explain: model: no such name\n"


def test_help_imports_neither_triton_nor_the_training_extras():
    code = (
        "import sys; from fastdeit.commands import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('triton', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.rstrip().endswith("[]"), out
