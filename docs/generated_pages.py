"""Pages of the site that have their source elsewhere: MkDocs calls `on_files` (mkdocs.yml, `hooks`)."""

import argparse
import importlib
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

from fastdeit.commands.cli import COMMANDS

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config) -> Files:
    """Adds the reference of the commands from their parsers, and CONTRIBUTING and CHANGELOG from the root."""
    pages = {"command-reference.md": command_reference()}
    for name in ("CONTRIBUTING", "CHANGELOG"):
        # Links there are relative to the root, where GitHub shows the file.
        pages[f"{name.lower()}.md"] = re.sub(r"\]\(docs/", "](", (ROOT / f"{name}.md").read_text())
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def command_reference() -> str:
    """One section for each command: usage in a line, then a table of its arguments."""
    sections = ["# Command reference", "`fastdeit COMMAND --help` prints the same. `python -m fastdeit` is `fastdeit`."]
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"fastdeit {name}", add_help=False)
        importlib.import_module(command.module).add_arguments(parser)
        sections += [f"## fastdeit {name}", f"{command.help[0].upper()}{command.help[1:]}.", *arguments(parser)]
    return "\n\n".join(sections) + "\n"


def arguments(parser: argparse.ArgumentParser) -> list[str]:
    """A table of the arguments of parser, and sections for the modes that it has."""
    rows, modes = [], []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        if isinstance(action, argparse._SubParsersAction):
            for mode, subparser in action.choices.items():
                about = (subparser.description or "").replace("%%", "%")
                modes += [f"### {parser.prog} {mode}", f"{about[:1].upper()}{about[1:]}.", *arguments(subparser)]
            continue
        if "-h" in action.option_strings:
            continue
        help_text = parser._get_formatter()._expand_help(action) if action.help else ""
        rows.append(f"| `{invocation(action)}` | {escape(help_text)} |")
    return ["\n".join(["| argument | meaning |", "|---|---|", *rows])] * bool(rows) + modes


def invocation(action: argparse.Action) -> str:
    """An argument as it is written: `--top K`, `IMAGE`, `--json`."""
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    if not action.option_strings:
        return str(value)
    option = action.option_strings[-1]
    return option if action.nargs == 0 else f"{option} [{value}]" if action.nargs == "?" else f"{option} {value}"


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
