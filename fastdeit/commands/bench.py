"""`fastdeit bench`: times the suites of benchmarks/suites, and makes tables and charts of results."""

import argparse
import importlib
from pathlib import Path
from typing import NamedTuple

from fastdeit.benchmarks.runner import SUITES


class Mode(NamedTuple):
    module: str  # with add_arguments(parser) and run(args)
    help: str


MODES = {
    "report": Mode(
        "fastdeit.benchmarks.report.results_report",
        "tables and plots of results, and what changed between two sets of them",
    ),
    "evidence": Mode(
        "fastdeit.benchmarks.report.static_report",
        "print what is known without a GPU: counts, compiled kernels, host time",
    ),
    "deployment": Mode(
        "fastdeit.benchmarks.deployment",
        "compare frozen models with PyTorch's tutorial on deploying a vision transformer, without a GPU",
    ),
    "loader": Mode(
        "fastdeit.benchmarks.loader", "time the loader beside timm's, in images per CPU second, without a GPU"
    ),
    "pictures": Mode("fastdeit.benchmarks.report.pictures", "draw where a step's time goes by roofline arithmetic"),
    "profile": Mode(
        "fastdeit.benchmarks.profile_step", "time the kernels of a forward pass and a training step, on a GPU"
    ),
    "readme": Mode(
        "fastdeit.benchmarks.report.readme", "write the README's performance section from the committed results"
    ),
    "roofline": Mode(
        "fastdeit.benchmarks.report.roofline_table", "estimate ceilings of full models from two numbers of a GPU"
    ),
}
# Seconds: for everything, for a case, to set up a candidate. A whole model takes torch.compile most of a minute, its max-autotune
# more than that: the quick run leaves it out.
RUNS = {
    "quick": (160, 100, 60),
    "full": (560, 240, 150),
}


def suites() -> list[str]:
    """Names of the suites: `layer_norm` is test_layer_norm.py."""
    return sorted(path.stem.removeprefix("test_") for path in SUITES.glob("test_*.py"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    modes = parser.add_subparsers(dest="mode", metavar="MODE")
    for name, (total, _, _) in RUNS.items():
        about = (
            "time each suite's most important cases" if name == "quick" else "time all cases, the most important first"
        )
        mode = modes.add_parser(
            name,
            help=f"{about}, in at most {total / 60:.0f} minutes" + (" (default)" if name == "quick" else ""),
            description=about,
        )
        _add_run_arguments(mode, total)
        if name == "quick":
            parser.set_defaults(**vars(mode.parse_args([])) | {"mode": name})  # of `fastdeit bench` alone
    for name, (module, about) in MODES.items():
        mode = modes.add_parser(name, help=about, description=about)
        importlib.import_module(module).add_arguments(mode)


def _add_run_arguments(parser: argparse.ArgumentParser, total: int) -> None:
    parser.add_argument("--only", action="append", metavar="SUITE", choices=suites(), help=", ".join(suites()))
    parser.add_argument("-k", dest="keyword", metavar="EXPRESSION", help="only cases that match, as pytest's -k")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench"),
        metavar="DIR",
        help="folder of the results (default: bench); cases that it holds are not measured again",
    )
    parser.add_argument(
        "--seconds", type=float, default=total, metavar="N", help=f"time limit in seconds (default: {total})"
    )
    parser.add_argument(
        "--toy", action="store_true", help="tiny shapes on the CPU, to check that the suites run; times mean nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Measures what the folder of results does not have, or does what the mode does; returns 0, or 1 if a case failed.

    Raises:
        ValueError: no GPU, or the folder has results of another machine or source, or --seconds is not positive, or no case
            is wanted.
        ImportError: the extra `bench` is not installed.
    """
    if args.mode in MODES:
        return importlib.import_module(MODES[args.mode].module).run(args)
    if not args.seconds > 0:
        raise ValueError(f"--seconds: expected a positive number, got {args.seconds}")
    try:
        import pytest  # noqa: F401
        import pytest_benchmark  # noqa: F401
    except ImportError as error:
        raise ImportError(f"benchmarks need the extra 'bench': pip install 'fastdeit[bench]' ({error})") from error
    import torch

    from fastdeit.benchmarks import results_folder, runner

    if not (args.toy or torch.cuda.is_available()):
        raise ValueError("benchmarks need a CUDA device; --toy shows on a CPU that the suites run")
    identity = results_folder.identity(args.toy)
    folder = results_folder.Folder(args.out.absolute())
    folder.begin(identity)
    print(", ".join(f"{name} {value}" for name, value in identity.items() if value), flush=True)
    options = ["--quick"] if args.mode == "quick" else []
    options += ["--toy"] if args.toy else []
    options += ["-k", args.keyword] if args.keyword else []
    _, case, candidate = RUNS[args.mode]
    code = runner.measure(folder, args.only or suites(), runner.Limits(args.seconds, case, candidate), options)
    _, done, missing = results_folder.read(args.out)
    if args.keyword and not done and not missing:
        raise ValueError(f"-k: no case matches {args.keyword!r}")
    print(f"{len(done)} cases are in {args.out}; fastdeit bench report {args.out} makes tables and plots of them")
    if missing:
        print(f"{len(missing)} cases are left: the same command goes on with them")
    return code
