"""Runs mypy over fastdeit/ and kernels/. A file may have as many lines with errors as tests/type_errors.txt grants it, no more.

    python tests/type_check.py           fails on a line too many; says where the list can shrink
    python tests/type_check.py --shrink  lowers the list to what mypy finds; never raises it

`make lint` runs it. The list is for files written before mypy was: a new file has none.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GRANTED = ROOT / "tests" / "type_errors.txt"
LINKED = ROOT / "build" / "types"


def link_tree() -> None:
    """Lays fastdeit with kernels inside it, as it is installed: mypy does not run the code that joins them in a source tree."""
    shutil.rmtree(LINKED, ignore_errors=True)
    (LINKED / "fastdeit").mkdir(parents=True)
    for path in [*(ROOT / "fastdeit").iterdir(), ROOT / "kernels"]:
        (LINKED / "fastdeit" / path.name).symlink_to(path)


def run_mypy() -> str:
    """mypy's output, its paths relative to the linked tree. Raises SystemExit where there is no mypy, or it fails."""
    if importlib.util.find_spec("mypy") is None:  # Python then ends with 1, as mypy does after errors in types
        raise SystemExit("mypy is not installed: pip install --constraint constraints.txt mypy")
    link_tree()
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    command = [sys.executable, "-m", "mypy", *options, "fastdeit"]
    result = subprocess.run(command, cwd=LINKED, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        raise SystemExit(f"mypy did not run:\n{result.stdout}{result.stderr}")
    return result.stdout


def lines_with_errors(output: str) -> dict[str, dict[int, str]]:
    """File (relative to the repository) to line number to the first error there."""
    found: dict[str, dict[int, str]] = {}
    for file, line, message in re.findall(r"^fastdeit/(\S+?):(\d+): error: (.*)$", output, re.MULTILINE):
        path = file if file.startswith("kernels/") else f"fastdeit/{file}"
        found.setdefault(path, {}).setdefault(int(line), message)
    return found


def read_granted(text: str) -> dict[str, int]:
    return {file: int(count) for count, file in (line.split() for line in text.splitlines())}


def too_many(found: dict[str, dict[int, str]], granted: dict[str, int]) -> list[str]:
    """A paragraph for each file with more lines than it is granted."""
    return [
        f"{file}: {len(lines)} lines with type errors, {granted.get(file, 0)} granted\n"
        + "\n".join(f"  {file}:{line}: {message}" for line, message in sorted(lines.items()))
        for file, lines in sorted(found.items())
        if len(lines) > granted.get(file, 0)
    ]


def shrunk(found: dict[str, dict[int, str]], granted: dict[str, int]) -> dict[str, int]:
    """The list with each count lowered to what was found, and without files that are clean or gone."""
    lowered = {file: min(count, len(found.get(file, {}))) for file, count in granted.items()}
    return {file: count for file, count in sorted(lowered.items()) if count}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", action="store_true", help="lower tests/type_errors.txt to what mypy finds")
    shrink = parser.parse_args().shrink
    found, granted = lines_with_errors(run_mypy()), read_granted(GRANTED.read_text())
    smaller = shrunk(found, granted)
    if shrink:
        GRANTED.write_text("".join(f"{count:3} {file}\n" for file, count in smaller.items()))
    elif smaller != granted:
        print("tests/type_errors.txt can shrink: python tests/type_check.py --shrink")
    problems = too_many(found, granted)
    print(
        "\n".join(problems) or f"types: {sum(smaller.values())} lines with errors in {len(smaller)} files, all granted"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
