"""`fastdeit bench`: the timing suites of this directory, by pytest-benchmark."""

import argparse
from pathlib import Path

DIRECTORY = Path(__file__).parent


def suites() -> list[str]:
    """Names of the suites: `layer_norm` is test_layer_norm.py."""
    return sorted(path.stem.removeprefix("test_") for path in DIRECTORY.glob("test_*.py"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"one of {', '.join(suites())}; all by default. Or `report FILE...`: tables of raw results, as Markdown",
    )
    parser.add_argument(
        "--toy", action="store_true", help="tiny shapes on the CPU: shows that the suites run, measures nothing"
    )
    parser.add_argument("-k", dest="keyword", metavar="EXPRESSION", help="only cases that match, as pytest's -k")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write pytest-benchmark's raw results to FILE")


def run(args: argparse.Namespace) -> int:
    """Times the chosen suites and returns pytest's exit code.

    Raises:
        ValueError: a suite that there is none of, or a results file in a directory that there is none of.
        ImportError: the extra `bench` is not installed.
    """
    if args.suites[:1] == ["report"]:
        return _report(args.suites[1:])
    unknown = sorted(set(args.suites) - set(suites()))
    if unknown:
        raise ValueError(f"no benchmark suite called {', '.join(unknown)}; there are {', '.join(suites())}")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json: no directory {args.json.absolute().parent}")
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError as error:
        raise ImportError(f"benchmarks need the extra 'bench': pip install 'fastdeit[bench]' ({error})") from error
    files = [str(DIRECTORY / f"test_{name}.py") for name in args.suites or suites()]
    options = ["--import-mode=importlib", f"--rootdir={DIRECTORY}", "-p", "no:cacheprovider", "-q"]
    options += ["--toy"] if args.toy else []
    options += ["-k", args.keyword] if args.keyword else []
    if args.json is not None:
        options.append(f"--benchmark-json={args.json.absolute()}")
    return int(pytest.main([*options, *files]))


def _report(files: list[str]) -> int:
    from fastdeit.benchmarks.report import markdown

    if not files:
        raise ValueError("report: expected at least one file that fastdeit bench --json wrote")
    print("\n".join(markdown(Path(file)) for file in files), end="")
    return 0
