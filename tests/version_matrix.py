"""Runs tests with the oldest and the newest versions that users may have, each in an environment of its own.

    python tests/version_matrix.py --list
    python tests/version_matrix.py --corner oldest
    python tests/version_matrix.py --corner pinned --python 3.12 -- tests/ops -k layer_norm

Without arguments after `--` it runs what `make test-fast` runs. Environments stay in build/matrix/, several GB each, and are used
again. A row for each run is added to build/matrix/results.md. It is no part of `make test`.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "matrix"
EXTRAS = ("train", "loader", "test", "bench", "hosts")


class Corner(NamedTuple):
    """Versions of a few packages; what they leave open comes from constraints.txt, or is the newest."""

    python: str
    versions: dict[str, str]
    constrained: bool


# The oldest corner has setup.py's lower bounds. The Attention of timm 1.0.25 takes no `is_causal`.
CORNERS = {
    "oldest": Corner(
        "3.10",
        {"torch": "2.8.0", "triton": "3.4.0", "torchvision": "0.23.0", "timm": "1.0.26", "torchao": "0.16.0"},
        constrained=True,
    ),
    "pinned": Corner("3.11", {}, constrained=True),
    # Newer than the pinned ones, by a launcher of Triton's with another signature: what plans and the PTX machine were tested with.
    "recent": Corner("3.11", {"torch": "2.14.1", "triton": "3.8.0", "torchvision": "0.29.1"}, constrained=True),
    # Triton's interpreter fails on loops with run-time bounds under numpy 2.4.
    "newest": Corner("3.13", {"numpy": "2.3.5"}, constrained=False),
}


def constraints(pins: str, corner: Corner) -> str:
    """constraints.txt, given as text, with the corner's versions in the place of its own.

    Packages that depend on a replaced version of torch by exact version are left to pip: only pins by name are known here.
    """
    lines = []
    for line in pins.splitlines() if corner.constrained else []:
        name = re.match(r"[\w.-]+(?===)", line)
        if name is not None and normalised(name[0]) not in corner.versions:
            lines.append(line)
    return "\n".join([*lines, *(f"{name}=={version}" for name, version in corner.versions.items())]) + "\n"


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def environment(name: str, corner: Corner, python: str) -> Path:
    """The interpreter of an environment with the corner's versions; made if it is not there.

    Raises:
        SystemExit: there is no such Python.
        subprocess.CalledProcessError: pip could not install the versions.
    """
    folder = FOLDER / f"{name}-{python}"
    interpreter = folder / "bin" / "python"
    if (folder / "complete").exists():
        return interpreter
    base = shutil.which(f"python{python}")
    if (
        base is None or subprocess.run([base, "-c", ""], capture_output=True).returncode
    ):  # pyenv has names that do not run
        raise SystemExit(f"--python: there is no python{python} on the path that runs")
    subprocess.run([base, "-m", "venv", "--clear", folder], check=True)
    limits = folder / "constraints.txt"
    limits.write_text(constraints((ROOT / "constraints.txt").read_text(), corner))
    install = [interpreter, "-m", "pip", "install", "--quiet", "--constraint", limits]
    subprocess.run([*install, "--editable", f"{ROOT}[{','.join(EXTRAS)}]"], check=True)
    (folder / "complete").touch()
    return interpreter


def fast_selection(makefile: str) -> list[str]:
    """The paths that `make test-fast` runs."""
    return re.search(r"^FAST := (.*?[^\\])\n", makefile, re.MULTILINE | re.DOTALL)[1].replace("\\\n", " ").split()


def versions_in(interpreter: Path) -> str:
    names = ("torch", "triton", "timm", "torchvision", "transformers", "numpy")
    code = f"import importlib.metadata as m; print(', '.join(n + ' ' + m.version(n) for n in {names}))"
    return subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run(name: str, python: str, arguments: list[str]) -> int:
    """pytest's exit code; adds a row to results.md."""
    interpreter = environment(name, CORNERS[name], python)
    command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    began = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    minutes = (time.monotonic() - began) / 60
    print(result.stdout)
    counts = result.stdout.strip().rpartition("\n")[2]
    table = FOLDER / "results.md"
    if not table.exists():
        table.write_text("| corner | Python | versions | tests | result | minutes |\n|---|---|---|---|---|---:|\n")
    with table.open("a") as file:
        cells = (name, python, versions_in(interpreter), " ".join(arguments), counts, f"{minutes:.1f}")
        file.write(f"| {' | '.join(cells)} |\n")
    return result.returncode


def main() -> int:
    own, separator, arguments = sys.argv[1:], "--", []
    if separator in own:
        at = own.index(separator)
        own, arguments = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corner", choices=CORNERS, action="append", help="default: all")
    parser.add_argument("--python", metavar="X.Y", help="another Python than the corner's")
    parser.add_argument("--list", action="store_true", help="print the corners and run nothing")
    args = parser.parse_args(own)
    chosen = args.corner or list(CORNERS)
    if args.list:
        for name in chosen:
            corner = CORNERS[name]
            rest = "constraints.txt" if corner.constrained else "the newest"
            fixed = ", ".join(f"{package} {version}" for package, version in corner.versions.items())
            print(f"{name}: Python {args.python or corner.python}; {fixed}{'; else ' if fixed else ''}{rest}")
        return 0
    arguments = arguments or fast_selection((ROOT / "Makefile").read_text())
    return max(run(name, args.python or CORNERS[name].python, arguments) for name in chosen)


if __name__ == "__main__":
    sys.exit(main())
